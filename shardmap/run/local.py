"""Run chunks on the devices of this machine, in one process, with autograd kept."""

from __future__ import annotations

import bisect
import collections
import logging
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardmap import errors
from shardmap._torch import set_grad
from shardmap.lower.graphs import Chunk as Given
from shardmap.lower.saved_results import unsaved
from shardmap.planning import device as devices
from shardmap.planning.memory import format_bytes
from shardmap.planning.split import Chunk, Split
from shardmap.program.autocast import plain_numerics
from shardmap.run import graphed
from shardmap.run.base import ChunkDone, ChunkRedone, Job, RunFinished, RunStarted, emit, unheard
from shardmap.run.gather import Gather, placed
from shardmap.run.lanes import Flight, Lane, blame, fast, make_lane
from shardmap.run.prepare import Devices, Ready, there
from shardmap.run.storing import StoreGather
from shardmap.store import Store

logger = logging.getLogger("shardmap")

AHEAD_PER_LANE = 8
"""Most partial results that wait for those of a slower device: where chunks are reduced in order,
the other lanes pause then."""

LEAST_SHARE = 4
"""Smallest part of a full chunk that the last chunks have: they are smaller, so that lanes finish
together."""


def run(
    job: Job,
    split: Split,
    on: Devices,
    store: Store | None = None,
    memory: Mapping[int, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The outputs of all samples, stacked or reduced, on their devices; none if they go to a store.

    Args:
        job: The mapped call.
        split: The planned lanes and chunks.
        on: The devices of the call.
        store: Where results go instead of memory; only the units that are missing there are
            computed.
        memory: Memory for stacked outputs, by position; that of others is allocated.

    Raises:
        OutOfMemory: Not even one sample fits.
        DeviceLostError: A device failed and no other can take over.
    """
    started = time.perf_counter()
    emit(
        RunStarted(
            split.samples,
            sum(lane.chunks for lane in split.lanes) or 1,
            tuple(lane.name for lane in split.lanes),
        )
    )
    previous = torch.is_grad_enabled()
    executor = _Run(
        job, split, on, Gather(job, memory) if store is None else StoreGather(job, store), store
    )
    try:
        with plain_numerics():
            if not job.grad:
                set_grad(False)
            executor.run()
            result = executor.gather.finish()
    except BaseException as error:
        executor.abandon()  # the traceback keeps the frames and their tensors alive
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        set_grad(previous)
    emit(RunFinished(time.perf_counter() - started, executor.redone))
    return result


def run_whole(job: Job, on: Devices) -> list[torch.Tensor]:
    """The stacked outputs of a small map.

    It is one chunk on the device of the samples.
    """
    started = time.perf_counter()
    name = str(job.home)
    emit(RunStarted(job.samples, 1, (name,)))
    previous = torch.is_grad_enabled()
    try:
        with plain_numerics():
            if not job.grad:
                set_grad(False)
            ready = on.on(name, bool(job.samples > 1), slices=False)
            began = time.perf_counter()
            inputs = [there(t, job.home) for t in job.read(0, job.samples)]
            given = Given(
                job.samples,
                job.numbered(0, job.samples),
                job.home,
                job.seed,
                job.recording.scalars,
                ready.fixed,
                inputs,
            )
            outs = _one_chunk(job, ready, given)
            result = [
                placed(t.to(o.device), o, job.samples)
                for t, o in zip(unsaved(outs, ready.low.batched.saved), job.outputs, strict=True)
            ]
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        set_grad(previous)
    ended = time.perf_counter()
    emit(ChunkDone(name, 0, job.samples, ended - began, ended))
    emit(RunFinished(ended - started))
    return result


def _one_chunk(job: Job, ready: Ready, given: Given) -> Sequence[torch.Tensor]:
    """The outputs of a small map, compiled or captured if that was asked for."""
    found = fast(job, ready, given)
    failure = None
    if found is not None:
        try:
            return found.chunk(*given.arguments, list(given.inputs))
        except errors.ShardmapError:
            raise
        except Exception as error:
            failure = error
    outs = ready.low.replay.chunk(*given.arguments, list(given.inputs))
    if failure is not None:  # the data is not to blame
        blame(job, ready, failure)
    return outs


@dataclass(slots=True)
class _Fault:
    """The failure of a chunk, without the error: its traceback holds the chunk's tensors."""

    kind: str
    """"memory" or "device"."""
    reason: str


class _Run:
    """One call: a queue of samples, and lanes that take chunks from it when they are free."""

    def __init__(self, job: Job, split: Split, on: Devices, gather: Gather, store: Store | None):
        self.job = job
        self.on = on
        self.gather = gather
        self.lanes = [
            make_lane(i, plan, job, on, self.gather, alone=len(split.lanes) == 1)
            for i, plan in enumerate(split.lanes)
        ]
        self.next = 0
        """The first sample that has not been handed to a lane."""
        self.again: collections.deque[Chunk] = collections.deque()
        """Chunks that failed, in order; for a store, the units that are missing."""
        self.redone: collections.Counter[str] = collections.Counter()
        """Chunks that were handed out again, by cause."""
        self.failures: collections.Counter[int] = collections.Counter()
        """Number of devices that a chunk has failed on, by the chunk's first sample."""
        if store is not None:
            self.next = split.samples
            self.again.extend(Chunk(*store.header.rows(unit)) for unit in store.missing())
        self.empty = split.samples == 0 and store is None
        self.reduced = any(o.reduction is not None for o in job.outputs)

    def run(self) -> None:
        if (
            self.job.recording.written_inputs
        ):  # checks use the first samples: before the function writes to them
            for lane in self.lanes:
                for several in {False, self.job.samples > 1}:
                    self.on.on(lane.plan.device, several, lane.direct)
        while True:
            for lane in self.lanes:
                self._collect(lane, wait=False)
            flying = [lane for lane in self.lanes if lane.flights]
            if not self._left():
                if not flying:
                    return
                self._collect(flying[0], wait=True)
                continue
            lane = self._choose(bool(flying))
            if lane is None:
                self._collect(min(flying, key=lambda lane: lane.expects(0)), wait=True)
            else:
                self._submit(lane, self._take(lane))

    def _left(self) -> bool:
        return bool(self.again) or self.next < self.job.samples or self.empty

    def _choose(self, flying: bool) -> Lane | None:
        """The lane that would be done first with the next chunk; None if it is better to wait."""
        if len(self.lanes) == 1:
            lane = self.lanes[0]
            return None if lane.full else lane
        if flying and self.reduced and self.gather.waiting > AHEAD_PER_LANE * len(self.lanes):
            return None
        alive = [lane for lane in self.lanes if lane.alive]
        size = min(max(1, self.job.samples - self.next), *[lane.limit for lane in alive])
        lane = min(alive, key=lambda lane: (lane.expects(size), lane.number))
        return None if lane.full else lane

    def _take(self, lane: Lane) -> Chunk:
        """The next chunk for a lane; chunks that failed before come first."""
        self.empty = False
        if self.again:
            chunk = self.again.popleft()
            size = lane.chunk_size(chunk.size) if chunk.size > 1 else 1
            if chunk.size > size:
                self.again.appendleft(Chunk(chunk.start + size, chunk.stop))
                self.failures[chunk.start + size] = self.failures[chunk.start]
                chunk = Chunk(chunk.start, chunk.start + size)
            return chunk
        left = self.job.samples - self.next
        most = size = lane.chunk_size(left) if left else 0
        if (
            len(self.lanes) > 1 and not self.reduced
        ):  # a share of the rest, so that lanes finish together
            size = min(size, max(most // LEAST_SHARE, -(-left // len(self.lanes)), 1))
        stop = self.next + size
        bounds = self.job.bounds
        last = bounds[bisect.bisect_right(bounds, stop) - 1] if bounds else 0
        chunk = Chunk(self.next, last if self.next < last < stop else stop)
        self.next = chunk.stop
        return chunk

    def _submit(self, lane: Lane, chunk: Chunk) -> None:
        written = self._backup(chunk)
        try:
            with unheard():  # maps inside a user-defined operator report no events here
                lane.submit(chunk)
            return
        except Exception as error:
            fault = _classify(error)
            if fault is None:
                raise
        # Outside the except block, as the error's traceback held the frames of the chunk, and they
        # its memory.
        self._restore(chunk, written, fault)
        self._failed(lane, [chunk], fault)

    def _collect(self, lane: Lane, wait: bool) -> None:
        if not lane.flights:
            return
        try:
            flights = lane.collect(wait)
        except Exception as error:
            fault = _classify(error)
            if fault is None:
                raise
        else:
            for flight in flights:
                self._finished(lane, flight)
            return
        self._failed(lane, lane.drop(), fault)

    def _finished(self, lane: Lane, flight: Flight) -> None:
        chunk = flight.chunk
        self.gather.add(chunk.start, chunk.stop, flight.outs)
        seconds = flight.ended - flight.began
        if chunk.size:
            lane.learned.note(chunk.size, flight.seconds, chunk.size in lane.plan.trials)
        emit(ChunkDone(lane.name, chunk.start, chunk.stop, seconds, flight.ended))

    # -- faults

    def _failed(self, lane: Lane, chunks: list[Chunk], fault: _Fault) -> None:
        if fault.kind == "memory":
            self._halve(lane, chunks, fault)
        else:
            self._move(lane, chunks, fault)
        self.again.extendleft(reversed(chunks))
        self.redone["memory ran out" if fault.kind == "memory" else "device failed"] += len(chunks)
        for chunk in chunks:
            emit(ChunkRedone(lane.name, chunk.start, chunk.stop, fault.reason))

    def _halve(self, lane: Lane, chunks: list[Chunk], fault: _Fault) -> None:
        """Free memory, and compute smaller chunks from now on."""
        while lane.flights:
            self._collect(lane, wait=True)
        if devices.accelerated(lane.device):
            graphed.release(lane.device)
            torch.accelerator.empty_cache()
        size = max(chunk.size for chunk in chunks)
        lane.scratch.clear()
        if size <= 1:
            one = format_bytes(lane.plan.memory.chunk_bytes(1))
            stays = format_bytes(lane.plan.memory.resident_bytes)
            raise errors.OutOfMemory(
                f"{self.job.call}: memory ran out on {lane.device} with a chunk of one sample "
                f"(sample {chunks[0].start}; predicted {one} "
                f"for it, {stays} for what stays): {fault.reason}; use a device with more memory, "
                "keep less of the result with reduce=, or "
                "free what else is on the device"
            )
        lane.limit = size // 2
        lane.learned.ceiling = lane.limit
        logger.warning(
            "%s: memory ran out on %s with %d samples at a time; going on with %d: %s",
            self.job.call, lane.name, size, lane.limit, fault.reason,
        )  # fmt: skip

    def _move(self, lane: Lane, chunks: list[Chunk], fault: _Fault) -> None:
        """Go on without the device, if another can take over."""
        chunks += [
            c
            for other in self.lanes
            if other is not lane and other.device == lane.device
            for c in other.drop()
        ]
        chunks.sort()
        for other in self.lanes:
            if other.device == lane.device:
                other.alive = False
        where = f"samples {chunks[0].start} to {chunks[-1].stop - 1}" if chunks else "no samples"
        for chunk in chunks:
            self.failures[chunk.start] += 1
        lost = any(o.device == lane.device for o in self.job.outputs) and lane.device.type != "cpu"
        if (
            lost
            or self.job.grad
            or not any(other.alive for other in self.lanes)
            or any(self.failures[c.start] > 1 for c in chunks)
        ):
            why = (
                "the results are there" if lost
                else "gradients recorded from outside lead through it" if self.job.grad
                else "another device failed on the same samples: the error may be in the data "
                "(an index out of bounds?)"
                if any(other.alive for other in self.lanes)
                else "no other device is left"
            )  # fmt: skip
            raise errors.DeviceLostError(
                f"{self.job.call}: {lane.device} failed with {where}, and {why}: {fault.reason}"
            )
        warnings.warn(
            f"{self.job.call}: {lane.device} failed with {where}, and the other devices compute "
            f"them: {fault.reason}",
            errors.DeviceLostWarning,
            stacklevel=2,
        )

    def _backup(self, chunk: Chunk) -> list[tuple[int, torch.Tensor]]:
        """Copies of the rows that the function writes in place.

        A chunk that is computed twice must write once.
        """
        if not self.job.recording.written_inputs or self.job.grad or self.job.transformed:
            return []
        parts = [
            (i, self.job.inputs[i][chunk.start : chunk.stop])
            for i in self.job.recording.written_inputs
        ]
        return [
            (i, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t))
            for i, t in parts
        ]

    def _restore(
        self, chunk: Chunk, written: list[tuple[int, torch.Tensor]], fault: _Fault
    ) -> None:
        if self.job.recording.written_inputs and not written:
            raise errors.OutOfMemory(
                f"{self.job.call}: a chunk failed ({fault.reason}) after it may have "
                "written in place "
                "to an argument that requires grad, "
                "so it cannot be computed again; pass a smaller chunk_size"
            )
        for i, t in written:
            self.job.inputs[i][chunk.start : chunk.stop].copy_(t)

    def abandon(self) -> None:
        """Drop everything: after an error or Ctrl-C nothing of the call may stay in memory."""
        for lane in self.lanes:
            lane.release()
        self.on.forget()
        self.gather.forget()
        used = {lane.device for lane in self.lanes if devices.accelerated(lane.device)}
        if used:
            torch.accelerator.empty_cache()


_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Unable to allocate")


def _classify(error: Exception) -> _Fault | None:
    """Sort an error into a fault of memory or device; None if it is the function's own."""
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, errors.ShardmapError):
        return None
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return _Fault("memory", reason)
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY):
        return _Fault("memory", reason)
    return _Fault("device", reason) if isinstance(error, torch.AcceleratorError) else None
