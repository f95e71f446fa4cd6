"""Shards, chunks, and the names of devices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from shardmap.errors import DeviceError
from shardmap.planning import device
from shardmap.planning.split import split

SIZES = (0, 1, 2, 3, 7, 12)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("samples", "shards", "chunk_size"), list(itertools.product(SIZES, (1, 2, 3, 5), (None, 1, 2, 3, 100))))
def test_chunks_partition_the_batch_in_order(samples: int, shards: int, chunk_size: int | None) -> None:
    """Every sample exactly once, in order; fails on a gap, an overlap, or a chunk that is too large."""
    devices = tuple(f"cuda:{i}" for i in range(shards))
    plan = split(samples, devices, chunk_size)
    covered = [i for c in plan.chunks for i in range(c.start, c.stop)]
    assert covered == list(range(samples))
    if chunk_size is not None:
        assert all(c.stop - c.start <= chunk_size for c in plan.chunks)
    if samples:
        assert all(c.start < c.stop for c in plan.chunks), "no empty chunks"
    else:
        assert [(c.start, c.stop) for c in plan.chunks] == [(0, 0)]
    shares = [sum(c.stop - c.start for c in chunks) for _, chunks in plan.shards()]
    assert len(shares) == shards
    assert sum(shares) == samples
    assert max(shares) - min(shares) <= 1
    assert [c.device for c in plan.chunks] == sorted((c.device for c in plan.chunks), key=devices.index)


def test_a_device_named_twice_takes_two_shares() -> None:
    plan = split(5, ("cpu", "cpu"), None)
    assert [(c.start, c.stop) for c in plan.chunks] == [(0, 3), (3, 5)]
    assert [[(c.start, c.stop) for c in chunks] for _, chunks in plan.shards()] == [[(0, 3)], [(3, 5)]]


def test_the_text_of_a_plan() -> None:
    assert str(split(5, ("cpu", "cuda:0"), 2)).splitlines() == [
        "shard  device  samples  chunks  largest chunk",
        "    0     cpu        3       2              2",
        "    1  cuda:0        2       1              2",
    ]


@pytest.mark.parametrize("devices", ["auto", "cpu", "cpu:0", CPU, ["cpu"], (CPU,)])
def test_names_of_this_machine(devices: Any) -> None:
    assert device.resolve(devices, CPU, "call") == ("cpu",)


def test_repeats_are_kept() -> None:
    assert device.resolve(["cpu", "auto", CPU], CPU, "call") == ("cpu", "cpu", "cpu")


def test_names_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available", lambda: ("cpu", "cuda:0", "cuda:1", "cuda:2"))
    assert device.resolve("cuda:*", CPU, "call") == ("cuda:0", "cuda:1", "cuda:2")
    assert device.resolve("cuda:2, 0", CPU, "call") == ("cuda:2", "cuda:0")
    assert device.resolve(["cuda:1", "cpu"], CPU, "call") == ("cuda:1", "cpu")
    with pytest.raises(DeviceError, match="cuda:3, which is not there; this machine has cpu, cuda:0, cuda:1, cuda:2"):
        device.resolve("cuda:1,3", CPU, "call")


@pytest.mark.parametrize("devices", ["abacus", "abacus:*", "cpu:1", "", [], ["cpu", "abacus"], 0, None, [0], "cuda:x"])
def test_what_is_not_there_is_named(devices: Any) -> None:
    """The message carries the call and the value, and lists what is there where that helps."""
    with pytest.raises(DeviceError) as caught:
        device.resolve(devices, CPU, "the call")
    assert str(caught.value).startswith("the call: devices=")
    assert repr(devices) in str(caught.value)
    if isinstance(devices, str):
        assert ", ".join(device.available()) in str(caught.value)
