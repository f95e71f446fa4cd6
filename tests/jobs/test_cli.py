"""The command line: every mistake is one line and exit code 2, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.cli import main
from shardmap.program.ir import operator
from shardmap.rules import registry

ROOT = Path(__file__).parents[2]
GRADIENTS = str(ROOT / "configs" / "digits_gradients" / "run.yaml")
DIGITS = f"python: {ROOT / 'configs' / 'digits_gradients'}\n"

MISTAKES = {
    "no command": [],
    "unknown command": ["walk"],
    "no configuration": ["run"],
    "missing file": ["run", "nowhere.yaml"],
    "a folder": ["run", "."],
    "a run folder": ["run", "finished"],
    "not YAML": ["run", "broken.yaml"],
    "not text": ["run", "binary.yaml"],
    "an empty file": ["run", "empty.yaml"],
    "a list": ["run", "list.yaml"],
    "no function": ["run", "no_function.yaml"],
    "a section without path": ["run", "no_path.yaml"],
    "a section that is a number": ["run", "number.yaml"],
    "unknown key in the file": ["run", "unknown.yaml"],
    "unknown key": ["run", GRADIENTS, "--chunk_sise", "3"],
    "unknown key inside": ["run", GRADIENTS, "--data.pth", "x"],
    "unknown argument": ["run", GRADIENTS, "--model.init_args.epoch", "3"],
    "no value": ["run", GRADIENTS, "--seed"],
    "a loose word": ["run", GRADIENTS, "extra"],
    "text for a number": ["run", GRADIENTS, "--chunk_size", "many"],
    "a fraction of a chunk": ["run", GRADIENTS, "--chunk_size", "2.5"],
    "chunk of zero": ["run", GRADIENTS, "--chunk_size", "0"],
    "negative chunk": ["run", GRADIENTS, "--chunk_size=-4"],
    "text for yes or no": ["run", GRADIENTS, "--save_outputs", "perhaps"],
    "not a choice": ["run", GRADIENTS, "--randomness", "maybe"],
    "argument of the wrong type": ["run", GRADIENTS, "--model.init_args.epochs", "lots"],
    "argument out of range": ["run", GRADIENTS, "--model.init_args.epochs=-1"],
    "argument not a choice": ["run", GRADIENTS, "--report.init_args.score", "best"],
    "not an import path": ["run", GRADIENTS, "--function", "f"],
    "no such module": ["run", GRADIENTS, "--function", "no_such_package.f"],
    "no such function": ["run", GRADIENTS, "--function", "digits.f"],
    "not a function": ["run", GRADIENTS, "--function", "digits.CLASSES"],
    "data that is no dataset": ["run", GRADIENTS, "--data", "os.getcwd"],
    "unknown column": ["run", GRADIENTS, "--columns", "[image, labl]"],
    "no column": ["run", GRADIENTS, "--columns", "[]"],
    "a report that finds nothing": ["run", "no_findings.yaml"],
    "unknown device": ["run", GRADIENTS, "--devices", "abacus"],
    "absent device": ["run", GRADIENTS, "--devices", "cuda:97"],
    "no device": ["run", GRADIENTS, "--devices", "[]"],
    "output below a file": ["run", GRADIENTS, "--output", "empty.yaml/run"],
    "output where nothing can be made": ["run", GRADIENTS, "--output", "/proc/shardmap/run"],
    "empty output": ["run", GRADIENTS, "--output", ""],
    "unknown option of another command": ["devices", "--fast"],
    "resume without a store": ["run", GRADIENTS, "--resume", "true"],
    "a kind of store without a store": ["run", GRADIENTS, "--store_kind", "memmap"],
    "an unknown kind of store": ["run", GRADIENTS, "--store", "s", "--store_kind", "hdf5"],
    "a store and a reduction": ["run", GRADIENTS, "--store", "s", "--reduce", "mean"],
    "a store and saved outputs": ["run", GRADIENTS, "--store", "s", "--save_outputs", "true"],
    "an empty store": ["run", GRADIENTS, "--store", ""],
    "files at a URL": ["run", GRADIENTS, "--store", "s3://bucket/s", "--store_kind", "safetensors"],
    "a URL of no known kind": ["run", GRADIENTS, "--store", "abacus://s"],
    "a store where a file is": ["run", GRADIENTS, "--store", "empty.yaml"],
    "a store in a folder of something else": ["run", GRADIENTS, "--store", "."],
    "a store that is there": ["run", GRADIENTS, "--store", "store"],
    "a store of another kind": ["run", GRADIENTS, "--store", "store", "--resume", "true"],
    "a store of another call": [
        "run",
        "quick.yaml",
        "--store",
        "store",
        "--store_kind",
        "memmap",
        "--resume",
        "true",
    ],
    "a reduction that is none": ["run", GRADIENTS, "--reduce", "median"],
    "a reduction of rows that a report needs": ["run", "no_rows.yaml"],
    "workers without Ray": ["run", GRADIENTS, "--workers", "3"],
    "no worker": ["run", GRADIENTS, "--devices", "ray", "--workers", "0"],
    "going on with nothing": ["resume", "nowhere"],
    "going on with a folder": ["resume", "."],
    "going on without a name": ["resume"],
    "going on with a script's store": ["resume", "store"],
    "verifying nothing": ["verify", "nowhere"],
    "verifying without a name": ["verify"],
    "verifying a part and all": ["verify", "store", "--all", "--units", "3"],
    "verifying less than nothing": ["verify", "store", "--units=-1"],
    "verifying many": ["verify", "store", "--units", "many"],
    "verifying on a cluster": ["verify", "store", "--devices", "ray"],
    "verifying with an unknown option": ["verify", "store", "--fast"],
    "a page of nothing": ["report", "nowhere"],
    "a page of a folder": ["report", "."],
    "a page of a store": ["report", "store"],
    "a page without a name": ["report"],
    "a page with an unknown option": ["report", "store", "--fast"],
    "a plan of nothing": ["plan"],
    "a plan of a missing file": ["plan", "nowhere.yaml"],
    "a plan for no worker": ["plan", GRADIENTS, "--workers", "0"],
    "a plan for some workers": ["plan", GRADIENTS, "--workers", "some"],
    "a plan with an unknown key": ["plan", GRADIENTS, "--chunk_sise", "3"],
    "a plan for an absent device": ["plan", GRADIENTS, "--devices", "cuda:97"],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with broken configurations, as the current directory."""
    (tmp_path / "broken.yaml").write_text("data: [1, 2\nfunction: }\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- data\n- function\n")
    (tmp_path / "no_function.yaml").write_text(f"{DIGITS}data: digits.load\n")
    (tmp_path / "no_path.yaml").write_text(
        f"{DIGITS}data: {{init_args: {{flip_seed: 1}}}}\nfunction: digits.loss_gradient\n"
    )
    (tmp_path / "number.yaml").write_text(f"{DIGITS}data: 3\nfunction: digits.loss_gradient\n")
    parts = (
        f"{DIGITS}data: digits.load",
        "function: torch.neg",
        "columns: [image]",
        "report: builtins.id",
    )
    (tmp_path / "no_findings.yaml").write_text("\n".join((*parts, "save_outputs: false")))
    (tmp_path / "quick.yaml").write_text("\n".join(parts[:3]))
    folders = [str(ROOT / "configs" / name) for name in ("digits_jacobian", "digits_gradients")]
    no_rows = (f"python: {folders}", "data: digits.load", *parts[1:3])
    no_rows = (*no_rows, "report: reports.sensitivity_maps", "reduce: sum")
    (tmp_path / "no_rows.yaml").write_text("\n".join(no_rows))
    shardmap.vmap(torch.sin, out=shardmap.MemmapSink(tmp_path / "store"))(torch.ones(3, 2))
    (tmp_path / "unknown.yaml").write_text(
        f"{DIGITS}data: digits.load\nfunction: a.b\ndevice: cpu\n"
    )
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.yaml").write_text("data: a.b\nfunction: a.b\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, workplace, capsys):
    before = listing(workplace)
    assert main(MISTAKES[name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("shardmap: ")
    assert "Traceback" not in error
    assert listing(workplace) == before


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "shardmap.jobs.cli", "run", GRADIENTS, "--chunk_size", "many"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "shardmap: chunk_size: 'many' does not fit; give a whole number of at least 1 or auto "
        "or null\n"
    )
    assert listing(tmp_path) == []


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "shardmap.jobs.cli",
        "run",
        GRADIENTS,
        "--model.init_args.epochs",
        "100000",
        "--output",
        "runs/long",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        "epoch" in path.read_text() for path in tmp_path.glob("runs/long/log.jsonl")
    ):
        assert process.poll() is None, process.stderr
        time.sleep(0.05)  # until training is under way
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "shardmap: interrupted; nothing was left behind\n"
    assert listing(tmp_path) == []


def test_an_error_of_the_users_function_keeps_its_traceback_and_leaves_nothing(
    tmp_path, monkeypatch
):
    (tmp_path / "users_failing.py").write_text(
        "def fail(dataset):\n    raise LookupError('the user has to see this')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match="the user has to see this"):
        main(["run", GRADIENTS, "--model", "users_failing.fail"])
    assert [
        name
        for name in listing(tmp_path)
        if "users_failing" not in name and "__pycache__" not in name
    ] == []


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"    {name} " in out
        for name in ("run", "plan", "resume", "verify", "report", "ops", "devices")
    )


def test_devices_lists_the_processor(capsys):
    assert main(["devices"]) == 0
    assert capsys.readouterr().out.startswith("cpu ")


def test_ops_lists_rules_and_the_scoreboard(tmp_path, capsys):
    directions = {
        "forward": {
            "torch": "refused",
            "torch_served": 1,
            "shardmap": "right",
            "shardmap_served": 2,
        }
    }
    (tmp_path / "board.json").write_text(
        json.dumps({"torch_version": "2.13", "operators": {"add": directions, "sub": directions}})
    )
    assert main(["ops", "--scoreboard", str(tmp_path / "board.json")]) == 0
    out = capsys.readouterr().out
    assert "aten::" in out
    assert out.splitlines()[-3:] == [
        "direction   subject  refused  right",
        "  forward  shardmap        0      2",
        "  forward     torch        2      0",
    ]


def test_ops_lists_what_has_no_rule(capsys):
    """Each row is what a map would do: no operator with a rule, each that the registry lacks."""
    torch.library.define("clitest::opaque", "(Tensor x) -> Tensor")
    assert main(["ops", "--missing"]) == 0
    *rows, _, last = capsys.readouterr().out.splitlines()[1:]
    found = {row.split()[0]: row.split()[1] for row in rows}
    assert {"clitest::opaque", "aten::hash_tensor"} <= found.keys()
    assert "aten::add.Tensor" not in found
    assert "aten::linear" not in found, "recorded as other operators"
    assert "aten::is_nonzero" not in found, "a question"
    assert "aten::hash_tensor.out" not in found
    assert set(found.values()) == {"functorch", "loop"}
    for name, tier in found.items():
        op = operator(name)
        assert registry.lookup(op) is registry.decomposition(op) is None
        assert registry.has_functorch_kernel(op) == (tier == "functorch")
    assert last.split()[0] == str(len(found))


@pytest.mark.parametrize("tier", ["rule", "decomposition", "functorch", "loop"])
def test_ops_lists_one_tier(tier, capsys):
    assert main(["ops", "--tier", tier]) == 0
    *rows, _, _ = capsys.readouterr().out.splitlines()[1:]
    assert {row.split()[1] for row in rows} == {tier}
    assert {row.split()[0] for row in rows} == {
        name for name, one, _ in registry.recordable() if one == tier
    }


@pytest.mark.parametrize("words", [["--tier", "other"], ["--missing", "--tier", "loop"]])
def test_ops_refuses_other_words(words, capsys):
    assert main(["ops", *words]) == 2
    assert "--tier" in capsys.readouterr().err
