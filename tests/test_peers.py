"""The command that runs other libraries' tests with our `vmap`, on a peer made up here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.peers.__main__ import ROOT, compared
from tests.peers.table import PEERS

PEER = """
import functorch, torch
from torch.func import vmap

def test_without_a_map():
    assert torch.func.jacrev(torch.sin)(torch.zeros(2)).shape == (2, 2)

def test_that_passes_with_both():
    assert torch.equal(vmap(torch.dot)(torch.ones(3, 2), torch.ones(3, 2)), torch.full((3,), 2.0))

def test_of_data():
    found = torch.vmap(lambda x: x if x > 0 else -x)(torch.tensor([-1.0, 2.0]))
    assert found.tolist() == [1.0, 2.0]

def test_of_torch_alone():
    mapped = functorch.vmap(lambda x: (x, "text"), out_dims=(0, None), chunk_size=None)
    assert mapped(torch.ones(2))[1] == "text"

def test_that_fails():
    assert vmap(torch.sin)(torch.zeros(2)).sum() == 1
"""


def test_the_counts(tmp_path: Path) -> None:
    tests = tmp_path / "test_peer.py"
    tests.write_text(PEER)
    command = [sys.executable, "-m", "tests.peers", "tensordict", "--here", "--tests", str(tests)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "--work", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == (
        "tensordict: 5 tests, of which 4 call vmap; 2 of these pass with torch.func.vmap, and 1 of "
        "those with shardmap.vmap"
    )
    assert lines[1] == "  passes with ours only: test_peer.py::test_of_data"
    assert lines[2].startswith("  test_peer.py::test_of_torch_alone: OutputError: ")
    assert len(lines) == 3


def test_a_test_that_did_not_run_with_ours_is_listed() -> None:
    passed = {"outcome": "passed", "calls": 1, "error": ""}
    text = compared({"a": passed, "b": passed}, {"a": passed})
    assert text.splitlines()[1:] == ["  b: did not run"]
    assert "2 of these pass with torch.func.vmap, and 1 of those" in text


def test_a_peer_without_a_distribution_of_tests_says_what_to_pass() -> None:
    assert not PEERS["tensordict"].tests
    ran = subprocess.run(
        [sys.executable, "-m", "tests.peers", "tensordict"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    assert "name them by --tests" in ran.stderr
