"""Attention rules against the loop, and the form for other devices against the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardmap
from shardmap.rules import attention
from tests.rules.against_loop import assert_close, check, real
from tests.rules.test_conv import gradients

attend = F.scaled_dot_product_attention
HIDDEN = torch.tensor(
    [[True, False, True], [False, True, True], [True, True, True], [False, False, True]]
)

CASES = {
    "plain": (attend, 1),
    "batch": (attend, 2),
    "causal": (lambda q, k, v: attend(q, k, v, is_causal=True), 1),
    "scale": (lambda q, k, v: attend(q, k, v, scale=0.3), 2),
    "shared mask": (lambda q, k, v: attend(q, k, v, HIDDEN), 2),
    "shared masks": (
        lambda q, k, v: attend(q, k, v, torch.stack([HIDDEN, ~HIDDEN]).unsqueeze(1)),
        2,
    ),
    "grouped queries": (lambda q, k, v: attend(q, k, v, enable_gqa=True), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Each choice of mapped query, key and value."""
    func, batch = CASES[name]
    heads = 2 if name == "grouped queries" else 1
    makers = real(batch, 2, 4, 4), real(batch, 2 // heads, 3, 4), real(batch, 2 // heads, 3, 4)
    options: dict[str, Any] = {"tolerance": 1e-5, "strided": False, "randomness": "different"}
    check(gradients(func), *makers, gradient=False, **options)
    check(func, *makers, sizes=(2,), **options)


@pytest.mark.parametrize("shape", [(4, 3), (1, 1, 4, 3), (2, 1, 4, 3), (2, 2, 4, 3)])
def test_mapped_masks(shape):
    """A mask of each sample: of booleans, or added to the scores."""
    makers = real(2, 2, 4, 4), real(*shape)
    shared = torch.randn(
        2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    options: dict[str, Any] = {
        "tolerance": 1e-5,
        "strided": False,
        "gradient": False,
        "always": (1,),
        "randomness": "different",
    }
    check(lambda q, m: attend(q, shared, shared, m > -0.5), *makers, **options)
    check(
        gradients(lambda q, m: attend(q, shared, shared, m.detach()) + 0 * m.sum()),
        *makers,
        **options,
    )


def test_layers():
    """A layer with heads in permuted memory, whose results the next call views."""
    torch.manual_seed(0)
    layer = (
        torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    )
    check(layer, real(3, 8), strided=False, tolerance=1e-6, randomness="different")
    check(
        gradients(layer),
        real(2, 3, 8),
        gradient=False,
        strided=False,
        tolerance=1e-6,
        randomness="different",
    )


@pytest.mark.parametrize("name", CASES)
def test_on_another_device(name, monkeypatch):
    """The form for devices that lack the recorded kernel gives what the kernel gives."""
    monkeypatch.setattr(attention, "same_device", lambda b, eq: False)
    test_forward_and_backward(name)


def test_kernels_of_other_devices_on_this_one(monkeypatch):
    """Programs recorded with the kernels of another device.

    Their calls, made by hand, are lowered to products here.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(3, 1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    out, lse = attention.attend(*(t.flatten(0, 1) for t in (q, k, v)), None, True, None)
    want = torch.func.vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))(
        q, k, v
    )
    assert_close(out.unflatten(0, (3, 1)), want, 1e-6, "forward")
    flat = [t.flatten(0, 1) for t in (grad, q, k, v)]
    leaves = [t.clone().requires_grad_() for t in flat[1:]]
    expected = torch.autograd.grad(
        F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, flat[0]
    )
    got = attention.attend_backward(*flat, None, out, lse, True, None)
    for mine, theirs in zip(got, expected, strict=False):
        assert_close(mine, theirs, 1e-6, "backward")


def test_rows_without_keys():
    """Rows that may attend to nothing."""
    mask = torch.tensor([[False, False], [True, False]])
    x = torch.randn(3, 1, 1, 2, 4)
    shardmap.clear_caches()
    got = shardmap.vmap(lambda q: attend(q, q, q, mask), randomness="different")(x)
    out, _ = attention.attend(*[x.flatten(0, 1)] * 3, mask, False, None)
    assert_close(out.unflatten(0, (3, 1)), got, 1e-5, "empty rows")


@pytest.mark.parametrize("split", [lambda p: p[None], lambda p: p[:, None]])
@pytest.mark.parametrize("size", [1, 3, 61])
def test_an_unsqueezed_sample_beside_draws(split: Any, size: int) -> None:
    """A view that differs from the sample's in strides of single entries is no overlap."""
    x = torch.rand(size, 5, 8)

    def function(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = split(p)
        found = F.scaled_dot_product_attention(q, q, q)
        return found, F.dropout(found, 0.5)

    for options in ({}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}):
        found, dropped = shardmap.vmap(function, randomness="different", **options)(x)
        wanted = torch.stack([F.scaled_dot_product_attention(*[split(p)] * 3) for p in x])
        torch.testing.assert_close(found, wanted)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], 2 * wanted[kept])
        assert 0.3 < kept.float().mean() < 0.7
