"""Chunks for which memory runs out, and errors of the function: results stay right, writes happen once."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from shardmap.planning.split import Chunk
from tests import oracle
from tests.run.faults import (
    DIES,
    OUT_OF_MEMORY,
    SAMPLES,
    Script,
    at,
    batch_of,
    done,
    function,
    larger_than,
    once_from,
    redone,
    same,
)

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
