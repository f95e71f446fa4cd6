"""From a recording to functions that run: lower once per program and remember."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import fork_safe_lock
from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.batcher import lower
from shardmap.lower.codegen import Replay, generate
from shardmap.program.ir import Equation, Program


class SlowLoopWarning(UserWarning):
    """An operator runs sample by sample because nothing batches it."""


@dataclass(slots=True)
class Notes:
    """What the planner knows of a program, whoever lowered it."""

    observed: dict[Any, Any] = field(default_factory=dict)
    """What a chunk has been seen to cost, by device and the way that it runs."""
    learned: dict[str, Any] = field(default_factory=dict)
    """What running chunks has shown, by device."""


@dataclass(slots=True)
class Lowered:
    """A program, ready to run on one kind of device."""

    program: Program
    options: LoweringOptions
    batched: BatchedProgram
    replay: Replay
    fixes: Fixes = field(default_factory=Fixes)
    """What the checks of the first runs found."""
    checked: set[bool] = field(default_factory=set)
    """Whether chunks of one sample (False) and of several (True) have been checked."""
    notes: Notes = field(default_factory=Notes)
    sample_bytes: int | None = None
    """Bytes of all recorded results of one sample, once somebody has asked."""


class _Key:
    """A cache key that is hashed once: a program is thousands of nested tuples."""

    __slots__ = ("code", "parts")

    def __init__(self, *parts: Any):
        self.parts = parts
        self.code = hash(parts)

    def __hash__(self) -> int:
        return self.code

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Key) and self.parts == other.parts)


_CAPACITY = 256
_cache: collections.OrderedDict[_Key, tuple[_Key, Lowered]] = collections.OrderedDict()
_notes: collections.OrderedDict[_Key, Notes] = collections.OrderedDict()
"""Kept apart, because a plan and a map are different calls of one program."""
_by_identity: dict[tuple[int, LoweringOptions, tuple[bool, ...]], Lowered] = {}
"""The same lowerings by address of their programs: a program that was expected and came is not
compared again."""
_lock = fork_safe_lock()


def lowered(
    program: Program, options: LoweringOptions, layout: tuple[bool, ...], sources: dict[str, str]
) -> Lowered:
    """The lowering of `program`, made once.

    Args:
        program: What one sample does.
        options: What else decides how it is lowered.
        layout: For each mapped input, whether samples lie one after another in memory.
        sources: The user's line for operators without a rule of ours, for warnings.
    """
    shortcut = (id(program), options, layout)
    with _lock:
        same = _by_identity.get(shortcut)
        if same is not None and same.program is program:
            return same
        key = _Key(program, options, layout)
        found = _cache.get(key)
        if found is not None:
            _cache.move_to_end(found[0])
            if found[1].program is program:
                _by_identity[shortcut] = found[1]
            return found[1]
    program.check()
    made = Lowered(program, options, *lower_with(program, options, Fixes(), sources))
    anyone = _Key(program, replace(options, call=""), layout)
    with _lock:
        made.notes = _notes.setdefault(anyone, made.notes)
        _notes.move_to_end(anyone)
        while len(_notes) > _CAPACITY:
            _notes.popitem(last=False)
        _cache[key] = key, made
        _by_identity[shortcut] = made
        while len(_cache) > _CAPACITY:
            dropped = _cache.popitem(last=False)[1][1]
            for known in [k for k, low in _by_identity.items() if low is dropped]:
                del _by_identity[known]
    return made


def lower_with(
    program: Program, options: LoweringOptions, fixes: Fixes, sources: dict[str, str]
) -> tuple[BatchedProgram, Replay]:
    """The batched program and its functions, with `fixes` applied.

    Warns of each operator that falls to the loop, or refuses it.
    """

    def to_loop(eq: Equation) -> None:
        name = eq.op.name()
        line = eq.source or sources.get(name, "an unknown line")
        if options.strict:
            raise errors.UnsupportedOperatorError(
                f"{options.call}: no rule batches {name} (called at {line}) and strict=True "
                "refuses a loop over the batch; register a rule "
                "with shardmap.batching_rule, rewrite the call, or pass strict=False"
            )
        warnings.warn(
            f"{options.call}: no rule batches {name} (called at {line}), so it runs sample by "
            "sample; register one with "
            "shardmap.batching_rule, "
            "or pass strict=True to refuse such calls",
            SlowLoopWarning,
            stacklevel=2,
        )

    batched = lower(program, options, fixes, to_loop)
    return batched, generate(batched, options.grad)


@contextlib.contextmanager
def plain_numerics() -> Iterator[None]:
    """Replay means what was recorded.

    Autocast has been recorded as casts and must not cast again.
    """
    entered = [t for t in ("cpu", "cuda") if torch.is_autocast_enabled(t)]
    if not entered:
        yield
        return
    with contextlib.ExitStack() as stack:
        for t in entered:
            stack.enter_context(torch.autocast(t, enabled=False))
        yield


def draw_seed() -> int:
    """A seed from torch's generator.

    One draw per call, whatever the number of samples, chunks and devices.
    """
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))
