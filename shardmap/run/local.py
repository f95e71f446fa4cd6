"""Run chunks on the devices of this machine, in one process, with autograd kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardmap import engine
from shardmap.engine import Lowered
from shardmap.internals import functorch
from shardmap.planning.split import Plan
from shardmap.record import outer_recordings_suspended, recording_settings, transforms_set_aside
from shardmap.recording import Recording, element
from shardmap.run.base import ChunkDone, RunFinished, RunStarted, emit
from shardmap.verify import Trial, check


@dataclass(frozen=True, slots=True)
class Job:
    """One mapped call, ready to run on any executor."""

    recording: Recording
    inputs: list[torch.Tensor]
    """The mapped tensors, mapped dimension first."""
    home: torch.device
    """Where the outputs go."""
    lower: Callable[[str], Lowered]
    """The lowering for a kind of device."""
    seed: int
    grad: bool
    """Whether outer autograd records."""


def run(job: Job, plan: Plan) -> list[torch.Tensor]:
    """The stacked outputs of all chunks, `[N, *shape]` each, on the job's home device."""
    started = time.perf_counter()
    emit(RunStarted(plan.samples, len(plan.chunks), plan.devices))
    gather = Gather(job, plan)
    previous = torch.is_grad_enabled()
    try:
        with engine.plain_numerics():
            if not job.grad:
                torch._C._set_grad_enabled(False)
            ready: dict[str, tuple[Lowered, tuple[torch.Tensor, ...]]] = {}
            for chunk in plan.chunks:
                began = time.perf_counter()
                device = torch.device(chunk.device)
                if chunk.device not in ready:
                    ready[chunk.device] = _prepare(job, device, plan)
                low, fixed = ready[chunk.device]
                inputs = [_rows(t, chunk.start, chunk.stop, plan.samples, device) for t in job.inputs]
                outs = low.replay.chunk(chunk.stop - chunk.start, chunk.start, device, job.seed, job.recording.scalars, fixed, inputs)
                del inputs
                gather.add(chunk.start, chunk.stop, outs, low)
                del outs
                emit(ChunkDone(chunk.device, chunk.start, chunk.stop, time.perf_counter() - began))
            result = gather.finish()
    finally:
        torch._C._set_grad_enabled(previous)
    emit(RunFinished(time.perf_counter() - started))
    return result


def _rows(tensor: torch.Tensor, start: int, stop: int, samples: int, device: torch.device) -> torch.Tensor:
    rows = tensor if stop - start == samples else tensor.narrow(0, start, stop - start)
    return rows if rows.device == device else to_device(rows, device)


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `t` on `device` with its strides behind the first dimension: recorded views depend on them."""
    repeated = [d for d in range(1, t.dim()) if t.stride(d) == 0 and t.shape[d] > 1]
    compact = t
    for d in repeated:
        compact = compact.narrow(d, 0, 1)
    moved = compact.to(device)
    if moved.stride()[1:] != compact.stride()[1:]:
        rows = min((s for s in compact.stride()[1:] if s), default=1)
        if rows >= t.shape[0] and t.stride(0) == 1:
            # The samples lie side by side (in_dims other than 0): rows keep their strides in a tensor as large as this one.
            whole = [1, *compact.stride()[1:]]
        else:
            whole = [1 + sum((n - 1) * s for n, s in zip(compact.shape[1:], compact.stride()[1:], strict=True)), *compact.stride()[1:]]
        moved = torch.empty_strided(compact.shape, whole, dtype=t.dtype, device=device).copy_(compact)
    return moved.expand(t.shape) if repeated else moved


def _prepare(job: Job, device: torch.device, plan: Plan) -> tuple[Lowered, tuple[torch.Tensor, ...]]:
    """The lowering for `device`, checked, and what no sample changes, computed there once."""
    low = job.lower(device.type)
    captured = [_captured_to(t, device) for t in job.recording.captured]
    literals = [t.to(device) if t.device == job.home else t for t in job.recording.literals]
    for several in {c.stop - c.start > 1 for c in plan.chunks if c.device == str(device) and c.stop > c.start}:
        if several not in low.checked:
            _check(job, low, device, 2 if several else 1, captured, literals)
    fixed = low.replay.fixed(device, job.seed, job.recording.scalars, captured, literals)
    return low, fixed


def _captured_to(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    return t if t.device == device or t.device.type == "meta" else t.to(device)


def _check(job: Job, low: Lowered, device: torch.device, size: int, captured: list[torch.Tensor], literals: list[torch.Tensor]) -> None:
    """Check the lowering on the first rows, without leaving a trace of it."""
    state = torch.default_generator.get_state()
    with torch.no_grad(), recording_settings(device.type), outer_recordings_suspended(), transforms_set_aside():
        rows = [element(t).detach().narrow(0, 0, size) for t in job.inputs]
        trial = Trial(
            device,
            job.seed,
            size,
            [r if r.device == device else to_device(r, device) for r in rows],
            [element(t).detach() for t in captured],
            [element(t) for t in literals],
        )
        try:
            check(low, job.recording, trial)
        finally:
            torch.default_generator.set_state(state)


class Gather:
    """Puts chunks together in the order of the batch.

    Without outer autograd each chunk is written into its slice of one preallocated output: concatenating at the end would
    double the memory. With it, chunks are concatenated so that gradients flow.
    """

    def __init__(self, job: Job, plan: Plan):
        self.job = job
        self.plan = plan
        self.concatenate = job.grad or functorch.peek_interpreter_stack() is not None
        """Outer transforms cannot write a chunk of theirs into a plain tensor."""
        self.whole: list[torch.Tensor | None] = []
        self.parts: list[list[torch.Tensor]] = []
        self.single: list[torch.Tensor | None] = []

    def add(self, start: int, stop: int, outs: tuple[torch.Tensor, ...], low: Lowered) -> None:
        """Take the outputs of the samples `start` to `stop`."""
        size, home = self.plan.samples, self.job.home
        if not self.parts:
            self.parts = [[] for _ in outs]
            self.whole = [None] * len(outs)
            self.single = [None] * len(outs)
        for k, (t, v) in enumerate(zip(outs, low.batched.outputs, strict=True)):
            if not v.mapped:
                if self.single[k] is None:
                    self.single[k] = t.to(home)
            elif stop - start == size:
                self.whole[k] = t.to(home)
            elif self.concatenate:
                self.parts[k].append(t.to(home))
            else:
                whole = self.whole[k]
                if whole is None:
                    whole = self.whole[k] = torch.empty((size, *t.shape[1:]), dtype=t.dtype, device=home)
                whole[start:stop].copy_(t)

    def finish(self) -> list[torch.Tensor]:
        """The outputs: stacked, or as they are where no sample changes them."""
        out: list[torch.Tensor] = []
        for single, whole, parts in zip(self.single, self.whole, self.parts, strict=True):
            if single is not None:
                out.append(single)
            elif whole is not None:
                out.append(whole)
            else:
                out.append(torch.cat(parts))
        return out
