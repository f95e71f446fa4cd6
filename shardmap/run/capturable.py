"""What a CUDA graph can hold: the calls of a chunk, and the memory that a replay reads."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from shardmap.lower.cache import Lowered
from shardmap.lower.codegen import Replay
from shardmap.lower.graphs import Chunk, Meta, UncompilableError
from shardmap.program.analysis import random_call
from shardmap.program.ir import Equation
from shardmap.program.schema import in_words
from shardmap.rules.lowering import Call, ChunkStart, Seed

GAPS = 2
"""Most bytes of a static copy, as a multiple of its elements' bytes."""

_MASKS = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators that count the true entries of a mask on the host."""


@dataclass(slots=True)
class Static:
    """A tensor that a graph reads at each replay."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: torch.Tensor | None = None
    """What is copied to; None for a tensor of the caller's that is read where it is, and which the
    graph does not keep alive."""
    owner: weakref.ref[torch.Tensor] | None = None
    """The caller's tensor in whose memory it lies, if it is read there."""
    address: int = 0
    always: bool = False
    """True to copy at each replay: the caller may write to the tensor in between."""
    last: weakref.ref[torch.Tensor] | None = None
    """The tensor that was copied last."""

    @classmethod
    def in_place(cls, t: torch.Tensor, owner: torch.Tensor) -> Static:
        """A captured tensor, read where it is."""
        return cls(t.shape, t.stride(), t.dtype, None, weakref.ref(owner), t.data_ptr())

    @classmethod
    def for_copies(cls, t: torch.Tensor, always: bool = False) -> Static:
        """Memory for copies of values that do not depend on the sample."""
        memory = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return cls(t.shape, t.stride(), t.dtype, memory, always=always)

    @classmethod
    def for_samples(cls, t: torch.Tensor) -> Static:
        """Memory for copies of samples, with the strides of their rows.

        Raises:
            UncompilableError: Most of the memory would be gaps.
        """
        stride = _strides(t)
        memory = torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device)
        return cls(t.shape, stride, t.dtype, memory, always=True)

    def serves(self, t: torch.Tensor, owner: torch.Tensor | None) -> bool:
        """True if the graph computes with the values of `t`, which lies in memory of `owner`."""
        if t.shape != self.shape or t.stride() != self.stride or t.dtype != self.dtype:
            return False
        if self.owner is None:
            return self.always or owner is None
        return self.owner() is owner and t.data_ptr() == self.address

    def load(self, t: torch.Tensor) -> None:
        """Copy a tensor to where the graph reads it, unless it is there already."""
        to = self.memory
        if to is None or not (self.always or self.last is None or self.last() is not t):
            return
        self.last = weakref.ref(t)
        t = t.detach()
        for d in range(t.dim()):
            if to.stride(d) == 0 and to.shape[d] > 1:  # its entries lie in one place
                to, t = to.narrow(d, 0, 1), t.narrow(d, 0, 1)
        to.copy_(t)


def _strides(t: torch.Tensor) -> tuple[int, ...]:
    """Strides for a copy of samples: recorded views depend on those of the rows."""
    rows = t.stride()[1:]
    count, row = 1, 1
    for n, s in zip(t.shape[1:], rows, strict=True):
        row += max(n - 1, 0) * s
        count *= n if s else 1
    step = row if row <= GAPS * count else t.stride(0)
    span = row + max(t.shape[0] - 1, 0) * step
    if span > GAPS * max(count * t.shape[0], 1):
        raise UncompilableError(
            "the samples of an argument lie between those of other chunks; move the mapped "
            "dimension to the front and make the batch contiguous"
        )
    return (step, *rows)


def layout_of(chunk: Chunk) -> str:
    """Reason why a graph cannot read the tensors of a chunk; empty if it can."""
    try:
        for t in (*chunk.fixed, *chunk.inputs):
            Meta.of(t)
            if t.device != chunk.device:
                return (
                    f"a tensor on {t.device} is read, whose value would be a constant of the "
                    f"graph; move it to {chunk.device}"
                )
        for t in chunk.inputs:
            _strides(t)
    except UncompilableError as error:
        return str(error)
    return ""


def obstacle(low: Lowered) -> str:
    """Reason why the calls of a chunk cannot be captured; empty if they can be."""
    if not isinstance(low.replay, Replay):
        return "the function itself is run on each sample"
    for call in low.batched.chunk:
        inside = 0 <= call.equation < len(low.program.equations)
        eq = low.program.equations[call.equation] if inside else None
        name = "a call" if eq is None else in_words(eq.op)
        if _kinds((call.args, tuple([a for _, a in call.kwargs]))) & {Seed, ChunkStart} or (
            eq is not None and random_call(eq)
        ):
            return (
                f"{name} draws random numbers for each chunk; draw them outside (torch.randn for "
                "the whole batch) and pass them in as an argument"
            )
        if not call.outs and not call.writes:
            return f"the host waits for {name}, which asks for a value"
        if eq is not None and _waits(call, eq):
            return f"the host waits for {name}, whose result's shape or python value is data"
        if eq is not None and crosses_devices(eq):
            return f"{name} reads or writes memory of another device; move it there outside"
        if eq is not None and low.batched.tiers.get(name) == "loop":
            return f"{name} runs sample by sample"
    return ""


def crosses_devices(eq: Equation) -> bool:
    """True if a call reads or writes on several devices.

    A graph would keep the values that it read on the host, or the address of memory that is gone.
    """
    return len({torch.device(v.spec.device).type for v in (*eq.inputs(), *eq.results())}) > 1


def _waits(call: Call, eq: Equation) -> bool:
    """True if the host has to read values to launch a call."""
    if eq.answer is not None or torch.Tag.data_dependent_output in eq.op.tags:
        return True
    if eq.op.overloadpacket.__name__ in _MASKS:
        specs = [v.spec for v in eq.inputs()]
        return any(spec.dtype in (torch.bool, torch.uint8) for spec in specs[1:])
    return torch.Tag.dynamic_output_shape in eq.op.tags


def _kinds(arg: object) -> set[type]:
    if isinstance(arg, list | tuple) and type(arg) in (list, tuple):
        return {kind for a in arg for kind in _kinds(a)}
    return {type(arg)}
