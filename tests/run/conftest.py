"""Fixtures for chunks that fail as a script says, and for graphs that only pretend."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import shardmap
from shardmap import errors
from shardmap.planning.split import Chunk
from shardmap.run import cuda_graphs, lanes, local
from shardmap.run.base import listen
from tests.run.faults import Pretend, Script
from tests.run.pretended_graphs import Pretended


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Chunks fail as the script says; nothing is known of any program."""
    shardmap.clear_caches()
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


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """The events that a map has reported."""
    heard: list[Any] = []
    with listen(heard.append):
        yield heard


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """Pretended graphs; a test fails if anything runs without one and it does not say so."""
    shardmap.clear_caches()
    found = Pretended()
    monkeypatch.setattr(cuda_graphs, "graphs", found)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.CompileWarning)
        yield found
    shardmap.clear_caches()
