"""Functions that change a setting of torch and do not set it back, as the loop leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import shardmap

Tensor = torch.Tensor


def default_dtype(r: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return r * torch.full((4,), 0.1)


def no_gradients(r: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return r * 2


def deterministic(r: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    return r * 3


def precision(r: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("medium")
    return r @ r


SETTINGS: list[Callable[[], object]] = [
    torch.get_default_dtype, torch.is_grad_enabled, torch.are_deterministic_algorithms_enabled,
    torch.get_float32_matmul_precision,
]  # fmt: skip


def reset() -> None:
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _settings_of_the_tests() -> Iterator[None]:
    yield
    reset()


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("function", [default_dtype, no_gradients, deterministic, precision])
def test_every_call_leaves_the_settings_of_the_loop(
    trace: str, function: Callable[[Tensor], Tensor]
) -> None:
    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(5):
        rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        wanted = torch.stack([function(r) for r in rows])
        left = [setting() for setting in SETTINGS]
        reset()
        found = mapped(rows)
        assert [setting() for setting in SETTINGS] == left
        reset()
        torch.testing.assert_close(found, wanted)


def test_a_setting_that_is_set_back_is_no_reason_to_record_again() -> None:
    def function(r: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.no_grad():
                return r @ r
        finally:
            torch.set_float32_matmul_precision(before)

    rows = torch.randn(5, 4)
    for _ in range(6):
        found = shardmap.vmap(function)(rows)
        torch.testing.assert_close(found, torch.stack([r @ r for r in rows]))
    assert "recorded at each call" not in shardmap.plan(function)(rows).explain()
