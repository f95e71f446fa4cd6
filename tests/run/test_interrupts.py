"""Interrupts and failed chunks leave nothing in memory and no mode changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import shardmap
from shardmap.planning.split import Chunk
from shardmap.run import prepare
from tests import oracle
from tests.run.faults import (
    SAMPLES,
    Script,
    at,
    batch_of,
    function,
    larger_than,
    same,
)


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
