"""The schedule of a cluster: it hands out chunks to workers, with bounded retries.

It does not depend on Ray, tensors or clocks.

The executor for a cluster and its simulation (`shardmap.run.simulate`) run this same code. Each
step costs the same for three workers as for a thousand: a million chunks pass through in seconds.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator, Sequence

from shardmap.planning.split import Chunk

RETRIES = 3
"""Most times that a task is computed again after its worker died or a store could not be
reached."""


class Schedule:
    """The chunks of one run and the workers that compute them.

    Args:
        chunks: The chunks to compute, in order; read one by one.
        window: Chunks handed to a worker at a time: one that it computes, and others whose samples
            travel meanwhile.
        retries: Most times that a chunk is computed again after its worker died.
        expected: Number of workers expected to join: if there are few chunks, each of those that
            join first takes only one.
    """

    def __init__(self, chunks: Sequence[Chunk], window: int, retries: int, expected: int = 0):
        self.window = window
        self.retries = retries
        self.expected = expected
        self.redone = 0
        """Number of chunks that were handed out again."""
        self._fresh = iter(chunks)
        self._again: collections.deque[Chunk] = collections.deque()
        self._rooms: list[collections.OrderedDict[Hashable, None]] = [
            collections.OrderedDict() for _ in range(window + 1)
        ]
        """Workers by the number of chunks that they can still take, in order of arrival there.

        A plain dict looks for its first key past all that were deleted before: handing out to n
        workers would take n * n / 2 steps.
        """
        self._flying: dict[Hashable, dict[Chunk, None]] = {}
        self.flying = 0
        """Number of chunks that workers have."""
        self._deaths: collections.Counter[int] = collections.Counter()
        self._fruitless = 0
        """Number of losses since a chunk was last finished."""
        self._most = 0
        """Largest number of workers so far."""
        self._suspects: collections.deque[tuple[int, Chunk]] = collections.deque()
        """Chunks that may have killed their worker, each with the number of chunks to hand out
        before it."""
        self._handed = 0
        """Number of chunks handed out so far."""
        self._unseen = len(chunks)
        """Number of chunks that have never been handed out."""

    # -- workers

    def join(self, worker: Hashable) -> None:
        """Add a worker that is ready."""
        assert worker not in self._flying, (
            f"{worker} has joined already: its chunks would be forgotten"
        )
        self._flying[worker] = {}
        self._rooms[self.window][worker] = None
        self._most = max(self._most, len(self._flying))

    def leave(self, worker: Hashable) -> list[Chunk]:
        """Remove a worker that is gone, and return its chunks.

        Its chunks go back to the queue; the first of them is the one that it was computing.

        That one waits until every worker has had others: if workers die of another cause, a
        fresh worker's first chunk would be the same one time after time.
        """
        chunks = list(self._flying.pop(worker, ()))
        for room in self._rooms:
            room.pop(worker, None)
        if chunks:
            self._suspects.append(
                (self._handed + self.window * max(1, len(self._flying)), chunks[0])
            )
            self._again.extendleft(reversed(chunks[1:]))
        self.redone += len(chunks)
        self.flying -= len(chunks)
        return chunks

    def blame(self, chunk: Chunk) -> bool:
        """Count a chunk that was lost with its worker, or could not be finished.

        Returns True if it may be tried again.

        If other chunks are lost too it may be tried more often, as the workers rather than the
        chunk fail. It may not if no chunk gets finished.
        """
        self._deaths[chunk.start] += 1
        self._fruitless += 1
        others = len(self._deaths) - 1
        return self._deaths[
            chunk.start
        ] <= self.retries + others and self._fruitless <= self.retries * (2 + self._most)

    def deaths(self, chunk: Chunk) -> int:
        """Number of losses that `chunk` was blamed for."""
        return self._deaths[chunk.start]

    @property
    def workers(self) -> list[Hashable]:
        """The workers that are ready."""
        return list(self._flying)

    # -- chunks

    def assignments(self) -> Iterator[tuple[Hashable, Chunk]]:
        """Hand out chunks until none is left or no worker has room.

        The emptiest workers first, so that the last chunks are spread.
        """
        for room in range(self.window, 0, -1):
            waiting = self._rooms[room]
            while waiting:
                absent = max(0, self.expected - len(self._flying))
                if self.waiting <= absent * (
                    self.window - room
                ):  # each expected worker gets as many as this one has
                    return
                chunk = self._next()
                worker, _ = waiting.popitem(last=False)
                self._rooms[room - 1][worker] = None
                self._flying[worker][chunk] = None
                self._handed += 1
                self.flying += 1
                yield worker, chunk

    def done(self, worker: Hashable, chunk: Chunk) -> None:
        """Count a chunk that a worker has finished."""
        flying = self._flying[worker]
        room = self.window - len(flying)
        del self._rooms[room][worker], flying[chunk]
        self._rooms[room + 1][worker] = None
        self._fruitless = 0
        self.flying -= 1

    def again(self, worker: Hashable, chunk: Chunk) -> None:
        """Take back a chunk that a worker could not finish for a temporary reason.

        It goes back to the front of the queue.
        """
        fruitless = self._fruitless
        self.done(worker, chunk)
        self._fruitless = fruitless
        self._again.appendleft(chunk)
        self.redone += 1

    def put_back(self, chunks: Sequence[Chunk]) -> None:
        """Put chunks whose results were lost at the front of the queue."""
        self._again.extendleft(reversed(chunks))
        self.redone += len(chunks)

    @property
    def waiting(self) -> int:
        """Number of chunks that wait to be handed out."""
        return self._unseen + len(self._again) + len(self._suspects)

    @property
    def finished(self) -> bool:
        """True if everything has been computed."""
        return not self.waiting and not self.flying

    def _next(self) -> Chunk:
        if self._suspects and (
            self._suspects[0][0] <= self._handed or not (self._again or self._unseen)
        ):
            return self._suspects.popleft()[1]
        if self._again:
            return self._again.popleft()
        self._unseen -= 1
        return next(self._fresh)
