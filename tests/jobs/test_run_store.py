"""Runs whose outputs go to a store: killed and resumed, verified, and refused with a remedy."""

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
from tests.jobs.stored_run import GRADIENTS, MODULE, ROOT, chunks, rows
from tests.jobs.stored_run import workplace as workplace


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
        from shardmap.jobs.cli import main
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
    told = (
        "shardmap: interrupted; units that are in store stay, and `shardmap resume "
        "store` goes on with them\n"
    )
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
