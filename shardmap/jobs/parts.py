"""What a run maps: the data and the model, made as the configuration says, and the function of one sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import shardmap
from shardmap.config import BoundRun, RunConfig
from shardmap.errors import ConfigError, DeviceError
from shardmap.extras import require
from shardmap.jobs.base import Dataset
from shardmap.planning.device import resolve
from shardmap.planning.memory import parse_bytes


@dataclass(frozen=True)
class Parts:
    """A run's data, model and function, ready to be mapped."""

    dataset: Dataset
    model: Any
    """None without one."""
    columns: list[Tensor]
    """What the function is mapped over, in the order of its parameters."""
    one_sample: Callable[..., Any]
    """The function of one sample's values of the columns."""


def load_parts(run: BoundRun, say: Callable[[str], None]) -> Parts:
    """Call what the configuration names as data and model.

    Torch must be seeded with the run's seed: draws depend on what was drawn before.

    Raises:
        ConfigError: What they return, or a column, is not what is needed.
    """
    config = run.config
    dataset = run.data()
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"data.path: {config.data.path!r} returned a {type(dataset).__name__}; return a shardmap.jobs.Dataset")
    columns = _pick_columns(dataset, config.columns)
    say(f"{config.function.path} over {len(dataset)} samples of {', '.join(config.columns or dataset.columns)}")

    model = None if run.model is None else run.model(dataset)
    leading = () if run.model is None else (model,)

    @functools.wraps(run.function.function)  # errors and warnings call it by its name
    def one_sample(*row: Any) -> Any:
        # A run's outputs end in files: detached here, no chunk keeps an autograd graph alive, and other processes can compute them.
        return pytree.tree_map_only(Tensor, Tensor.detach, run.function.function(*leading, *row, **run.function.args))

    return Parts(dataset, model, columns, one_sample)


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before anything is loaded.

    Raises:
        ConfigError: A device is not there, or an amount of memory is none.
        MissingExtraError: Ray is asked for, and not installed.
    """
    if config.devices == "ray":
        require("ray", extra="ray", purpose="for devices: ray")
    else:
        try:
            resolve(config.devices, torch.device("cpu"), "run")
        except DeviceError as error:
            raise ConfigError(str(error)) from error
    if config.memory_budget is not None and parse_bytes(config.memory_budget) is None:
        raise ConfigError(f"memory_budget: {config.memory_budget!r} is no amount of memory; write for example 6GiB or 512 MiB")


def map_options(config: RunConfig) -> dict[str, Any]:
    """The options of `shardmap.vmap` that a configuration gives, but for its store."""
    devices = shardmap.Ray(workers=config.workers) if config.devices == "ray" and config.workers is not None else config.devices
    return {
        "devices": devices,
        "randomness": config.randomness,
        "chunk_size": config.chunk_size,
        "memory_budget": config.memory_budget,
        "reduce": config.reduce,
    }


def _pick_columns(dataset: Dataset, names: list[str] | None) -> list[Tensor]:
    if names == []:
        raise ConfigError(f"columns: [] is empty; name at least one of {', '.join(dataset.columns)}, or leave the key out")
    for name in names or ():
        if name not in dataset.columns:
            raise ConfigError(f"columns: {name!r} is not in the data; known: {', '.join(dataset.columns)}")
    return [dataset[name] for name in (dataset.columns if names is None else names)]
