"""Compute all rows or columns of one sample's Jacobian by a map over unit vectors.

This map is inside the function that is mapped over the samples.

The calls for one unit vector are recorded once, lowered by the same rules as all others, and
replayed for some of them at a time inside the recording of the sample. So the unit vectors become a
dimension of the recorded calls; values that do not depend on them (the function's own) are
computed once for each sample, and values that do not depend on the sample once for all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardmap.call import arguments as edges
from shardmap.call.execute import pairs_of
from shardmap.call.job import job_of
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.planning.memory import MIB
from shardmap.program.analysis import live_equations, mapped_groups, written
from shardmap.program.ir import Program, Var, variables
from shardmap.rules import huge_pages as pages
from shardmap.run import local, prepare
from shardmap.run.base import unheard
from shardmap.trace.record import record
from shardmap.transforms.zeros import without_zeros

TARGET_BYTES = 8 * MIB
"""Bytes of one sample's intermediates from which its unit vectors are cut: chunks of samples are
kept at that size for the cache."""
MOST_CHUNKS = 64
"""Most chunks of unit vectors, whose calls are all recorded, unless memory requires more."""
BUDGET_PART = 4
"""One sample's intermediates take at most the budget divided by this: results and kernels need
memory too."""


@dataclass(slots=True)
class Seeding:
    """The number of unit vectors at a time, requested and used."""

    asked: int | str | None
    """The value that the user gave."""
    memory: Callable[[torch.device], int | None]
    """The budget on a device."""
    call: str
    most: int | None = None
    """The limit set by a plan that did not fit."""
    largest: int = 0
    """The largest number taken at a time in the recordings that were made with this `most`."""

    def at_once(self, each: int, count: int, device: torch.device) -> int:
        """Choose the number of unit vectors at a time, of `count`, by the bytes of each."""
        if isinstance(self.asked, int):
            size = self.asked
        elif self.asked is None:
            size = count
        else:
            size = max(TARGET_BYTES // each, -(-count // MOST_CHUNKS))
            budget = self.memory(device)
            if budget is not None:
                size = min(size, budget // BUDGET_PART // each)
            if self.most is not None:
                size = min(size, self.most)
        size = max(1, min(size, count))
        size = -(-count // -(-count // size))  # chunks of even size
        self.largest = max(self.largest, size)
        return size


class UnitVectors:
    """A function of one unit vector, recorded, and computed for all unit vectors of a shape.

    Args:
        core: Takes a tensor of the given shape and returns a tuple of tensors.
        like: A tensor of that shape, dtype and device, with at least one element.
        call: The user's call, for errors.
    """

    def __init__(
        self,
        core: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        like: torch.Tensor,
        call: str,
    ):
        self.count = like.numel()
        self.like = like
        # Two, and not one, if there are: a dimension of size one would be a special case to
        # kernels.
        batch = edges.collect((self._seeds(0, min(2, self.count)),), {}, 0, None, call)
        recording, structure = record(core, batch, "same", False, call)
        program, self.each_bytes = _looked_at(recording.program)
        recording = dataclasses.replace(recording, program=program)
        options = Options(
            0,
            0,
            "same",  # a sample's draws are those of all its unit vectors
            None,
            "auto",
            None,
            None,
            None,
            0.9,
            "each",
            False,
            False,
            None,
            None,
            False,
            False,
            call,
        )
        job = job_of(Prepared(recording, structure), batch, options, True, False, pairs_of)
        # An output that does not depend on the unit vector is not repeated for each of them.
        outputs = tuple([o if o.mapped else dataclasses.replace(o, dim=None) for o in job.outputs])
        self.job = dataclasses.replace(job, outputs=outputs)

    @property
    def program(self) -> Program:
        """The recorded program of one unit vector."""
        return self.job.recording.program

    @property
    def draws(self) -> bool:
        """True if the function draws random numbers."""
        return bool(self.job.recording.random)

    def holding(self, tensors: list[torch.Tensor]) -> tuple[Var, ...]:
        """The variables that hold any of some tensors, among those that `core` captures."""
        known = {id(t) for t in tensors}
        pairs = zip(self.program.captured, self.job.recording.captured, strict=True)
        return tuple([v for v, t in pairs if id(t) in known])

    def run(self, seeding: Seeding) -> list[tuple[torch.Tensor, ...]]:
        """Compute the results of `core` for one chunk of unit vectors after another.

        Each result has the shape `[vectors, *shape]`.
        """
        step = seeding.at_once(self.each_bytes, self.count, self.like.device)
        on, parts = prepare.Devices(self.job), []
        for start in range(0, self.count, step):
            if step < self.count:
                pages.give_back()
            seeds = self._seeds(start, min(start + step, self.count))
            with unheard():
                outs = local.run_whole(
                    dataclasses.replace(self.job, inputs=[seeds], samples=len(seeds)), on
                )
            spread = [
                t if o.mapped else t.expand(len(seeds), *t.shape)
                for t, o in zip(outs, self.job.outputs, strict=True)
            ]
            parts.append(tuple(spread))
        return parts

    def _seeds(self, start: int, stop: int) -> torch.Tensor:
        """The unit vectors `start` to `stop`, `[stop - start, *shape]`."""
        rows = torch.eye(stop - start, dtype=self.like.dtype, device=self.like.device)
        if start or stop < self.count:
            rows = torch.nn.functional.pad(rows, (start, self.count - stop))
        return rows.view(-1, *self.like.shape)


@functools.lru_cache(maxsize=64)
def _looked_at(program: Program) -> tuple[Program, int]:
    """The program without symbolic zeros, and its peak of live bytes for one unit vector."""
    program = without_zeros(program)
    return program, live_bytes(program)


def live_bytes(program: Program) -> int:
    """The peak of live bytes of one sample, counting only values that depend on it."""
    mapped = mapped_groups(program, "same", False)
    live = live_equations(
        program, {v.group for eq in program.equations for v in written(eq)}, set()
    )
    equations = list(itertools.compress(program.equations, live))
    sizes: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, eq in enumerate(equations):
        for v in (*eq.inputs(), *eq.results()):
            if v.group in mapped:
                sizes[v.group] = max(
                    sizes.get(v.group, 0), math.prod(v.spec.shape) * v.spec.dtype.itemsize
                )
                last[v.group] = i
    ends = {v.group for v in variables(program.outputs)}
    now = peak = 0
    begun: set[int] = set()
    for i, eq in enumerate(equations):
        used = {v.group for v in (*eq.inputs(), *eq.results()) if v.group in mapped}
        now += sum(sizes[g] for g in used - begun)
        begun |= used
        peak = max(peak, now)
        now -= sum(sizes[g] for g in used if last[g] == i and g not in ends)
    return max(peak, 1)
