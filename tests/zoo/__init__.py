"""Models of the field as their packages build them: tiny, random weights, on every sample the loop.

Each model is a builder with a name. `python -m tests.zoo` runs them, each in a process of its own,
and prints one line per model; `tests/zoo/judge.py` says what is compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FAMILIES = (
    "language",
    "perception",
    "vision",
    "graphs",
    "physics",
    "sequences",
    "probabilistic",
    "adapted",
)
"""The modules of this package that register models."""

SAMPLES = 4


@dataclass(frozen=True)
class Model:
    """A model, its loss of one sample, and a batch of different samples.

    Attributes:
        module: The module, in the mode in which it is mapped.
        loss: Takes the module and one sample, and returns a scalar.
        batch: The mapped arguments, samples first.
        output: Takes the module and the first argument's sample, for the Jacobian with respect to
            it; None where that is no real tensor.
        precision: The least precise dtype that the model computes in, whatever its weights' dtype.
        unused: True if a sample leaves some parameters without a gradient that another one has.
        options: Options of the map that the model needs, such as `randomness`.
    """

    module: nn.Module
    loss: Callable[..., torch.Tensor]
    batch: tuple[torch.Tensor, ...]
    output: Callable[..., torch.Tensor] | None = None
    precision: torch.dtype = torch.float64
    unused: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Entry:
    """A name in the zoo.

    Attributes:
        build: Makes the model.
        package: What has to be installed, besides torch.
        loops: The operators that run sample by sample, as `plan.explain()` names them, and why.
    """

    name: str
    build: Callable[[], Model]
    package: str
    loops: dict[str, str]


_entries: dict[str, Entry] = {}


def entry(
    name: str, package: str = "torch", loops: dict[str, str] | None = None
) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Register a builder under a name."""

    def register(build: Callable[[], Model]) -> Callable[[], Model]:
        assert name not in _entries, name
        _entries[name] = Entry(name, build, package, loops or {})
        return build

    return register


def entries() -> dict[str, Entry]:
    """All models by name, in the order of their families. Imports none of the packages."""
    for family in FAMILIES:
        importlib.import_module(f"tests.zoo.{family}")
    return dict(_entries)
