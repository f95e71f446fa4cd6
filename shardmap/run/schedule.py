"""Which worker computes which chunk next: handing out, and bounded retries.

Knows nothing of Ray, tensors or time.

The executor for a cluster and its simulation (`shardmap.run.simulate`) run this same code. Each
step costs the same for three workers as for a thousand: a million chunks pass through in seconds.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator, Sequence

from shardmap.planning.split import Chunk

RETRIES = 3
"""How often a task is computed again after its worker died or a store could not be reached."""


class Schedule:
    """The chunks of one run and the workers that compute them.

    Args:
        chunks: What is to be computed, in order; taken from as it is needed.
        window: Chunks handed to a worker at a time: one that it computes, and others whose samples
            travel meanwhile.
        retries: How often a chunk is computed again after the worker that had it died.
        expected: Workers that are to come: where there are few chunks, each of those that come
            first takes only one.
    """

    def __init__(self, chunks: Sequence[Chunk], window: int, retries: int, expected: int = 0):
        self.window = window
        self.retries = retries
        self.expected = expected
        self.redone = 0
        """Chunks that were handed out again."""
        self._fresh = iter(chunks)
        self._again: collections.deque[Chunk] = collections.deque()
        self._rooms: list[collections.OrderedDict[Hashable, None]] = [
            collections.OrderedDict() for _ in range(window + 1)
        ]
        """By the number of chunks that they can still take: the workers, in the order in which they
        came to it.

        A plain dict looks for its first key past all that were deleted before: handing out to n
        workers would take n * n / 2 steps.
        """
        self._flying: dict[Hashable, dict[Chunk, None]] = {}
        self.flying = 0
        """Chunks that workers have."""
        self._deaths: collections.Counter[int] = collections.Counter()
        self._fruitless = 0
        """Losses since a chunk was last finished."""
        self._most = 0
        """Workers at a time."""
        self._suspects: collections.deque[tuple[int, Chunk]] = collections.deque()
        """Chunks that were to blame, each with the number of chunks that are to be handed out
        before it."""
        self._handed = 0
        """Chunks handed out so far."""
        self._unseen = len(chunks)
        """Chunks that have never been handed out."""

    # -- workers

    def join(self, worker: Hashable) -> None:
        """A worker is ready."""
        assert worker not in self._flying, (
            f"{worker} has joined already: its chunks would be forgotten"
        )
        self._flying[worker] = {}
        self._rooms[self.window][worker] = None
        self._most = max(self._most, len(self._flying))

    def leave(self, worker: Hashable) -> list[Chunk]:
        """A worker is gone.

        Its chunks go back to the queue, and are returned, the one that it was computing first.

        That one waits until every worker has had others: where workers die of something else, a
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
        """A chunk was lost with the worker that computed it, or could not be finished.

        Whether it may be tried again.

        Where others are lost too it may be tried as much more often: then it is rather the workers
        that fail. But not if nothing gets done.
        """
        self._deaths[chunk.start] += 1
        self._fruitless += 1
        others = len(self._deaths) - 1
        return self._deaths[
            chunk.start
        ] <= self.retries + others and self._fruitless <= self.retries * (2 + self._most)

    def deaths(self, chunk: Chunk) -> int:
        """How often `chunk` was to blame."""
        return self._deaths[chunk.start]

    @property
    def workers(self) -> list[Hashable]:
        """Those that are ready."""
        return list(self._flying)

    # -- chunks

    def assignments(self) -> Iterator[tuple[Hashable, Chunk]]:
        """Hand out chunks until none is left or nobody has room.

        The emptiest workers first, so that the last chunks are spread.
        """
        for room in range(self.window, 0, -1):
            waiting = self._rooms[room]
            while waiting:
                absent = max(0, self.expected - len(self._flying))
                if self.waiting <= absent * (
                    self.window - room
                ):  # as many as this worker has, for each of those that are to come
                    return
                chunk = self._next()
                worker, _ = waiting.popitem(last=False)
                self._rooms[room - 1][worker] = None
                self._flying[worker][chunk] = None
                self._handed += 1
                self.flying += 1
                yield worker, chunk

    def done(self, worker: Hashable, chunk: Chunk) -> None:
        """A worker has finished a chunk."""
        flying = self._flying[worker]
        room = self.window - len(flying)
        del self._rooms[room][worker], flying[chunk]
        self._rooms[room + 1][worker] = None
        self._fruitless = 0
        self.flying -= 1

    def again(self, worker: Hashable, chunk: Chunk) -> None:
        """A worker could not finish a chunk, for a reason that may pass.

        It goes back to the front of the queue.
        """
        fruitless = self._fruitless
        self.done(worker, chunk)
        self._fruitless = fruitless
        self._again.appendleft(chunk)
        self.redone += 1

    def put_back(self, chunks: Sequence[Chunk]) -> None:
        """Chunks that were finished are lost, and go to the front of the queue."""
        self._again.extendleft(reversed(chunks))
        self.redone += len(chunks)

    @property
    def waiting(self) -> int:
        """Chunks that wait to be handed out."""
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
