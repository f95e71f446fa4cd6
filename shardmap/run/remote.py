"""A worker process: it loads the recorded program once, then computes task after task.

It does not depend on Ray.

A task is computed like any map on this machine's devices (`shardmap.run.local`): in chunks that
the worker plans for its own memory and halves when that runs out.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.planning.device import free_bytes
from shardmap.planning.refusal import refusal_of
from shardmap.planning.split import Split, split
from shardmap.program.ir import Program
from shardmap.rules import huge_pages as pages
from shardmap.run import graphed, local, prepare
from shardmap.run.base import ChunkRedone, Event, Job, listen, unheard
from shardmap.run.lowerings import Lowerings
from shardmap.run.messages import HOST, Constants, Done, Failure, Task
from shardmap.run.packing import Packed, pack, unpack
from shardmap.run.sites import sites, small
from shardmap.trace.recording import Recording


@dataclass(slots=True)
class _Bound:
    """A program bound to one call's tensors, on this worker's device."""

    call: str
    program: Program
    constants: Constants
    device: torch.device
    recording: Recording
    devices: dict[tuple[bool, ...], prepare.Devices] = field(default_factory=dict)
    """The prepared devices, by layout of the inputs."""
    memory: dict[int, torch.Tensor] = field(default_factory=dict)
    """Memory of stacked outputs, kept between tasks: filling fresh pages would cost more than
    computing."""

    def job(self, inputs: list[torch.Tensor], task: Task) -> tuple[Job, prepare.Devices]:
        """A task as a map of its own."""
        layout = tuple([t.is_contiguous() for t in inputs])
        constants = self.constants

        lowerings = Lowerings(self.recording, constants.options, layout, fixes=constants.fixes)
        job = Job(
            self.recording, inputs, task.size, self.device, constants.outputs, lowerings,
            constants.seed, False, False, False,
            constants.options.call, offset=task.start, partial=True, numbers=task.numbers,
            compile=constants.compile, cuda_graphs=constants.cuda_graphs,
        )  # fmt: skip
        on = self.devices.get(layout)
        if on is None:
            on = self.devices[layout] = prepare.Devices(
                job, lambda device: constants.budget.on(device, task.peers)
            )
        on.job = job
        return job, on

    def room(self, job: Job) -> dict[int, torch.Tensor]:
        """The memory for the stacked outputs of a job."""
        for k, out in enumerate(job.outputs):
            held = self.memory.get(k)
            if out.stacked and (held is None or held.shape[0] < job.samples):
                self.memory[k] = pages.whole((job.samples, *out.shape), out.dtype, HOST)
        return {k: t[: job.samples] for k, t in self.memory.items()}


class Worker:
    """Computes tasks of recorded programs in a process of its own.

    Every call brings the program and its constants by reference, and the worker keeps what it
    made of them, so that a replacement for a worker that died needs no messages of its own.
    """

    PROGRAMS = 32
    """Most programs that are kept."""

    def __init__(self, threads: int, device_type: str):
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore", engine.SlowLoopWarning)  # the driver has warned
        on_cuda = (
            device_type == "cuda" and torch.cuda.is_available()
        )  # Ray's GPUs may be logical: numbers without hardware
        self.device = torch.device("cuda", 0) if on_cuda else HOST
        self.programs: collections.OrderedDict[str, Program] = collections.OrderedDict()
        self.bound: _Bound | None = None

    def info(self) -> dict[str, Any]:
        """Facts about this process: its machine, device, free memory, threads and programs."""
        return {
            "pid": os.getpid(),
            "node": platform.node(),
            "torch": torch.__version__,
            "device": str(self.device),
            "name": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else platform.machine(),
            "free_bytes": free_bytes(self.device),
            "threads": torch.get_num_threads(),
            "programs": len(self.programs),
        }

    def forget(self) -> None:
        """Drop the last call's tensors."""
        self.bound = None

    def bind(
        self, call: str, digest: str, text: np.ndarray, constants: Constants
    ) -> Failure | None:
        """Prepare for a call's tasks, so that no task is lost if this fails.

        Returns:
            The failure, if there is one.
        """
        try:
            self._bind(call, digest, text, constants)
        except Exception as error:
            self.bound = None
            return Failure.of(error)
        return None

    def task(
        self, call: str, digest: str, text: np.ndarray, constants: Constants, task: Task
    ) -> Done | Failure:
        """Compute one task.

        Args:
            call: Identifies the mapped call.
            digest: Identifies the program.
            text: The program's text, as bytes.
            constants: Data that all tasks of the call share.
            task: The samples.

        Returns:
            Its outputs, or the receipt for rows written to the store; or the failure.
        """
        try:
            bound = self._bind(call, digest, text, constants)
            with torch.no_grad():
                return _compute(bound, task)
        except Exception as error:
            # the traceback's frames and the bound tensors are dropped, as they may fill the memory
            self.bound = None
            return Failure.of(error)

    def task_apart(
        self, call: str, digest: str, text: np.ndarray, constants: Constants, task: Task
    ) -> tuple[Done | Failure, tuple[Packed | None, ...]]:
        """Compute one task, and return its reduced outputs as a separate object.

        That object need not go to the driver.
        """
        done = self.task(call, digest, text, constants, task)
        if isinstance(done, Failure):
            return done, ()
        reduced = [o.reduction is not None for o in constants.outputs]
        rest = tuple([None if r else p for p, r in zip(done.outputs, reduced, strict=True)])
        apart = tuple([p if r else None for p, r in zip(done.outputs, reduced, strict=True)])
        return dataclasses.replace(done, outputs=rest), apart

    def combine(
        self, names: Sequence[str | None], *parts: Sequence[Packed | None]
    ) -> tuple[Packed | None, ...]:
        """Combine neighbouring tasks' reduced outputs in the order of the samples.

        Args:
            names: The reduction of each output, None for one that is not reduced.
            parts: The reduced outputs of each task.
        """
        return tuple(
            [
                None if name is None else _combined(name, [p[k] for p in parts])
                for k, name in enumerate(names)
            ]
        )

    def _bind(self, call: str, digest: str, text: np.ndarray, constants: Constants) -> _Bound:
        if self.bound is not None and self.bound.call == call:
            return self.bound
        self.bound = None
        if constants.store is not None:
            constants.store.check_here()
        if constants.cuda_graphs:
            graphed.refuse_devices([str(self.device)], constants.options.call)
        constants.settings.apply()
        program = self.programs.get(digest)
        if program is None:
            program = Program.loads(text.tobytes().decode())
            while len(self.programs) >= self.PROGRAMS:
                self.programs.popitem(last=False)
            self.programs[digest] = program
        self.programs.move_to_end(digest)
        captured = tuple([unpack(p, self.device) for p in constants.captured])
        literals = tuple(
            [unpack(p, self.device if follows else HOST) for p, follows in constants.literals]
        )
        # Tasks do not begin with the sample that was recorded, so that there is no output to
        # compare with: the driver has done it.
        recording = Recording(
            program,
            captured,
            literals,
            constants.scalars,
            frozenset(),
            False,
            constants.sources,
            (),
        )
        self.bound = _Bound(call, program, constants, self.device, recording)
        return self.bound


def _compute(bound: _Bound, task: Task) -> Done:
    began, constants = time.perf_counter(), bound.constants
    stop = task.start + task.size
    inputs = [
        constants.columns[i].rows_between(task.start, stop) if p is None else unpack(p, HOST)
        for i, p in enumerate(task.inputs)
    ]
    job, on = bound.job(inputs, task)
    _seed(constants, task.start)
    events: list[Event] = []
    with unheard(), listen(events.append):
        outs = _run(bound, job, on, task)
    redone = [
        dataclasses.replace(e, start=task.start + e.start, stop=task.start + e.stop)
        for e in events
        if isinstance(e, ChunkRedone)
    ]
    store, receipt = constants.store, None
    packed: tuple[Packed | None, ...] = (None,) * len(outs)
    if store is not None:
        receipt = store.write(task.start // store.header.unit, outs)
    else:
        wanted = [
            o.mapped or o.reduction is not None or o.dim is not None or task.unmapped
            for o in job.outputs
        ]
        packed = tuple([pack(t) if w else None for t, w in zip(outs, wanted, strict=True)])
    return Done(packed, receipt, time.perf_counter() - began, tuple(redone))


def _run(bound: _Bound, job: Job, on: prepare.Devices, task: Task) -> list[torch.Tensor]:
    """Compute a task: as one chunk if it is small, else by a plan."""
    budget = bound.constants.budget
    always = budget.bytes is not None
    if not (always or task.halvings or any(o.reduction for o in job.outputs)) and small(job):
        return local.run_whole(job, on)
    found = sites(
        job,
        on,
        [str(bound.device)],
        lambda device: budget.on(device, task.peers),
        job.samples > 1,
        always,
    )
    cut = split(job.samples, found, bound.constants.chunk_size, sharing=task.peers)
    cut = _halved(cut, task.halvings) if task.halvings else cut
    refusal = refusal_of(cut, task=True)
    if refusal is not None:
        raise errors.OverBudget(refusal)
    return local.run(job, cut, on, memory=bound.room(job))


def _halved(cut: Split, times: int) -> Split:
    """The same plan with smaller chunks: it was wrong about this worker's memory."""
    lanes = [
        dataclasses.replace(lane, chunk=max(1, lane.chunk >> times), trials=())
        for lane in cut.lanes
    ]
    return dataclasses.replace(cut, lanes=tuple(lanes))


def _combined(name: str, parts: Sequence[Packed | None]) -> Packed:
    total: torch.Tensor | None = None
    for part in parts:
        assert part is not None
        t = unpack(part, HOST)
        if total is None:
            total = t.clone()
        elif name in ("sum", "mean"):
            total += t
        else:
            total = torch.maximum(total, t) if name == "max" else torch.minimum(total, t)
    assert total is not None
    return pack(total)


def _seed(constants: Constants, start: int) -> None:
    """Seed torch's generator, for operators that draw from it.

    One draw for all samples must be one on all workers.
    """
    own = constants.seed[0]
    assert isinstance(own, int), "a map inside another map is not sent to workers"
    if constants.options.randomness != "error":
        torch.manual_seed(own + (start if constants.options.randomness == "different" else 0))
