"""Chunks that fail: memory that runs out, devices that die or are slow, interrupts.

Results stay right, nothing is written twice.
"""

from __future__ import annotations

import collections
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.planning.split import Chunk
from shardmap.run import lanes, local, prepare
from shardmap.run.base import ChunkDone, ChunkRedone, listen
from tests import oracle

SAMPLES = 13
OUT_OF_MEMORY: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes"
    ),
    lambda: MemoryError(),
    lambda: MemoryError("Unable to allocate 3 GiB for an array"),
)
DIES = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


@dataclass(frozen=True)
class Pretend:
    """A device of its own in name, and really the CPU."""

    name: str
    type: str = "cpu"

    def __str__(self) -> str:
        return self.name


@dataclass
class Script:
    """What is to go wrong, and what was computed."""

    early: Callable[[Any, Chunk, int], None] = lambda lane, chunk, call: None
    """Called before a chunk is computed, with the number of the call; may raise."""
    late: Callable[[Any, Chunk, int], None] = lambda lane, chunk, call: None
    """Called after it."""
    calls: int = 0
    computed: collections.Counter[int] = field(default_factory=collections.Counter)
    """How often each sample was."""
    by_lane: collections.Counter[int] = field(default_factory=collections.Counter)
    """Samples computed by each lane."""
    made: list[StorageWeakRef] = field(default_factory=list)
    """The memory of all results."""


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    """What one test teaches about a program is not for the next."""
    engine.clear()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Chunks fail as the script says."""
    script, original = Script(), lanes.Lane.compute

    def compute(self: Any, ready: Any, chunk: Chunk) -> Any:
        number, script.calls = script.calls, script.calls + 1
        script.early(self, chunk, number)
        shown, self.device = self.device, torch.device("cpu")
        try:
            outs = original(self, ready, chunk)
        finally:
            self.device = shown
        script.computed.update(range(chunk.start, chunk.stop))
        script.by_lane[self.number] += chunk.size
        script.made += [
            StorageWeakRef(t.untyped_storage())
            for t in (*outs, *self.gather.whole.values())
            if t is not None
        ]
        script.late(self, chunk, number)
        return outs

    monkeypatch.setattr(lanes.Lane, "compute", compute)
    return script


@pytest.fixture
def several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane is a device of its own: `gpu0`, `gpu1`, ..."""
    original = local.make_lane

    def make(number: int, *rest: Any, **options: Any) -> Any:
        lane = original(number, *rest, **options)
        lane.device = Pretend(f"gpu{number}")
        return lane

    monkeypatch.setattr(local, "make_lane", make)


@pytest.fixture
def taking_turns(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    """Lanes get chunks in turn, however long they take."""
    handed: collections.Counter[int] = collections.Counter()

    def expects(self: Any, size: int) -> float:
        return handed[self.number]

    submit = lanes.Lane.submit

    def submitted(self: Any, chunk: Chunk) -> None:
        handed[self.number] += 1
        submit(self, chunk)

    monkeypatch.setattr(lanes.Lane, "expects", expects)
    monkeypatch.setattr(lanes.Lane, "submit", submitted)


def at(
    call: int, make: Callable[[], BaseException], lane: int | None = None
) -> Callable[[Any, Chunk, int], None]:
    """Raise in the given call, or in the lane's."""

    def fail(there: Any, chunk: Chunk, number: int) -> None:
        if number == call and lane in (None, there.number):
            raise make()

    return fail


def once_from(call: int, make: Callable[[], BaseException]) -> Callable[[Any, Chunk, int], None]:
    """Raise once, in the given call or a later one, for a chunk that can be halved."""
    raised: list[int] = []

    def fail(there: Any, chunk: Chunk, number: int) -> None:
        if number >= call and chunk.size > 1 and not raised:
            raised.append(number)
            raise make()

    return fail


def larger_than(size: int) -> Callable[[Any, Chunk, int], None]:
    """Memory for so many samples and no more."""

    def fail(lane: Any, chunk: Chunk, number: int) -> None:
        if chunk.size > size:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return fail


def batch_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def function(x: torch.Tensor) -> Any:
    return x.sin() * x, x.outer(x).sum(0)


def same(got: Any, want: Any, what: str = "output") -> None:
    for i, (g, w) in enumerate(
        zip(
            torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True
        )
    ):
        oracle.assert_same(g, w, f"{what} {i}")


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """What happened."""
    heard: list[Any] = []
    with listen(heard.append):
        yield heard


def redone(events: list[Any]) -> list[ChunkRedone]:
    return [e for e in events if isinstance(e, ChunkRedone)]


def done(events: list[Any]) -> list[ChunkDone]:
    return [e for e in events if isinstance(e, ChunkDone)]


# ----------------------------------------------------------------------------------------------
# memory runs out


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"], ["cpu"] * 3])
@pytest.mark.parametrize("call", range(4))
def test_memory_runs_out_once(
    make: Any, late: bool, devices: Any, call: int, script: Script, events: list[Any]
) -> None:
    """At any chunk: the chunk is computed again in halves, and nothing else is."""
    setattr(script, "late" if late else "early", once_from(call, make))
    batch = batch_of(SAMPLES + 1, 3)
    got = shardmap.vmap(function, check="off", devices=devices, chunk_size=4)(batch)
    same(got, oracle.loop(function)(batch))
    assert sorted(script.computed) == list(range(SAMPLES + 1))
    again = redone(events)
    assert len(again) == 1 or isinstance(devices, list)
    twice = {i for i, count in script.computed.items() if count > 1}
    assert max(script.computed.values()) <= 2
    assert twice == ({i for e in again for i in range(e.start, e.stop)} if late else set())
    assert sorted(i for e in done(events) for i in range(e.start, e.stop)) == list(
        range(SAMPLES + 1)
    )
    if again:
        assert type(make()).__name__ in again[0].reason


@pytest.mark.parametrize("how", ["plain", "grad", "remat", "sum", "fold", "max", "out_dims"])
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("devices", ["cpu", ["cpu"] * 3])
def test_memory_for_few_samples_only(
    how: str, most: int, devices: Any, script: Script, events: list[Any]
) -> None:
    """Chunks are halved until they fit, whatever becomes of the results; gradients included."""
    script.early = larger_than(most)
    batch = batch_of(SAMPLES, 3).requires_grad_(how in ("grad", "remat"))
    options: dict[str, Any] = {"remat": how == "remat"}
    if how in ("sum", "max"):
        options["reduce"] = how
    elif how == "fold":
        options["reduce"] = torch.add, None
    elif how == "out_dims":
        options["out_dims"] = -1
    got = shardmap.vmap(function, check="off", devices=devices, chunk_size=8, **options)(batch)
    want = oracle.loop(function, 0, options.get("out_dims", 0))(batch)
    if how in ("sum", "fold", "max"):
        want = tuple(t.amax(0) if how == "max" else t.sum(0) for t in want)
    same(got, want)
    assert max(e.stop - e.start for e in done(events)) <= most
    assert set(script.computed.values()) == {1}, (
        "a chunk that failed before it computed anything is computed once"
    )
    if batch.requires_grad:
        same(
            *(torch.autograd.grad(sum(t.sum() for t in out), batch) for out in (got, want)),
            what="gradient",
        )


@pytest.mark.parametrize("seed", range(12))
def test_memory_runs_out_again_and_again(seed: int, script: Script) -> None:
    """Before or after a chunk, at random, on three lanes.

    Every sample is there, each as often as its chunks failed, and once more.
    """
    draw = random.Random(seed)
    failed: collections.Counter[int] = collections.Counter()

    def sometimes(lane: Any, chunk: Chunk, number: int) -> None:
        if chunk.size > 1 and draw.random() < 0.3:
            failed.update(range(chunk.start, chunk.stop))
            raise draw.choice(OUT_OF_MEMORY)()

    setattr(script, draw.choice(["early", "late"]), sometimes)
    late = script.late is sometimes
    batch = batch_of(101, 3)
    got = shardmap.vmap(
        function,
        check="off",
        devices=["cpu"] * draw.choice([1, 3]),
        chunk_size=16,
        reduce=(None, "sum"),
    )(batch)
    want = oracle.loop(function)(batch)
    same(got, (want[0], want[1].sum(0)))
    assert script.computed == {i: 1 + (failed[i] if late else 0) for i in range(101)}
    assert failed, "nothing went wrong"


def test_what_fits_is_remembered_for_the_next_call(
    script: Script, events: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The next call of the same program begins with chunks that fit."""
    script.early = larger_than(3)
    batch = batch_of(SAMPLES, 50_000)

    def large(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 2).sum()

    with caplog.at_level("WARNING", logger="shardmap"):
        first = shardmap.vmap(large, chunk_size=SAMPLES - 1)(batch)
    assert redone(events)
    assert "memory ran out on cpu with 12 samples at a time; going on with 6" in caplog.text
    (notes,) = {id(low.notes): low.notes for low in engine.lowerings()}.values()
    assert notes.learned["cpu"].ceiling == 3
    events.clear()
    second = shardmap.vmap(large)(batch)
    assert not redone(events)
    assert max(e.stop - e.start for e in done(events)) <= 3
    same((first, second), (oracle.loop(large)(batch),) * 2)


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
def test_not_even_one_sample_fits(make: Any, devices: Any, script: Script) -> None:
    """The error has the call, the device, bytes, the sample and the remedy, and is a MemoryError."""

    def fail(lane: Any, chunk: Chunk, number: int) -> None:
        if chunk.start <= 5 < chunk.stop:
            raise make()

    script.early = fail
    with pytest.raises(errors.OutOfMemory) as caught:
        shardmap.vmap(function, check="off", devices=devices, chunk_size=4)(batch_of(SAMPLES, 3))
    text = str(caught.value)
    assert text.startswith(
        "shardmap.vmap(function, in_dims=0): memory ran out on cpu with a chunk of one sample "
        "(sample 5;"
    )
    assert " B" in text
    assert type(make()).__name__ in text
    assert "reduce=" in text
    assert isinstance(caught.value, MemoryError)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        RuntimeError("boom"),
        IndexError("index 7"),
        KeyError("k"),
        errors.MismatchError("m"),
    ],
)
@pytest.mark.parametrize("call", range(4))
def test_an_error_of_the_functions_own_passes_through(
    error: Exception, call: int, script: Script, events: list[Any]
) -> None:
    """The very object, at any chunk, and nothing is tried again."""

    def fail() -> Exception:
        return error

    script.early = at(call, fail)
    with pytest.raises(type(error)) as caught:
        shardmap.vmap(function, check="off", chunk_size=4)(batch_of(SAMPLES, 3))
    assert caught.value is error
    assert not redone(events)
    assert script.calls == call + 1


# ----------------------------------------------------------------------------------------------
# written in place


def writes(x: torch.Tensor) -> torch.Tensor:
    x.mul_(2).add_(1)
    return x.sum()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("call", range(4))
def test_a_write_reaches_the_caller_once_when_memory_runs_out(
    late: bool, in_dim: int, call: int, script: Script
) -> None:
    """Rows that a failed chunk may have written are restored before they are computed again."""
    setattr(script, "late" if late else "early", once_from(call, OUT_OF_MEMORY[0]))
    shape = (SAMPLES + 1, 3) if in_dim == 0 else (3, SAMPLES + 1)
    batch, expected = batch_of(*shape), batch_of(*shape)
    got = shardmap.vmap(writes, in_dim, chunk_size=4)(batch)
    same((got, batch), (oracle.loop(writes, in_dim)(expected), expected))
    assert max(script.computed.values()) == 1 + late


@pytest.mark.usefixtures("several_devices", "taking_turns")
@pytest.mark.parametrize("call", range(4))
def test_a_write_reaches_the_caller_once_when_a_device_dies(call: int, script: Script) -> None:
    script.late = at(call, lambda: torch.AcceleratorError(DIES))
    batch, expected = batch_of(SAMPLES, 3), batch_of(SAMPLES, 3)
    with pytest.warns(errors.DeviceLostWarning):
        got = shardmap.vmap(writes, chunk_size=4, devices=["cpu"] * 3)(batch)
    same((got, batch), (oracle.loop(writes)(expected), expected))


def test_a_write_that_autograd_recorded_cannot_be_taken_back(script: Script) -> None:
    script.late = at(1, OUT_OF_MEMORY[0])
    batch = batch_of(SAMPLES, 3).requires_grad_() * 1
    with pytest.raises(
        errors.OutOfMemory, match=r"shardmap.vmap\(writes, in_dims=0\).*in place.*chunk_size"
    ):
        shardmap.vmap(writes, chunk_size=4)(batch)


# ----------------------------------------------------------------------------------------------
# devices that die


@pytest.mark.usefixtures("several_devices", "taking_turns")
@pytest.mark.parametrize("reduce", [None, "sum", (torch.add, None)])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("lane", range(3))
@pytest.mark.parametrize("call", range(4))
def test_the_others_finish_when_a_device_dies(
    reduce: Any, late: bool, lane: int, call: int, script: Script, events: list[Any]
) -> None:
    """At any chunk of any device: one warning, all results, and the device gets nothing more."""
    died: list[int] = []

    def die(there: Any, chunk: Chunk, number: int) -> None:
        assert not died or there.number != lane, "a device that died was asked again"
        if there.number == lane and number >= call:
            died.append(number)
            raise torch.AcceleratorError(DIES)

    setattr(script, "late" if late else "early", die)
    batch = batch_of(101, 3)
    with pytest.warns(errors.DeviceLostWarning) as caught:
        got = shardmap.vmap(
            function, check="off", devices=["cpu"] * 3, chunk_size=5, reduce=reduce
        )(batch)
    want = oracle.loop(function)(batch)
    same(got, want if reduce is None else tuple(t.sum(0) for t in want))
    lost = [str(w.message) for w in caught if w.category is errors.DeviceLostWarning]
    (again,) = redone(events)
    assert len(lost) == 1
    assert lost[0].startswith(
        f"shardmap.vmap(function, in_dims=0): gpu{lane} failed with samples {again.start} to "
        f"{again.stop - 1}"
    )
    assert "illegal memory access" in lost[0]
    assert "\n" not in lost[0]
    twice = set(range(again.start, again.stop)) if late else set()
    assert script.computed == {i: 1 + (i in twice) for i in range(101)}


@pytest.mark.usefixtures("several_devices", "taking_turns")
def test_two_devices_die_at_different_chunks(script: Script) -> None:
    died: set[int] = set()

    def die(there: Any, chunk: Chunk, number: int) -> None:
        if there.number < 2 and there.number not in died and number >= 2:
            died.add(there.number)
            if len(died) == 2 and chunk.start in failed:
                died.discard(there.number)
                return
            failed.add(chunk.start)
            raise torch.AcceleratorError(DIES)

    failed: set[int] = set()
    script.early = die
    batch = batch_of(101, 3)
    with pytest.warns(errors.DeviceLostWarning) as caught:
        got = shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=5)(batch)
    same(got, oracle.loop(function)(batch))
    assert len([w for w in caught if w.category is errors.DeviceLostWarning]) == 2
    assert died == {0, 1}


@pytest.mark.usefixtures("several_devices", "taking_turns")
@pytest.mark.parametrize("sample", [0, 5, 12])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_two_devices_fail_on_the_same_samples(sample: int, chunk_size: int, script: Script) -> None:
    """Then it is the data, and the third device is spared."""

    def die(there: Any, chunk: Chunk, number: int) -> None:
        if chunk.start <= sample < chunk.stop:
            raise torch.AcceleratorError(DIES)

    script.early = die
    with pytest.warns(errors.DeviceLostWarning), pytest.raises(errors.DeviceLostError) as caught:  # noqa: PT012
        shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=chunk_size)(
            batch_of(SAMPLES, 3)
        )
    text = str(caught.value)
    assert text.startswith("shardmap.vmap(function, in_dims=0): gpu")
    assert "the error may be in the data" in text
    assert "illegal memory access" in text


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
def test_the_only_device_dies(devices: Any, script: Script) -> None:
    """A device that is named twice is one."""
    script.early = at(1, lambda: torch.AcceleratorError(DIES))
    with pytest.raises(
        errors.DeviceLostError,
        match=r"shardmap.vmap\(function.*cpu failed with samples .*no other device is left",
    ):
        shardmap.vmap(function, check="off", devices=devices, chunk_size=4)(batch_of(SAMPLES, 3))


@pytest.mark.usefixtures("several_devices", "taking_turns")
def test_gradients_lead_through_the_device_that_died(script: Script) -> None:
    script.early = at(2, lambda: torch.AcceleratorError(DIES))
    with pytest.raises(errors.DeviceLostError, match="gradients"):
        shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=4)(
            batch_of(SAMPLES, 3).requires_grad_()
        )


@pytest.mark.usefixtures("several_devices", "taking_turns")
@pytest.mark.parametrize("seed", range(8))
def test_memory_runs_out_and_devices_die(seed: int, script: Script) -> None:
    """In one call, at random; the last device lives."""
    draw, dead = random.Random(seed), set()

    def fail(there: Any, chunk: Chunk, number: int) -> None:
        if chunk.size > 1 and draw.random() < 0.2:
            raise draw.choice(OUT_OF_MEMORY)()
        if there.number and not dead and draw.random() < 0.1:
            dead.add(there.number)
            raise torch.AcceleratorError(DIES)

    script.early = fail
    batch = batch_of(101, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.DeviceLostWarning)
        got = shardmap.vmap(
            function, check="off", devices=["cpu"] * 3, chunk_size=16, reduce=("sum", None)
        )(batch)
    want = oracle.loop(function)(batch)
    same(got, (want[0].sum(0), want[1]))
    assert set(script.computed.values()) == {1}


@pytest.mark.usefixtures("several_devices")
def test_a_slow_device_does_less(script: Script) -> None:
    """Ten times slower: a tenth of the others' work, and right results."""

    def wait(there: Any, chunk: Chunk, number: int) -> None:
        time.sleep(0.002 * chunk.size * (10 if there.number == 1 else 1))

    script.early = wait
    batch = batch_of(101, 3)
    got = shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=1)(batch)
    same(got, oracle.loop(function)(batch))
    slow, *fast = (script.by_lane[i] for i in (1, 0, 2))
    assert slow * 4 < min(fast), script.by_lane
    assert slow + sum(fast) == 101


# ----------------------------------------------------------------------------------------------
# interrupts


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("how", ["plain", "grad", "remat", "sum", "fold"])
@pytest.mark.parametrize("devices", ["cpu", ["cpu"] * 3])
@pytest.mark.parametrize("call", range(4))
def test_an_interrupt_leaves_nothing_behind(
    error: Any, how: str, devices: Any, call: int, script: Script
) -> None:
    """No result of the call is alive, even while the traceback is held, and grad mode is as before."""
    script.early = at(call, error)
    batch = batch_of(SAMPLES, 3).requires_grad_(how in ("grad", "remat"))
    options: dict[str, Any] = {"remat": how == "remat"}
    if how in ("sum", "fold"):
        options["reduce"] = "sum" if how == "sum" else (torch.add, None)
    for enabled in (True, False):
        script.calls = 0
        with torch.set_grad_enabled(enabled):
            with pytest.raises(error) as caught:
                shardmap.vmap(function, check="off", devices=devices, chunk_size=4, **options)(
                    batch
                )
            assert torch.is_grad_enabled() is enabled
        assert all(ref.expired() for ref in script.made), "a result is alive"
        assert len(script.made) > 0 or call == 0
        del caught


inside: list[StorageWeakRef] = []
armed = False


@torch.library.custom_op("shardmap_faults_test::odd", mutates_args=())
def odd(t: torch.Tensor) -> torch.Tensor:
    """An operator that may be interrupted."""
    inside.append(StorageWeakRef(t.untyped_storage()))
    if armed:
        raise KeyboardInterrupt
    return t * 2


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("how", ["plain", "whole", "grad"])
@pytest.mark.parametrize("call", range(3))
def test_an_interrupt_inside_a_chunk_leaves_nothing_behind(
    how: str, call: int, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk's intermediates die too, while the traceback is held."""

    def arm(lane: Any, chunk: Chunk, number: int) -> None:
        monkeypatch.setitem(globals(), "armed", number == call)

    script.early, script.late = arm, lambda *_: monkeypatch.setitem(globals(), "armed", False)
    weight = batch_of(3).requires_grad_(how == "grad")
    batch = batch_of(SAMPLES, 3)
    del inside[:]

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        return odd(y) + y * weight

    ready = prepare.Devices.on

    def on(self: Any, name: str, several: bool, slices: bool | None = None) -> Any:
        there = ready(self, name, several, slices)
        monkeypatch.setitem(globals(), "armed", how == "whole")  # then there is no lane that could
        return there

    monkeypatch.setattr(prepare.Devices, "on", on)
    with pytest.raises(KeyboardInterrupt) as caught:
        shardmap.vmap(interrupted, chunk_size=None if how == "whole" else 4)(batch)
    assert torch.is_grad_enabled()
    assert inside
    assert all(ref.expired() for ref in (*inside, *script.made)), "an intermediate is alive"
    del caught


def test_memory_of_a_failed_chunk_is_free_before_it_is_tried_again(script: Script) -> None:
    """The error's traceback held the chunk's tensors: it is gone when the halves are computed."""
    held: list[StorageWeakRef] = []

    def fail(lane: Any, chunk: Chunk, number: int) -> None:
        if number == 1:
            mine = torch.ones(1000)
            held.append(StorageWeakRef(mine.untyped_storage()))
            raise MemoryError(mine.shape)
        if number == 2:
            assert held[0].expired(), "the failed chunk's memory is still taken"

    script.early = fail
    batch = batch_of(SAMPLES, 3)
    same(shardmap.vmap(function, check="off", chunk_size=4)(batch), oracle.loop(function)(batch))
    assert script.calls > 2


def test_the_device_is_made_ready_once_whatever_fails(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured tensors are not copied again for a chunk that is tried again."""
    copied: list[Any] = []
    original = prepare.captured_to

    def counted(t: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(t)
        return original(t, device)

    monkeypatch.setattr(prepare, "captured_to", counted)
    script.early = larger_than(1)
    weight, batch = batch_of(3, 3), batch_of(SAMPLES, 3)
    same(
        shardmap.vmap(lambda x: weight @ x, chunk_size=8)(batch),
        oracle.loop(lambda x: weight @ x)(batch),
    )
    assert len(copied) == 1
