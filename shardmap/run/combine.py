"""Reduced outputs of neighbouring tasks, combined by workers before the driver receives them."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardmap import errors
from shardmap.planning.split import Chunk
from shardmap.run.base import Output
from shardmap.run.gather import Gather
from shardmap.run.messages import HOST
from shardmap.run.packing import Packed, unpack
from shardmap.run.pool import RayWorker, first_line, lost_errors
from shardmap.run.schedule import RETRIES

FAN = 8
"""Tasks whose reduced outputs one worker combines."""

APART_BYTES = 1 << 18
"""Size of a task's reduced outputs from which workers combine them; smaller ones are returned with
the task at no cost."""


@dataclass(slots=True)
class _Group:
    """Neighbouring tasks whose reduced outputs one worker combines."""

    chunks: tuple[Chunk, ...]
    parts: dict[Chunk, Any]
    """References of the outputs that have been computed."""
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """Tasks whose reduced outputs were lost with a machine and must be computed again."""

    worker: RayWorker
    chunks: tuple[Chunk, ...]
    reason: str


class Combiner:
    """Lets workers combine the reduced outputs of neighbouring tasks, and gathers the results.

    Args:
        ray: The ray package.
        call: The user's call, for errors.
        chunks: The tasks of the call.
        outputs: The call's outputs as workers return them.
        gather: Takes the combined outputs.
    """

    def __init__(
        self,
        ray: Any,
        call: str,
        chunks: Sequence[Chunk],
        outputs: Sequence[Output],
        gather: Gather,
    ):
        self.ray = ray
        self.call = call
        self.gather = gather
        self.names = [o.reduction.name if o.reduction is not None else None for o in outputs]
        size = sum(2 * o.sample_bytes for o in outputs if o.reduction is not None)
        groups = list(_grouped(chunks)) if size >= APART_BYTES and len(chunks) > FAN else []
        self.used = bool(groups)
        """True if tasks return their reduced outputs apart, to be combined here."""
        self.left = len(groups)
        """Groups that have not been gathered yet."""
        self.flying: dict[Any, tuple[_Group, RayWorker]] = {}
        """Groups that a worker is combining, by the reference of the result."""
        self._group_of = {chunk: group for group in groups for chunk in group.chunks}
        self._complete: collections.deque[_Group] = collections.deque()
        """Groups whose tasks are all done and which no worker is combining yet."""

    def add(self, chunk: Chunk, part: Any) -> None:
        """Note the reference of a task's reduced outputs."""
        group = self._group_of[chunk]
        group.parts[chunk] = part
        if len(group.parts) == len(group.chunks):
            self._complete.append(group)

    def hand_out(self, workers: Sequence[Any]) -> None:
        """Let workers combine the groups that are complete."""
        while self._complete and workers:
            group = self._complete.popleft()
            worker = workers[len(self.flying) % len(workers)]
            assert isinstance(worker, RayWorker)
            parts = [group.parts[chunk] for chunk in group.chunks]
            self.flying[worker.actor.combine.remote(self.names, *parts)] = group, worker

    def take(self, ref: Any) -> Lost | None:
        """Gather a combined group.

        Args:
            ref: The reference of the result, which is ready.

        Returns:
            The tasks that must be computed again because their outputs were lost, or None.

        Raises:
            WorkerError: The outputs were lost too often, or combining them raised an error.
        """
        group, worker = self.flying.pop(ref)
        try:
            outcome: Sequence[Packed | None] = self.ray.get(ref)
        except lost_errors(self.ray) as error:
            group.tries += 1
            if group.tries > RETRIES:
                raise errors.WorkerError(
                    f"{worker.failed_with(self.call, group.chunks[0])}: sums were lost "
                    f"{group.tries} times: {error}"
                ) from error
            if not isinstance(error, self.ray.exceptions.ObjectLostError):
                self._complete.append(group)
                return None
            group.parts = {}  # they were on a machine that has left the cluster
            return Lost(worker, group.chunks, first_line(error))
        except self.ray.exceptions.RayError as error:
            raise errors.WorkerError(
                f"{worker.failed_with(self.call, group.chunks[0])}: {error}"
            ) from error
        start, stop = group.chunks[0].start, group.chunks[-1].stop
        self.gather.add(
            start, stop, [None if p is None else unpack(p, HOST).clone() for p in outcome]
        )
        group.parts = {}
        self.left -= 1
        return None


def _grouped(chunks: Sequence[Chunk]) -> Iterator[_Group]:
    for at in range(0, len(chunks), FAN):
        yield _Group(tuple(chunks[at : at + FAN]), {})
