"""A lowered program is checked before its first run.

What a wrong rule gives never reaches the caller.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.lower import check
from shardmap.rules import registry
from tests import oracle

x = torch.arange(24.0).view(3, 2, 4) + 1


@torch.library.custom_op("shardmap_verify_test::twice", mutates_args=())
def twice(t: torch.Tensor) -> torch.Tensor:
    """An operator whose rule each test writes."""
    return (t * 2).contiguous()


OP = torch.ops.shardmap_verify_test.twice.default
CALLS: list[str] = []


@pytest.fixture(autouse=True, params=["call by call", "as a whole first"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tries lowerings as those of small programs, and as those of large ones."""
    if request.param == "as a whole first":
        monkeypatch.setattr(check, "HEAVY_FROM", 0)
    return request.param


@pytest.fixture
def use() -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Registers a rule for the operator that calls a function of the batch."""
    shardmap.clear_caches()
    rules = dict(registry._rules)

    def register(batched: Callable[..., Any]) -> None:
        @shardmap.batching_rule(OP)
        def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
            spec = eq.outs[0].spec
            return b.call(batched, *args, shape=spec.shape, dtype=spec.dtype)

    yield register
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


def answer(batch: torch.Tensor = x, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        return shardmap.vmap(
            lambda r: torch.ops.shardmap_verify_test.twice(r).view(8) + 1, **options
        )(batch)


def _raises(t: torch.Tensor) -> torch.Tensor:
    raise ValueError("a rule's own fault")


WRONG = {
    "shape": lambda t: (t * 2).unsqueeze(1),
    "no batch dimension": lambda t: t[0] * 2,
    "dtype": lambda t: (t * 2).double(),
    "values": lambda t: t * 3,
    "samples in another order": lambda t: (t * 2).flip(0),
    "one sample for all": lambda t: (t[-1:] * 2).expand_as(t).clone(),
    "exception": _raises,
    "nan": lambda t: t * float("nan"),
}


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"devices": ["cpu", "cpu"]}, {"trace": "once"}], ids=str
)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_not_believed(
    name: str, options: dict[str, Any], use: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The result is the loop's, and the log says what was wrong.

    Alone in its chunk a sample has no order to be wrong in.
    """
    use(WRONG[name])
    harmless = options.get("chunk_size") == 1 and name in (
        "samples in another order",
        "one sample for all",
    )
    with caplog.at_level(logging.INFO, "shardmap"):
        for _ in range(2):
            oracle.assert_same(answer(**options), x.view(3, 8) * 2 + 1, name)
    assert harmless or "next tier" in caplog.text or "slower rules" in caplog.text


def test_other_strides_are_put_right(
    use: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The `view` that follows would fail on them.

    A copy restores them and the rule stays in use.
    """
    calls = []

    def batched(t: torch.Tensor) -> torch.Tensor:
        calls.append(t.shape[0])
        return (t * 2).transpose(1, 2).contiguous().transpose(1, 2)

    use(batched)
    with caplog.at_level(logging.INFO, "shardmap"):
        oracle.assert_same(answer(), x.view(3, 8) * 2 + 1, "output")
    assert "restored by a copy" in caplog.text
    assert "next tier" not in caplog.text
    assert calls[-1] == 3, "the rule itself served the batch"


def test_a_right_rule_is_left_alone(
    use: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    use(lambda t: t * 2)
    with caplog.at_level(logging.INFO, "shardmap"):
        oracle.assert_same(answer(), x.view(3, 8) * 2 + 1, "output")
    assert not caplog.records


def test_checked_once_for_one_sample_and_once_for_several(use: Callable[..., None]) -> None:
    sizes = []

    def batched(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.shape[0])
        return t * 2

    use(batched)
    for n in (3, 3, 1, 1, 2):
        answer(x[:n])
    assert sizes == [2, 3, 3, 1, 1, 1, 2]


def test_gradients_survive_a_demotion(use: Callable[..., None]) -> None:
    use(lambda t: t * 3)
    batch = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        got = shardmap.vmap(lambda r: (torch.ops.shardmap_verify_test.twice(r.detach()) * r).sum())(
            batch
        )
    (gradient,) = torch.autograd.grad(got.sum(), batch)
    oracle.assert_same(gradient, x * 2, "gradient")


@torch.library.custom_op("shardmap_verify_test::drift", mutates_args=())
def drift(t: torch.Tensor) -> torch.Tensor:
    """Not a function of its arguments."""
    CALLS.append("call")
    return t * len(CALLS)


def test_what_is_no_function_of_its_arguments_is_refused() -> None:
    with (
        pytest.warns(shardmap.SlowLoopWarning),
        pytest.raises(errors.MismatchError, match="something else when it is called again"),
    ):
        shardmap.vmap(lambda r: torch.ops.shardmap_verify_test.drift(r))(x)


@pytest.mark.parametrize("wrong_for", ["all", "one"])
@pytest.mark.parametrize("then", [1, 4, 6])
def test_chunks_of_one_sample_after_a_call_at_once(
    use: Callable[[Callable[..., Any]], None], then: int, wrong_for: str
) -> None:
    """They have a lowering of their own, which is tried later, when the function need not run.

    7 samples in chunks of 4 leave no sample alone, in chunks of 6 or 1 they do.
    """
    use(lambda t: t * 3 if wrong_for == "all" or len(t) == 1 else t * 2)
    batch = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0))
    want = torch.stack([answer(row[None])[0] for row in batch])
    torch.testing.assert_close(want, batch.view(7, 8) * 2 + 1)
    shardmap.clear_caches()
    torch.testing.assert_close(answer(batch), want)
    torch.testing.assert_close(answer(batch, chunk_size=then), want)
    torch.testing.assert_close(answer(batch, chunk_size=then, devices=["cpu", "cpu"]), want)


def test_a_right_program_is_computed_once_as_a_whole(use: Callable[..., None], way: str) -> None:
    """The samples of a trial are computed once if the first results are right."""
    sizes = []

    def batched(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.shape[0])
        return t * 2

    use(batched)
    oracle.assert_same(answer(memory_budget="1GiB"), x.view(3, 8) * 2 + 1, "output")
    assert sizes.count(2) == (2 if way == "as a whole first" else 3), sizes  # one more is measured


def test_memory_that_is_not_written_is_seen(way: str) -> None:
    """Slices of a result hold no value that passes for the result's."""
    for dtype in (torch.float32, torch.complex64, torch.int64, torch.bool):
        for size in (1, 3, 70001, 1 << 18):
            memory = check._filled((2, size), dtype, torch.device("cpu"))
            zeros = torch.zeros(2, size, dtype=dtype)
            assert memory.shape == zeros.shape
            for row in range(2):
                assert not torch.equal(check.thinned(memory)[row], check.thinned(zeros)[row])


def test_a_whole_program_that_raises_is_made_plainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is simplified between calls may fail where the calls one by one do not."""
    executed, tried = check._executed, []

    def failing(found: check.Verified, *rest: Any) -> Any:
        tried.append(found.fixes.separate)
        if not found.fixes.separate:
            raise RuntimeError("a view of a result with another layout")
        return executed(found, *rest)

    def function(t: torch.Tensor) -> torch.Tensor:
        return -(t * 3).sin() + t.exp()  # a difference, if it is simplified

    shardmap.clear_caches()
    monkeypatch.setattr(check, "_executed", failing)
    want = torch.stack([function(t) for t in x])
    assert torch.allclose(shardmap.vmap(function)(x), want)
    assert False in tried
