"""What lowering takes besides a program, and the batched program that it makes: frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardmap.program.ir import Var
from shardmap.rules.lowering import Call, V


@dataclass(frozen=True, slots=True)
class BatchedProgram:
    """What a program does to a chunk of samples, on one kind of device."""

    fixed: tuple[Call, ...]
    """Calls that no sample changes: once per device."""
    chunk: tuple[Call, ...]
    """Calls on whole chunks."""
    inputs: tuple[V, ...]
    captured: tuple[V, ...]
    literals: tuple[V, ...]
    outputs: tuple[V, ...]
    tiers: dict[str, str]
    """For each operator in use, the tier that serves it."""
    values: int
    """How many values the calls define."""
    results: dict[int, tuple[Var, V]]
    """By value index: the recorded tensor that it is the batch of, for the checks of the first
    run."""
    summed: frozenset[int] = frozenset()
    """By value index: mapped outputs that are summed over the chunk's samples, `[*shape]`."""
    ghosts: dict[int, str] = field(default_factory=dict)
    """By number of the recorded call: what is computed from factors instead
    (`shardmap.factors`)."""


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """What besides the program decides how it is lowered."""

    device_type: str
    randomness: str
    strict: bool
    grad: bool
    """Whether outer autograd records."""
    transformed: bool
    """Whether `torch.func` transforms are active around the call."""
    call: str
    summed: tuple[bool, ...] = ()
    """For each output, whether only its sum over the samples is wanted; none if nothing is said."""


@dataclass(slots=True)
class Fixes:
    """What trying a program has shown to be needed, by number of the recorded call."""

    tiers: dict[int, str] = field(default_factory=dict)
    """"functorch" or "loop": a higher tier's result was not the recorded one."""
    restride: set[int] = field(default_factory=set)
    """Calls whose results have other strides than the sample's."""
    plain: bool = False
    """Whether nothing is computed from factors."""
