"""Kernels in every layout of their operands against the loop, some operators each day."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest
import torch

from tests import oracle, sweep
from tests.kernels import layouts
from tests.kernels import sweep as kernels

PARTS = 60
TODAY = datetime.datetime.now(datetime.UTC).timetuple().tm_yday % PARTS
KNOWN_TO_FAIL_ONCE = (
    "linalg_lu_solve",
    "linalg_ldl_solve",
    "nn_functional_gelu",
    "linalg_slogdet",
    "native_batch_norm",
)
"""Operators whose kernels were found to be wrong, or to end the process, for some layouts."""


def assert_right(names: Sequence[str], samples: int, seeds: int, groups: Sequence[str]) -> None:
    """No case of these operators is wrong, and none ends its process."""
    found = [
        detail
        for _, result in kernels.run(names, groups, samples, seeds)
        for detail in result["details"]
        if not detail.startswith("refused")
    ]
    assert not found, "\n".join(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", [pytest.param(TODAY, id=f"part_{TODAY}_of_{PARTS}")])
def test_operators_of_the_day(part: int) -> None:
    """Each 60th operator, from today's on; the test's id says which."""
    names = kernels.rotated(list(sweep.operators()), f"{part}/{PARTS}")
    assert_right(names, samples=1, seeds=1, groups=["values"])


@pytest.mark.timeout(300)
def test_operators_that_were_wrong_once() -> None:
    assert_right(KNOWN_TO_FAIL_ONCE, samples=1, seeds=1, groups=["values"])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
def test_all_operators(part: int) -> None:
    """Every operator, forward, gradient and forward-mode derivatives."""
    names = kernels.rotated(list(sweep.operators()), f"{part}/4")
    assert_right(names, samples=3, seeds=2, groups=list(kernels.GROUPS))


@pytest.mark.parametrize("name", layouts.OF_ALL)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 2, 3, 4), (5, 0, 3)])
def test_layouts_keep_values(name: str, shape: tuple[int, ...]) -> None:
    batch = torch.arange(float(torch.Size(shape).numel())).view(shape)
    assert torch.equal(layouts.OF_ALL[name](batch), batch)


def test_layouts_differ() -> None:
    """Each lays out a batch of images in its own way."""
    batch = torch.randn(5, 2, 3, 4)
    made = {n: f(batch) for n, f in (layouts.OF_ALL | layouts.OF_ONE).items()}
    seen = {(t.stride(), t.storage_offset()) for t in made.values()}
    assert len(seen) == len(made)


def case(name: str, mode: str, layout: str, turn: int) -> kernels.Case:
    """One case of an operator's first sample."""
    op = sweep.operators()[name]
    leaves, spec, at = next(sweep.batches(op, torch.float32, 1))
    return kernels.Case(name, op, leaves, spec, at, mode, layout, turn)


@pytest.mark.parametrize("mode", ["forward", "gradient", "jvp", "jacfwd", "hessian"])
@pytest.mark.parametrize("turn", range(4))
def test_a_wrong_map_is_noticed(mode: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hands the last sample the row of the one before."""
    import shardmap

    def mixing(func, in_dims=0, out_dims=0, **options):
        right = oracle.loop(func, in_dims, out_dims, **options)

        def mapped(*args):
            results = right(*args)
            several = isinstance(results, tuple | list)
            mixed = [t.clone() for t in (results if several else [results])]
            for t in mixed:
                t[-1] = t[-2]
            return type(results)(mixed) if several else mixed[0]

        return mapped

    tried = case("nn_functional_softplus", mode, "plain", turn)
    assert kernels.judge_case(tried).kind == "right"
    monkeypatch.setattr(shardmap, "vmap", mixing)
    assert kernels.judge_case(tried).kind == "wrong"


def test_operands_are_mapped_in_each_way() -> None:
    """All, one, all but one."""
    made = [case("addmm", "forward", "plain", turn).mapped() for turn in range(12)]
    assert {tuple(m) for m in made} == {(0, 1, 2), (0,), (1,), (2,), (1, 2), (0, 2), (0, 1)}


def test_rotation_covers_each_operator_once() -> None:
    names = [str(i) for i in range(101)]
    parts = [kernels.rotated(names, f"{k}/7") for k in range(7)]
    assert sorted(sum(parts, []), key=int) == names


def test_a_worker_that_dies_names_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than ending the run."""
    dead = [("add|values", "died with exit status -11")]
    monkeypatch.setattr(kernels.isolate, "run", lambda *args, **kwargs: iter(dead))
    ((item, result),) = kernels.run(["add"], ["values"], 1, 1)
    assert item == "add|values"
    assert kernels.verdict_of(result) == "crashed"
    assert result["details"] == ["crash: add|values: died with exit status -11"]
