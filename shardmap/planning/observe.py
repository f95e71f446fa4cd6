"""Measure what a chunk costs by running two or three samples under a dispatch mode.

The costs are live bytes, operations and memory traffic.

Nothing is estimated from shapes: the mode sees every tensor that the replay makes, the
temporaries inside composite calls and what autograd saves among them, and when each dies. By runs
of two and of three samples each live byte is either fixed or per sample. The small peak tracker is
modelled on cubed's and `torch.distributed._tools.mem_tracker`; operations are counted as in
`torch.utils.flop_counter`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from shardmap._torch import TorchDispatchMode, packet_of, schema_of, storage_id
from shardmap.lower.cache import Lowered
from shardmap.lower.codegen import Replay
from shardmap.planning.memory import Level, envelope
from shardmap.planning.shapes import Shapes
from shardmap.trace.recording import flat_tensors


@dataclass(frozen=True, slots=True)
class OpCost:
    """Cost of the calls that serve one recorded operator, for one sample."""

    name: str
    calls: int
    """Kernels launched, whatever the chunk size."""
    flops: float
    """Floating-point operations per sample."""
    bytes: float
    """Bytes read and written per sample."""
    fixed_bytes: float = 0.0
    """Bytes read and written whatever the chunk size: weights, mostly."""


class Kernel(NamedTuple):
    """Cost of one kernel of a chunk."""

    flops: float
    """Floating-point operations per sample."""
    bytes: float
    """Bytes read and written per sample."""
    fixed_bytes: float
    """Bytes read and written whatever the chunk size."""
    elements: float
    """Elements of its results per sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """Cost of running a chunk of a program."""

    levels: tuple[Level, ...]
    """Live bytes at their peaks, of tensors that the chunk makes: no inputs, no captured
    tensors, no slices of the result."""
    kept: Level
    """Live bytes when the chunk is done, outputs included; under outer autograd also those saved
    for backward."""
    costs: tuple[OpCost, ...]
    """Cost of each recorded operator, in the order of first use."""
    backward: tuple[Level, ...] = ()
    """The same as `levels` for a chunk with its backward pass; empty without outer autograd."""
    backward_unknown: str = ""
    """Error that computing gradients raised, if their cost is unknown for that reason."""
    kernels: tuple[Kernel, ...] = ()
    """Cost of each kernel, in their order."""
    saved: Level = Level(0, 0)
    """Part of `kept` that is saved for backward."""

    @property
    def calls(self) -> int:
        """Kernels launched per chunk."""
        return sum(c.calls for c in self.costs)

    @property
    def flops(self) -> float:
        """Floating-point operations per sample."""
        return sum(c.flops for c in self.costs)

    @property
    def bytes(self) -> float:
        """Bytes read and written per sample."""
        return sum(c.bytes for c in self.costs)


class _Watch(TorchDispatchMode):
    """Dispatch mode that sees every operator below autograd: its memory, operations and traffic."""

    def __init__(self, known: Sequence[torch.Tensor], shapes: Shapes | None = None):
        super().__init__()
        self.shapes = shapes
        self.known = {storage_id(t.untyped_storage()) for t in known}
        self.live: dict[int, int] = {}
        self.now = 0
        self.trail: list[int] = []
        """Live bytes after each operator that made memory."""
        self.kernels: list[tuple[int, float, float, float]] = []
        """Number of the recorded call, operations, bytes and elements of results of each kernel."""
        self.equation = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that skipping adds imports torch._dynamo: 2 to 3.5 s, once

    def mark(self, number: int) -> None:
        self.equation = number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        run = self.shapes
        out = func(*args, **kwargs) if run is None else run(func, args, kwargs)
        made = [
            t
            for t in flat_tensors(out if isinstance(out, tuple | list) else (out,))
            if t.layout is torch.strided
        ]
        given = [t for t in flat_tensors((*args, *kwargs.values())) if t.layout is torch.strided]
        before = {storage_id(t.untyped_storage()) for t in given}
        fresh = False
        for t in made:
            fresh |= self._see(t)
        if fresh:
            self.trail.append(self.now)
        if (
            fresh
            or schema_of(func).is_mutable
            or not all(storage_id(t.untyped_storage()) in before for t in made)
        ):
            formula = flop_registry.get(packet_of(func))
            elements = sum(t.numel() for t in made)
            flops = formula(*args, **kwargs, out_val=out) if formula is not None else elements
            touched = sum(_touched(t) for t in (*given, *made))
            self.kernels.append((self.equation, flops, touched, elements))
        return out

    def _see(self, t: torch.Tensor) -> bool:
        storage = t.untyped_storage()
        key = storage_id(storage)
        if key in self.known or key in self.live:
            return False
        size = storage.nbytes()
        self.live[key] = size
        self.now += size
        weakref.finalize(storage, self._dead, key)
        return True

    def _dead(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def _touched(t: torch.Tensor) -> int:
    """Bytes of the distinct elements: an expanded tensor is read once."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size()


def observe(
    low: Lowered,
    run: Callable[..., Any],
    sizes: Sequence[int],
    known: Callable[[int], Sequence[torch.Tensor]],
    shapes: Shapes | None = None,
) -> Observation:
    """Watch chunks of two sizes.

    Args:
        low: The lowered program.
        run: `run(size, mark)` computes a chunk of that many samples and returns its outputs.
        sizes: One or two numbers of samples.
        known: For a size, the tensors that exist before: inputs, captured, slices of the
            result.
        shapes: Computes the calls if the chunks are of tensors without memory.
    """
    watched = []
    for size in sizes:
        watch = _Watch(known(size), shapes)
        with watch:
            outs = run(size, watch.mark)
        kept = watch.now
        graph = [t.grad_fn for t in flat_tensors(outs if isinstance(outs, tuple | list) else ())]
        del outs
        watched.append((size, watch, kept, watch.now))
        del graph
    size, watch, kept, saved = watched[-1]
    first_size, first, first_kept, first_saved = watched[0]
    if len(watched) == 2 and len(first.trail) == len(watch.trail):
        points = [
            _line(first_size, a, size, b) for a, b in zip(first.trail, watch.trail, strict=True)
        ]
        rest = _line(first_size, first_kept, size, kept)
        held = _line(first_size, first_saved, size, saved)
    # kernels were chosen by the size, or there is one size only: everything counts as growing with
    # the chunk
    else:
        points = [Level(0, -(-a // size)) for a in watch.trail]
        rest = Level(0, -(-kept // size))
        held = Level(0, -(-saved // size))
    kernels = _kernels(first_size, first, size, watch)
    names: dict[str, list[float]] = {}
    equations = low.program.equations
    for (number, *_), kernel in zip(watch.kernels, kernels, strict=True):
        if isinstance(low.replay, Replay):
            name = equations[number].op.name() if number < len(equations) else "outputs"
        else:  # several programs, or the function itself: their calls are not told apart
            name = low.replay.source
        total = names.setdefault(name, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, kernel.flops, kernel.bytes, kernel.fixed_bytes)):
            total[i] += value
    costs = tuple([OpCost(name, int(c), f, b, w) for name, (c, f, b, w) in names.items()])
    return Observation(envelope(points), rest, costs, kernels=kernels, saved=held)


def _kernels(size: int, watch: _Watch, larger: int, other: _Watch) -> tuple[Kernel, ...]:
    """The kernels of a chunk: bytes that two sizes have in common do not grow with the chunk."""
    alike = larger > size and len(watch.kernels) == len(other.kernels)
    found = []
    for (_, _, smaller, _), (_, flops, touched, elements) in zip(
        watch.kernels if alike else other.kernels, other.kernels, strict=True
    ):
        each = max(0.0, (touched - smaller) / (larger - size)) if alike else touched / larger
        each = min(each, touched / larger)  # what grows faster counts as growing with the chunk
        fixed = touched - larger * each
        found.append(Kernel(flops / larger, each, fixed, elements / larger))
    return tuple(found)


def _line(size: int, a: int, larger: int, b: int) -> Level:
    """The line through two observations.

    What grows faster than the chunk counts as growing with it.
    """
    per_sample = max(0, -(-(b - a) // (larger - size)))
    fixed = b - larger * per_sample
    return Level(fixed, per_sample) if fixed >= 0 else Level(0, -(-b // larger))
