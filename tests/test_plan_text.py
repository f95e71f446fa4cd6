"""What print(plan) and plan.explain() say."""

from __future__ import annotations

import torch

import shardmap
from tests.test_engine import odd  # registers an operator that nothing batches


def test_the_table_has_a_row_for_each_device_and_a_total() -> None:
    plan = shardmap.plan(torch.sin, devices=["cpu", "cpu"], chunk_size=3)(torch.randn(13, 2))
    title, header, first, second, total = str(plan).splitlines()
    assert title == "shardmap.plan(sin, in_dims=0): 13 samples"
    assert header.split("  ")[0] == "device"
    assert first.split()[:4] == ["cpu#1", "7", "3", "3"]
    assert second.split()[:4] == ["cpu#2", "6", "3", "2"]
    assert total.split()[:3] == ["all", "13", "5"]
    assert max(map(len, str(plan).splitlines())) <= 120


def test_the_explanation_names_operators_tiers_and_what_is_hoisted() -> None:
    weights = torch.randn(5, 5)

    def function(r: torch.Tensor) -> torch.Tensor:
        return odd((weights @ weights.T) @ r).relu() + torch.special.bessel_j0(r)

    with torch.no_grad():
        plan = shardmap.plan(function)(torch.randn(7, 5))
    text = plan.explain()
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert rows["mv"].endswith("rule")
    assert rows["shardmap_engine_test::odd"].endswith("loop over the samples")
    assert rows["special_bessel_j0"].split()[-1] in ("rule", "torch.func.vmap")
    assert "Computed once for all samples:" in text
    hoisted = next(line for line in text.splitlines() if line.startswith("Computed once"))
    assert "mm" in hoisted
    assert "odd" not in hoisted
    assert "all" in rows


def test_the_operations_of_a_product_are_counted() -> None:
    """`[40, 30] @ [30]` for each of 1,000 samples: 2 * 40 * 30 operations each."""
    weights = torch.randn(40, 30)
    text = shardmap.plan(lambda r: weights @ r)(torch.randn(1000, 30)).explain()
    (row,) = [line for line in text.splitlines() if line.startswith("mv ")]
    assert row.split()[2] == "0.0024"


def test_gradients_remat_and_reductions_are_told() -> None:
    model = torch.nn.Linear(3, 1)
    x = torch.randn(5, 3)
    assert "remat=True computes it again" in shardmap.plan(model)(x).explain()
    assert "backward computes each chunk again" in shardmap.plan(model, remat=True)(x).explain()
    assert "1 of 1 outputs (mean)" in shardmap.plan(model, reduce="mean")(x).explain()


def test_an_empty_batch_is_explained() -> None:
    text = shardmap.plan(torch.sin)(torch.randn(0, 3)).explain()
    assert "0 samples" in text
    assert "Operators by cost" not in text
