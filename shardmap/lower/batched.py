"""What lowering takes besides a program, and the batched program that it makes: frozen data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

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
    tiers: Mapping[str, str]
    """For each operator in use, the tier that serves it."""
    values: int
    """How many values the calls define."""
    results: Mapping[int, tuple[Var, V]]
    """By value index: the recorded tensor that it is the batch of, for the checks of the first
    run."""
    summed: frozenset[int] = frozenset()
    """By value index: mapped outputs that are summed over the chunk's samples, `[*shape]`."""
    written: Mapping[int, tuple[tuple[Var, V], ...]] = field(default_factory=dict)
    """By number of a recorded call that writes: the tensors that it writes, and their batches."""
    factored: Mapping[int, str] = field(default_factory=dict)
    """By number of the recorded call: what is computed from factors instead
    (`shardmap.factors`)."""


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """What besides the program decides how it is lowered."""

    device_type: str
    randomness: str
    strict: bool
    grad: bool
    """True if outer autograd records."""
    transformed: bool
    """True if `torch.func` transforms are active around the call."""
    call: str
    summed: tuple[bool, ...] = ()
    """For each output, whether only its sum over the samples is wanted; none if nothing is said."""
    traced: bool = False
    """True if the samples hold no values, because the call is traced: what is lowered so has not
    been compared with anything, and is kept apart."""


@dataclass(frozen=True, slots=True)
class Fixes:
    """What trying a program has shown to be needed, by number of the recorded call."""

    tiers: Mapping[int, str] = field(default_factory=dict)
    """"functorch" or "loop": the result of a higher tier was not the recorded one."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """For each entry of `tiers`, what the higher tier did wrong."""
    restride: frozenset[int] = frozenset()
    """Calls whose results have other strides than the sample's."""
    plain: bool = False
    """True if nothing is computed from factors."""
    copied: bool = False
    """True if outputs are copied into their slices instead of being computed there."""

    def demoted(self, number: int, tier: str, reason: str) -> Fixes:
        """These fixes, with a recorded call served by a lower tier."""
        tiers = {**self.tiers, number: tier}
        return replace(self, tiers=tiers, reasons={**self.reasons, number: reason})

    def restrided(self, numbers: Iterable[int]) -> Fixes:
        """These fixes, with the strides of some calls' results put right by a copy."""
        return replace(self, restride=self.restride.union(numbers))
