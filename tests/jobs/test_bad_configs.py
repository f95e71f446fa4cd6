"""Configurations that are wrong in every way that we could think of.

One line with key, value and remedy, exit code 2, nothing written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardmap.jobs.cli import main
from tests.jobs.bad_configs import CASES, GOOD, MODULE, NET

ROOT = Path(__file__).parents[2]


class Evil:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, samples and weights, right and wrong ones, and a run's store."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "users_bad.py").write_text(MODULE)
    (folder / "users_broken.py").write_text("1 / 0\n")
    np.save(folder / "x.npy", np.ones((5, 2), np.float32))
    (folder / "short.npy").write_bytes((folder / "x.npy").read_bytes()[:-3])
    objects = np.empty(2, object)
    objects[:] = [Evil(), Evil()]
    np.save(folder / "objects.npy", objects, allow_pickle=True)
    net = nn.Sequential()
    net.add_module("first", nn.Linear(2, 3))
    net.add_module("last", nn.Linear(3, 4))
    state = net.state_dict()
    save_file(state, folder / "good.safetensors")
    save_file(
        {name: t for name, t in state.items() if name != "last.bias"},
        folder / "lacking.safetensors",
    )
    torch.save({**state, "extra": torch.ones(1)}, folder / "more.pt")
    torch.save({name: t.double() for name, t in state.items()}, folder / "double.pt")
    torch.save({"model": state, "epoch": 3} | state, folder / "checkpoint.pt")
    torch.save([torch.ones(2)], folder / "list.pt")
    torch.save({**state, "evil": Evil()}, folder / "evil.pt")
    torch.save(
        {**state, "evil": Evil()}, folder / "evil_old.pth", _use_new_zipfile_serialization=False
    )
    shutil.copy(folder / "evil.pt", folder / "evil.safetensors")
    (folder / "short.pt").write_bytes((folder / "more.pt").read_bytes()[:200])
    (folder / "folder.pt").mkdir()
    (folder / "run.yaml").write_text(GOOD + "store: store\n")
    command = [sys.executable, "-m", "shardmap.jobs.cli", "run", "run.yaml"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    shutil.rmtree(folder / "runs")
    return folder


@pytest.fixture
def workplace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def listing(folder: Path) -> dict[str, str]:
    """Everything below a folder, with its contents."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "a folder"
        for p in found
    }


def prepared(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """The command's words, and what the answer has to contain."""
    text, words, expected = CASES[name]
    (folder / "run.yaml").write_text(
        textwrap.dedent(text), encoding="utf-8", errors="surrogateescape"
    )
    return (words if words[:1] == ["run"] else ["run", "run.yaml", *words]), expected


@pytest.mark.parametrize("name", CASES)
def test_a_bad_configuration_is_one_line_with_key_value_and_remedy(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = prepared(name, workplace)
    before = listing(workplace)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("shardmap: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    assert [part for part in expected if part not in error] == [], error
    assert listing(workplace) == before


@pytest.mark.parametrize(
    "name",
    [
        "not UTF-8",
        "weights with code",
        "an absent device",
        "not allowed",
        "a source that is a pickle",
    ],
)
def test_a_bad_configuration_in_a_process_of_its_own(name: str, workplace: Path) -> None:
    words, expected = prepared(name, workplace)
    before = listing(workplace)
    done = subprocess.run(
        [sys.executable, "-m", "shardmap.jobs.cli", *words],
        capture_output=True,
        text=True,
        cwd=workplace,
        env=environment(),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [part for part in expected if part not in done.stderr] == [], done.stderr
    assert listing(workplace) == before


def test_there_are_at_least_fifty() -> None:
    assert len(CASES) >= 50


def test_the_pickles_of_these_tests_do_run_code_where_they_are_trusted(workplace: Path) -> None:
    """Otherwise the cases with code would prove nothing."""
    torch.load("evil.pt", weights_only=False)
    assert Path("pwned").is_dir()
    with pytest.raises(FileExistsError, match="pwned"):  # made a second time
        np.load("objects.npy", allow_pickle=True)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        NET + "weights: good.safetensors\n",
        NET.replace("users_bad.Net", "{path: users_bad.Net, init_args: {width: 2}}"),
    ],
)
def test_the_configurations_that_these_are_made_from_run(text: str, workplace: Path) -> None:
    (workplace / "run.yaml").write_text(text)
    assert main(["run", "run.yaml", "--allow", "users_bad"]) == 0
