"""Shards, chunks, and the names of devices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from shardmap.errors import DeviceError
from shardmap.planning import device
from shardmap.planning.split import Chunk, chunks_of

SIZES = (0, 1, 2, 3, 7, 12)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("samples", "step"), list(itertools.product(SIZES, (1, 2, 3, 100))))
def test_chunks_partition_the_batch_in_order(samples: int, step: int) -> None:
    """Every sample exactly once, in order.

    Fails on a gap, an overlap, or a chunk that is too large.
    """
    chunks = chunks_of(samples, step)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(samples))
    assert all(c.size <= step for c in chunks)
    assert all(c.size for c in chunks) or chunks == (Chunk(0, 0),)


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
    with pytest.raises(
        DeviceError,
        match="cuda:3, which is not there; this machine has cpu, cuda:0, cuda:1, cuda:2",
    ):
        device.resolve("cuda:1,3", CPU, "call")


@pytest.mark.parametrize(
    "devices", ["abacus", "abacus:*", "cpu:1", "", [], ["cpu", "abacus"], 0, None, [0], "cuda:x"]
)
def test_what_is_not_there_is_named(devices: Any) -> None:
    """The message carries the call and the value, and lists what is there where that helps."""
    with pytest.raises(DeviceError) as caught:
        device.resolve(devices, CPU, "the call")
    assert str(caught.value).startswith("the call: devices=")
    assert repr(devices) in str(caught.value)
    if isinstance(devices, str):
        assert ", ".join(device.available()) in str(caught.value)
