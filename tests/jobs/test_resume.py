"""Runs that are killed and gone on with, by the name of their folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardmap
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load, to_yaml
from shardmap.jobs.folder import RunFolder, state_of
from shardmap.run.base import ChunkDone, listen

ROOT = Path(__file__).parents[2]
MODULE = """
import torch
from shardmap.jobs import Dataset, Findings

def load(*, rows: int = 23):
    return Dataset({"x": torch.arange(3.0 * rows).view(rows, 3).remainder(7.0)})

def model(dataset):
    return torch.randn(3, 3)

def noisy(weight, x, *, steps: int = 1):
    for _ in range(steps):
        x = (weight @ x).sin() + 0.1 * x
    return {"noisy": x + torch.rand(3), "norm": x.norm()}

def report(outcome):
    rows = outcome.tensors()
    (outcome.folder / "norms.txt").write_text(str(rows["norm"].tolist()))
    return Findings("found", {"norm": float(rows["norm"].sum())})

def nothing(outcome):
    return None

def broken(outcome):
    raise LookupError("the user has to see this")
"""
CONFIG = """
data: {path: users_resume.load, init_args: {rows: 23}}
model: users_resume.model
function: users_resume.noisy
report: users_resume.report
randomness: different
devices: cpu
chunk_size: 4
seed: 5
output: runs/mine
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of the user's own, as the current directory."""
    (tmp_path / "users_resume.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_resume", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def begin(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "shardmap.jobs.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(words: Sequence[str]) -> float:
    """Let a run end; its seconds."""
    began = time.monotonic()
    process = begin(words)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    return time.monotonic() - began


def state(folder: str = "runs/mine") -> str | None:
    found = state_of(Path(folder))
    return None if found is None else found["state"]


def rows(folder: str = "runs/mine") -> list[torch.Tensor]:
    store = shardmap.open_store(f"{folder}/results.zarr")
    return [store.read(k, 0, store.header.samples) for k in range(len(store.header.outputs))]


def findings(folder: str = "runs/mine") -> dict[str, object]:
    summary = json.loads(Path(folder, "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("seconds", "store")}


def stopped_after(sample: int) -> AbstractContextManager[None]:
    """A Ctrl-C when the chunk that ends there is computed."""

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone) and event.stop == sample:
            raise KeyboardInterrupt

    return listen(interrupt)


# -- killed
# ------------------------------------------------------------------------------------------------------------


LONG = ["--data.init_args.rows", "2003", "--chunk_size", "2", "--function.init_args.steps", "30"]


def killed_again_and_again(kills: int, seed: int) -> None:
    """A run that is killed at random moments and gone on with ends as one that was left alone, to the last bit."""
    whole = finished(["run", "run.yaml", *LONG, "--output", "runs/whole"])
    moments, killed, number = random.Random(seed), 0, 0
    while (
        killed < kills
    ):  # a run that is through before it has been killed often enough is followed by another one
        number += 1
        killed += killed_until_through(f"runs/run{number}", kills - killed, whole, moments)
        compare(f"runs/run{number}", "runs/whole")


def killed_until_through(folder: str, kills: int, whole: float, moments: random.Random) -> int:
    """Kill and go on, so many times unless it ends before; how often it was killed."""
    killed = committed = 0
    while state(folder) != "complete":
        process = begin(
            ["run", "run.yaml", *LONG, "--output", folder]
            if state(folder) is None
            else ["resume", folder]
        )
        if killed < kills:
            time.sleep(moments.uniform(0, 0.8 * whole))
            process.kill()
        _, error = process.communicate(timeout=120)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, error.decode()
            assert state(folder) == "complete"
            break
        killed += 1
        if Path(folder, "results.zarr/manifest.jsonl").exists():
            there = len(shardmap.open_store(f"{folder}/results.zarr").receipts())
            assert there >= committed  # nothing that was committed is lost
            committed = there
            if there < 1002:
                assert state(folder) == "unfinished"
    return killed


def compare(folder: str, whole: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(rows(folder), rows(whole), strict=True))
    assert findings(folder) == findings(whole)
    assert Path(folder, "norms.txt").read_text() == Path(whole, "norms.txt").read_text()
    assert {p.name for p in Path(folder).iterdir()} == {p.name for p in Path(whole).iterdir()}
    assert all(
        json.loads(line)
        for line in Path(folder, "log.jsonl").read_text().splitlines()
        if line.endswith("}")
    )


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(workplace: Path) -> None:
    killed_again_and_again(2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(seed: int, workplace: Path) -> None:
    killed_again_and_again(10, seed)


@pytest.mark.parametrize("words", [[], ["--reduce", "mean", "--report", "null"]])
def test_a_run_that_is_killed_in_the_middle_of_its_map_is_unfinished_and_goes_on(
    words: list[str], workplace: Path, capsys
) -> None:
    script = (
        "import os, signal\nfrom shardmap.jobs.cli import main\nfrom shardmap.run.base import ChunkDone, listen\n"
        "def kill(event):\n    if isinstance(event, ChunkDone) and event.stop == 12:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"with listen(kill):\n    main(['run', 'run.yaml', *{words!r}])\n"
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
    assert state() == "unfinished"
    assert not Path("runs/mine/summary.json").exists()
    seen: list[int] = []
    with listen(
        lambda event: (
            seen.append(event.stop - event.start) if isinstance(event, ChunkDone) else None
        )
    ):
        assert main(["resume", "runs/mine"]) == 0
    said = capsys.readouterr().out
    assert state() == "complete"
    assert main(["run", "run.yaml", *words, "--output", "runs/whole"]) == 0
    if words:
        assert sum(seen) == 23
        assert "the run starts from the beginning" in said
        one, other = (load_file(f"runs/{name}/outputs.safetensors") for name in ("mine", "whole"))
        assert one.keys() == other.keys() == {"noisy", "norm"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        assert 0 < sum(seen) < 23
        assert " of 6 units are there, and stay" in said
        assert all(torch.equal(a, b) for a, b in zip(rows(), rows("runs/whole"), strict=True))


def test_what_was_killed_before_it_was_a_store_is_made_anew(workplace: Path) -> None:
    with stopped_after(12):
        assert main(["run", "run.yaml"]) == 130
    Path("runs/mine/results.zarr/manifest.jsonl").unlink()
    with Path("runs/mine/log.jsonl").open("a") as log:
        log.write('{"time": 1, "ev')
    assert main(["resume", "runs/mine"]) == 0
    assert len(rows()[0]) == 23
    lines = Path("runs/mine/log.jsonl").read_text().splitlines()
    assert sum(line.startswith('{"time": 1, "ev') and not line.endswith("}") for line in lines) == 1
    assert json.loads(lines[-1])["event"] == "finished"


# -- stopped -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_folder_and_says_how_to_go_on(workplace: Path, capsys) -> None:
    with stopped_after(12):
        assert main(["run", "run.yaml"]) == 130
    assert (
        capsys.readouterr().err
        == "shardmap: interrupted; what is in runs/mine stays, and `shardmap resume runs/mine` goes on with it\n"
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
            "--output: runs/mine is gone on with where it is, and so are its outputs; leave --output out",
        ),
        (
            ["--store=elsewhere"],
            "--store=elsewhere: runs/mine is gone on with where it is, and so are its outputs; leave --store out",
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
            == f"shardmap: runs/mine: the run is still running, as process {os.getpid()}; wait for it, or stop it first\n"
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


# -- verified ----------------------------------------------------------------------------------------------------------


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
        "run folder runs/mine-2: there is runs/mine already, a run that has not ended; `shardmap resume runs/mine` goes on"
        in out
    )
    assert (state(), state("runs/mine-2")) == ("unfinished", "complete")


def test_a_killed_run_with_a_store_goes_on_in_its_folder_by_run_resume_too(workplace: Path) -> None:
    words = ["run", "run.yaml", "--store", "store"]
    script = (
        "import os, signal\nfrom shardmap.jobs.cli import main\nfrom shardmap.run.base import ChunkDone, listen\n"
        "def kill(event):\n    if isinstance(event, ChunkDone) and event.stop == 12:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
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
