"""The progress bar: what it counts, and when it is silent."""

from __future__ import annotations

import functools
import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import rich.console
import torch

import shardmap
from shardmap.jobs import printing
from shardmap.jobs.folder import RunFolder
from shardmap.run import progress
from shardmap.run.base import ChunkDone, ChunkRedone, RunFinished, RunStarted, listen


def render(bars: progress.Bars, width: int = 200) -> str:
    """The present state of the bars, as text."""
    console = rich.console.Console(file=(text := io.StringIO()), width=width, color_system=None)
    console.print(bars.progress.get_renderable())
    return text.getvalue().rstrip("\n") + "\n"


def drawn(*events: object, says: str | None = None, width: int = 200) -> str:
    """The last state of the bars after these events, as text."""
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None
    )
    with progress.bars(console=console, preparing=says is not None) as bars:
        if says is not None:
            bars.say(says)
        for event in events:
            bars(event)  # type: ignore[arg-type]
        return render(bars, width)


def test_it_counts_samples_and_chunks_in_all_and_per_device() -> None:
    text = drawn(
        RunStarted(1000, 4, ("cuda:0", "cuda:1")), ChunkDone("cuda:0", 0, 300, 0.1), ChunkDone("cuda:1", 300, 500, 0.1),
        ChunkDone("cuda:0", 500, 800, 0.1),
    )  # fmt: skip
    whole, first, second = [line.strip() for line in text.splitlines()[:3]]
    assert whole.startswith("mapping")
    assert "800/1,000 samples" in whole
    assert "3/4 chunks" in whole
    assert "/s" in whole
    assert "cuda:0" in first
    assert "600 samples" in first
    assert "2 chunks" in first
    assert "share 75%" in first
    assert "200 samples" in second
    assert "1 chunk " in second
    assert "share 25%" in second
    assert whole.endswith("left")
    assert "left" not in first + second, "a device has no share of its own, and so no end"
    assert "/1,000" not in first + second


def test_a_worker_that_joins_gets_a_line() -> None:
    text = drawn(
        RunStarted(40, 8, ("ray:0", "ray:1")),
        ChunkDone("ray:0", 0, 10, 0.1),
        ChunkDone("ray:2", 10, 40, 0.1),
    )
    assert [line.split()[0] for line in text.splitlines()] == ["mapping", "ray:0", "ray:1", "ray:2"]
    assert "share 75%" in text.splitlines()[3]


def test_speeds_of_devices_side_by_side_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock on the wall.

    Two devices that took 4 s each for 400 samples did 200 per second together.
    """
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=200, color_system=None
    )
    with progress.bars(console=console) as bars:
        bars(RunStarted(1000, 10, ("a", "b")))
        now[0] += 4.0
        for name, start in (("a", 0), ("b", 400)):
            bars(ChunkDone(name, start, start + 400, 4.0))
        speeds = {task.description.strip(): task.fields["speed"] for task in bars.progress.tasks}
        assert speeds == {"mapping": "200/s", "a": "100/s", "b": "100/s"}
        assert bars.whole is not None
        task = bars.progress.tasks[0]
        assert task.fields["ends"] == pytest.approx(105.0), "200 samples at 200 per second"
        now[0] += 20.0
        assert "0:00:00 left" in render(bars), "never less than nothing"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_fits_its_terminal(width: int) -> None:
    text = drawn(
        RunStarted(1_000_000, 40, ("cuda:0#1", "cuda:0#2")), ChunkDone("cuda:0#1", 0, 300_000, 0.1),
        ChunkRedone("cuda:0#2", 300_000, 600_000, "RuntimeError: [enforce fail at "
            "alloc_cpu.cpp:117] " + 200 * "x"), width=width,
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) == 3


def test_what_is_said_is_plain_text() -> None:
    """Paths and reasons are full of what rich takes for markup.

    A closing tag without its opening one is an error there.
    """
    for said in ("reading [/tmp/x]", "a [bold] one", "[enforce fail at alloc_cpu.cpp:117]"):
        assert said in drawn(says=said)
    assert "one two" in drawn(says="one\n two")
    assert len(drawn(says=200 * "x", width=80).splitlines()) == 1


def test_chunks_that_were_not_planned() -> None:
    """Never all of them before the end, nor fewer than there are."""
    events = [RunStarted(8, 2, ("cpu",)), *[ChunkDone("cpu", i, i + 1, 0.1) for i in range(8)]]
    counts = [drawn(*events[: i + 1]).split(" samples ")[1].split(" chunk")[0] for i in range(9)]
    assert counts == ["0/2", "1/2", "2/3", "3/4", "4/5", "5/6", "6/7", "7/8", "8/8"]
    assert "1/1 chunks" in drawn(RunStarted(8, 4, ("cpu",)), ChunkDone("cpu", 0, 8, 0.1)), "or more"


def test_maps_inside_the_map_are_not_counted() -> None:
    inside = [
        RunStarted(3, 1, ("cuda:5", "cuda:6")),
        ChunkDone("cuda:5", 0, 3, 0.1),
        RunFinished(0.1),
    ]
    outside = [
        ChunkDone("cpu", 0, 250, 0.1),
        ChunkRedone("cpu", 250, 500, "memory"),
        ChunkDone("cpu", 250, 500, 0.1),
    ]
    text = drawn(RunStarted(1000, 4, ("cpu",)), *inside, outside[0], *inside, *outside[1:], *inside)
    assert len(text.splitlines()) == 1
    assert "500/1,000 samples" in text
    assert "2/4 chunks, 1 again" in text
    assert "mapped" in drawn(RunStarted(1, 1, ("cpu",)), *inside, RunFinished(0.1))


def test_one_map_after_the_other_begins_anew() -> None:
    one = [RunStarted(10, 1, ("a", "b")), ChunkDone("a", 0, 10, 0.1), RunFinished(0.1)]
    text = drawn(*one, RunStarted(1000, 4, ("cpu",)), ChunkDone("cpu", 0, 250, 0.1))
    assert len(text.splitlines()) == 1
    assert text.startswith("mapping")
    assert "250/1,000 samples" in text


def test_a_map_that_is_recorded_draws_nothing() -> None:
    """It did, and the import of rich moved python's random state, for which the recording blamed the function."""
    script = """
import torch, shardmap
inner = shardmap.vmap(torch.sin, progress="always")
print(shardmap.vmap(lambda r: inner(r).sum(), chunk_size=2, progress={value!r})(torch.zeros(5, 3)).tolist())
"""
    for value, lines in ((False, 0), ("always", 1)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(value=value)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[0.0, 0.0, 0.0, 0.0, 0.0]"
        assert ("5/5 samples" in done.stderr) == bool(lines)
        assert "3/3 samples" not in done.stderr


def test_there_is_one_bar_at_a_time() -> None:
    """A map inside another one's bar draws nothing of its own, whatever its option."""
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=100, color_system=None
    )
    other = rich.console.Console(file=(silent := io.StringIO()), force_terminal=True, width=100)
    with progress.bar(console=console):
        with progress.bar(console=other):
            shardmap.vmap(torch.sin, chunk_size=2, progress="always")(torch.randn(10))
    assert silent.getvalue() == ""
    assert "10/10 samples" in console.file.getvalue()  # type: ignore[attr-defined]
    with progress.bar(console=other):
        shardmap.vmap(torch.sin, chunk_size=2)(torch.randn(10))
    assert "10/10 samples" in silent.getvalue(), "afterwards there is room again"


def test_one_device_is_one_line_and_more_chunks_than_planned_are_no_nonsense() -> None:
    text = drawn(
        RunStarted(4, 1, ("cpu",)),
        ChunkRedone("cpu", 0, 4, "memory"),
        ChunkDone("cpu", 0, 2, 0.1),
        ChunkDone("cpu", 2, 4, 0.1),
    )
    assert len(text.splitlines()) == 1
    assert "4/4 samples" in text
    assert "2/2 chunks" in text
    assert "1 again" in text


def test_an_empty_batch_and_the_end() -> None:
    text = drawn(RunStarted(0, 1, ("cpu",)), ChunkDone("cpu", 0, 0, 0.0), RunFinished(0.0))
    assert "mapped" in text
    assert "0/0 samples" in text
    assert "1/1 chunks" in text
    shown = io.StringIO()
    with progress.bar(console=rich.console.Console(file=shown, force_terminal=True, width=100)):
        shardmap.vmap(torch.sin)(torch.randn(0, 3))
    assert "0/0 samples" in shown.getvalue()


def test_where_nobody_watches_events_and_texts_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line uses it in this way.

    Its log messages are handled, and rich is not imported.
    """
    monkeypatch.setattr(progress, "require", None)
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bars(preparing=True) as bars:
            bars.say("loading")
            for event in (
                RunStarted(1, 1, ("cpu",)),
                ChunkDone("cpu", 0, 1, 0.1),
                RunFinished(0.1),
            ):
                bars(event)
        with progress.bar():
            shardmap.vmap(torch.sin, progress=True)(torch.randn(2))
        assert stream is None or stream.getvalue() == ""


def test_it_draws_where_asked_and_is_silent_elsewhere() -> None:
    """In a process whose stderr is no terminal.

    Only "always" draws, and rich is not even imported otherwise.
    """
    script = """
import sys, torch, shardmap
x = torch.randn(300, 200)
shardmap.vmap(lambda r: r.outer(r).sum(), chunk_size=20, progress={value!r})(x)
print("rich" in sys.modules)
"""
    for value, imported in ((True, "False"), ("always", "True"), (False, "False")):
        done = subprocess.run(
            [sys.executable, "-c", script.format(value=value)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == imported
        assert ("300/300 samples" in done.stderr) == (value == "always")
        if value != "always":
            assert done.stderr == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_running_after_an_error(error: type[BaseException]) -> None:
    """No thread, no redirected stream, and the next bar draws."""
    before, streams = set(threading.enumerate()), (sys.stdout, sys.stderr)

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone):
            raise error

    with pytest.raises(error), listen(interrupt):
        shardmap.vmap(torch.sin, chunk_size=2, progress="always")(torch.randn(10))
    for thread in (
        set(threading.enumerate()) - before
    ):  # rich tells its thread to end and does not wait for it
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert (sys.stdout, sys.stderr) == streams
    assert not progress._drawing.get()


def test_the_command_line_shows_what_jobs_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages are shown at the begin of the map's line.

    Warnings stay above it, and the engine's own messages are for the log.
    """
    console = rich.console.Console(
        file=(shown := io.StringIO()), force_terminal=True, width=120, color_system=None
    )
    monkeypatch.setattr(progress, "bars", functools.partial(progress.bars, console=console))
    caplog.set_level(logging.INFO, "shardmap")
    with printing.progress() as drawn:
        (task,) = drawn.progress.tasks  # type: ignore[attr-defined]
        assert task.description == "preparing"
        logging.getLogger("shardmap.jobs.digits").info("epoch 1 of [/15]")
        logging.getLogger("shardmap.lower.cache").info("lowered")
        warnings.warn("careful", UserWarning, stacklevel=1)
        assert task.description == "epoch 1 of [/15]"
        drawn(RunStarted(1, 1, ("cpu",)))
        assert task.description == "mapping"
    assert "shardmap: warning: UserWarning: careful" in shown.getvalue()
    assert not [h for h in logging.getLogger("shardmap").handlers if type(h).__name__ == "Show"]


def test_a_run_log_has_a_line_for_each_event(tmp_path: Path) -> None:
    events = [
        RunStarted(10, 2, ("cpu", "cuda:0")), ChunkRedone("cuda:0", 5, 10, "OutOfMemoryError: [/x]"), ChunkDone("cpu", 0, 5, 0.25),
        RunFinished(1.5),
    ]  # fmt: skip
    with RunFolder.create(str(tmp_path / "run"), "") as folder:
        for event in events:
            folder.log_event(event)
        lines = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"event": "map started", "samples": 10, "chunks": 2, "devices": ["cpu", "cuda:0"]},
        {
            "event": "chunk redone",
            "device": "cuda:0",
            "start": 5,
            "stop": 10,
            "reason": "OutOfMemoryError: [/x]",
        },
        {"event": "chunk done", "device": "cpu", "start": 0, "stop": 5, "seconds": 0.25},
        {"event": "map finished", "seconds": 1.5, "redone": {}},
    ]
