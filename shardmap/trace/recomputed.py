"""What a gradient computes again (`torch.utils.checkpoint`) or unpacks (`saved_tensors_hooks`)."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils import checkpoint

from shardmap.program.ir import Var
from shardmap.program.object_parts import cells_of
from shardmap.program.python_state import Reader, name_of, reader_of
from shardmap.program.state_facts import is_library

CHECKPOINT = "torch.utils.checkpoint"
SAVED = "saved_tensors_hooks"


@dataclass
class Region:
    """The calls that were recorded under one pair of hooks on what autograd saves."""

    unpack: Callable[..., object]
    calls: list[range] = field(default_factory=list)
    """Positions of their equations."""

    @property
    def is_checkpoint(self) -> bool:
        """True if the hooks are those of a checkpoint."""
        return getattr(self.unpack, "__module__", "") == checkpoint.__name__

    def positions(self) -> set[int]:
        """Positions of the equations."""
        return {position for calls in self.calls for position in calls}


class Part(NamedTuple):
    """A function that is called again, and the objects that it is called with."""

    function: object
    given: Mapping[str, object]


class Recomputed:
    """A hook that changes no gradient, and reads what some parts of the function read.

    Args:
        kind: `CHECKPOINT` if one is among them, else `SAVED`.
        parts: The parts.
        tensors: The tensors that the calls of checkpointed parts read from outside.
    """

    def __init__(self, kind: str, parts: Sequence[Part], tensors: tuple[Var, ...]):
        self.kind = kind
        self.parts = parts
        self.tensors = tensors
        self.names = [f"{name_of(part.function)}#{k}" for k, part in enumerate(parts)]
        """For each part: the name by which its reader is kept."""

    def __call__(self, grad: torch.Tensor) -> None:
        """Leave the gradient as it is."""

    def readers(self, is_sample: Callable[[torch.Tensor], bool]) -> list[Reader]:
        """The readers of the parts that are written in python."""
        found = []
        for name, part in zip(self.names, self.parts, strict=True):
            reader = reader_of(part.function, part.given, is_sample)
            if reader is not None:
                reader.kept_as = name
                reader.by_value = self.kind is SAVED
                reader.follow(None)  # all methods: nothing tells which of them will run
                found.append(reader)
        return found


def reads(region: Region) -> bool:
    """True if hooks may read something beside what they are given."""
    unpack = region.unpack
    if region.is_checkpoint:
        return _frame(unpack) is not None
    if is_library(getattr(unpack, "__module__", "")):
        return False
    if not isinstance(unpack, types.FunctionType):
        return True
    code = unpack.__code__
    given = unpack.__closure__ or unpack.__defaults__ or unpack.__kwdefaults__
    return bool(code.co_names or given or code.co_freevars)


def parts_of(unpack: Callable[..., object]) -> list[Part]:
    """What an unpack hook calls: itself, or the function of a checkpoint."""
    if getattr(unpack, "__module__", "") != checkpoint.__name__:
        return [Part(unpack, {})]
    frame = _frame(unpack)
    again = _cells(vars(frame)["recompute_fn"])
    arguments = enumerate(vars(frame)["saved_args"])
    given = {f"argument {k}": a for k, a in arguments if type(a).__name__ != "SavedTensor"}
    keywords = again.get("kwargs")
    given |= keywords if isinstance(keywords, dict) else {}
    context = again.get("recompute_context")
    if not is_library(type(context).__module__):
        given["context_fn"] = context
    return [Part(again["fn"], given)]


def _frame(unpack: object) -> object:
    """The frame of a checkpoint; None for the hooks of a recomputation, which is recorded."""
    cells = _cells(unpack)
    if "unpack_hook" in cells:  # one that explains errors is around it
        cells = _cells(cells["unpack_hook"])
    return cells.get("frame")


def _cells(function: object) -> dict[str, object]:
    assert isinstance(function, types.FunctionType)
    return cells_of(function)
