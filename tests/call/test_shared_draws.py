"""Functions that branch on a random number that all samples share: `randomness="same"`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors

Tensor = torch.Tensor

WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 7},
    {"devices": ["cpu", "cpu"], "chunk_size": 5},
    {"trace": "once"},
    {"check": "off"},
    {"check": "always"},
]


@pytest.fixture(autouse=True)
def _known_functions_are_dropped() -> None:
    shardmap.clear_caches()


def by_a_coin(r: Tensor) -> tuple[Tensor, Tensor]:
    drawn = torch.rand((), dtype=torch.float64)
    return (r * 2 if drawn > 0.5 else r * 3), drawn


def by_a_coin_and_the_sample(r: Tensor) -> tuple[Tensor, Tensor]:
    drawn = torch.randn((), dtype=torch.float64)
    return (r * 2 if drawn + r.sum() > 0 else r * 3), drawn


def filled(r: Tensor) -> tuple[Tensor, Tensor]:
    drawn = torch.empty((), dtype=torch.float64).uniform_()
    return (r * 2 if bool(drawn > 0.5) else r * 3), drawn


def rule(name: str, r: Tensor, drawn: Tensor) -> Tensor:
    at = drawn + r.sum() > 0 if name == "by_a_coin_and_the_sample" else drawn > 0.5
    return r * 2 if at else r * 3


FUNCTIONS = [by_a_coin, by_a_coin_and_the_sample, filled]


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("size", [1, 3, 23])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_all_samples_share_the_draw_and_follow_from_it(function: Any, size: int) -> None:
    batch = torch.randn(size, 3, dtype=torch.float64)
    for seed in range(6):
        found = []
        for way in WAYS:
            mapped = shardmap.vmap(function, randomness="same", **way)
            for again in range(2):
                torch.manual_seed(10 * seed + again)
                results, drawn = mapped(batch)
                assert drawn.unique().numel() == 1
                wanted = torch.stack([rule(function.__name__, r, drawn[0]) for r in batch])
                torch.testing.assert_close(results, wanted, rtol=0, atol=0)
                found.append((again, float(drawn[0])))
        assert len(set(found)) == 2  # the same number however it is computed


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("trace", ["each", "once"])
def test_a_coin_is_fair(trace: str) -> None:
    mapped = shardmap.vmap(by_a_coin, randomness="same", trace=trace)
    batch, heads = torch.ones(3, 1, dtype=torch.float64), 0
    for seed in range(200):
        torch.manual_seed(seed)
        heads += int(mapped(batch)[0][0, 0] == 2)
    assert 65 <= heads <= 135  # five standard deviations


def test_strict_refuses_and_a_number_that_is_passed_in_is_served() -> None:
    batch = torch.randn(7, 3, dtype=torch.float64)
    with pytest.raises(errors.VariesError, match="random number that all samples share"):
        shardmap.vmap(by_a_coin, randomness="same", strict=True)(batch)

    def given(r: Tensor, drawn: Tensor) -> Tensor:
        return r * 2 if drawn > 0.5 else r * 3

    for number in (0.2, 0.9):
        drawn = torch.tensor(number)
        found = shardmap.vmap(given, (0, None), strict=True)(batch, drawn)
        torch.testing.assert_close(found, torch.stack([given(r, drawn) for r in batch]))
