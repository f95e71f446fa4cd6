"""Devices that die or are slow: the others compute the rest, and results stay right."""

from __future__ import annotations

import random
import time
import warnings
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.planning.split import Chunk
from tests import oracle
from tests.run.faults import (
    DIES,
    OUT_OF_MEMORY,
    SAMPLES,
    Script,
    at,
    batch_of,
    function,
    redone,
    same,
)


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
    batch = batch_of(SAMPLES, 3)
    mapped = shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=chunk_size)
    with pytest.warns(errors.DeviceLostWarning), pytest.raises(errors.DeviceLostError) as caught:
        mapped(batch)
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
        # the sleep is the work of a device: nothing is waited for
        time.sleep(0.002 * chunk.size * (10 if there.number == 1 else 1))

    script.early = wait
    batch = batch_of(101, 3)
    got = shardmap.vmap(function, check="off", devices=["cpu"] * 3, chunk_size=1)(batch)
    same(got, oracle.loop(function)(batch))
    slow, *fast = (script.by_lane[i] for i in (1, 0, 2))
    assert slow * 4 < min(fast), script.by_lane
    assert slow + sum(fast) == 101
