"""The keys of a run with their types, and the checks of keys that exclude each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from shardmap.errors import ConfigError

Task = Literal["vmap", "per_sample_grad", "jacobian", "hessian", "hvp"]


@dataclass(frozen=True)
class Bounds:
    """The range of a number, written beside its type: `Annotated[int, Bounds(least=1)]`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    """Like `least`, but itself excluded."""

    def admits(self, value: float) -> bool:
        """True if `value` lies in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        parts = (
            (" of at least ", self.least),
            (" above ", self.above),
            (" of at most ", self.most),
        )
        return " and".join(f"{words}{bound}" for words, bound in parts if bound is not None)


@dataclass(frozen=True)
class Call:
    """A function or class, named by its import path, with the named arguments it gets."""

    path: str
    """`module.name` of a module in the configuration's folders (`python`), or
    `package.module.name` of anything in the current directory or installed."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Named arguments, checked against the signature: a class is constructed with them, a
    function gets them with each call."""


@dataclass(frozen=True)
class Files:
    """Samples in files or at a URL, read by `shardmap.source`."""

    path: dict[str, str] | list[str] | str
    """A `.npy` or `.safetensors` file, a zarr array or group, a store; several `.safetensors`
    files; or a file for each column by name."""
    columns: list[str] | None = None
    """The columns to take; a file without column names, such as `.npy`, gets these names."""


@dataclass(frozen=True)
class RunConfig:
    """One run: its samples, the function to map, devices and chunks, and the report.

    Each field is a key of the configuration.
    """

    python: list[str] | str = "."
    """Folders whose modules import paths may name, before what is installed; relative to the
    file, whose own folder is the default."""
    task: Task = "vmap"
    """The computation for each sample: `function` itself, the gradient of `loss`, or derivatives
    of `function` with respect to its arguments."""
    data: Call | None = None
    """Called first; returns a `shardmap.jobs.Dataset` or a `shardmap.Source`."""
    source: Files | None = None
    """The samples in files, instead of `data`."""
    model: Call | None = None
    """A class is constructed; a function is called with the dataset. The result is the
    function's first argument for all samples."""
    weights: str | None = None
    """Parameters and buffers for the model, or for the module that `function` names:
    `.safetensors`, or a `.pt` or `.pth` state dict."""
    function: Call | None = None
    """A function of one sample: it gets the model, if there is one, then a value of each column.
    A class is constructed, and the instance is called so."""
    loss: Call | None = None
    """For `task: per_sample_grad` of a module: `loss(output, *rest)`, where the first column is
    the module's input."""
    params: list[str] | str | None = None
    """For `task: per_sample_grad`: names or patterns of the parameters, such as `"*.weight"`;
    null for all that require grad."""
    flat: bool = False
    """For `task: per_sample_grad`: one row of all gradients per sample instead of a tensor for
    each parameter."""
    method: Literal["auto", "reverse", "forward"] = "auto"
    """For `task: jacobian`: row by row, column by column, or whichever is cheaper."""
    argnums: int | list[int] = 0
    """For `task: jacobian`, `hessian` and, one number, `hvp`: by which columns, counted from 0,
    the function is differentiated."""
    report: Call | None = None
    """Called with a `shardmap.jobs.Outcome`; writes tables and pictures into the run folder."""
    columns: list[str] | None = None
    """The columns that are mapped, in the order of the function's parameters; null for all of
    them."""
    devices: list[str] | str = "auto"
    """`auto`, `cpu`, `cuda:*`, `ray`, or a list of devices."""
    workers: Annotated[int, Bounds(least=1)] | None = None
    """With `devices: ray`: the number of worker processes; null for one per GPU, or per core where
    the cluster has no GPU."""
    chunk_size: Annotated[int, Bounds(least=1)] | Literal["auto"] | None = "auto"
    """Most samples computed at once on a device; `auto` plans it by memory and cache, null takes
    all that fall to the device."""
    memory_budget: str | None = None
    """The memory that the map may take on each device, such as `6GiB`; null for nine tenths of the
    free memory."""
    randomness: Literal["error", "same", "different"] = "error"
    """The treatment of random calls inside the function, as in `torch.func.vmap`."""
    batch_norm: Literal["error", "frozen", "per_sample"] = "error"
    """The statistics that batch norm in training mode takes inside the function: it is refused, or
    takes the running ones, or each sample's own."""
    compile: bool | Literal["auto"] = False
    """True compiles chunks of the planned size by Inductor before they run; `auto` does so in the
    background of long runs."""
    cuda_graphs: bool = False
    """True replays chunks of the planned size as CUDA graphs, on CUDA devices alone."""
    check: Literal["first", "always", "off"] = "first"
    """The time at which results are compared with the function's own: at the first use of its
    program, at every call, or never."""
    reduce: str | list[Any] | dict[str, Any] | None = None
    """Combines outputs over all samples: a name, a name with its arguments, or several of them;
    memory does not grow with the samples."""
    seed: int = 0
    """Seeds torch before the model is made."""
    store: str | None = None
    """A path or URL: outputs are written there as they are computed; null for `results.zarr` in
    the run folder."""
    store_kind: Literal["zarr", "safetensors", "memmap"] = "zarr"
    """The format of the store; only `zarr` takes URLs."""
    resume: bool = False
    """True to go on with what `store` holds of this run; only what is missing is computed."""
    output: str = "runs/run"
    """The run folder. A folder that exists is left alone: the run goes to `NAME-2`, `NAME-3`,
    and so on."""
    save_outputs: bool | None = None
    """True if the outputs are kept in the run folder; null for yes, unless `store` names another
    place."""

    def __post_init__(self) -> None:
        if self.save_outputs is None:
            object.__setattr__(self, "save_outputs", self.store is None)
        _check_parts(self)
        _check_task(self)
        _check_places(self)

    @property
    def stored(self) -> bool:
        """True if outputs are written to a store as they are computed.

        The store is the one that `store` names, or one in the run folder. Reduced outputs are
        small and stay in memory; outputs of a cluster's workers are gathered, because the workers
        may not see the run folder.
        """
        inside = bool(self.save_outputs) and self.reduce is None and self.devices != "ray"
        return self.store is not None or inside

    def identity(self) -> dict[str, Any]:
        """The keys that decide what is computed, with their values.

        The other keys say where and how it is computed, and where the outputs go.
        """
        return {
            key: value for key, value in dataclasses.asdict(self).items() if key in IDENTITY_KEYS
        }

    def digest(self) -> str:
        """Hash of `identity`: equal for two runs that are to give the same outputs."""
        return hashlib.blake2b(
            json.dumps(self.identity(), sort_keys=True, default=repr).encode(), digest_size=16
        ).hexdigest()


IDENTITY_KEYS = (
    "task", "data", "source", "model", "weights", "function", "loss", "params", "flat", "method",
    "argnums", "columns", "randomness", "batch_norm", "reduce", "seed",
)  # fmt: skip
"""The keys that decide what is computed."""
SECTIONS = tuple(
    item.name
    for item in dataclasses.fields(RunConfig)
    if "Call" in str(item.type) or "Files" in str(item.type)
)
"""The keys that have keys of their own; `key: text` is short for `key: {path: text}`."""


def _check_parts(config: RunConfig) -> None:
    """Refuse a run without samples, or without a function to map."""
    if config.data is None and config.source is None:
        raise ConfigError(
            "data: missing, and so is source; every run names its samples, data: "
            "package.module.name or source: FILE"
        )
    if config.data is not None and config.source is not None:
        given, path = config.data.path, config.source.path
        raise ConfigError(
            f"source: {path!r}, and data: {given!r}; samples come from one of them: leave the "
            "other out"
        )
    if config.source is not None and not config.source.path:
        raise ConfigError(
            f"source.path: {config.source.path!r} is empty; give a file, a folder or a URL"
        )
    if config.function is None and config.model is None:
        raise ConfigError(
            "function: missing, and so is model; every run names what it maps, for example "
            "function: package.module.name"
        )


def _check_task(config: RunConfig) -> None:
    """Refuse keys that belong to another task: they would have no effect."""
    task = config.task
    homes: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
        ("loss", config.loss is not None, ("per_sample_grad",)),
        ("params", config.params is not None, ("per_sample_grad",)),
        ("flat", config.flat, ("per_sample_grad",)),
        ("method", config.method != "auto", ("jacobian",)),
        ("argnums", config.argnums != 0, ("jacobian", "hessian", "hvp")),
    )
    for key, given, tasks in homes:
        if given and task not in tasks:
            value = getattr(config, key)
            told = (
                value.path
                if isinstance(value, Call)
                else str(value).lower()
                if isinstance(value, bool)
                else value
            )
            raise ConfigError(
                f"{key}: {told}, and task: {task}; it is for task: {' or '.join(tasks)}: give "
                f"that, or leave {key} out"
            )
    if config.params is not None and not config.params:
        raise ConfigError(
            f"params: {config.params!r} is empty; give names or patterns of parameters, or null "
            "for all of them"
        )
    if config.argnums == []:
        raise ConfigError(
            "argnums: [] is empty; give the number of a column, counted from 0, or a list of them"
        )
    if task == "hvp" and isinstance(config.argnums, list):
        raise ConfigError(
            f"argnums: {config.argnums}, and task: hvp; the vectors are one column: give the "
            "number of theirs"
        )
    if task != "per_sample_grad":
        return
    if config.loss is None and (config.function is None or config.model is None):
        missing = "model" if config.model is None else "function"
        raise ConfigError(
            f"{missing}: missing, and task: per_sample_grad has no loss; give loss: "
            "package.module.name for the gradient of a module, or "
            "function and model for one of a function of parameters that model returns"
        )
    if config.loss is not None and config.function is not None and config.model is not None:
        raise ConfigError(
            f"function: {config.function.path}, with both model and loss; the loss is of the "
            "model's output: leave function or loss out"
        )


def _check_places(config: RunConfig) -> None:
    """Refuse devices, stores and run folders that do not go together."""
    if not config.output.strip():
        raise ConfigError("output: '' is empty; give the path of the run folder")
    if config.devices == []:
        raise ConfigError("devices: [] is empty; give auto, or at least one device")
    if config.workers is not None and config.devices != "ray":
        raise ConfigError(
            f"workers: {config.workers}, and devices: {config.devices}; workers are Ray's: give "
            "devices: ray, or leave them out"
        )
    if config.store is None:
        if config.resume:
            raise ConfigError(
                "resume: true, and there is no store; give store: PATH, or go on with a run folder "
                "by `shardmap resume RUN`"
            )
        if config.store_kind != "zarr":
            raise ConfigError(
                f"store_kind: {config.store_kind}, and there is no store; give store: PATH, or "
                "leave store_kind out"
            )
        return
    if not config.store.strip():
        raise ConfigError("store: '' is empty; give a path or URL, or null")
    if config.reduce is not None:
        raise ConfigError(
            f"reduce: {config.reduce}, and store: {config.store}; what is reduced fits in memory: "
            "leave one of them out"
        )
    if config.save_outputs:
        raise ConfigError(
            f"save_outputs: true, and store: {config.store}; the outputs are in the store: leave "
            "save_outputs out"
        )
    if (
        config.store_kind != "zarr"
        and "://" in config.store
        and not config.store.startswith(("file://", "local://"))
    ):
        raise ConfigError(
            f"store_kind: {config.store_kind}, and store: {config.store}; only zarr takes URLs: "
            "give store_kind: zarr, or a folder"
        )
