"""Results in memory that an operator writes to: `out=`, in-place calls, running statistics.

What is returned is what was written last, however the map runs: in one chunk, in several, on two
lanes, reduced, stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests import oracle


@torch.library.custom_op("shardmap_writes_test::fill_twice", mutates_args=("target",))
def fill_twice(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write twice `source` into `target`."""
    target.copy_(source * 2)


@torch.library.custom_op("shardmap_writes_test::swap", mutates_args=("a", "b"))
def swap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exchange two tensors, and return their sum."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    return a + b


def _batch_norm(r: torch.Tensor) -> Any:
    mean, var = torch.zeros(2), torch.ones(2)
    return F.batch_norm(r.view(3, 2), mean, var, training=True), mean, var


def _instance_norm(r: torch.Tensor) -> Any:
    mean, var = torch.zeros(2), torch.ones(2)
    out = F.instance_norm(r.view(1, 2, 3), mean, var, use_input_stats=True)
    return out, mean, var


def _custom(r: torch.Tensor) -> torch.Tensor:
    target = torch.empty(6)
    fill_twice(target, r)
    return target


def _swapped(r: torch.Tensor) -> Any:
    a, b = r.clone(), torch.arange(6.0)
    total = swap(a, b)
    return a, b, total


def _foreach(r: torch.Tensor) -> Any:
    parts = [r.clone(), torch.ones(6)]
    torch._foreach_add_(parts, [r, r])
    torch._foreach_mul_(parts, 2.0)
    return tuple(parts)


def _sorted(r: torch.Tensor) -> Any:
    values, indices = torch.empty(6), torch.empty(6, dtype=torch.int64)
    torch.sort(r, out=(values, indices))
    return values, indices


def _largest(r: torch.Tensor) -> Any:
    values, indices = torch.empty(2), torch.empty(2, dtype=torch.int64)
    torch.topk(r, 2, out=(values, indices))
    return values, indices


def _written_twice(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(6)
    torch.sin(r, out=out)
    torch.mul(out, r, out=out)
    return out


def _returned_and_changed(r: torch.Tensor) -> Any:
    out = torch.zeros(6)
    first = torch.add(out, r)
    out.add_(first).mul_(2)
    return first, out


def _through_a_view(r: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, 6)
    torch.exp(r, out=out[1])
    out[0] = r.sum()
    return out


def _into_a_transpose(r: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, 2)
    torch.cos(r.view(2, 3), out=out.t())
    return out


def _filled_in_pieces(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(3)
    out[0], out[1], out[2] = r.sum(), r.max(), r.min()
    return out


def _same_for_all_then_written(r: torch.Tensor) -> Any:
    table = torch.arange(6.0)
    before = table * 1
    table.index_add_(0, torch.tensor([1, 3]), r[:2])
    return before, table


def _of_another_dtype(r: torch.Tensor) -> torch.Tensor:
    return torch.add(r, 1, out=torch.empty(6, dtype=torch.float64))


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda r: torch.add(r, 1, out=torch.empty(6)),
    "add with alpha": lambda r: torch.add(r, r, alpha=3, out=torch.empty(6)),
    "sin": lambda r: torch.sin(r, out=torch.zeros(6)),
    "sum": lambda r: torch.sum(r.view(2, 3), 0, out=torch.empty(3)),
    "cumsum": lambda r: torch.cumsum(r, 0, out=torch.empty(6)),
    "matmul": lambda r: torch.mm(r.view(2, 3), r.view(3, 2), out=torch.empty(2, 2)),
    "cat": lambda r: torch.cat([r, r * 2], out=torch.empty(12)),
    "stack": lambda r: torch.stack([r, r * 2], out=torch.empty(2, 6)),
    "where": lambda r: torch.where(r > 0, r, -r, out=torch.empty(6)),
    "clamp": lambda r: torch.clamp(r, -0.5, 0.5, out=torch.empty(6)),
    "index_select": lambda r: torch.index_select(r, 0, torch.tensor([4, 0]), out=torch.empty(2)),
    "gather": lambda r: torch.gather(r, 0, torch.tensor([4, 0]), out=torch.empty(2)),
    "comparison": lambda r: torch.gt(r, 0, out=torch.empty(6, dtype=torch.bool)),
    "another dtype": _of_another_dtype,
    "sort": _sorted,
    "topk": _largest,
    "written twice": _written_twice,
    "through a view": _through_a_view,
    "into a transpose": _into_a_transpose,
    "filled in pieces": _filled_in_pieces,
    "returned and changed": _returned_and_changed,
    "written later": _same_for_all_then_written,
    "add_": lambda r: torch.zeros(6).add_(r),
    "copy_": lambda r: torch.empty(6).copy_(r),
    "index_put_": lambda r: torch.zeros(6).index_put_((torch.tensor([2]),), r.sum()),
    "scatter_": lambda r: torch.zeros(6).scatter_(0, torch.tensor([5, 1]), r[:2]),
    "masked_fill_": lambda r: r.clone().masked_fill_(r > 0, 7.0),
    "fill_ of a slice": lambda r: torch.ones(6).narrow(0, 1, 2).fill_(0).add(r[:2]),
    "foreach": _foreach,
    "custom operator": _custom,
    "custom operator with a result": _swapped,
    "batch norm": _batch_norm,
    "instance norm": _instance_norm,
}
WAYS: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 2": {"chunk_size": 2},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once", "chunk_size": 3},
}

pytestmark = pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")


def _leaves(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _loop(function: Callable[[torch.Tensor], Any], rows: torch.Tensor) -> list[torch.Tensor]:
    columns = zip(*[_leaves(function(r)) for r in rows], strict=True)
    return [torch.stack(column) for column in columns]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_is_returned(form: str, way: str) -> None:
    function = FORMS[form]
    mapped = shardmap.vmap(function, **WAYS[way])
    for size in (7, 7, 1, 3):
        rows = torch.randn(size, 6)
        for got, want in zip(_leaves(mapped(rows)), _loop(function, rows), strict=True):
            oracle.assert_same(got, want, f"{form}, {way}, {size} samples")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_reduced_and_stored(form: str, tmp_path: Path) -> None:
    function, rows = FORMS[form], torch.randn(7, 6)
    want = _loop(function, rows)
    if all(t.dtype.is_floating_point for t in want):
        for reduce, combine in (("sum", lambda t: t.sum(0)), ("max", lambda t: t.amax(0))):
            got = _leaves(shardmap.vmap(function, reduce=reduce, chunk_size=2)(rows))
            for a, t in zip(got, want, strict=True):
                torch.testing.assert_close(a, combine(t), rtol=1e-5, atol=1e-5)
    store = shardmap.vmap(function, out=shardmap.MemmapSink(tmp_path / "s"), chunk_size=2)(rows)
    for spec, t in zip(store.header.outputs, want, strict=True):
        oracle.assert_same(store.read(spec.name, 0, 7), t, f"{form}, stored")


def test_a_large_batch_without_options() -> None:
    rows = torch.randn(300_000, 6)
    got = shardmap.vmap(lambda r: torch.add(r, 1, out=torch.empty(6)))(rows)
    assert torch.equal(got, rows + 1)


def test_out_is_batched_by_the_operators_own_rule() -> None:
    """No loop, and no warning of one."""
    for form in ("add", "matmul", "where", "cumsum", "another dtype", "through a view"):
        plan = shardmap.plan(FORMS[form], strict=True)(torch.randn(5, 6))
        assert "loop" not in plan.explain().partition("Memory")[0], form
