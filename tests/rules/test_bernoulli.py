"""What decides a dropout: four elements by each word, the same however samples are cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shardmap
from shardmap.rules.philox import Stream

SEED, NUMBER = 123456789, 5
CHANCES = (0.0, 1e-9, 2.0**-20, 1e-5, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2.0**-18, 1.0)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 37, 256, 70_001, 2**17])
@pytest.mark.parametrize("p", CHANCES)
def test_a_sample_is_decided_alone_as_among_others(count: int, p: float) -> None:
    size = 7 if count > 1000 else 61
    whole = Stream(size, 0, SEED, NUMBER).below(count, p)
    assert whole.shape == (size, count)
    for chunk in (1, 3, size):
        parts = [
            Stream(min(chunk, size - at), at, SEED, NUMBER).below(count, p)
            for at in range(0, size, chunk)
        ]
        assert np.array_equal(np.concatenate(parts), whole), chunk


@pytest.mark.parametrize("p", CHANCES)
def test_the_chance_is_exact(p: float) -> None:
    samples, count = 64, 2**18
    kept = Stream(samples, 3, SEED, NUMBER).below(count, p)
    total = samples * count
    error = math.sqrt(total * p * (1 - p))
    assert abs(int(kept.sum()) - total * p) <= 4.5 * error + (1 if 0 < p < 1 else 0)
    by_place = kept.reshape(-1, 16).mean(0)  # each of the sixteen numbers of a count
    assert np.abs(by_place - p).max() <= 4.5 * error / total * 4 + 16 / total


def test_decisions_are_independent() -> None:
    kept = Stream(256, 0, SEED, NUMBER).below(4096, 0.5).astype(np.float64) * 2 - 1
    for lag in (1, 2, 3, 4, 8, 16, 32):
        assert abs((kept[:, lag:] * kept[:, :-lag]).mean()) < 5 / math.sqrt(kept.size)
    assert abs((kept[1:] * kept[:-1]).mean()) < 5 / math.sqrt(kept.size)
    other = Stream(256, 0, SEED, NUMBER + 1).below(4096, 0.5).astype(np.float64) * 2 - 1
    assert abs((kept * other).mean()) < 5 / math.sqrt(kept.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 67])
def test_dropout_is_the_same_for_any_chunks_and_lanes(size: int, dtype: torch.dtype) -> None:
    x = torch.rand(size, 5, 37, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    ways: list[dict[str, Any]] = [
        {}, {"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 64}, {"trace": "once"},
        {"devices": ["cpu", "cpu"], "chunk_size": 2},
    ]  # fmt: skip
    found = []
    for way in ways:
        torch.manual_seed(11)
        found.append(shardmap.vmap(lambda r: F.dropout(r, 0.3), randomness="different", **way)(x))
    for other in found[1:]:
        assert torch.equal(found[0], other)
    kept = found[0] != 0
    assert found[0].dtype == dtype
    want = torch.stack([F.dropout(r, 0.0) * k / 0.7 for r, k in zip(x, kept, strict=True)])
    torch.testing.assert_close(found[0], want.to(dtype))
    assert size < 3 or not torch.equal(kept[0], kept[1])
