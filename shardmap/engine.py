"""From a recording to functions that run: lower once per program, check the first run, remember."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmap.batch import BatchedProgram, LoweringOptions, lower, restride
from shardmap.codegen import Replay, generate
from shardmap.program import Equation, Program
from shardmap.rules.lowering import V, values

logger = logging.getLogger("shardmap")


class SlowLoopWarning(UserWarning):
    """An operator runs sample by sample because nothing batches it."""


@dataclass(slots=True)
class Lowered:
    """A program, ready to run on one kind of device."""

    program: Program
    options: LoweringOptions
    batched: BatchedProgram
    replay: Replay
    fixes: dict[int, str] = field(default_factory=dict)
    """What the checks of the first runs found, by number of the recorded call."""
    checked: set[bool] = field(default_factory=set)
    """Whether chunks of one sample (False) and of several (True) have been checked."""


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
_lock = threading.Lock()


def lowered(program: Program, options: LoweringOptions, layout: tuple[bool, ...], sources: dict[str, str]) -> Lowered:
    """The lowering of `program`, made once.

    Args:
        program: What one sample does.
        options: What else decides how it is lowered.
        layout: For each mapped input, whether samples lie one after another in memory.
        sources: The user's line for operators without a rule of ours, for warnings.
    """
    key = _Key(program, options, layout)
    with _lock:
        found = _cache.get(key)
        if found is not None:
            _cache.move_to_end(found[0])
            return found[1]
    program.check()
    batched, replay = _lower(program, options, {}, sources)
    made = Lowered(program, options, batched, replay)
    with _lock:
        _cache[key] = key, made
        while len(_cache) > _CAPACITY:
            _cache.popitem(last=False)
    return made


def _lower(program: Program, options: LoweringOptions, fixes: dict[int, str], sources: dict[str, str]) -> tuple[BatchedProgram, Replay]:
    def warn(eq: Equation) -> None:
        name = eq.op.name()
        line = eq.source or sources.get(name, "an unknown line")
        warnings.warn(
            f"{options.call}: no rule batches {name} (called at {line}), so it runs sample by sample; register one with shardmap.batching_rule, "
            "or pass strict=True to refuse such calls",
            SlowLoopWarning,
            stacklevel=2,
        )

    batched = lower(program, options, fixes, warn)
    return batched, generate(batched, options.grad)


def check(low: Lowered, device: torch.device, seed: int, scalars: tuple[float, ...], tensors: Tensors, sources: dict[str, str]) -> None:
    """Run a chunk of at most two samples call by call and compare each result's shape, dtype and strides with the recording.

    What differs is mended before the first real run: other strides are put right by a copy after the call, another shape or
    dtype moves the call one tier down. Kernels choose the strides of their results by their inputs, so that no rule can
    promise them for every layout.
    """
    size = tensors.size
    several = size > 1
    while True:
        found = _check_once(low, device, seed, scalars, tensors)
        if not found:
            break
        for number, (fix, text) in found.items():
            previous = low.fixes.get(number)
            assert (previous, fix) != ("loop", "functorch"), f"{low.options.call}: a loop over samples gave a wrong result: {text}"
            low.fixes[number] = "loop" if previous == "functorch" and fix == "functorch" else fix
            logger.info("%s: %s; %s", low.options.call, text, {"restride": "restored by a copy", "functorch": "served by the next tier"}.get(fix, fix))
        low.batched, low.replay = _lower(low.program, low.options, low.fixes, sources)
    low.checked.add(several)


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a program is run on."""

    size: int
    inputs: list[torch.Tensor]
    captured: list[torch.Tensor]
    literals: list[torch.Tensor]


def _check_once(low: Lowered, device: torch.device, seed: int, scalars: tuple[float, ...], tensors: Tensors) -> dict[int, tuple[str, str]]:
    batched = low.batched
    env: dict[int, Any] = {}
    bound = zip((*batched.inputs, *batched.captured, *batched.literals), (*tensors.inputs, *tensors.captured, *tensors.literals), strict=True)
    for v, t in bound:
        env[v.index] = t
    symbols = {"BatchSize": tensors.size, "ChunkStart": 0, "Seed": seed, "SampleDevice": device}

    def value(arg: Any) -> Any:
        kind = type(arg)
        if kind is V:
            return env[arg.index]
        if kind is list or kind is tuple:
            return [value(a) for a in arg]
        if kind.__name__ in symbols:
            return symbols[kind.__name__]
        if kind.__name__ == "Param":
            return scalars[arg.scalar]
        return arg

    last: dict[int, int] = {}
    calls = (*batched.fixed, *batched.chunk)
    for i, call in enumerate(calls):
        for v in values((call.args, tuple(v for _, v in call.kwargs))):
            last[v.index] = i
    found: dict[int, tuple[str, str]] = {}
    for i, call in enumerate(calls):
        try:
            out = call.target(*[value(a) for a in call.args], **{k: value(v) for k, v in call.kwargs})
        except Exception as error:
            if low.fixes.get(call.equation) == "loop" or call.equation >= len(low.program.equations) or not call.mapped:
                raise
            number = call.equation
            return found | {number: ("functorch", f"{low.program.equations[number]} raised {type(error).__name__}: {error}")}
        if call.outs:
            for index, t in zip(call.outs, out if call.several else (out,), strict=True):
                if index is not None:
                    env[index] = t
                    if index in batched.results:
                        fix = _compare(low, batched.results[index], t, tensors.size, env)
                        if fix is not None:
                            found[call.equation] = fix
                            if fix[0] != "restride":
                                return found
                            env[index] = restride(t, batched.results[index][0].spec.stride)
        for v in values((call.args, tuple(v for _, v in call.kwargs))):
            if last.get(v.index) == i:
                env.pop(v.index, None)
    return found


def _compare(low: Lowered, expected: tuple[Any, V], t: torch.Tensor, size: int, env: dict[int, Any]) -> tuple[str, str] | None:
    var, v = expected
    text = f"{var} should be {var.spec} for each of {size} samples, strides {var.spec.stride}; got {tuple(t.shape)} {t.dtype} strides {t.stride()}"
    if tuple(t.shape) != ((size, *v.shape) if v.mapped else v.shape) or t.dtype != var.spec.dtype:
        return "functorch", text
    if v.mapped and t.numel():
        same = all(n <= 1 or a == s for n, a, s in zip(var.spec.shape, t.stride()[1:], var.spec.stride, strict=True))
        if not same:
            return "restride", text
    return None


@contextlib.contextmanager
def plain_numerics() -> Iterator[None]:
    """Replay means what was recorded: autocast has been recorded as casts and must not cast again."""
    entered = [t for t in ("cpu", "cuda") if torch.is_autocast_enabled(t)]
    if not entered:
        yield
        return
    with contextlib.ExitStack() as stack:
        for t in entered:
            stack.enter_context(torch.autocast(t, enabled=False))
        yield


def draw_seed() -> int:
    """A seed from torch's generator: one draw per call, whatever the number of samples, chunks and devices."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))

