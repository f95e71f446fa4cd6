"""The batched program and the options of lowering, as frozen data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from shardmap.program.ir import Var
from shardmap.rules.lowering import Call, V


@dataclass(frozen=True, slots=True)
class BatchedProgram:
    """A program for a chunk of samples, on one kind of device."""

    fixed: tuple[Call, ...]
    """Calls that do not depend on the sample: run once per device."""
    chunk: tuple[Call, ...]
    """Calls on whole chunks."""
    inputs: tuple[V, ...]
    captured: tuple[V, ...]
    literals: tuple[V, ...]
    outputs: tuple[V, ...]
    tiers: Mapping[str, str]
    """For each operator in use, the slowest tier that serves a call of it."""
    values: int
    """Number of values that the calls define."""
    results: Mapping[int, tuple[Var, V]]
    """For a value's index: the recorded tensor that it is the batch of, for the checks of the first
    run."""
    summed: frozenset[int] = frozenset()
    """Indices of mapped outputs that are summed over the chunk's samples, `[*shape]`."""
    written: Mapping[int, tuple[tuple[Var, V], ...]] = field(default_factory=dict)
    """For the number of a recorded call that writes in place: the written tensors, and their
    batches."""
    factored: Mapping[int, str] = field(default_factory=dict)
    """For the number of a recorded call that is computed from factors (`shardmap.factors`): a text
    about it."""
    saved: tuple[bool, ...] = ()
    """For each output, True if autograd may save it; empty where autograd records nothing."""
    separate: tuple[Call, ...] | None = None
    """The calls of a chunk as the rules emitted them, if `chunk` was simplified: each serves one
    recorded call, so that they can be compared with the recording."""

    @property
    def comparable(self) -> tuple[Call, ...]:
        """All calls, each of which serves one recorded call."""
        return (*self.fixed, *(self.chunk if self.separate is None else self.separate))


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """The options that decide, with the program, how it is lowered."""

    device_type: str
    randomness: str
    strict: bool
    grad: bool
    """True if outer autograd is recording."""
    transformed: bool
    """True if `torch.func` transforms are active around the call."""
    call: str
    summed: tuple[bool, ...] = ()
    """For each output: True if only its sum over the samples is needed; empty for none."""
    traced: bool = False
    """True if the samples hold no values, because the call is traced: such a lowering has not been
    compared with anything, and is kept apart."""


@dataclass(frozen=True, slots=True)
class Fixes:
    """Changes to a lowering that trials have shown to be needed, by number of the recorded call."""

    tiers: Mapping[int, str] = field(default_factory=dict)
    """"functorch" or "loop": the result of a higher tier was not the recorded one."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """For each entry of `tiers`, the fault of the higher tier."""
    restride: frozenset[int] = frozenset()
    """Calls whose results need a copy to have the strides of the sample's."""
    plain: bool = False
    """True if nothing is computed from factors."""
    separate: bool = False
    """True if the calls of a chunk are not simplified."""
    copied: bool = False
    """True if outputs are copied into their slices instead of being computed there."""

    def demoted(self, number: int, tier: str, reason: str) -> Fixes:
        """These fixes, with a recorded call served by a lower tier."""
        tiers = {**self.tiers, number: tier}
        return replace(self, tiers=tiers, reasons={**self.reasons, number: reason})

    def restrided(self, numbers: Iterable[int]) -> Fixes:
        """These fixes, with the strides of some calls' results corrected by a copy."""
        return replace(self, restride=self.restride.union(numbers))


TIERS = ("rule", "functorch", "loop")
"""What may serve an operator, the fastest first."""


def slowest(*parts: Mapping[str, str]) -> dict[str, str]:
    """For each operator, the slowest tier that serves a call of it."""
    found: dict[str, str] = {}
    for part in parts:
        for name, tier in part.items():
            found[name] = max(found.get(name, tier), tier, key=TIERS.index)
    return found
