"""The progress bar: what it counts, and when it is silent."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest
import rich.console
import torch

import shardmap
from shardmap.run import progress
from shardmap.run.base import ChunkDone, ChunkRedone, RunFinished, RunStarted, listen


def drawn(*events: object) -> str:
    """The last state of the bars after these events, as text."""
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with progress.bars(console=console) as bars:
        for event in events:
            bars(event)  # type: ignore[arg-type]
        lines = bars.progress.get_renderable()
        console = rich.console.Console(file=(text := io.StringIO()), width=200, color_system=None)
        console.print(lines)
    return text.getvalue()


def test_it_counts_samples_and_chunks_in_all_and_per_device() -> None:
    text = drawn(
        RunStarted(1000, 4, ("cuda:0", "cuda:1")), ChunkDone("cuda:0", 0, 300, 0.1), ChunkDone("cuda:1", 300, 500, 0.1),
        ChunkDone("cuda:0", 500, 800, 0.1),
    )  # fmt: skip
    whole, first, second = text.splitlines()[:3]
    assert whole.startswith("mapping")
    assert "800/1,000 samples" in whole
    assert "3/4 chunks" in whole
    assert "/s" in whole
    assert "cuda:0" in first
    assert "600 samples" in first
    assert "2 chunks" in first
    assert "200 samples" in second


def test_one_device_is_one_line_and_more_chunks_than_planned_are_no_nonsense() -> None:
    text = drawn(RunStarted(4, 1, ("cpu",)), ChunkRedone("cpu", 0, 4, "memory"), ChunkDone("cpu", 0, 2, 0.1), ChunkDone("cpu", 2, 4, 0.1))
    assert len(text.splitlines()) == 1
    assert "4/4 samples" in text
    assert "2/2 chunks" in text
    assert "again: memory" in text


def test_an_empty_batch_and_the_end() -> None:
    text = drawn(RunStarted(0, 1, ("cpu",)), ChunkDone("cpu", 0, 0, 0.0), RunFinished(0.0))
    assert "mapped" in text


def test_it_draws_where_asked_and_is_silent_elsewhere() -> None:
    """In a process whose stderr is no terminal: only "always" draws, and rich is not even imported otherwise."""
    script = """
import sys, torch, shardmap
x = torch.randn(300, 200)
shardmap.vmap(lambda r: r.outer(r).sum(), chunk_size=20, progress={value!r})(x)
print("rich" in sys.modules)
"""
    for value, imported in ((True, "False"), ("always", "True"), (False, "False")):
        done = subprocess.run([sys.executable, "-c", script.format(value=value)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == imported
        assert ("300/300 samples" in done.stderr) == (value == "always")
        if value != "always":
            assert done.stderr == ""


def test_nothing_is_left_running_after_an_error() -> None:
    before = threading.active_count()

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen(interrupt):
        shardmap.vmap(torch.sin, chunk_size=2, progress="always")(torch.randn(10))
    assert threading.active_count() == before
