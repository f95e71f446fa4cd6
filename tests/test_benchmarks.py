"""The benchmarks of the planner, of Jacobians and of rules run, and judge.

Their numbers are not a test's business.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, models, rules

pytestmark = pytest.mark.rotating

ROOT = Path(__file__).parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_planners_benchmark_writes_its_tables(tmp_path: Path) -> None:
    small = (
        "--samples",
        "64",
        "--slice",
        "64",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "found"),
    )
    done = run("benchmarks.planner", "--parts", "stacked", "reduced", *small)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert {len(s) for s in results["stacked"]["seconds"].values()} == {2}
    text = (tmp_path / "found.md").read_text()
    assert done.stdout == text
    assert text.count("speed against torch.func at its best") == 2
    assert results["stacked"]["memory"]["result"] == 64 * 4 * sum(
        p.numel() for p in models.mlp().parameters()
    )


def test_the_memory_benchmark_measures_in_processes_of_their_own(tmp_path: Path) -> None:
    words = (
        "--quick",
        "--no-budget",
        "--cases",
        "reduction",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "found"),
    )
    done = run("benchmarks.memory", *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["chunk"] for row in rows] == [64, 256]
    assert rows[1]["measured"] > 2 * rows[0]["measured"] > 0
    assert 0.5 < rows[1]["predicted"] / rows[1]["measured"] < 1.5


def test_the_benchmark_of_jacobians_writes_its_tables(tmp_path: Path) -> None:
    words = (
        "--cases",
        "Hessian",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--no-jax",
        "--output",
        str(tmp_path / "found"),
    )
    done = run("benchmarks.jacobians", *words)
    assert done.returncode in (0, 1), done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"].values()
    assert found["peaks"]["torch.func"]["result"] == 256 * 64 * 64 * 4
    assert found["ratio"]["torch.func"]["median"] == 1.0
    assert done.stdout == (tmp_path / "found.md").read_text()


def test_targets_hold_from_512_mib_on() -> None:
    """Under the measured peak is a miss, however little."""
    row = {"measured": 1000 << 20, "predicted": 1000 << 20, "corrected": 1000 << 20}
    assert memory.judge(row) == "pass"
    assert memory.judge(row | {"corrected": (1000 << 20) - 1}) == "FAIL"
    assert memory.judge(row | {"corrected": 1151 << 20}) == "FAIL"
    assert memory.judge(row | {"predicted": 700 << 20}) == "FAIL"
    assert memory.judge(row | {"measured": 100 << 20}) == ""


def test_the_benchmark_of_dropout_writes_its_table(tmp_path: Path) -> None:
    """It compares what is kept and scaled before it times anything."""
    done = run(
        "benchmarks.dropout", "--rounds", "2", "--threads", "1", "--output", str(tmp_path / "d.md")
    )
    assert done.returncode in (0, 1), done.stderr
    text = (tmp_path / "d.md").read_text()
    assert done.stdout == text
    assert len(text.splitlines()) == 2 + 2 * 3


def test_the_benchmark_of_paths_compares_and_writes_its_table(tmp_path: Path) -> None:
    """Every sample is compared before anything is timed."""
    done = run(
        "benchmarks.paths", "--subjects", "two branches", "--rounds", "2", "--output",
        str(tmp_path / "p.md"),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    lines = (tmp_path / "p.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["two branches"] * 2


def test_the_benchmark_of_rules_compares_and_writes_its_table(tmp_path: Path) -> None:
    """A rule, a loop, and an operator that has no one right answer."""
    done = run(
        "benchmarks.rules", "--only", "tanh,histc,normal", "--rounds", "2", "--output",
        str(tmp_path / "r.md"),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout == (tmp_path / "r.md").read_text()
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [(row["name"], row["elements"] > 1) for row in results["rows"]] == [
        ("tanh", True),
        ("histc", True),
    ]
    assert results["left_out"] == {"normal": "draws random numbers"}
    assert results["wrong"] == {}


def test_targets_of_rules_are_judged() -> None:
    """Overhead of short calls is in the median alone; a loop of torch.func has its own target."""

    def row(
        name: str, tier: str, peer: str, ms: float, of_peer: float, of_loop: float
    ) -> rules.Row:
        times = {"shardmap": 1.0, "replayed": 1.0, "torch.func": ms, "the loop": 5.0}
        return rules.Row(name, 9, tier, peer, times, of_peer, of_loop)

    good = [
        row("a", "rule", "batched", 2.0, 0.5, 0.1),
        row("b", "rule", "batched", 0.1, 1.6, 0.1),
        row("c", "rule", "batched", 2.0, 1.0, 0.1),
        row("z", "rule", "batched", 2.0, 0.5, 0.1),
        row("d", "rule", "loop", 2.0, 0.1, 0.1),
        row("e", "loop", "refused", 2.0, 0.0, 1.1),
    ]
    assert "FAIL" not in rules.summary(good, {}, {})
    for worse in (
        row("f", "rule", "batched", 1.0, 1.51, 0.1),
        row("g", "loop", "batched", 0.5, 0.9, 1.11),
    ):
        assert rules.summary([*good, worse], {}, {}).count("FAIL") == 1
    slow = [row(name, "rule", "loop", 2.0, 0.21, 0.1) for name in "hij"]
    assert rules.summary([*good, *slow], {}, {}).count("FAIL") == 1
    assert "FAIL: k is wrong: rows differ" in rules.summary(good, {}, {"k": "rows differ"})
