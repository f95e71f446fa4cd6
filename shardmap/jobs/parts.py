"""The parts of a run: its samples, its model, and the function of one sample."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import shardmap
from shardmap._extras import require
from shardmap._torch import pytree
from shardmap.call.options import MapOptions
from shardmap.errors import ConfigError, DeviceError, SourceError
from shardmap.jobs import weights
from shardmap.jobs.base import Dataset
from shardmap.jobs.config import BoundCall, BoundRun, RunConfig
from shardmap.planning.device import resolve
from shardmap.planning.memory import parse_bytes
from shardmap.store import Source
from shardmap.store.columns import Column
from shardmap.store.ragged import Ragged


@dataclass(frozen=True)
class Parts:
    """A run's samples, model and function, ready to be mapped."""

    dataset: Dataset
    model: Any
    """The model; None without one."""
    columns: list[Tensor | Column | Ragged]
    """The columns that are mapped, in the order of the function's parameters."""
    call: Callable[..., Any]
    """The function with its arguments bound, or the object that the class makes; the model if there
    is no function."""
    leading: tuple[Any, ...]
    """The arguments of `call` before a sample's values of the columns: the model, if there is one
    beside the function."""
    loss: Callable[..., Any] | None
    """A function of the module's output and of the columns that follow the first."""
    name: str
    """The name of `call`, for errors and warnings."""

    @property
    def ragged(self) -> bool:
        """True if samples have different shapes."""
        return any(isinstance(column, Ragged) for column in self.columns)

    def between(self, start: int, stop: int) -> Parts:
        """These parts with the samples from `start` up to `stop` only."""
        columns: list[Tensor | Column | Ragged] = []
        for column in self.columns:
            if isinstance(column, Ragged):
                columns.append(column.between(start, stop))
            elif isinstance(column, Tensor):
                columns.append(column[start:stop])
            else:
                columns.append(column.rows_between(start, stop))
        return dataclasses.replace(self, columns=columns)

    def stacked(self) -> Parts:
        """These parts with the samples of ragged columns stacked: their shapes must be equal."""
        columns = [
            torch.stack([column[i] for i in range(len(column))])
            if isinstance(column, Ragged)
            else column
            for column in self.columns
        ]
        return dataclasses.replace(self, columns=columns)

    @property
    def one_sample(self) -> Callable[..., Any]:
        """The function of one sample's values of the columns."""

        def one_sample(*row: Any) -> Any:
            return self.call(*self.leading, *row)

        one_sample.__name__ = one_sample.__qualname__ = self.name
        return one_sample

    @property
    def detached(self) -> Callable[..., Any]:
        """The function with detached outputs.

        Outputs are written to files, so no chunk needs an autograd graph.
        """
        function = self.one_sample

        @functools.wraps(function)
        def detached(*row: Any) -> Any:
            return pytree.tree_map_only(Tensor, Tensor.detach, function(*row))

        return detached


def load_parts(run: BoundRun, say: Callable[[str], None]) -> Parts:
    """Make the samples, the model with its weights, and the function of a configuration.

    Torch must be seeded with the run's seed: draws depend on earlier ones.

    Raises:
        ConfigError: Their results, or a column, have the wrong type.
    """
    config = run.config
    state = (
        None if config.weights is None else weights.read(config.weights)
    )  # before the slower parts
    dataset = _samples(run)
    names = list(dataset.columns) if config.columns is None else config.columns
    columns = _pick_columns(dataset, config.columns)
    training = config.randomness != "error" or config.batch_norm != "error"
    model = None if run.model is None else _made(run.model, training, dataset)
    call, leading, name = _callable(run, model, training)
    if state is not None and config.weights is not None:
        module = model if run.model is not None else call
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"weights: {config.weights!r} is for a torch.nn.Module, and what was made is a "
                f"{type(module).__name__}; name a module, or "
                "leave weights out"
            )
        weights.load(module, state, config.weights)
    loss = None if run.loss is None else _loss(run.loss)
    parts = Parts(dataset, model, columns, call, leading, loss, name)
    _check_task(config, parts, names)
    what = "" if config.task == "vmap" else f"{config.task} of "
    named = config.function or config.model
    assert named is not None
    say(f"{what}{named.path} over {len(dataset)} samples of {', '.join(names)}")
    return parts


def check_machine(config: RunConfig) -> None:
    """Refuse a configuration that this machine cannot run, before anything is loaded.

    Raises:
        ConfigError: A device is absent, or an amount of memory cannot be parsed.
        MissingExtraError: Ray is needed, and not installed.
    """
    if config.devices == "ray":
        require("ray", extra="ray", purpose="for devices: ray")
    else:
        try:
            resolve(config.devices, torch.device("cpu"), "run")
        except DeviceError as error:
            raise ConfigError(str(error)) from error
    if config.memory_budget is not None and parse_bytes(config.memory_budget) is None:
        raise ConfigError(
            f"memory_budget: {config.memory_budget!r} is no amount of memory; write for example "
            "6GiB or 512 MiB"
        )


def map_options(run: BoundRun) -> MapOptions:
    """The options of `shardmap.vmap` that a configuration gives, without its store."""
    config = run.config
    devices = (
        shardmap.Ray(workers=config.workers)
        if config.devices == "ray" and config.workers is not None
        else config.devices
    )
    return {
        "devices": devices,
        "randomness": config.randomness,
        "batch_norm": config.batch_norm,
        "compile": config.compile,
        "cuda_graphs": config.cuda_graphs,
        "check": config.check,
        "chunk_size": config.chunk_size,
        "memory_budget": config.memory_budget,
        "reduce": run.reduce,
    }


def _samples(run: BoundRun) -> Dataset:
    config = run.config
    if config.source is not None:
        path = config.source.path
        try:
            return Dataset.of(shardmap.source(path, names=config.source.columns))
        except SourceError as error:
            raise ConfigError(f"source: {error}") from error
    assert run.data is not None
    assert config.data is not None
    dataset = run.data()
    if isinstance(dataset, Source):
        return Dataset.of(dataset)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.path: {config.data.path!r} returned a {type(dataset).__name__}; return a "
            "shardmap.jobs.Dataset or a shardmap.Source"
        )
    return dataset


def _made(call: BoundCall, training: bool, *leading: Any) -> Any:
    """Call a function, or construct a class.

    A module that is constructed here is put into eval mode, unless `training`: the configuration
    says what dropout or batch normalisation are to do, which eval mode would leave out.
    """
    if not call.is_class:
        return call(*leading[: call.leading])
    made = call()
    return made.eval() if isinstance(made, nn.Module) and not training else made


def _callable(
    run: BoundRun, model: Any, training: bool
) -> tuple[Callable[..., Any], tuple[Any, ...], str]:
    """The callable that is mapped, its arguments before the columns, and its name."""
    if run.function is None:
        if not callable(model):
            assert run.config.model is not None
            path, kind = run.config.model.path, type(model).__name__
            raise ConfigError(
                f"model.path: {path!r} returned a {kind}, which cannot be called; name a function "
                "for it, function: ..."
            )
        return (
            model,
            (),
            type(model).__name__
            if isinstance(model, nn.Module)
            else getattr(model, "__name__", type(model).__name__),
        )
    leading = () if run.model is None else (model,)
    if run.function.is_class:
        made = _made(run.function, training)
        if not callable(made):
            assert run.config.function is not None
            raise ConfigError(
                f"function.path: what {run.config.function.path!r} constructs cannot be called; "
                "give it a __call__, or a function"
            )
        return made, leading, type(made).__name__
    function = run.function.function
    call = functools.partial(function, **run.function.args) if run.function.args else function
    return call, leading, getattr(function, "__name__", type(function).__name__)


def _loss(call: BoundCall) -> Callable[..., Any]:
    if call.is_class:
        return _made(call, False)
    return functools.partial(call.function, **call.args) if call.args else call.function


def _pick_columns(dataset: Dataset, names: list[str] | None) -> list[Tensor | Column | Ragged]:
    if names == []:
        raise ConfigError(
            f"columns: [] is empty; name at least one of {', '.join(dataset.columns)}, or leave "
            "the key out"
        )
    for name in names or ():
        if name not in dataset.columns:
            raise ConfigError(
                f"columns: {name!r} is not in the data; known: {', '.join(dataset.columns)}"
            )
    return [dataset.columns[name] for name in (dataset.columns if names is None else names)]


def _check_task(config: RunConfig, parts: Parts, names: list[str]) -> None:
    """Refuse columns and parts that do not fit the task, in the configuration's own words."""
    if config.task == "hvp" and len(names) < 2:
        raise ConfigError(
            f"columns: {', '.join(names)} is one, and task: hvp takes the vectors as a last one; "
            "name it"
        )
    arguments = names[:-1] if config.task == "hvp" else names
    for number in config.argnums if isinstance(config.argnums, list) else [config.argnums]:
        if not 0 <= number < len(arguments):
            told = (
                f"the function's columns are {', '.join(arguments)}: give 0 to {len(arguments) - 1}"
            )
            raise ConfigError(f"argnums: {number} is out of range; {told}")
    if (
        config.task == "per_sample_grad"
        and parts.loss is not None
        and not isinstance(parts.call, nn.Module)
    ):
        raise ConfigError(
            f"loss: {config.loss.path if config.loss else ''!r} is of a module's output, and "
            f"{parts.name} is none; name a torch.nn.Module, "
            "or a function of parameters without loss"
        )
    if (
        config.task == "per_sample_grad"
        and parts.loss is None
        and isinstance(parts.model, nn.Module)
    ):
        raise ConfigError(
            f"function: {parts.name} gets its parameters from model, and that is a module; give "
            "loss: package.module.name instead of "
            "function, or let model return a tensor or a dict of tensors"
        )
    if config.task == "per_sample_grad" and parts.loss is not None:
        _check_call(parts.call, ("columns",), names[:1])
        _check_call(parts.loss, ("columns", "loss"), ["the output", *names[1:]])
    else:
        _check_call(
            parts.call, ("columns", "function"), [*["the model"] * len(parts.leading), *arguments]
        )


def _check_call(function: Callable[..., Any], keys: tuple[str, ...], given: list[str]) -> None:
    """Refuse a function whose signature does not take the arguments that it would get."""
    try:
        signature = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        )
    except (ValueError, TypeError):  # written in C: it reports missing arguments itself
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        name = getattr(function, "__name__", None) or getattr(
            getattr(function, "func", None), "__name__", type(function).__name__
        )
        raise ConfigError(
            f"{keys[0]}: {name}{signature} is called with {', '.join(given)}: {error}; name other "
            f"{' or another '.join(keys)}"
        ) from None
