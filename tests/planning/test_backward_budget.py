"""Budgets hold through backward where gradients are recorded from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("how", "budget", "samples"),
    [("plain", "300MiB", 7001), ("remat", "100MiB", 4001), ("remat", "200MiB", 13001)],
)
def test_forward_and_backward_stay_within_the_budget(how: str, budget: str, samples: int) -> None:
    """Measured in a process of its own: no more than was predicted, and that within the budget."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.backward_case", how, budget, str(samples)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        cwd=ROOT,
    )
    found = json.loads(done.stdout)
    assert found["measured"] <= found["predicted"] <= found["budget"], found
    assert found["gradients agree"]
    assert how == "plain" or found["chunks"] > 1
