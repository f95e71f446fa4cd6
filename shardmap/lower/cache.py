"""Cache of lowerings: each is made and checked once; only finished values are kept."""

from __future__ import annotations

import collections
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardmap import errors
from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.batcher import lower
from shardmap.lower.check import verified
from shardmap.lower.codegen import Executable, Replay, generate
from shardmap.lower.no_samples import without_samples
from shardmap.lower.trial import Trial
from shardmap.program.analysis import recorded_bytes
from shardmap.program.ir import Equation, Program
from shardmap.rules import registry

SlowLoopWarning = errors.SlowLoopWarning


@dataclass(slots=True)
class Notes:
    """The planner's measurements of a program, shared by all its lowerings.

    They are the only part of a lowering that changes.
    """

    observed: dict[Any, Any] = field(default_factory=dict)
    """Measured costs of a chunk, by device and the way that it runs."""
    learned: dict[str, Any] = field(default_factory=dict)
    """Measurements of chunks that ran, by device."""
    compiled: dict[object, object] = field(default_factory=dict)
    """Compiled forms of the program, by what decides them (`shardmap.run.compiled`)."""
    recorded_bytes: list[int] = field(default_factory=list)
    """Bytes of all recorded results of one sample, once they have been added up."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program, ready to run on one kind of device."""

    program: Program
    options: LoweringOptions
    batched: BatchedProgram
    replay: Executable
    fixes: Fixes
    """Fixes that trials have shown to be needed."""
    loose: frozenset[int]
    """Positions of outputs whose values cannot be compared: rounding grows along the program."""
    notes: Notes
    sample_bytes: int
    """Bytes of all recorded results of one sample."""


class _Key:
    """A cache key that is hashed once: a program is thousands of nested tuples."""

    __slots__ = ("code", "parts")

    def __init__(self, *parts: Hashable):
        self.parts = parts
        self.code = hash(parts)

    def __hash__(self) -> int:
        return self.code

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Key) and self.code == other.code and self.parts == other.parts
        )


class Kept:
    """Cache of the last few values, each made under a lock of its own.

    Threads that request a value wait for the thread that makes it; other threads do not
    wait. The locks are reentrant: a signal handler may call a map while its thread is making one.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._making: dict[Hashable, list[Any]] = {}
        self._lock = threading.RLock()

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
            return found

    def made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value, made now if there is none; an error leaves no entry."""
        found = self.get(key)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, [threading.RLock(), 0])
            making[1] += 1
        try:
            with making[0]:
                found = self.get(key)
                if found is None:
                    found = make()
                    with self._lock:
                        self._values[key] = found
                        while len(self._values) > self.capacity:
                            self._values.popitem(last=False)
                return found
        finally:
            with self._lock:
                making[1] -= 1
                if not making[1]:
                    self._making.pop(key, None)

    def replace(self, key: Hashable, value: Any) -> None:
        """Replace the kept value."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.capacity:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()

    def values(self) -> list[Any]:
        """The kept values, oldest first."""
        with self._lock:
            return list(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def after_fork(self) -> None:
        """Renew the locks: in a forked child those that were held would never be released."""
        self._lock = threading.RLock()
        self._making = {}


CAPACITY = 256
_drafts = Kept(CAPACITY)
_lowered = Kept(CAPACITY)
_notes = Kept(CAPACITY)
"""Notes are kept apart, as a plan and a map are different calls of one program."""
_by_identity = Kept(4 * CAPACITY)
"""The same lowerings by address of their programs: a program that was expected and recorded is not
compared again. The values hold their programs, so that no address is used twice."""


def clear() -> None:
    """Drop all lowerings."""
    for kept in (_by_identity, _lowered, _drafts, _notes):
        kept.clear()


def lowerings() -> list[Lowered]:
    """The kept lowerings, oldest first."""
    return _lowered.values()


def after_fork() -> None:
    """Renew the locks of this module."""
    for kept in (_by_identity, _lowered, _drafts, _notes):
        kept.after_fork()


@dataclass(frozen=True, slots=True)
class _Draft:
    """A program that has been lowered but not tried."""

    program: Program
    batched: BatchedProgram
    replay: Replay


@dataclass(frozen=True, slots=True)
class _Again:
    """Lowers a program of which there already is a draft."""

    program: Program
    sources: dict[str, str]
    first: _Draft
    drafted: LoweringOptions

    def __call__(
        self, options: LoweringOptions, fixes: Fixes, quiet: bool = False
    ) -> tuple[BatchedProgram, Replay]:
        if options == self.drafted and fixes == Fixes():
            return self.first.batched, self.first.replay
        return lower_with(self.program, options, fixes, self.sources, quiet)


def draft(
    program: Program, options: LoweringOptions, layout: tuple[bool, ...], sources: dict[str, str]
) -> BatchedProgram:
    """The batched program as the rules make it, untried: for facts that values do not decide."""
    quick = "draft", id(program), options, layout, registry.version()
    found = _by_identity.get(quick)
    if found is None or found[0] is not program:
        found = program, _draft(_key(program, options, layout), program, options, sources)
        _by_identity.replace(quick, found)
    return found[1].batched


def notes(program: Program, options: LoweringOptions, layout: tuple[bool, ...]) -> Notes:
    """The notes on a program, shared by all its lowerings."""
    quick = "notes", id(program), options, layout
    found = _by_identity.get(quick)
    if found is not None and found[0] is program:
        return found[1]
    made = _notes.made(_Key(program, replace(options, call=""), layout), Notes)
    _by_identity.replace(quick, (program, made))
    return made


def _draft(
    key: _Key, program: Program, options: LoweringOptions, sources: dict[str, str]
) -> _Draft:
    def make() -> _Draft:
        program.check()
        return _Draft(program, *lower_with(program, options, Fixes(), sources))

    return _drafts.made(key, make)


def _key(program: Program, options: LoweringOptions, layout: tuple[bool, ...]) -> _Key:
    return _Key(program, options, layout, registry.version())


def known(
    program: Program, options: LoweringOptions, layout: tuple[bool, ...], size: int, slices: bool
) -> Lowered | None:
    """The lowering of this very program object, if it was requested before."""
    found = _by_identity.get((id(program), options, layout, size, slices, registry.version()))
    return found[1] if found is not None and found[0] is program else None


def lowered(
    program: Program,
    options: LoweringOptions,
    layout: tuple[bool, ...],
    size: int,
    sources: dict[str, str],
    tried: Callable[[], Trial] | None,
    slices: bool = True,
    fixes: Fixes | None = None,
) -> Lowered:
    """The lowering of `program`, tried on samples and frozen; made once.

    Args:
        program: The program of one sample.
        options: The options that also decide how it is lowered.
        layout: For each mapped input, True if samples lie one after another in memory.
        size: Number of samples that it is tried on: 1 or 2; 0 for an empty batch.
        sources: The user's line for operators without a rule of ours, for warnings.
        tried: Makes the samples that it is tried on; None for no trial.
        slices: True if its outputs may be computed into slices of a result.
        fixes: Fixes that another process has found to be needed.
    """
    found = known(program, options, layout, size, slices)
    if found is not None:
        return found
    key = _key(program, options, layout)

    def make() -> Lowered:
        first = _draft(key, program, options, sources)
        learned = notes(program, options, layout)
        if not (size or options.traced):
            none = without_samples(program, first.batched, options)
            replay = generate(none, options.grad)
            return replace(_untried(first, options, learned), batched=none, replay=replay)
        if tried is None or not size:
            return _untried(first, options, learned)

        again = _Again(program, sources, first, options)
        done = verified(program, options, again, tried(), fixes or Fixes(), slices)
        flags = [v.mapped for v in first.batched.outputs]
        assert [v.mapped for v in done.batched.outputs] == flags, (
            f"{options.call}: a lower tier changes which outputs differ by sample"
        )
        return Lowered(
            program,
            options,
            done.batched,
            done.replay,
            done.fixes,
            done.loose,
            learned,
            recorded_bytes(program),
        )

    found = _lowered.made(_Key(key, size, tried is None, slices), make)
    quick = id(program), options, layout, size, slices, registry.version()
    _by_identity.replace(quick, (program, found))
    return found


def untried(
    program: Program, options: LoweringOptions, layout: tuple[bool, ...], sources: dict[str, str]
) -> Lowered:
    """The lowering of `program` as the rules make it, which no trial has compared: for its costs.

    It is not kept: what is kept has been tried.
    """
    first = _draft(_key(program, options, layout), program, options, sources)
    return _untried(first, options, notes(program, options, layout))


def _untried(first: _Draft, options: LoweringOptions, learned: Notes) -> Lowered:
    return Lowered(
        first.program,
        options,
        first.batched,
        first.replay,
        Fixes(),
        frozenset(),
        learned,
        recorded_bytes(first.program),
    )


def lower_with(
    program: Program,
    options: LoweringOptions,
    fixes: Fixes,
    sources: dict[str, str],
    quiet: bool = False,
) -> tuple[BatchedProgram, Replay]:
    """The batched program and its functions, with `fixes` applied.

    Warns of each operator that only the loop serves, or refuses it, unless `quiet`.
    """

    def to_loop(number: int, eq: Equation) -> None:
        if quiet:
            return
        name = eq.op.name()
        line = eq.source or sources.get(name, "an unknown line")
        if registry.lookup(eq.op) is not None and number in fixes.reasons:
            why = (
                f"the rule that batches {name} (called at {line}) is wrong: {fixes.reasons[number]}"
            )
            remedy = "mend the rule (shardmap.batching_rule(..., replace=True))"
        else:
            why = f"no rule batches {name} (called at {line})"
            remedy = "register one with shardmap.batching_rule"
        if options.strict:
            raise errors.UnsupportedOperatorError(
                f"{options.call}: {why}, and strict=True refuses a loop over the batch; {remedy}, "
                "rewrite the call, or pass strict=False"
            )
        warnings.warn(
            f"{options.call}: {why}, so it runs sample by sample; {remedy}, or pass strict=True to "
            "refuse such calls",
            SlowLoopWarning,
            stacklevel=2,
        )

    batched = lower(program, options, fixes, to_loop, lowered)
    return batched, generate(batched, options.grad, fixes.copied)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draw a seed from torch's generator, or the user's.

    One is drawn per call, whatever its samples and devices.
    """
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device=device, generator=generator))
