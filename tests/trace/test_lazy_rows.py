"""Rows that are lazy conjugates or negatives, or made under inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors


def numbers(size: int) -> Tensor:
    return torch.randn(
        size, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(size)
    )


def loop(f: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return torch.stack([f(row) for row in batch])


ASKING: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor], str]] = {
    "conjugate": (Tensor.is_conj, Tensor.conj, "resolve_conj"),
    "conjugate, torch": (torch.is_conj, Tensor.conj, "resolve_conj"),
    "negative": (Tensor.is_neg, lambda t: t.conj().imag, "resolve_neg"),
    "negative, torch": (torch.is_neg, lambda t: t.conj().imag, "resolve_neg"),
}


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}])
def test_a_question_about_laziness(name: str, options: dict) -> None:
    ask, lazy, remedy = ASKING[name]

    def function(row: Tensor) -> Tensor:
        return row * (2 if ask(row) else 3)

    mapped = shardmap.vmap(function, **options)
    for size in (1, 3, 5):
        batch = lazy(numbers(size))
        with pytest.raises(errors.EscapeError, match=f"asks is_.*{remedy}"):
            mapped(batch)
        plain = batch.resolve_conj().resolve_neg()
        torch.testing.assert_close(mapped(plain), loop(function, plain))


def test_a_question_about_inference_mode() -> None:
    def function(row: Tensor) -> Tensor:
        return row * (2 if row.is_inference() else 3)

    mapped = shardmap.vmap(function)
    batch = torch.randn(5, 3)
    with torch.inference_mode(), pytest.raises(errors.EscapeError, match=r"torch\.no_grad\(\)"):
        mapped(batch * 1)
    with torch.no_grad():
        assert torch.equal(mapped(batch * 1), loop(function, batch * 1))


CONJUGATING: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.conj().sum(),
    "product": lambda x: (x.conj() * x * 2j).sum(),
    "vdot": lambda x: torch.vdot(x, x * 2),
    "matmul": lambda x: x.conj() @ x,
}


@pytest.mark.parametrize("name", CONJUGATING)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}])
def test_gradients_from_outside_are_plain_tensors(name: str, options: dict) -> None:
    """As those of a loop are, whose rows are stacked; in later calls as well."""
    function = CONJUGATING[name]
    mapped = shardmap.vmap(function, **options)
    for size in (5, 5, 5, 5, 5, 3, 1):
        batch = numbers(size).requires_grad_()
        found = []
        for outputs in (mapped(batch), loop(function, batch)):
            loss = torch.view_as_real(outputs).square().sum()
            (first,) = torch.autograd.grad(loss, batch, create_graph=True)
            assert not first.is_conj()
            found.append((first, *torch.autograd.grad(torch.view_as_real(first).sum(), batch)))
        torch.testing.assert_close(*found)
