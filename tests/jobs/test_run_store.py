"""Runs whose outputs go to a store: killed and gone on with, verified, and refused in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load
from shardmap.jobs.run import execute
from shardmap.run.base import ChunkDone, listen

ROOT = Path(__file__).parents[2]
GRADIENTS = str(ROOT / "configs" / "digits_gradients")
MODULE = """
import torch
from shardmap.jobs import Dataset, Findings

def load(*, rows: int = 23, shift: float = 0.0):
    return Dataset({"x": torch.arange(3.0 * rows).view(rows, 3) + shift})

def model(dataset):
    return torch.randn(3)

def noisy(weight, x):
    return {"noisy": (x * weight).sin() + torch.rand(3), "norm": x.norm()}

def report(outcome):
    noisy, norm = outcome.rows()
    return Findings(f"{type(outcome.outputs).__name__} of {len(noisy)} rows", {"norm": float(norm.sum())})
"""
CONFIG = """
data: {path: users_store.load, init_args: {rows: 23}}
model: users_store.model
function: users_store.noisy
report: users_store.report
randomness: different
devices: cpu
chunk_size: 4
seed: 5
output: runs/mine
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of the user's own, as the current directory."""
    (tmp_path / "users_store.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_store", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def chunks() -> tuple[list[tuple[int, int]], object]:
    """The chunks that are computed inside the context."""
    seen: list[tuple[int, int]] = []
    return seen, listen(
        lambda event: (
            seen.append((event.start, event.stop)) if isinstance(event, ChunkDone) else None
        )
    )


def rows(url: str = "store") -> list[torch.Tensor]:
    store = shardmap.open_store(url)
    return [store.read(k, 0, store.header.samples) for k in range(len(store.header.outputs))]


@pytest.mark.parametrize("kind", ["zarr", "safetensors", "memmap"])
def test_a_store_holds_what_the_run_without_one_saves_and_says_how_it_was_made(
    kind: str, workplace: Path, capsys
) -> None:
    assert main(["run", "run.yaml"]) == 0
    assert main(["run", "run.yaml", "--store", "store", "--store_kind", kind]) == 0
    said = capsys.readouterr().out
    assert "ZarrStore of 23 rows" in said
    assert f"{kind.capitalize()}Store of 23 rows" in said
    assert "written to runs/mine-2, the outputs to store" in said
    kept, stored = rows("runs/mine/results.zarr"), rows()
    assert torch.equal(stored[0], kept[0])
    assert torch.equal(stored[1], kept[1])
    assert not Path("runs/mine-2/results.zarr").exists()
    assert not list(Path("runs").glob("*/outputs.safetensors"))
    summary = json.loads(Path("runs/mine-2/summary.json").read_text())
    assert (summary["store"], summary["units"]) == (str(workplace / "store"), 6)
    header = shardmap.open_store("store").header
    assert [spec.name for spec in header.outputs] == ["noisy", "norm"]
    assert header.attributes["function"] == "users_store.noisy"
    assert header.attributes["configuration"]["data"]["init_args"] == {"rows": 23, "shift": 0.0}
    assert header.attributes["configuration_hash"] == bind(load("run.yaml")).config.digest()
    assert header.attributes["versions"]["torch"] == torch.__version__


def test_a_killed_run_goes_on_with_exactly_the_missing_units(workplace: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal
        from shardmap.cli import main
        from shardmap.run.base import ChunkDone, listen
        def kill(event):
            if isinstance(event, ChunkDone) and event.stop == 12:
                os.kill(os.getpid(), signal.SIGKILL)
        with listen(kill):
            main(["run", "run.yaml", "--store", "store"])
        """
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    killed = subprocess.run(
        [sys.executable, "-c", script], check=False, env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    there = shardmap.open_store("store")
    missing = there.missing()
    assert 0 < len(missing) < 6
    assert json.loads(Path("runs/mine/state.json").read_text())["state"] == "unfinished"
    seen, listening = chunks()
    with listening:
        assert main(["resume", "store"]) == 0
    assert json.loads(Path("runs/mine/state.json").read_text()) == {"state": "complete"}
    assert [path.name for path in Path("runs").iterdir()] == ["mine"]
    assert [i for a, b in seen for i in range(a, b)] == [
        i for unit in missing for i in range(*there.header.rows(unit))
    ]
    main(["run", "run.yaml", "--store", "whole"])
    assert all(torch.equal(a, b) for a, b in zip(rows(), rows("whole"), strict=True))


def test_ctrl_c_keeps_what_is_committed_and_says_how_to_go_on(workplace: Path, capsys) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone) and event.stop == 12:
            raise KeyboardInterrupt

    with listen(interrupt):
        assert main(["run", "run.yaml", "--store", "store"]) == 130
    told = "shardmap: interrupted; units that are in store stay, and `shardmap resume store` goes on with them\n"
    assert capsys.readouterr().err == told
    assert shardmap.open_store("store").missing() == [3, 4, 5]
    assert not Path("runs/mine").exists()  # nothing of the outputs was in it
    assert main(["run", "run.yaml", "--store", "store", "--resume", "true"]) == 0
    assert "3 of 6 units are there, and stay" in capsys.readouterr().out
    assert shardmap.open_store("store").missing() == []
    seen, listening = chunks()
    with listening:
        assert main(["resume", "store", "--output", "runs/again"]) == 0
    assert seen == []
    assert Path("runs/again/summary.json").exists()


def test_ctrl_c_before_there_is_a_store_leaves_nothing(workplace: Path, capsys) -> None:
    (workplace / "users_store.py").write_text(
        MODULE.replace("return torch.randn(3)", "raise KeyboardInterrupt")
    )
    assert main(["run", "run.yaml", "--store", "store"]) == 130
    assert capsys.readouterr().err == "shardmap: interrupted; nothing was left behind\n"
    assert not Path("store").exists()
    assert not Path("runs").exists()


def test_a_store_is_gone_on_with_where_it_has_moved_to(workplace: Path) -> None:
    main(["run", "run.yaml", "--store", "store"])
    shardmap.open_store("store").discard(2)
    Path("store").rename("moved")
    assert main(["resume", "moved"]) == 0
    assert shardmap.open_store("moved").missing() == []
    assert not Path("store").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "6"], "Keys that differ: seed: 5 is stored, 6 is given"),
        (
            ["--data.init_args.rows", "22"],
            "Keys that differ: data.init_args.rows: 23 is stored, 22 is given",
        ),
        (["--data.init_args.shift", "1"], "data: the samples have changed"),
    ],
)
def test_another_run_is_refused_with_the_keys_that_differ(
    words: list[str], said: str, workplace: Path, capsys
) -> None:
    main(["run", "run.yaml", "--store", "store"])
    before = {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()}
    runs = sorted(Path("runs").iterdir())
    capsys.readouterr()
    assert main(["run", "run.yaml", "--store", "store", "--resume", "true", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds another run" in error
    assert said in error
    assert {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()} == before
    assert sorted(Path("runs").iterdir()) == runs


def test_reduced_outputs_are_the_mean_and_no_report_of_rows_takes_them(
    workplace: Path, capsys
) -> None:
    from safetensors.torch import load_file

    assert main(["run", "run.yaml", "--reduce", "mean", "--report", "null"]) == 0
    main(["run", "run.yaml"])
    mean, kept = load_file("runs/mine/outputs.safetensors"), rows("runs/mine-2/results.zarr")
    torch.testing.assert_close(mean["noisy"], kept[0].mean(0))
    assert mean["norm"].shape == ()
    capsys.readouterr()
    assert main(["run", "run.yaml", "--reduce", "mean", "--output", "runs/refused"]) == 2
    assert "reduce: the report needs the outputs of each sample" in capsys.readouterr().err
    assert not Path("runs/refused").exists()


def test_the_digits_report_reads_from_a_store(tmp_path: Path) -> None:
    words = ["--model.init_args.epochs", "1", "--report.init_args.top", "3"]
    kept, findings = execute(bind(load(GRADIENTS, [*words, "--output", str(tmp_path / "kept")])))
    _, again = execute(
        bind(
            load(
                GRADIENTS,
                [*words, "--output", str(tmp_path / "run"), "--store", str(tmp_path / "store")],
            )
        )
    )
    assert findings is not None
    assert again is not None
    assert again.numbers == findings.numbers


# -- shardmap verify
# ---------------------------------------------------------------------------------------------------


def test_a_good_store_is_verified_and_left_alone(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    before = {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()}
    runs = sorted(Path("runs").iterdir())
    capsys.readouterr()
    assert main(["verify", "store"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: all as written"
    assert out[-1] == "3 of 6 units recomputed: equal to the last bit"
    seen, listening = chunks()
    with listening:
        assert main(["verify", "store", "--all", "--devices", '["cpu", "cpu"]']) == 0
    assert sorted(seen)[0] == (0, 4)
    assert sum(b - a for a, b in seen) == 23
    assert (
        capsys.readouterr().out.splitlines()[-1] == "6 of 6 units recomputed: equal to the last bit"
    )
    assert main(["verify", "store", "--units", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no unit was computed again"
    assert {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()} == before
    assert sorted(Path("runs").iterdir()) == runs


def test_a_flipped_byte_is_found_discarded_and_computed_anew(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store", "--store_kind", "memmap"])
    whole = rows()
    path = Path("store/noisy.npy")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # in the last unit
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "store"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: 1 damaged"
    assert out[1] == "unit 5 (rows 20 to 22): damaged, its bytes are not those that were written"
    assert (
        out[-1]
        == "`shardmap verify store --discard` takes these units back, `shardmap resume store` computes them anew"
    )
    assert shardmap.open_store("store").missing() == []
    assert main(["verify", "store", "--discard"]) == 1
    assert "1 units are discarded" in capsys.readouterr().out
    assert shardmap.open_store("store").missing() == [5]
    assert main(["resume", "store"]) == 0
    assert main(["verify", "store", "--all"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(rows(), whole, strict=True))


def test_a_changed_number_with_a_right_checksum_is_found(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    store = shardmap.open_store("store")
    changed = store.read_unit(1)
    changed[0][2, 1] += 0.25
    store.commit(store.write(1, changed))
    capsys.readouterr()
    assert main(["verify", "store", "--all"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: all as written"
    assert out[-3] == "6 of 6 units recomputed: 1 differ"
    assert out[-2] == "unit 1 (rows 4 to 7): noisy differs by up to 0.25"
    assert main(["verify", "store", "--all", "--discard"]) == 1
    assert shardmap.open_store("store").missing() == [1]
    assert main(["verify", "store"]) == 0
    assert "5 of 6 units are committed" in capsys.readouterr().out


def test_rounding_is_no_difference_and_is_said(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    store = shardmap.open_store("store")
    changed = store.read_unit(1)
    changed[1][:] = torch.nextafter(changed[1], torch.tensor(torch.inf))
    store.commit(store.write(1, changed))
    capsys.readouterr()
    assert main(["verify", "store", "--all"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("6 of 6 units recomputed: equal within rounding, largest difference ")
    assert last.endswith(", in norm")


@pytest.mark.parametrize("change", ["function", "model", "data"])
def test_code_that_has_changed_since_is_said_in_words(
    change: str, workplace: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["run", "run.yaml", "--store", "store"])
    old, new = {
        "function": (".sin()", ".cos()"),
        "model": ("randn", "rand"),
        "data": ("+ shift", "+ shift + 1"),
    }[change]
    (workplace / "users_store.py").write_text(MODULE.replace(old, new))
    monkeypatch.delitem(sys.modules, "users_store")
    capsys.readouterr()
    assert main(["verify", "store"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("6 of 6 units are committed; checksums: all as written\n")
    assert captured.err.count("\n") == 1
    wanted = (
        "data: the samples have changed"
        if change == "data"
        else "program: the function, or a tensor that it captures, has changed"
    )
    assert f"cannot be compared, it holds another run: {wanted}" in captured.err
    assert (
        "The configuration is the same: the code or the files that it names have changed"
        in captured.err
    )


def test_a_function_that_is_gone_is_said_in_words(
    workplace: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["run", "run.yaml", "--store", "store"])
    (workplace / "users_store.py").write_text(MODULE.replace("def noisy", "def noise"))
    monkeypatch.delitem(sys.modules, "users_store")
    capsys.readouterr()
    assert main(["verify", "store"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "shardmap: function.path: 'users_store.noisy' cannot be imported, users_store has no noisy; did you mean users_store.noise?\n"
    )


def test_a_store_of_a_script_is_hashed_and_nothing_else(workplace: Path, capsys) -> None:
    shardmap.vmap(torch.sin, out=shardmap.MemmapSink("store"), chunk_size=3)(torch.ones(7, 2))
    assert main(["verify", "store"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 of 3 units are committed; checksums: all as written"
    assert "not written by a configured run" in out[1]
    assert f"out=shardmap.store.Recompute({str(workplace / 'store')!r}), resume=True" in out[1]
    assert main(["resume", "store"]) == 2
    assert (
        "was not written by a configured run; call shardmap.vmap as it was called"
        in capsys.readouterr().err
    )


# -- shardmap plan -----------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_nothing_is_written(workplace: Path, capsys) -> None:
    before = sorted(workplace.rglob("*"))
    seen, listening = chunks()
    with listening:
        assert main(["plan", "run.yaml"]) == 0
        out = capsys.readouterr().out
        assert "cpu       23      4       6" in out
        assert "workers" not in out
        assert main(["plan", "run.yaml", "--workers", "5", "--store", "store"]) == 0
        out = capsys.readouterr().out
        assert "Outputs go to store, 6 units of 4 rows" in out
        assert "5 workers, each like this machine" in out
        assert "store requests            18  2 and the manifest's entry for each unit" in out
        assert main(["plan", "run.yaml", "--devices", "ray"]) == 0
        assert "--workers N forecasts" in capsys.readouterr().out
        assert main(["plan", "run.yaml", "--devices", "ray", "--workers", "3"]) == 0
        assert "3 workers, each like this machine" in capsys.readouterr().out
    assert seen == []
    assert sorted(workplace.rglob("*")) == before


def test_the_forecast_counts_what_the_run_moves(workplace: Path) -> None:
    from shardmap.jobs.plan import plan

    _, found = plan(bind(load("run.yaml", ["--chunk_size", "auto"])), workers=2)
    assert found is not None
    assert (found.sent_bytes, found.gathered_bytes) == (23 * 3 * 4, 23 * (3 + 1) * 4)
    assert found.workload.program_bytes > 3 * 4
    assert (found.task_samples, found.tasks) == (2, 12)


def test_a_measurement_replaces_the_guess(tmp_path: Path) -> None:
    from shardmap.jobs.plan import plan

    planned, found = plan(
        bind(load(GRADIENTS, ["--model.init_args.epochs", "0"])), workers=2, measure=True
    )
    assert found is not None
    assert found.workload.measured
    assert "~" not in str(found)
    assert found.compute_seconds > 0
    assert planned.seconds == pytest.approx(1797 * found.workload.sample_seconds)


# -- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_configured_number_of_workers_gathers_and_reduces(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setenv("RAY_ADDRESS", "local")
    words = ["run", "run.yaml", "--devices", "ray", "--workers", "1"]
    for reduced in ([], ["--reduce", "sum", "--report", "null"]):
        assert main([*words, *reduced, "--output", "runs/ray"]) == 0
        assert main(["run", "run.yaml", *reduced, "--output", "runs/here"]) == 0
    there = load_file(
        "runs/ray/outputs.safetensors"
    )  # workers may not see the run folder: what they compute is gathered
    assert torch.allclose(there["noisy"], rows("runs/here/results.zarr")[0])
    assert torch.allclose(there["norm"], rows("runs/here/results.zarr")[1])
    here, there = (load_file(f"runs/{name}-2/outputs.safetensors") for name in ("here", "ray"))
    assert all(torch.allclose(here[name], there[name]) for name in here)


@pytest.mark.ray
def test_the_forecast_counts_the_units_that_workers_write(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardmap.jobs.plan import plan

    monkeypatch.setenv("RAY_ADDRESS", "local")
    words = ["--devices", "ray", "--workers", "2", "--store", "store", "--chunk_size", "auto"]
    _, found = plan(bind(load("run.yaml", words)))
    assert found is not None
    assert main(["run", "run.yaml", *words]) == 0
    header = shardmap.open_store("store").header
    assert (found.tasks, found.task_samples) == (header.units, header.unit) == (12, 2)


@pytest.mark.ray
def test_workers_write_to_the_store_of_a_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["run", "run.yaml", "--devices", "ray", "--workers", "1", "--store", "store"]) == 0
    shardmap.open_store("store").discard(2)
    assert main(["resume", "store"]) == 0
    assert main(["verify", "store", "--all"]) == 0
    assert "6 of 6 units recomputed: equal" in capsys.readouterr().out
    main(["run", "run.yaml", "--store", "here"])
    assert all(torch.allclose(a, b) for a, b in zip(rows(), rows("here"), strict=True))
