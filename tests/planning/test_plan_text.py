"""Tests of the text of print(plan) and plan.explain()."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardmap
from shardmap.planning import table
from shardmap.planning.memory import Level, MemoryModel, format_bytes
from shardmap.planning.split import Collected, Lane, Split
from tests.lower.test_engine import odd  # registers an operator that nothing batches


def test_the_table_has_a_row_for_each_device_and_a_total() -> None:
    plan = shardmap.plan(torch.sin, devices=["cpu", "cpu"], chunk_size=3)(torch.randn(13, 2))
    title, header, first, second, total = plan.summary.splitlines()
    assert str(plan).startswith(plan.summary)
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
    assert hoisted == "Computed once for all samples: permute, mm.", (
        "a rule that shares a weight's view among samples hoists no call"
    )
    assert rows["mm"].endswith("once for all samples")
    assert rows["shardmap_engine_test::odd"].split()[1:3] == ["per", "sample"]
    assert "A loop calls its operator for each sample by itself" in text
    assert "all" in rows


def test_a_printed_plan_lists_the_most_costly_operators_and_the_rest_as_one() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        for operator in (
            torch.sin,
            torch.cos,
            torch.exp,
            torch.tanh,
            torch.sigmoid,
            torch.sqrt,
            torch.abs,
            torch.neg,
            torch.sign,
            torch.ceil,
        ):
            r = operator(r)
        return r + odd(r[:1])

    plan = shardmap.plan(function)(torch.randn(7, 5))
    text = str(plan)
    assert "Computed once for all samples: nothing." in text
    assert "more" in text
    assert "loop over the samples" in text, "what runs sample by sample is always shown"
    rows = [
        line
        for line in text.splitlines()
        if line.startswith(("sin ", "cos ", "exp ", "tanh ", "sigmoid ", "sqrt ", "abs ", "neg "))
    ]
    assert (
        len(rows)
        < 10
        < len([line for line in plan.explain().splitlines() if line.rstrip().endswith("rule")])
    )


def test_the_operations_of_a_product_are_counted() -> None:
    """`[40, 30] @ [30]` for each of 1,000 samples: 2 * 40 * 30 operations each."""
    weights = torch.randn(40, 30)
    text = shardmap.plan(lambda r: weights @ r)(torch.randn(1000, 30)).explain()
    (row,) = [line for line in text.splitlines() if line.startswith("mv ")]
    (total,) = [line for line in text.splitlines() if line.startswith("all ")]
    assert row.split()[1] == "1", "one kernel for all samples"
    assert float(row.split()[2]) == pytest.approx(0.0024)
    assert float(total.split()[2]) == pytest.approx(0.0024)
    assert total.split()[-1] == "100%"


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


def lane(name: str = "cpu", rows: int = 10, **other: object) -> Lane:
    """A lane of a plan that was not made."""
    memory = MemoryModel(1 << 20, (Level(2048, 512),))
    return dataclasses.replace(
        Lane(name, name.partition("#")[0], rows, 4, memory, 1 << 30, 0.5, True), **other
    )  # type: ignore[arg-type]


def test_an_operator_that_is_lifted_in_part_says_so() -> None:
    weights = torch.randn(5, 5)

    def function(r: torch.Tensor) -> torch.Tensor:
        return (weights @ weights).sin() @ torch.stack([r, r], 1).sin()

    text = shardmap.plan(function)(torch.randn(7, 5)).explain()
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert rows["sin"].endswith("rule; 1 once for all")
    assert "mm, sin" in text


def test_shares_add_up_to_the_predicted_time() -> None:
    """The cost of chunks beside their operators is a part of the predicted time.

    With one sample at a time, most of it.
    """
    plan = shardmap.plan(lambda r: r.sin().cos(), chunk_size=1)(torch.randn(500, 3))
    rows = [line.split() for line in plan.explain().splitlines()]
    shares = {
        row[0]: row[-2] if row[-1] == "rule" else row[-1]
        for row in rows
        if row and row[0] in ("sin", "cos", "around", "all")
    }
    numbers = {name: int(share.rstrip("%")) for name, share in shares.items()}
    assert numbers["all"] == 100
    assert numbers["sin"] + numbers["cos"] + numbers["around"] == pytest.approx(100, abs=2)
    assert numbers["around"] > 50


def test_no_line_is_longer_than_a_terminal() -> None:
    """Long operator names are cut in the middle, sentences wrapped."""

    @torch.library.custom_op(
        "shardmap_plan_text_test::an_operator_whose_name_goes_on_and_on_and_on_for_ever",
        mutates_args=(),
    )
    def long_name(t: torch.Tensor) -> torch.Tensor:
        return t.clone()

    weights = torch.randn(3)

    def function(r: torch.Tensor) -> torch.Tensor:
        shared = weights
        for operator in (
            torch.sin,
            torch.cos,
            torch.exp,
            torch.tanh,
            torch.sigmoid,
            torch.abs,
            torch.neg,
            torch.sign,
            torch.ceil,
            torch.floor,
        ):
            shared = operator(shared)
        for operator in (
            torch.erf,
            torch.atan,
            torch.asinh,
            torch.log1p,
            torch.expm1,
            torch.trunc,
            torch.round,
            torch.frac,
            torch.square,
        ):
            shared = operator(shared)
        return long_name(r) + shared

    with pytest.warns(shardmap.SlowLoopWarning):
        plan = shardmap.plan(function, devices=["cpu"] * 8, memory_budget=1000)(
            torch.randn(1000, 3)
        )
    for text in (str(plan), plan.explain()):
        assert max(map(len, text.splitlines())) <= 120
        assert "over budget: a chunk of" in text
        assert "shardmap_plan_text_test::" in text
        assert "…" in text


def test_memory_is_told_once_per_device_and_adds_up_to_the_peak() -> None:
    """1 MiB stays; 4 samples of 512 B and 2 KiB beside make a chunk of 4 KiB."""
    one = lane()
    text = table.memory(Split(30, (lane("cpu#1"), lane("cpu#2"), lane("cuda:0"))))
    first, second = text.replace("\n  ", " ").splitlines()
    assert first.startswith(
        "Memory on cpu (2 lanes): 1.0 MiB stay during the whole run; a chunk of 4 adds 4.0 KiB "
        "(512 B per sample and 2.0 KiB"
    )
    assert second.startswith("Memory on cuda:0: 1.0 MiB")
    assert f"at most {format_bytes(one.peak_bytes)}." in first


def test_what_the_first_chunks_showed_is_told() -> None:
    memory = MemoryModel(0, (Level(2 << 19, 1024),), 1.5)
    text = table.memory(Split(10, (lane(memory=memory),))).replace("\n  ", " ")
    assert "a chunk of 4 adds 1.5 MiB (1.5 KiB per sample and 1.5 MiB whatever its size)" in text
    assert "took 1.50 times what their tensors say" in text
    assert "nothing to that" in table.memory(
        Split(10, (lane(memory=MemoryModel(1000, (Level(0, 0),))),))
    )


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("budget", [None, 1000, 1 << 40])
def test_the_overview_has_straight_columns(lanes: int, budget: int | None) -> None:
    names = [f"cpu#{i}" if lanes > 1 else "cpu" for i in range(1, lanes + 1)]
    split = Split(
        10 * lanes,
        tuple(lane(name, budget_bytes=budget) for name in names),
        Collected("cuda:0", 5 << 30, 1 << 30),
    )
    title, header, *rows = table.overview("plan(f)", split).splitlines()
    assert title == f"plan(f): {10 * lanes} samples"
    table_rows = [row for row in rows if row.split()[0] in (*names, "cuda:0", "all")]
    assert len(table_rows) == lanes + 1 + (lanes > 1)
    ends = header.index("budget") + len("budget")
    for row in table_rows[:lanes]:
        assert row[ends - 1] != " "
        assert row[ends : ends + 2] == "  "
        assert ("OVER BUDGET" in row) == (budget == 1000)
    assert "results: OVER BUDGET" in table_rows[lanes]
    assert any(row.startswith("over budget: the results need 5.0 GiB on cuda:0") for row in rows)


def test_a_budget_that_nobody_knows_is_called_so_and_none_of_an_empty_batch() -> None:
    assert "unknown" in table.overview("plan(f)", Split(10, (lane(budget_bytes=None),)))
    assert "unknown" not in shardmap.plan(torch.sin)(torch.randn(0, 3)).summary


def test_gradients_whose_memory_cannot_be_known() -> None:
    """The map runs, and the plan says that computing gradients raises an error."""
    weight = torch.ones(5, requires_grad=True)

    def function(r: torch.Tensor) -> torch.Tensor:
        kept = (r * weight).exp()  # exp keeps its result for backward
        out = kept.sum()
        kept.add_(1)
        return out

    batch = torch.randn(7, 5)
    plan = shardmap.plan(function)(batch)
    text = plan.explain()
    assert "The memory that gradients take is not known" in text
    assert "modified by an inplace operation" in text
    torch.testing.assert_close(plan.run(), torch.stack([function(r) for r in batch]))
    assert "is not known" not in shardmap.plan(lambda r: (r * weight).exp())(batch).explain()
