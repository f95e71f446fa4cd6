"""Every named case against the loop, for every way of computing it.

Every refusal with its error.
"""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap import errors
from tests import (
    cases,
    cases_around,  # noqa: F401  (adds cases)
    cases_gradients,  # noqa: F401  (adds cases)
    cases_indexing,  # noqa: F401  (adds cases)
    oracle,
    refusals,
)

WAYS = {
    "plain": {},
    "chunk_1": {"chunk_size": 1},
    "chunk_2": {"chunk_size": 2},
    "chunk_3": {"chunk_size": 3},
    "chunk_100": {"chunk_size": 100},
    "two_shards": {"devices": ["cpu", "cpu"]},
    "two_shards_chunk_1": {"devices": ["cpu", "cpu"], "chunk_size": 1},
    "trace_once": {"trace": "once"},
}
FIXED_BATCH = {"jacobian_in_one_call", "hessian_in_one_call", "expanded_batch"}
"""Cases whose batch is not the kit's."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_loop(name: str, way: str) -> None:
    """Values, dtypes, gradients, side effects and aliasing, whatever the chunks and shards."""
    function, checks = cases.CASES[name]
    verdict = oracle.compare(cases.setting(function, **WAYS[way]), shardmap.vmap, checks)
    assert verdict.kind == "right", verdict.detail


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("name", [n for n in cases.CASES if n not in FIXED_BATCH])
def test_other_sizes(name: str, size: int) -> None:
    """A batch of one, and a prime."""
    function, checks = cases.CASES[name]
    verdict = oracle.compare(cases.setting(function, size), shardmap.vmap, checks)
    assert verdict.kind == "right", verdict.detail


NOT_OF_NOTHING = {*FIXED_BATCH, "under_functional_jacobian"}
"""Cases of which the loop itself has no result for an empty batch."""


@pytest.mark.parametrize("name", [n for n in cases.CASES if n not in NOT_OF_NOTHING])
def test_empty_batch(name: str) -> None:
    """No rows: the shapes and dtypes that rows would have had."""
    function, checks = cases.CASES[name]
    verdict = oracle.compare(cases.setting(function, 0), shardmap.vmap, checks)
    assert verdict.kind == "right", verdict.detail


def test_empty_batch_that_cannot_be_inferred() -> None:
    """A function that fails on zeros says so by its own error class."""

    def function(a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(a)

    with pytest.raises(errors.EmptyBatchError):
        shardmap.vmap(function)(torch.zeros(0, 3, 3))


@pytest.mark.parametrize("name", refusals.REFUSALS)
def test_refused_with_nothing_changed(name: str) -> None:
    """The error that is promised, and every tensor, counter and random state as before."""
    function, expected = refusals.REFUSALS[name]
    assert oracle.refusal(cases.setting(function), shardmap.vmap, expected)


@pytest.mark.parametrize("name", cases.CASES)
def test_cases_are_runnable(name: str) -> None:
    """The loop itself answers every case, so that no case passes by not being counted."""
    function, checks = cases.CASES[name]
    verdict = oracle.compare(cases.setting(function), oracle.loop, checks)
    assert verdict.kind == "right", verdict.detail
