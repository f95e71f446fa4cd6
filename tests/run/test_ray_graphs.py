"""cuda_graphs=True on a cluster whose workers have no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import shardmap
from shardmap import errors
from tests.on_ray import TWO, local_ray

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    with local_ray():
        yield


def test_workers_without_a_gpu_refuse_by_name() -> None:
    x = torch.randn(7, 3)
    with pytest.raises(errors.OptionError, match="computes on cpu: only CUDA devices have graphs"):
        shardmap.vmap(torch.sin, devices=TWO, cuda_graphs=True)(x)
    torch.testing.assert_close(shardmap.vmap(torch.sin, devices=TWO)(x), x.sin())
