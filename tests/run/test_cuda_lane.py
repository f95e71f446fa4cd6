"""The logic of the GPU's lane, with streams and events that only pretend.

What is in flight, what a failing device keeps and loses.

Memory is the CPU's; an event happens some queries after it was recorded. What only a GPU can show
is in test_gpu.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.run import lanes, local
from tests import oracle


class Stream:
    """Notes who waits for whom."""

    def __init__(self, device: Any = None):
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        """An order that the CPU keeps by itself."""
        self.waited.append(other)


class Event:
    """Happens after `LATE` queries, or when it is waited for.

    `broken` fails the n-th event instead.
    """

    LATE = 2
    made = 0
    broken: int | None = None

    def __init__(self) -> None:
        self.number, self.queries = Event.made, 0
        Event.made += 1

    def record(self, stream: Stream) -> None:
        """Recorded on the stream that carries results away."""
        assert isinstance(stream, Stream)

    def _fail(self) -> None:
        if self.number == Event.broken:
            raise torch.AcceleratorError("the device is gone")

    def query(self) -> bool:
        """True if it has happened."""
        self.queries += 1
        if self.queries < self.LATE:
            return False
        self._fail()
        return True

    def synchronize(self) -> None:
        """Wait."""
        self._fail()
        self.queries = self.LATE


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[lanes.CudaLane]:
    """CPU lanes are GPU lanes with pretended streams; returns the list of those that are made."""
    current, made = Stream(), []
    Event.made, Event.broken = 0, None
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(lanes, "_page_locked", lambda t: torch.empty(t.shape, dtype=t.dtype))

    def make(*arguments: Any, **options: Any) -> lanes.CudaLane:
        made.append(lanes.CudaLane(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(local, "make_lane", make)
    return made


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "elementwise": lambda x: x.sin() * 2,
    "transposed": lambda x: x.outer(x).t(),
    "gradient": lambda x: torch.func.grad(lambda v: v.sin().prod())(x),
}


@pytest.mark.parametrize(
    "options",
    [{}, {"out_dims": -1}, {"reduce": "sum"}, {"reduce": (torch.maximum, None)}],
    ids=lambda o: "".join(o),
)
@pytest.mark.parametrize("samples", [1, 3, 13])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_in_flight_give_the_loops_result(
    name: str, samples: int, options: dict[str, Any], pretended: list[lanes.CudaLane]
) -> None:
    x = torch.randn(samples, 3, dtype=torch.float64)
    got = shardmap.vmap(FUNCTIONS[name], chunk_size=2, devices=["cpu", "cpu"], **options)(x)
    if "reduce" in options:
        stacked = oracle.loop(FUNCTIONS[name])(x)
        want = stacked.sum(0) if options["reduce"] == "sum" else stacked.amax(0)
        torch.testing.assert_close(got, want)
    else:
        oracle.assert_same(
            got, oracle.loop(FUNCTIONS[name], out_dims=options.get("out_dims", 0))(x), name
        )
    assert pretended, "the pretended lanes were used"
    assert not any(lane.flights for lane in pretended)


def test_two_chunks_are_in_flight_and_no_more(
    pretended: list[lanes.CudaLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    most, original = [0], lanes.CudaLane.submit

    def counted(self: lanes.CudaLane, chunk: Any) -> None:
        original(self, chunk)
        most[0] = max(most[0], len(self.flights))

    monkeypatch.setattr(lanes.CudaLane, "submit", counted)
    shardmap.vmap(torch.sin, chunk_size=1)(torch.randn(20))
    assert most[0] == lanes.CudaLane.window == 2


@pytest.mark.parametrize("broken", range(7))
def test_a_device_that_fails_keeps_what_was_complete(
    broken: int, pretended: list[lanes.CudaLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes with an event, after other chunks were complete.

    Only what was in flight is computed again, by the other device.
    """
    original = local.make_lane
    computed: list[tuple[int, int]] = []

    class Named(str):
        type = "cpu"

    def make(number: int, *rest: Any, **options: Any) -> lanes.CudaLane:
        lane = original(number, *rest, **options)
        lane.device = Named(f"gpu{number}")  # type: ignore[assignment]
        lane.samples = lambda chunk: [t[chunk.start : chunk.stop] for t in lane.job.inputs]  # type: ignore[method-assign]
        inner = lane.compute

        def noted(ready: Any, chunk: Any) -> Any:
            computed.append(tuple(chunk))
            return inner(ready, chunk)

        lane.compute = noted  # type: ignore[method-assign]
        return lane

    monkeypatch.setattr(local, "make_lane", make)
    Event.broken = broken
    x = torch.randn(14, 3)
    with pytest.warns(errors.DeviceLostWarning, match="the device is gone"):
        got = shardmap.vmap(torch.exp, chunk_size=2, devices=["cpu", "cpu"])(x)
    assert torch.equal(got, x.exp())
    again = sum(stop - start for start, stop in computed) - len(x)
    assert 0 < again <= 2 * lanes.CudaLane.window, "at most the chunks in flight are computed again"


def test_gradients_from_outside(pretended: list[lanes.CudaLane]) -> None:
    x = torch.randn(7, 3, requires_grad=True)
    out = shardmap.vmap(lambda r: r.sin().sum(), chunk_size=2)(x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.cos())
