"""Runs that are killed and resumed, by the name of their folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load, to_yaml
from shardmap.jobs.folder import RunFolder
from shardmap.run.base import ChunkDone, listen
from tests.jobs.noisy_run import ROOT, rows, state, stopped_after
from tests.jobs.noisy_run import workplace as workplace


def test_ctrl_c_keeps_the_folder_and_says_how_to_go_on(workplace: Path, capsys) -> None:
    with stopped_after(12):
        assert main(["run", "run.yaml"]) == 130
    assert (
        capsys.readouterr().err
        == "shardmap: interrupted; what is in runs/mine stays, and `shardmap resume "
        "runs/mine` goes on with it\n"
    )
    assert state() == "unfinished"
    assert main(["resume", "runs/mine", "--devices", '["cpu", "cpu"]']) == 0
    assert state() == "complete"
    assert main(["run", "run.yaml", "--output", "runs/whole"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(rows(), rows("runs/whole"), strict=True))


def test_ctrl_c_in_a_reduced_run_leaves_nothing(workplace: Path, capsys) -> None:
    with stopped_after(12):
        assert main(["run", "run.yaml", "--reduce", "sum", "--report", "null"]) == 130
    assert capsys.readouterr().err == "shardmap: interrupted; nothing was left behind\n"
    assert not Path("runs").exists()


def test_a_store_in_a_run_folder_stands_for_the_run(workplace: Path) -> None:
    with stopped_after(12):
        main(["run", "run.yaml"])
    assert main(["resume", "runs/mine/results.zarr"]) == 0
    assert state() == "complete"
    assert [path.name for path in Path("runs").iterdir()] == ["mine"]


def test_a_run_folder_may_move(workplace: Path) -> None:
    with stopped_after(12):
        main(["run", "run.yaml"])
    Path("runs/mine").rename("moved")
    assert main(["resume", "moved"]) == 0
    assert state("moved") == "complete"
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize("report", ["nothing", "broken"])
def test_a_report_that_fails_loses_nothing(report: str, workplace: Path, capsys) -> None:
    words = ["run", "run.yaml", "--report", f"users_resume.{report}"]
    if report == "nothing":
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "returned a NoneType" in error
        assert "`shardmap resume runs/mine --key value` goes on with it" in error
    else:
        with pytest.raises(LookupError, match="the user has to see this"):
            main(words)
        assert "`shardmap resume runs/mine` goes on with it" in capsys.readouterr().err
    assert state() == "unfinished"
    seen: list[object] = []
    with listen(lambda event: seen.append(event) if isinstance(event, ChunkDone) else None):
        assert main(["resume", "runs/mine", "--report", "users_resume.report"]) == 0
    assert seen == []
    assert state() == "complete"
    assert Path("runs/mine/norms.txt").exists()


def test_a_complete_run_is_left_alone_unless_units_were_taken_back(workplace: Path, capsys) -> None:
    main(["run", "run.yaml"])
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["resume", "runs/mine"]) == 0
    assert capsys.readouterr().out == "runs/mine is complete: there is nothing to go on with\n"
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before
    assert main(["resume", "runs/mine", "--report", "null"]) == 2
    assert "is complete, so --report changes nothing" in capsys.readouterr().err
    whole = rows()
    shardmap.open_store("runs/mine/results.zarr").discard(2)
    assert main(["resume", "runs/mine"]) == 0
    assert "5 of 6 units are there, and stay" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(rows(), whole, strict=True))


def test_another_run_is_not_gone_on_with(workplace: Path, capsys) -> None:
    with stopped_after(12):
        main(["run", "run.yaml"])
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    for words, said in (
        (["--seed", "6"], "Keys that differ: seed: 5 is stored, 6 is given"),
        (["--data.init_args.rows", "22"], "data.init_args.rows: 23 is stored, 22 is given"),
        (["--reduce", "mean"], 'reduce: null is stored, "mean" is given'),
        (
            ["--output", "runs/other"],
            "--output: runs/mine is resumed in its place, with its outputs there; "
            "leave --output out",
        ),
        (
            ["--store=elsewhere"],
            "--store=elsewhere: runs/mine is resumed in its place, with its outputs "
            "there; leave --store out",
        ),
        (["--allow", "torch"], "data.path: 'users_resume.load' is not allowed"),
    ):
        assert main(["resume", "runs/mine", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before


def test_a_run_that_is_running_is_left_alone(workplace: Path, capsys) -> None:
    with RunFolder.create("runs/mine", to_yaml(bind(load("run.yaml")).config)) as folder:
        assert main(["resume", "runs/mine"]) == 2
        error = capsys.readouterr().err
        assert (
            error
            == f"shardmap: runs/mine: the run is still running, as process {os.getpid()}; wait "
            "for it, or stop it first\n"
        )
        folder.finish()


def test_a_process_that_is_gone_or_another_one_with_its_number_does_not_keep_a_run(
    workplace: Path,
) -> None:
    with stopped_after(12):
        main(["run", "run.yaml"])
    path = Path("runs/mine/state.json")
    for process, started in ((2**22 + 1, 0.0), (os.getpid(), 1.0)):
        path.write_text(
            json.dumps(
                {
                    "state": "unfinished",
                    "host": os.uname().nodename,
                    "process": process,
                    "started": started,
                }
            )
        )
        assert RunFolder.reopen(Path("runs/mine")).resumed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "perhaps"}'])
def test_a_state_that_cannot_be_understood_is_said(text: str, workplace: Path, capsys) -> None:
    main(["run", "run.yaml"])
    Path("runs/mine/state.json").write_text(text)
    capsys.readouterr()
    assert main(["resume", "runs/mine"]) == 2
    assert capsys.readouterr().err.startswith("shardmap: runs/mine/state.json: ")


def test_a_run_folder_is_verified_as_its_store_is(workplace: Path, capsys) -> None:
    main(["run", "run.yaml"])
    capsys.readouterr()
    assert main(["verify", "runs/mine", "--all", "--allow", "users_resume"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "6 of 6 units recomputed: equal to the last bit"
    )
    assert main(["verify", "runs/mine", "--allow", "torch"]) == 2
    assert "'users_resume.load' is not allowed" in capsys.readouterr().err
    main(["run", "run.yaml", "--reduce", "sum", "--report", "null", "--output", "runs/reduced"])
    capsys.readouterr()
    assert main(["verify", "runs/reduced"]) == 2
    assert (
        "runs/reduced: its outputs were reduced, and are in no store, so nothing can be compared"
        in capsys.readouterr().err
    )


def test_a_run_beside_one_that_has_not_ended_says_so(workplace: Path, capsys) -> None:
    with stopped_after(12):
        main(["run", "run.yaml"])
    capsys.readouterr()
    assert main(["run", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert (
        "run folder runs/mine-2: there is runs/mine already, a run that has not ended; "
        "`shardmap resume runs/mine` goes on" in out
    )
    assert (state(), state("runs/mine-2")) == ("unfinished", "complete")


def test_a_killed_run_with_a_store_goes_on_in_its_folder_by_run_resume_too(workplace: Path) -> None:
    words = ["run", "run.yaml", "--store", "store"]
    script = (
        "import os, signal\nfrom shardmap.jobs.cli import main\nfrom shardmap.run.base "
        "import ChunkDone, listen\n"
        "def kill(event):\n    if isinstance(event, ChunkDone) and event.stop == 12:\n "
        "       os.kill(os.getpid(), signal.SIGKILL)\n"
        f"with listen(kill):\n    main({words!r})\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert (
        subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode
        == -signal.SIGKILL
    )
    assert state() == "unfinished"
    assert main([*words, "--resume", "true"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["mine"]
    assert state() == "complete"
    assert shardmap.open_store("store").missing() == []
    assert (
        main([*words, "--resume", "true"]) == 0
    )  # that run is complete: this is another one, which finds all units there
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "mine-2"]
