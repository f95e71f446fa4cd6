"""The check of a program reads the caller's memory and never writes to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import shardmap

WEIGHT = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dropped(x: Tensor) -> Tensor:
    return F.dropout((x @ x.mT).softmax(-1), 0.4) @ x


def drawn(x: Tensor) -> Tensor:
    return torch.where(torch.rand(5, 5).double() > 0.5, x @ x.mT, 0.0) @ x @ WEIGHT.mT


def chaotic(x: Tensor) -> Tensor:
    y = (x @ x.mT).sigmoid()
    for _ in range(60):
        y = 3.9 * y * (1 - y)
    return y @ x


FUNCTIONS = [dropped, drawn, chaotic]
WAYS: list[dict[str, Any]] = [{}, {"chunk_size": 3}, {"trace": "once"}, {"check": "always"}]


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    shardmap.clear_caches()


def call(f: Callable[[Tensor], Tensor], x: Tensor, way: dict[str, Any]) -> Tensor:
    return shardmap.vmap(f, randomness="different", **way)(x)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_the_batch_and_weights_count_no_write(f: Any, way: dict[str, Any]) -> None:
    for size in (7, 7, 4, 1):
        x = torch.randn(size, 5, 4, dtype=torch.float64)
        before, versions = x.clone(), (x._version, WEIGHT._version)
        call(f, x, way)
        assert (x._version, WEIGHT._version) == versions
        torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_what_saved_the_batch_before_can_be_differentiated(f: Any, way: dict[str, Any]) -> None:
    x = torch.randn(7, 5, 4, dtype=torch.float64).requires_grad_()
    y = x * 1
    before = y.square().sum()
    torch.manual_seed(0)
    call(f, y, way)
    before.backward()
    torch.testing.assert_close(x.grad, 2 * x)


@pytest.mark.parametrize("f", FUNCTIONS)
def test_batches_that_cannot_be_written(f: Any) -> None:
    with torch.inference_mode():
        cached = torch.randn(7, 5, 4, dtype=torch.float64)
    assert call(f, cached, {}).shape[0] == 7
    whole = torch.randn(7, 5, 8, dtype=torch.float64).requires_grad_()
    for view in (whole * 1).chunk(2, -1):
        shardmap.clear_caches()
        call(f, view, {}).sum().backward(retain_graph=True)


READS = """
import numpy, torch, warnings
from tests.lower import test_given_memory as given
warnings.simplefilter("ignore")
x = torch.from_numpy(numpy.load({path!r}, mmap_mode="r"))
for f in given.FUNCTIONS:
    print(tuple(given.call(f, x, {{}}).shape))
"""


def test_a_file_that_is_mapped_for_reading_alone(tmp_path: Path) -> None:
    path = tmp_path / "batch.npy"
    np.save(path, np.random.default_rng(0).normal(size=(7, 5, 4)))
    # A write would end the process.
    code = READS.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["(7, 5, 4)", "(7, 5, 4)", "(7, 5, 4)"]
