"""Normalisation rules against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests.rules.against_loop import check, real
from tests.rules.test_conv import gradients

MEAN, VAR = (
    torch.tensor([0.5, -0.5, 0.0, 1.0]).double(),
    torch.tensor([1.0, 2.0, 0.5, 1.0]).double(),
)

CASES = {
    "layer": (lambda x, w, c: F.layer_norm(x, (4,), w, c), real(3, 4), real(4), real(4)),
    "layer row": (lambda x, w, c: F.layer_norm(x, (4,), w, c), real(4), real(4), real(4)),
    "layer 2": (
        lambda x, w, c: F.layer_norm(x, (2, 4), w, c),
        real(3, 2, 2, 4),
        real(2, 4),
        real(2, 4),
    ),
    "layer plain": (lambda x: F.layer_norm(x, (4,)), real(3, 4)),
    "group": (lambda x, w, c: F.group_norm(x, 2, w, c), real(2, 4, 3, 2), real(4), real(4)),
    "group 1": (lambda x, w, c: F.group_norm(x, 2, w, c), real(1, 4, 3), real(4), real(4)),
    "group plain": (lambda x: F.group_norm(x, 4), real(1, 4, 3)),
    "batch eval": (
        lambda x, w, c: F.batch_norm(x, MEAN, VAR, w, c),
        real(2, 4, 3),
        real(4),
        real(4),
    ),
    "batch eval row": (
        lambda x, w, c: F.batch_norm(x, MEAN, VAR, w, c),
        real(2, 4),
        real(4),
        real(4),
    ),
    "batch eval images": (
        lambda x, w, c: F.batch_norm(x, MEAN, VAR, w, c),
        real(1, 4, 3, 3),
        real(4),
        real(4),
    ),
    "batch eval plain": (lambda x: F.batch_norm(x, MEAN, VAR), real(2, 4, 3)),
    "batch own": (
        lambda x, w, c: F.batch_norm(x, None, None, w, c, True),
        real(3, 4, 3),
        real(4),
        real(4),
    ),
    "instance": (
        lambda x, w, c: F.instance_norm(x, None, None, w, c),
        real(2, 4, 5),
        real(4),
        real(4),
    ),
    "instance plain": (lambda x: F.instance_norm(x), real(2, 4, 5)),
    "rms": (lambda x, w: F.rms_norm(x, (4,), w), real(3, 4), real(4)),
    "local response": (lambda x: F.local_response_norm(x, 2), real(1, 4, 3, 3)),
    "weight 0": (lambda v, g: torch._weight_norm(v, g, 0), real(3, 4, 2), real(3, 1, 1)),
    "weight last": (lambda v, g: torch._weight_norm(v, g, 1), real(3, 4), real(1, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Each choice of mapped input, weight and bias."""
    func, *makers = CASES[name]
    # PyTorch 2.13 reads a strided weight as if it were contiguous in the backward of this one (its
    # samples' loop is wrong, not the map).
    check(gradients(func), *makers, gradient=False, sizes=(3,), strided=name != "batch eval row")
    check(func, *makers, sizes=(2, 1), strided=False)


def test_mapped_statistics():
    """Running statistics that differ by sample."""
    check(
        gradients(lambda x, w: F.batch_norm(x, MEAN, VAR, w)),
        real(2, 4, 3),
        real(4),
        gradient=False,
    )
    check(
        lambda x, m, v: F.batch_norm(x, m, v.exp()), real(2, 4, 3), real(4), real(4), gradient=False
    )


@pytest.mark.parametrize("name", ["layer", "group", "instance", "batch eval"])
def test_twice(name):
    """Gradients of gradients."""
    func, *makers = CASES[name]

    def twice(x, w, c):
        x, w, c = (t.detach().requires_grad_() for t in (x, w, c))
        gx, gw = torch.autograd.grad((func(x, w, c) ** 3).sum(), (x, w), create_graph=True)
        return torch.autograd.grad((gx**2).sum() + (gw**2).sum(), (x, w))

    check(twice, *makers, gradient=False, sizes=(2,), strided=False)


def test_a_sample_larger_than_the_cache():
    """One call per sample."""
    rows = real(513, 256, dtype=torch.float32)
    plain = real(256, dtype=torch.float32)
    check(
        gradients(lambda x, w, c: F.layer_norm(x, (256,), w, c)),
        rows,
        plain,
        plain,
        gradient=False,
        sizes=(2,),
        strided=False,
        tolerance=1e-4,
    )


def test_half_precision():
    """Gradients in the dtype that was recorded."""
    half = torch.bfloat16
    check(
        gradients(lambda x, w, c: F.layer_norm(x, (4,), w, c)),
        real(3, 4, dtype=half),
        real(4, dtype=half),
        real(4, dtype=half),
        gradient=False,
        strided=False,
        tolerance=6e-2,
        rules=False,
    )


def test_offset_rows():
    """Rows whose mean is far larger than their deviation."""
    check(
        gradients(lambda x, w, c: F.layer_norm(x + 1000, (16,), w, c)),
        *(real(n, dtype=torch.float32) for n in (16, 16, 16)),
        gradient=False,
        strided=False,
        tolerance=1e-3,
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_running_statistics_of_each_sample(chunk_size: int | None) -> None:
    """They are written to where they lie, also where they are strided."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 4, generator=generator)
    weight = torch.randn(4, generator=generator)

    def f(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(x, mean, var, weight, training=True)

    def statistics() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(5, 8)[:, ::2], torch.ones(4, 5).t()

    (mean, var), (own_mean, own_var) = statistics(), statistics()
    want = torch.stack([f(*row) for row in zip(x, own_mean, own_var, strict=True)])
    got = shardmap.vmap(f, chunk_size=chunk_size or "auto")(x, mean, var)
    for mine, theirs in ((got, want), (mean, own_mean), (var, own_var)):
        torch.testing.assert_close(mine, theirs)
