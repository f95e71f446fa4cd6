"""Replay of samples with unequal shapes, shape by shape.

Samples of one shape have a recording, a lowering and inputs of their own. What executors take for
one program stands for all of these: its samples are numbers of rows, and each chunk's rows are
computed shape by shape and put back to where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap.call import standin
from shardmap.call.execute import (
    Call,
)
from shardmap.call.forked import Instead
from shardmap.call.options import Options
from shardmap.call.routes import rows_of
from shardmap.call.standin import StandIn, in_order
from shardmap.lower.cache import Lowered
from shardmap.program.ir import Spec
from shardmap.rules.philox import Seeds
from shardmap.run import prepare
from shardmap.run.base import Job
from shardmap.run.prepare import there
from shardmap.run.rewritten import refusing_changes
from shardmap.store.ragged import PickedColumn


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one shape."""

    rows: list[int]
    """Their numbers among all, ascending."""
    call: Call
    """The map over them."""
    instead: Instead | None
    """Replacement of the replay, if samples of this shape take several paths."""
    job: Job

    @property
    def shapes(self) -> str:
        """Those of a sample's mapped arguments, in words."""
        shapes = [list(v.spec.shape) for v in self.job.recording.program.inputs]
        return " and ".join(map(str, shapes))


class ShapeReplay(StandIn):
    """Computes a chunk's rows shape by shape, in the form of a replay (`codegen.Replay`).

    Args:
        groups: The samples of each shape.
        specs: The outputs' metadata.
        budget: What the map may add on a device.
    """

    source = "a program for each shape"

    def __init__(self, groups: Sequence[Group], specs: Sequence[Spec], options: Options):
        self.specs = specs
        self.jobs = [group.job for group in groups]
        self.grad = torch.is_grad_enabled()
        self.remat, self.call = options.remat, options.call
        self._guards: dict[torch.device, Callable[[], None]] = {}
        self._on = [prepare.Devices(job, options.budget.on) for job in self.jobs]
        size = sum(len(group.rows) for group in groups)
        self.of_row = torch.empty(size, dtype=torch.int64)
        """The number of each row's shape: `[N]`."""
        self.place = torch.empty(size, dtype=torch.int64)
        """Its number among the samples of that shape: `[N]`."""
        for number, group in enumerate(groups):
            rows = torch.tensor(group.rows)
            self.of_row[rows] = number
            self.place[rows] = torch.arange(len(rows))
        self.largest = torch.tensor(groups[0].rows[:3])
        """Rows that show what a chunk costs at most."""

    def fixed(self, device: torch.device, seed: Seeds, *_: object) -> tuple[()]:
        """Compute what samples of each shape share, if chunks are computed again in backward."""
        if self.remat:
            ready = [self._ready(number, device) for number in range(len(self.jobs))]
            captured = [t for one in ready for t in one.captured]
            self._guards[device] = refusing_changes(self.call, captured)
        return ()

    def _refuse_changes(self, device: torch.device) -> None:
        guard = self._guards.get(device)
        if guard is not None:
            guard()

    def chunk(
        self,
        size: int,
        start: int,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one chunk, `[size, *shape]` each; `inputs` is the numbers of its rows."""
        self._refuse_changes(device)
        order, parts = [], []
        for at, found in self._groups(device, inputs[0]):
            order.append(at)
            parts.append(found)
        if len(parts) == 1:
            return parts[0]
        return in_order(order, parts)

    def chunk_into(
        self,
        size: int,
        start: int,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
        slices: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Compute one chunk as `chunk` does, and write its outputs into the given slices."""
        for at, found in self._groups(device, inputs[0]):
            for t, where in zip(found, slices, strict=True):
                where.index_copy_(0, at.to(where.device), t.to(where.device))
        return tuple(slices)

    def marked(self, slices: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        """`chunk`, or `chunk_into`, of samples of the largest shape, told call by call."""
        plain = super().marked(slices)

        def watched(*arguments: Any) -> tuple[torch.Tensor, ...]:
            size, _, device = arguments[:3]
            job = self.jobs[0]
            ready = self._on[0].on(str(device), job.samples > 1, slices=False)
            if isinstance(ready.low.replay, StandIn):
                given = list(arguments)
                given[standin.INPUTS] = [self.largest[torch.arange(size) % len(self.largest)]]
                return plain(*given)
            numbers = torch.arange(size) % job.samples
            inputs = [there(t, device) for t in picked(job, numbers)]
            outs = ready.low.replay.marked(slices=False)(
                size, 0, device, job.seed, job.recording.scalars, ready.fixed, inputs, arguments[-1]
            )
            found = self._as_results(ready.low, outs, size)
            if not slices:
                return found
            for t, where in zip(found, arguments[standin.INPUTS + 1], strict=True):
                where.copy_(t)
            return tuple(arguments[standin.INPUTS + 1])

        return watched

    def _groups(
        self, device: torch.device, rows: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The samples of each shape in a chunk, by their places in it, and their outputs."""
        rows = rows.cpu()
        of_row = self.of_row[rows]
        for number in of_row.unique().tolist():
            at = (of_row == number).nonzero().flatten()
            places = self.place[rows[at]]
            first, count = int(places[0]), len(places)
            if torch.equal(places, torch.arange(first, first + count)):
                yield at, self._rows(number, device, first, first + count)
                continue
            singly = [self._rows(number, device, p, p + 1) for p in places.tolist()]
            yield at, tuple([torch.cat(column) for column in zip(*singly, strict=True)])

    def _rows(
        self, number: int, device: torch.device, start: int, stop: int
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of consecutive samples of one shape."""
        job, size = self.jobs[number], stop - start
        with torch.set_grad_enabled(job.grad and self.grad):
            ready = self._ready(number, device)
            inputs = [there(t, device) for t in job.read(start, stop)]
            outs = ready.low.replay.chunk(
                size, start, device, job.seed, job.recording.scalars, ready.fixed, inputs
            )
        return self._as_results(ready.low, outs, size)

    def _ready(self, number: int, device: torch.device) -> prepare.Ready:
        """The program of one shape on a device."""
        job = self.jobs[number]
        with torch.set_grad_enabled(job.grad and self.grad):
            return self._on[number].on(str(device), job.samples > 1, slices=False)

    def _as_results(
        self, low: Lowered, outs: Sequence[torch.Tensor], size: int
    ) -> tuple[torch.Tensor, ...]:
        """A replay's outputs with a row for each sample, in the dtypes of all shapes' results."""
        wide = [
            t if v.mapped else t.expand(size, *t.shape)
            for t, v in zip(outs, low.batched.outputs, strict=True)
        ]
        return tuple([t.to(spec.dtype) for t, spec in zip(wide, self.specs, strict=True)])


def picked(job: Job, numbers: torch.Tensor) -> list[torch.Tensor]:
    """Some samples of each input, copied, where they are."""
    return [
        PickedColumn(job.columns[i], numbers.tolist()).rows_between(0, len(numbers))
        if i in job.columns
        else rows_of(t, numbers.to(t.device))
        for i, t in enumerate(job.inputs)
    ]
