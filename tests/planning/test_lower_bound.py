"""The least memory that a program needs: never more than what running it was seen to take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import shardmap
from shardmap.planning.lower_bound import recorded_peak
from shardmap.run import affordable, prepare
from tests.planning.common import batch_of

W = batch_of(200, 100)
NET = torch.nn.Sequential(torch.nn.Linear(200, 60), torch.nn.Tanh(), torch.nn.Linear(60, 5))
NET = NET.double()
CONV = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 5), torch.nn.ReLU(), torch.nn.Flatten(0))
CONV = CONV.double().requires_grad_(False)


def gradients(x: torch.Tensor) -> Any:
    return torch.autograd.grad(NET(x).square().sum(), tuple(NET.parameters()))


def norm(x: torch.Tensor) -> torch.Tensor:
    return sum((g.square().sum() for g in gradients(x)), torch.zeros((), dtype=x.dtype))


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "chain": lambda x: x.sin().cos().exp().sum(),
    "outer product": lambda x: x.outer(x),
    "wide in the middle": lambda x: (x[:, None] * x[None, :]).sin().sum(0),
    "views": lambda x: x.outer(x).t().reshape(100, 400)[:50].permute(1, 0),
    "expanded": lambda x: x[None].expand(300, 200).sum(0) + x.repeat(3)[:200],
    "copies": lambda x: x.clone().contiguous().to(torch.float64).detach() * 2,
    "in place": lambda x: torch.zeros(200, 200, dtype=x.dtype).add_(x).mul_(x[:, None]),
    "no sample in it": lambda x: x @ W.exp() @ torch.ones(100, 7, dtype=x.dtype),
    "gradients": gradients,
    "norms from factors": norm,
    "convolution": lambda x: CONV(x[None]),
    "half": lambda x: x.half().outer(x.half()).float().softmax(-1) @ x.float(),
    "several": lambda x: (x.outer(x), x.sin(), W.exp() @ x[:100], torch.cat([x, x, x])),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 10, 20)] * 3),
    "served by torch.func": lambda x: torch.cdist(x.view(20, 10), x.view(20, 10)),
    "masks": lambda x: torch.where(x > 0, x.outer(x), torch.zeros(200, 200, dtype=x.dtype)),
    "sorted": lambda x: x.sort().values.cumsum(0).flip(0).topk(17).values,
    "matrix": lambda x: torch.linalg.inv(x.outer(x) + 1e3 * torch.eye(200, dtype=x.dtype)),
}


@pytest.mark.parametrize("reduce", [None, "sum", "max"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bound_is_no_higher_than_what_was_observed(name: str, reduce: Any) -> None:
    """A map that would fit must not be refused: the whole model, at chunks of one sample."""
    plan = shardmap.plan(FUNCTIONS[name], reduce=reduce)(batch_of(7, 200))
    job, device = plan._job, torch.device("cpu")
    least = affordable.least_memory(job, device, 1, None)
    seen = plan.lanes[0].memory
    assert least.bound
    assert least.resident_bytes <= seen.resident_bytes
    assert least.peak_bytes(1) <= seen.peak_bytes(1) + 1024


@pytest.mark.parametrize("name", ["wide in the middle", "gradients", "half", "matrix"])
def test_the_bound_finds_the_large_values(name: str) -> None:
    """At least half of what was observed, kernels' workspaces aside."""
    plan = shardmap.plan(FUNCTIONS[name], reduce="max")(batch_of(7, 200))
    job = plan._job
    least = affordable.least_memory(job, torch.device("cpu"), 1, None)
    assert least.peak_bytes(1) >= plan.lanes[0].memory.peak_bytes(1) / 2


def test_the_peak_of_a_recording_is_the_one_counted_by_hand() -> None:
    """sin makes 1,600 bytes, cos 1,600 more, the product 320,000; its sum 1,600 with that alive."""
    plan = shardmap.plan(lambda x: x.sin().cos().outer(x).sum(0))(batch_of(7, 200))
    program = plan._job.recording.program
    assert recorded_peak(program) in (1_600 + 320_000, 1_600 + 320_000 + 1_600)


def test_what_is_tried_on_two_samples_only_where_two_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a small budget one sample is tried and watched, and the results are the same."""
    tried: list[int] = []
    ends = prepare.samples_at_the_ends

    def watch(job: Any, size: int) -> Any:
        tried.append(size)
        return ends(job, size)

    monkeypatch.setattr(prepare, "samples_at_the_ends", watch)
    batch = batch_of(11, 1500)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.outer(x).sin().sum(0)  # 17 MiB, twice, for 12 KiB

    expected = torch.stack([function(row) for row in batch])
    got = shardmap.vmap(function, memory_budget="45MiB")(batch)
    assert torch.allclose(got, expected)
    assert set(tried) == {1}
    tried.clear()
    shardmap.clear_caches()
    assert torch.allclose(shardmap.vmap(function, memory_budget="1GiB")(batch), expected)
    assert 2 in tried


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "refusal.py"


@pytest.mark.parametrize("budget", ["50MiB", "default"])
def test_a_refusal_costs_no_more_than_one_sample(budget: str) -> None:
    """Measured in a process of its own, where one sample's result is 400 MiB."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--mebibytes", "400", "--budget", budget, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert "OverBudget" in found["error"]
    assert found["seconds_after_the_sample"] < 1.0
    assert found["bytes_over_one_sample"] < 150 << 20
