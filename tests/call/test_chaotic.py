"""Chaotic functions are served, and faults in discontinuous ones are not taken for chaos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.rules import registry


def logistic(y: Tensor, steps: int = 80) -> Tensor:
    y = y.sigmoid() * 0.9 + 0.05
    for _ in range(steps):
        y = 3.99 * y * (1 - y)
    return y


WEIGHT = torch.ones(4, 3)
CHAOTIC: dict[str, Callable[[Tensor], Tensor]] = {
    "a transform": lambda x: logistic(torch.fft.rfft(x).abs()),
    "a product": lambda x: logistic(x @ x.mT),
    "weights": lambda x: logistic(x @ WEIGHT, 40),
    "a norm": lambda x: logistic(x / x.norm()),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"reduce": "mean"}], ids=str)
@pytest.mark.parametrize("name", CHAOTIC)
def test_rounding_that_grows_is_no_mismatch(name: str, options: dict[str, Any]) -> None:
    f = CHAOTIC[name]
    for seed in range(12):
        shardmap.clear_caches()
        x = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(seed))
        found = shardmap.vmap(f, **options)(x)
        assert found.isfinite().all()
        shorter = shardmap.vmap(lambda r: logistic(r @ WEIGHT, 4))(x)
        torch.testing.assert_close(shorter, torch.stack([logistic(r @ WEIGHT, 4) for r in x]))


@torch.library.custom_op("shardmap_chaos_test::twice", mutates_args=())
def twice(t: Tensor) -> Tensor:
    return t * 2


@twice.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)


@pytest.fixture
def _wrong_for_many() -> Iterator[None]:
    shardmap.clear_caches()
    rules = dict(registry._rules)

    @shardmap.batching_rule(torch.ops.shardmap_chaos_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2 if t.shape[0] < 5 else t * 2 + 3, *args)

    yield
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": lambda r: twice(r).floor(),
    "sign": lambda r: twice(r) * (r - 1).sign(),
    "smooth": lambda r: twice(r).sin(),
    "an inverse": lambda r: twice(r) @ (torch.outer(r, r) + torch.eye(6) * 1e-3).inverse(),
}


@pytest.mark.usefixtures("_wrong_for_many")
@pytest.mark.parametrize("name", STEPS)
def test_faults_are_refused_where_steps_move_some_numbers(name: str) -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0  # on a step
    with pytest.raises(errors.MismatchError, match="output 0"):
        shardmap.vmap(STEPS[name])(x)
