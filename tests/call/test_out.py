"""Results that are written to a store are those that are kept, each unit is computed once, and a run that was killed goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.run import lanes
from shardmap.run.base import ChunkDone, listen

SINKS: list[Callable[..., Any]] = [shardmap.ZarrSink, shardmap.MemmapSink, shardmap.SafetensorsSink]
W = torch.randn(4, 3)


def function(x: torch.Tensor) -> Any:
    """Several outputs, one of them the same for all samples, one in half precision."""
    return {"outer": x.outer(W @ x), "rest": (x.sum(), W.sum(0), x.bfloat16().sin())}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The chunks that were computed, in order."""
    chunks: list[tuple[int, int]] = []
    original = lanes.Lane.compute

    def noted(self: Any, ready: Any, chunk: Any) -> Any:
        chunks.append((chunk.start, chunk.stop))
        return original(self, ready, chunk)

    monkeypatch.setattr(lanes.Lane, "compute", noted)
    return chunks


def stored(store: shardmap.Store) -> dict[str, torch.Tensor]:
    """All rows of all outputs, by name, from a store opened anew."""
    store = shardmap.open_store(store.url)
    assert store.missing() == []
    assert store.corrupt() == []
    return {
        spec.name: store.read(spec.name, 0, store.header.samples) for spec in store.header.outputs
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 1}, {"chunk_size": 5}, {"devices": ["cpu"] * 3, "chunk_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("samples", [0, 1, 3, 13])
@pytest.mark.parametrize("sink", SINKS)
def test_the_store_holds_what_the_map_returns(
    sink: Callable[..., Any], samples: int, options: dict[str, Any], tmp_path: Path
) -> None:
    x = torch.randn(samples, 3)
    want = shardmap.vmap(function)(x)
    found = stored(shardmap.vmap(function, out=sink(tmp_path / "store"), **options)(x))
    assert list(found) == ["outer", "rest.0", "rest.1", "rest.2"]
    for got, wanted in zip(found.values(), (want["outer"], *want["rest"]), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # chunks round by their size


def test_one_output_is_named_result_and_a_user_reads_plain_zarr(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    x = torch.randn(7, 3)
    shardmap.vmap(torch.sin, out=shardmap.ZarrSink(tmp_path / "store"))(x)
    assert (zarr.open_group(tmp_path / "store", mode="r")["result"][:] == x.sin().numpy()).all()


def test_an_interrupted_run_goes_on_with_exactly_what_is_missing(
    tmp_path: Path, computed: list[tuple[int, int]]
) -> None:
    x, sink = torch.randn(23, 3), shardmap.ZarrSink(tmp_path / "store")

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone) and event.stop == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen(interrupt):
        shardmap.vmap(function, out=sink, chunk_size=4)(x)
    first = list(computed)
    assert shardmap.open_store(tmp_path / "store").missing() == [3, 4, 5]
    store = shardmap.vmap(function, out=sink, chunk_size="auto", resume=True)(x)
    again = computed[len(first) :]
    assert [i for a, b in again for i in range(a, b)] == list(range(12, 23)), (
        "nothing twice, nothing missing"
    )
    want = shardmap.vmap(function)(x)["outer"]
    torch.testing.assert_close(stored(store)["outer"], want, rtol=1e-6, atol=1e-6)
    computed.clear()
    shardmap.vmap(function, out=sink, resume=True)(x)
    assert computed == [], "a complete store is left alone"


def test_memory_that_runs_out_writes_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = lanes.Lane.compute, [0]

    def fails(self: Any, ready: Any, chunk: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 3):
            raise MemoryError("as a test")
        return original(self, ready, chunk)

    monkeypatch.setattr(lanes.Lane, "compute", fails)
    x = torch.randn(23, 3)
    found = stored(
        shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "store"), chunk_size=8)(x)
    )
    assert torch.equal(found["rest.0"], x.sum(1))


@pytest.mark.parametrize("what", ["samples", "weights", "function", "size"])
def test_another_run_is_not_gone_on_with(what: str, tmp_path: Path) -> None:
    weight, x = torch.randn(3), torch.randn(7, 3)
    shardmap.vmap(lambda r: r @ weight, out=shardmap.ZarrSink(tmp_path / "store"), chunk_size=2)(x)
    other = x + 1 if what == "samples" else x[:5] if what == "size" else x
    changed = weight * 2 if what == "weights" else weight
    mapped = (lambda r: r @ changed + 1) if what == "function" else (lambda r: r @ changed)
    with pytest.raises(errors.StoreMismatchError, match="holds another run"):
        shardmap.vmap(mapped, out=shardmap.ZarrSink(tmp_path / "store"), resume=True)(other)


def test_draws_are_those_of_the_seed_and_another_seed_is_refused(tmp_path: Path) -> None:
    x, sink = torch.zeros(7, 3), shardmap.ZarrSink(tmp_path / "store")

    def mapped(**options: Any) -> Any:
        return shardmap.vmap(
            lambda r: r + torch.rand(3), randomness="different", chunk_size=2, **options
        )(x)

    torch.manual_seed(5)
    want = mapped()
    torch.manual_seed(5)
    store = mapped(out=sink)
    assert torch.equal(stored(store)["result"], want)
    store.discard(1)
    torch.manual_seed(5)
    assert torch.equal(stored(mapped(out=sink, resume=True))["result"], want)
    with pytest.raises(errors.StoreMismatchError, match="program"):
        mapped(out=sink, resume=True)


def test_what_cannot_be_stored_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    x, sink = torch.randn(5, 3), shardmap.ZarrSink(tmp_path / "store")
    refused = [
        (lambda: shardmap.vmap(torch.sin, out=sink)(x.clone().requires_grad_()), "requires grad"),
        (lambda: shardmap.vmap(torch.sin, out=sink, reduce="sum")(x), "reduce="),
        (lambda: shardmap.vmap(torch.sin, out=sink, out_dims=1)(x), "out_dims=1"),
        (
            lambda: shardmap.vmap(lambda r: shardmap.vmap(torch.sin, out=sink)(r))(x),
            "inside another map",
        ),
        (lambda: shardmap.vmap(torch.sin, out=str(tmp_path)), "pass a sink"),  # type: ignore[arg-type]
        (lambda: shardmap.vmap(torch.sin, resume=True), "resume=True without out="),
        (lambda: shardmap.vmap(lambda r: r.outer(r), out=sink, memory_budget="10B")(x), "budget"),
    ]
    for call, text in refused:
        with pytest.raises(errors.ShardmapError, match=text):
            call()
    assert not (tmp_path / "store").exists()


def test_a_killed_process_loses_no_committed_unit(tmp_path: Path) -> None:
    """SIGKILL in the middle, then the same script again."""
    script = textwrap.dedent(
        """
        import os, signal, sys, torch, shardmap
        from shardmap.run.base import ChunkDone, listen
        x = torch.arange(40.0).view(20, 2)
        def kill(event):
            if isinstance(event, ChunkDone) and event.stop == 12 and sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        with listen(kill):
            store = shardmap.vmap(lambda r: r.outer(r), out=shardmap.ZarrSink(sys.argv[1]), chunk_size=3, resume=True)(x)
        assert torch.equal(store.read("result", 0, 20), x[:, :, None] * x[:, None, :])
        """
    )
    where = str(tmp_path / "store")
    killed = subprocess.run(
        [sys.executable, "-c", script, where, "kill"], check=False, env=os.environ
    )
    assert killed.returncode == -signal.SIGKILL
    assert shardmap.open_store(where).missing() == [4, 5, 6]
    subprocess.run([sys.executable, "-c", script, where, "go on"], check=True)


def test_results_larger_than_the_memory_that_may_be_used(tmp_path: Path) -> None:
    """400 MB of results by way of 150 MiB, in a process of its own."""
    script = textwrap.dedent(
        """
        import sys, torch, shardmap
        def status(key):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
        x = torch.randn(2500, 200)
        mapped = lambda name: shardmap.vmap(lambda r: r.outer(r), out=shardmap.ZarrSink(sys.argv[1] + name), memory_budget="150MiB")
        mapped("first")(x[:3])
        before = status("VmRSS")
        store = mapped("store")(x)
        print(status("VmHWM") - before)
        assert torch.equal(store.read("result", 2490, 2500), x[2490:, :, None] * x[2490:, None, :])
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path) + os.sep],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 150 << 20
