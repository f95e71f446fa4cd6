"""Handing out chunks: nothing lost, nothing twice, whatever happens in whatever order."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardmap.planning.split import Chunk, chunks_of
from shardmap.run.schedule import Schedule


def singles(count: int) -> list[Chunk]:
    return [Chunk(i, i + 1) for i in range(count)]


class Interleavings(RuleBasedStateMachine):
    """A schedule under any sequence of what may happen, beside a ledger of what each chunk went through."""

    @initialize(chunks=st.integers(0, 29), window=st.integers(1, 3), expected=st.integers(0, 5))
    def begin(self, chunks: int, window: int, expected: int) -> None:
        self.total, self.window = chunks, window
        self.schedule = Schedule(singles(chunks), window, retries=10**6, expected=expected)
        self.held: dict[int, list[Chunk]] = {}
        self.given = collections.Counter[int]()
        self.lost = collections.Counter[int]()
        self.finished = collections.Counter[int]()
        self.names = 0

    @rule(count=st.integers(1, 3))
    def join(self, count: int) -> None:
        for _ in range(count):
            self.names += 1
            self.schedule.join(self.names)
            self.held[self.names] = []

    @rule(most=st.integers(1, 99))
    def hand_out(self, most: int) -> None:
        """Perhaps only a part: something else happens while the driver is handing out."""
        for _, (worker, chunk) in zip(range(most), self.schedule.assignments(), strict=False):
            assert isinstance(worker, int)
            fullness = len(self.held[worker])
            assert fullness == min(len(chunks) for chunks in self.held.values()), (
                "the emptiest first"
            )
            self.held[worker].append(chunk)
            self.given[chunk.start] += 1

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        worker, chunk = self._some(data)
        self.schedule.done(worker, chunk)
        self.finished[chunk.start] += 1

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        worker, chunk = self._some(data)
        self.schedule.again(worker, chunk)
        self.lost[chunk.start] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        chunks = self.held.pop(worker)
        assert self.schedule.leave(worker) == chunks, "in the order in which they were handed out"
        for chunk in chunks:
            self.lost[chunk.start] += 1

    def _some(self, data: st.DataObject) -> tuple[int, Chunk]:
        worker = data.draw(st.sampled_from(sorted(w for w, chunks in self.held.items() if chunks)))
        chunk = data.draw(st.sampled_from(self.held[worker]))
        self.held[worker].remove(chunk)
        return worker, chunk

    @invariant()
    def ledger(self) -> None:
        if not hasattr(self, "schedule"):
            return
        flying = [chunk.start for chunks in self.held.values() for chunk in chunks]
        assert len(flying) == len(set(flying)) == self.schedule.flying, "no chunk is at two workers"
        assert all(len(chunks) <= self.window for chunks in self.held.values())
        assert max(self.finished.values(), default=1) == 1, "what is done is done once"
        assert not set(flying) & set(self.finished)
        for start in range(self.total):
            assert self.given[start] - self.lost[start] == self.finished[start] + (start in flying)
        assert self.schedule.redone == sum(self.lost.values())
        assert sorted(self.schedule.workers) == sorted(self.held)
        assert self.schedule.waiting == self.total - len(self.finished) - len(flying)
        assert self.schedule.finished == (len(self.finished) == self.total)

    def teardown(self) -> None:
        """One more worker finishes whatever is left, and each chunk is handed out once more than it was lost."""
        if not hasattr(self, "schedule"):
            return
        self.join(1)
        while not self.schedule.finished:
            self.hand_out(99)
            for worker, chunks in self.held.items():
                for chunk in chunks:
                    self.schedule.done(worker, chunk)
                    self.finished[chunk.start] += 1
                chunks.clear()
            self.ledger()
        assert sorted(self.finished.elements()) == list(range(self.total))
        assert all(self.given[start] == self.lost[start] + 1 for start in range(self.total))
        assert list(self.schedule.assignments()) == []


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 4))
def test_chunks_are_spread_evenly(chunks: int, workers: int, window: int):
    """No worker has two chunks more than another."""
    schedule = Schedule(singles(chunks), window, 0)
    for worker in range(workers):
        schedule.join(worker)
    loads = collections.Counter({worker: 0 for worker in range(workers)})
    for worker, _ in schedule.assignments():
        loads[worker] += 1
    assert sum(loads.values()) == min(chunks, workers * window) == schedule.flying
    assert max(loads.values()) - min(loads.values()) <= 1


def test_the_first_to_have_room_is_served_first():
    schedule = Schedule(singles(11), 2, 0)
    for worker in "abc":
        schedule.join(worker)
    given = list(schedule.assignments())
    assert "".join(str(worker) for worker, _ in given) == "abcabc"
    assert [chunk.start for _, chunk in given] == list(range(6))
    schedule.done("c", Chunk(2, 3))
    schedule.done("a", Chunk(0, 1))
    schedule.join("d")
    assert [(worker, chunk.start) for worker, chunk in schedule.assignments()] == [
        ("d", 6),
        ("c", 7),
        ("a", 8),
        ("d", 9),
    ]


def test_what_a_worker_had_is_next():
    """A lost chunk is handed out before any fresh one.

    The one that was being computed when each worker has had others.
    """
    schedule = Schedule(singles(13), 3, 1)
    for worker in "ab":
        schedule.join(worker)
    assert len(list(schedule.assignments())) == 6  # a: 0, 2, 4; b: 1, 3, 5
    schedule.done("a", Chunk(2, 3))
    schedule.again("b", Chunk(3, 4))
    assert schedule.leave("a") == [Chunk(0, 1), Chunk(4, 5)]
    assert schedule.leave("a") == [] == schedule.leave("never there")
    schedule.again("b", Chunk(5, 6))
    schedule.join("c")
    given = [(worker, chunk.start) for worker, chunk in schedule.assignments()]
    assert given == [("c", 5), ("b", 4), ("c", 3), ("b", 0), ("c", 6)]
    assert schedule.redone == 4


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded_for_each_chunk(retries: int):
    schedule = Schedule(singles(1), 1, retries)
    for life in range(retries + 1):
        schedule.join(life)
        [(worker, chunk)] = schedule.assignments()
        assert chunk == Chunk(0, 1)
        [lost] = schedule.leave(worker)
        assert schedule.blame(lost) == (life < retries)
        assert schedule.deaths(lost) == life + 1
    assert schedule.deaths(Chunk(1, 2)) == 0


def test_a_chunk_is_tried_more_often_where_others_are_lost_too():
    """Then it is rather the workers that fail: once more for each other chunk."""
    schedule = Schedule(singles(5), 1, 2)
    schedule.join("a")
    for chunk in singles(3):
        assert schedule.blame(chunk)
    assert [schedule.blame(Chunk(0, 1)) for _ in range(4)] == [True, True, True, False]


def test_nothing_is_tried_for_ever_while_nothing_gets_done():
    """Whatever chunks are to blame.

    Losses in a row are bounded, and counted anew when a chunk is done.
    """
    schedule = Schedule(singles(100), 1, 2)
    schedule.join("a")
    assert [schedule.blame(Chunk(i, i + 1)) for i in range(7)] == [True] * 6 + [False]
    [(worker, chunk)] = schedule.assignments()
    schedule.done(worker, chunk)
    assert schedule.blame(Chunk(50, 51))


def test_a_suspect_waits_for_others_unless_there_are_none():
    schedule = Schedule(singles(9), 1, 3)
    for worker in "ab":
        schedule.join(worker)
    assert len(list(schedule.assignments())) == 2
    assert schedule.leave("a") == [Chunk(0, 1)]
    schedule.join("c")
    order = []
    while not schedule.finished:
        given = list(schedule.assignments())
        order += [chunk.start for _, chunk in given]
        for worker, chunk in [*given, ("b", Chunk(1, 2))] if len(order) == 1 else given:
            schedule.done(worker, chunk)
    assert order == [2, 0, 3, 4, 5, 6, 7, 8]
    only = Schedule(singles(1), 1, 3)
    only.join("a")
    assert list(only.assignments())
    only.leave("a")
    only.join("b")
    assert list(only.assignments()) == [("b", Chunk(0, 1))]


@pytest.mark.parametrize(("chunks", "first"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 2)])
def test_few_chunks_wait_for_workers_that_are_to_come(chunks: int, first: int):
    """The first worker takes a second chunk only if one is left for each of the others."""
    schedule = Schedule(singles(chunks), 2, 0, expected=3)
    schedule.join("a")
    assert len(list(schedule.assignments())) == first
    schedule.join("b")
    schedule.join("c")
    list(schedule.assignments())
    assert schedule.flying == min(chunks, 6)


def test_a_worker_joins_once():
    schedule = Schedule(singles(3), 2, 0)
    schedule.join("a")
    with pytest.raises(AssertionError, match="a has joined already"):
        schedule.join("a")
    schedule.leave("a")
    schedule.join("a")  # a new process under an old name


def test_no_chunks_and_an_empty_one():
    assert Schedule([], 2, 3).finished
    schedule = Schedule(chunks_of(0, 5), 2, 3)
    assert schedule.waiting == 1
    assert not schedule.finished
    schedule.join("a")
    assert list(schedule.assignments()) == [("a", Chunk(0, 0))]
    schedule.done("a", Chunk(0, 0))
    assert schedule.finished
