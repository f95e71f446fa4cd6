"""Lanes, one per entry of `devices`.

A lane takes a chunk's samples, computes it, and hands its results over.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmap import errors
from shardmap.lower.codegen import Executable
from shardmap.lower.graphs import Chunk as Given
from shardmap.lower.saved_results import unsaved
from shardmap.planning import device as devices
from shardmap.planning.memory import MARGIN_BYTES
from shardmap.planning.speeds import Learned, even, next_size
from shardmap.planning.split import Chunk
from shardmap.planning.split import Lane as LanePlan
from shardmap.program.own_backward import DATA
from shardmap.rules import huge_pages as pages
from shardmap.run import compiled, graphed
from shardmap.run.affordable import direct
from shardmap.run.base import Job
from shardmap.run.gather import Gather
from shardmap.run.meter import CHUNKS, Meter
from shardmap.run.prepare import Devices, Ready, learned, there, to_device
from shardmap.run.rewritten import Recomputation, refusing_changes

Fast = compiled.CompiledReplay | graphed.Graph


@dataclass(slots=True)
class Flight:
    """A chunk that is being computed."""

    chunk: Chunk
    began: float
    """Time of its submission, on the clock of `time.perf_counter`."""
    outs: list[torch.Tensor | None]
    done: Any = None
    """An event on the device; None if the host has waited already."""
    ended: float = 0.0
    seconds: float = 0.0
    """Seconds that it took, without what it waited for the chunk before. On CPU those of this
    thread's clock, which stands still while other programs have the core: the thread takes part in
    each kernel."""
    keep: list[object] = field(default_factory=list)
    """Objects that must live until the chunk is complete."""


class Lane:
    """Computes chunks on a device that the host waits for.

    It serves the CPU, and accelerators for which no streams are used here.
    """

    window = 1
    """Most chunks in flight."""

    def __init__(
        self, number: int, plan: LanePlan, job: Job, on: Devices, gather: Gather, alone: bool
    ):
        self.number = number
        self.plan = plan
        self.name = plan.name
        self.device = torch.device(plan.device)
        self.job = job
        self.on = on
        self.gather = gather
        self.asynchronous = devices.accelerated(self.device)
        self.limit = plan.most
        """Most samples in a chunk; less after memory ran out."""
        self.size = plan.chunk
        """Samples in a chunk as chosen by speed; see `chunk_size`."""
        self.begun = False
        """True once a chunk has been taken: the first is of the planned size."""
        self.alive = True
        self.busy = 0.0
        """Seconds spent in chunks so far."""
        self.flights: collections.deque[Flight] = collections.deque()
        self.direct = direct(job, self.device) and _worth_slices(job, plan)
        self.scratch: dict[int, torch.Tensor] = {}
        self.ready: dict[bool, Ready] = {}
        self._learned: Learned | None = None
        self.failure: Exception | None = None
        """Error of the compiled or captured program in this chunk."""
        self.aside = 0.0
        """Seconds spent compiling and capturing, which are no part of a chunk's."""
        self.faster = bool(job.compile or job.cuda_graphs)
        """True if chunks of the planned size are compiled or captured."""
        self.recomputation = Recomputation(job.call)
        if self.device.type == "cpu":
            pages.keep_freed_memory()
        self.meter = self._meter(alone)

    @property
    def learned(self) -> Learned:
        """Measurements of this program's chunks on this device."""
        if self._learned is None:
            self._learned = learned(self.job, self.plan.device)
        return self._learned

    def _meter(self, alone: bool) -> Meter:
        """The meter of the first chunks' peaks.

        Beside other lanes, which take memory meanwhile, only the first chunk is measured.
        """
        job = self.job
        resident = (
            sum(o.sample_bytes for o in job.outputs if o.stacked)
            if self.direct and self.device.type == "cpu"
            else 0
        )
        kept = job.grad and not job.remat  # what outer autograd keeps grows from chunk to chunk
        return Meter(
            self.learned, self.plan, self.device, resident, 0 if kept else CHUNKS if alone else 1
        )

    @property
    def full(self) -> bool:
        """True if it can take no further chunk now."""
        return len(self.flights) >= self.window

    def expects(self, size: int) -> float:
        """Time at which a chunk of `size` samples would be done, in seconds of this lane's work."""
        waiting = sum(f.chunk.size for f in self.flights)
        return self.busy + (waiting + size) * (self.learned.sample_seconds or 0.0)

    def chunk_size(self, left: int) -> int:
        """Samples of the next chunk: the planned size, or the one that is measured or found best.

        Args:
            left: Samples that are left.
        """
        tried = () if self.faster else self.plan.trials  # compiled for one size
        trials = [size for size in tried if size <= self.limit]
        if trials:
            if self.begun:
                speeds, start = self.learned.measured(), self.plan.chunk
                self.size = next_size(speeds, trials, start, left, begins=False)
            self.begun = True
        size = min(self.size, self.limit)
        # The last two are of even size: a chunk of one sample would need a lowering of its own.
        return even(left, size) if trials and size < left < 2 * size else min(size, left)

    def submit(self, chunk: Chunk) -> None:
        """Compute a chunk and add it to `flights`."""
        ready = self._prepared(chunk)
        began, clock, self.aside = time.perf_counter(), time.thread_time(), 0.0
        if self.meter.watches(chunk) and not self.faster:  # compiling takes memory of its own
            self.meter.start()
            outs = self.compute(ready, chunk)
            self.meter.finish(chunk)
        else:
            outs = self.compute(ready, chunk)
            self.meter.samples += chunk.size
        if self.asynchronous:
            torch.accelerator.synchronize(self.device)
        ended = time.perf_counter()
        busy = time.thread_time() - clock if self.device.type == "cpu" else ended - began
        # A function that waits (for a file, for other threads) is timed by the wall.
        seconds = busy if 2 * busy > ended - began else ended - began
        flight = Flight(chunk, began + self.aside, outs, ended=ended, seconds=seconds - self.aside)
        self.flights.append(flight)

    def _prepared(self, chunk: Chunk) -> Ready:
        """The program on this device, checked for chunks of one sample, or of several."""
        several = chunk.size > 1
        ready = self.ready.get(several)
        if ready is None:
            ready = self.ready[several] = self.on.on(self.plan.device, several, self.direct)
        return ready

    def compute(self, ready: Ready, chunk: Chunk) -> list[torch.Tensor | None]:
        """A chunk's outputs, reduced ones combined; None for one already written in place."""
        job = self.job
        inputs = self.samples(chunk)
        numbers, scalars = job.numbered(chunk.start, chunk.stop), job.recording.scalars
        given = Given(
            chunk.size, numbers, self.device, job.seed, scalars, ready.fixed, inputs
        )  # fmt: skip
        arguments = given.arguments
        if self.faster:
            outs = self._compiled(ready, chunk, given)
            if outs is not None:
                return outs
        if self.direct:
            found = self._compute_into(ready.low.replay, chunk, arguments, inputs)
            return self._blamed(ready, found)
        replay = ready.low.replay.chunk
        if job.remat:
            refuse_changes = refusing_changes(job.call, ready.captured)

            def compute(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
                refuse_changes()
                return replay(*arguments, list(inputs))

            # Writes that autograd does not see change saved values: no early end.
            hidden = any(eq.op is DATA for eq in job.recording.program.equations)
            outs = self.recomputation.chunk(compute, inputs, early=not hidden)
        else:
            outs = replay(*arguments, inputs)
            if chunk.size == job.samples:  # of several chunks, results are copied together
                saved = zip(ready.low.batched.saved, job.outputs, strict=False)
                outs = unsaved(outs, [s and o.stacked for s, o in saved])
        return self._blamed(ready, list(self.gather.combined(outs, chunk.size)))

    def _compiled(
        self, ready: Ready, chunk: Chunk, given: Given
    ) -> list[torch.Tensor | None] | None:
        """A chunk's outputs, compiled or captured; None if it is to be computed as it is."""
        if chunk.size not in (min(self.size, self.limit), self.job.samples):
            return None
        began = time.perf_counter()
        each = self.learned.sample_seconds
        left = self.job.samples - chunk.start
        seconds = self.plan.seconds if each is None else each * left
        found = fast(self.job, ready, given, seconds)
        self.aside += time.perf_counter() - began
        if found is None:
            return None
        try:
            if self.direct:
                return self._compute_into(found, chunk, given.arguments, list(given.inputs))
            outs = found.chunk(*given.arguments, list(given.inputs))
            return list(self.gather.combined(outs, chunk.size))
        except errors.ShardmapError:
            raise
        except Exception as error:  # nothing has been written but slices, which are written anew
            self.failure = error
            return None

    def _blamed(self, ready: Ready, outs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """`outs`; where the compiled program raised and this one did not, the fault is its own."""
        if self.failure is not None:
            blame(self.job, ready, self.failure)
            self.failure = None
        return outs

    def samples(self, chunk: Chunk) -> list[torch.Tensor]:
        """The chunk's samples, on the device."""
        return [there(t, self.device) for t in self.job.read(chunk.start, chunk.stop)]

    def _compute_into(
        self,
        replay: Fast | Executable,
        chunk: Chunk,
        arguments: tuple[object, ...],
        inputs: list[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """Compute into slices of the result, and into scratch memory for outputs to be reduced."""
        slices = []
        for k, out in enumerate(self.job.outputs):
            if not out.sliced:
                continue
            if out.reduction is None:
                slices.append(self.gather.slot(k, chunk.start, chunk.stop))
                continue
            scratch = self.scratch.get(k)
            if scratch is None or scratch.shape[0] < chunk.size:
                scratch = None  # the smaller one is dropped first
                self.scratch.pop(k, None)
                scratch = self.scratch[k] = pages.whole(
                    (chunk.size, *out.shape), out.dtype, self.device
                )
            slices.append(scratch[: chunk.size])
        outs = self.gather.combined(replay.chunk_into(*arguments, inputs, slices), chunk.size)
        return [None if o.stacked else t for t, o in zip(outs, self.job.outputs, strict=True)]

    def collect(self, wait: bool) -> list[Flight]:
        """The chunks that are complete."""
        done, self.flights = list(self.flights), collections.deque()
        for flight in done:
            self.busy += flight.ended - flight.began
        return done

    def drop(self) -> list[Chunk]:
        """Drop the chunks in flight, and return them."""
        chunks = [f.chunk for f in self.flights]
        self.flights.clear()
        return chunks

    def release(self) -> None:
        """Drop everything that occupies memory on the device."""
        self.flights.clear()
        self.scratch.clear()
        self.ready.clear()


def fast(job: Job, ready: Ready, given: Given, seconds: float | None = None) -> Fast | None:
    """What computes a chunk of the planned size, compiled or captured; None to run it as it is."""
    found = compiled.chosen(job, ready, given, seconds) if job.compile else None
    if not job.cuda_graphs:
        return found
    return graphed.chosen(job, ready, given, found or ready.low.replay) or found


def blame(job: Job, ready: Ready, failure: Exception) -> None:
    """Run chunks as they are from now on: a compiled or captured one raised an error."""
    if job.compile:
        compiled.failed(job, ready, failure)
    if job.cuda_graphs:
        graphed.failed(job, ready, failure)


def _worth_slices(job: Job, plan: LanePlan) -> bool:
    """True if chunks should write into slices of the result.

    Not if one chunk is the whole result and its copy is smaller than the margin.

    Results that no kernel can write into a slice cost a copy: for a batch of a small transformer
    a twentieth of its time.
    """
    if (
        plan.chunk < job.samples
        or job.unit is not None
        or any(o.reduction is not None for o in job.outputs)
    ):
        return True
    return job.samples * sum(o.sample_bytes for o in job.outputs if o.stacked) >= MARGIN_BYTES


def make_lane(
    number: int, plan: LanePlan, job: Job, on: Devices, gather: Gather, alone: bool = True
) -> Lane:
    """The lane for one entry of `devices`."""
    cuda = plan.device.startswith("cuda") and devices.accelerated(torch.device(plan.device))
    return (CudaLane if cuda else Lane)(number, plan, job, on, gather, alone)


class CudaLane(Lane):
    """Computes chunks on a GPU.

    Launches run ahead of it; samples and results are copied from and to the host on streams of
    their own while others compute.
    """

    window = 2

    def __init__(
        self, number: int, plan: LanePlan, job: Job, on: Devices, gather: Gather, alone: bool
    ):
        super().__init__(number, plan, job, on, gather, alone)
        self.up, self.down = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self.free_since = 0.0
        self.keep: list[object] = []
        """Objects that the chunk being launched needs until it is complete."""

    def submit(self, chunk: Chunk) -> None:
        """Launch a chunk; it is in flight until its event on the device has occurred."""
        with torch.cuda.device(self.device):
            ready = self._prepared(chunk)
            began, self.aside = time.perf_counter(), 0.0
            measured = self.meter.watches(chunk) and not self.flights and not self.faster
            if measured:
                self.meter.start()
            else:
                self.meter.samples += chunk.size
            self.keep = []
            outs = self._home(self.compute(ready, chunk))
            done = torch.cuda.Event()
            done.record(self.down)
            if measured:
                done.synchronize()
                self.meter.finish(chunk)
            self.flights.append(Flight(chunk, began + self.aside, outs, done, keep=self.keep))

    def samples(self, chunk: Chunk) -> list[torch.Tensor]:
        """The chunk's samples, on the device.

        Samples on the host are copied through pinned memory while other chunks compute.
        """
        moved_there = []
        for part in self.job.read(chunk.start, chunk.stop):
            if self.job.grad or part.device.type != "cpu":
                moved_there.append(there(part, self.device))
                continue
            pinned = _pinned(part)
            with torch.cuda.stream(self.up):
                moved = to_device(pinned, self.device, non_blocking=True)
            self.keep.append(pinned)
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self.up)
            moved.record_stream(stream)
            moved_there.append(moved)
        return moved_there

    def _home(self, outs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Send the outputs to the device of the result.

        Copies to the host go through pinned memory, without waiting.
        """
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        sent: list[torch.Tensor | None] = []
        for t, out in zip(outs, self.job.outputs, strict=True):
            if t is None or self.job.grad or out.device.type != "cpu" or t.device.type == "cpu":
                sent.append(t)
                continue
            with torch.cuda.stream(self.down):
                pinned = _page_locked(t)
                pinned.copy_(t, non_blocking=True)
            t.record_stream(self.down)
            sent.append(pinned)
        return sent

    def collect(self, wait: bool) -> list[Flight]:
        """The chunks that are complete; with `wait`, at least the oldest."""
        done: list[Flight] = []
        while self.flights:
            flight = self.flights[0]
            try:
                if wait:
                    flight.done.synchronize()
                elif not flight.done.query():
                    break
            except RuntimeError:
                if done:
                    # what was complete before the device failed is kept; the next call meets the
                    # error again
                    break
                raise
            wait = False
            flight.ended = time.perf_counter()
            flight.seconds = flight.ended - max(flight.began, self.free_since)
            self.busy += flight.seconds
            self.free_since = flight.ended
            done.append(self.flights.popleft())
        return done


def _pinned(t: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory where `t` is dense.

    Other layouts are copied at the speed of pageable memory.
    """
    return _page_locked(t).copy_(t) if t.is_contiguous() else t


def _page_locked(t: torch.Tensor) -> torch.Tensor:
    """Dense page-locked memory of the shape and dtype of `t`."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
