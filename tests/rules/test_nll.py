"""Losses over classes against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests.rules.against_loop import below, check, real


def _gradient(func):
    def with_gradient(x, *rest):
        x = x.detach().requires_grad_()
        out = func(x, *rest)
        return out.detach(), torch.autograd.grad((out**3).sum(), x)[0]

    return with_gradient


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
def test_targets(shape, reduction):
    """Rows, single ones, and images; targets that are ignored."""
    classes = (5,) if not shape else (shape[0], 5, *shape[1:])
    options = {"reduction": reduction, "ignore_index": 2}
    check(
        lambda x, t: F.cross_entropy(x, t, **options), real(*classes), below(5, *shape), sizes=(3,)
    )
    check(
        _gradient(lambda x, t: F.nll_loss(x, t, **options)),
        real(*classes),
        below(5, *shape),
        gradient=False,
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
def test_weights(shape, reduction):
    """Weights of the classes, shared or of each sample; ignored targets that are no class."""
    classes = (5,) if not shape else (shape[0], 5, *shape[1:])

    def loss(x, t, w):
        return F.nll_loss(x, torch.where(t == 0, -100, t), w.detach().abs(), reduction=reduction)

    check(_gradient(loss), real(*classes), below(5, *shape), real(5), gradient=False)
    check(loss, real(*classes), below(5, *shape), real(5), strided=False, sizes=(2,))


def test_smoothing_and_single_precision():
    """The other parts of cross-entropy, in the dtype of most nets."""
    check(
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
        real(3, 4, dtype=torch.float32),
        below(4, 3),
        tolerance=1e-5,
    )


def test_twice():
    """Gradients of gradients."""

    def twice(x, t):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(x, t), x, create_graph=True)
        return torch.autograd.grad((g**2).sum(), x)[0]

    check(twice, real(3, 4), below(4, 3), gradient=False)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_margins(reduction):
    """Margin losses."""
    check(
        _gradient(lambda x, t: F.multi_margin_loss(x, t, reduction=reduction)),
        real(3, 4),
        below(4, 3),
        gradient=False,
    )
    check(
        _gradient(lambda x, t: F.multi_margin_loss(x, t, p=2, reduction=reduction)),
        real(4),
        below(4),
        gradient=False,
    )
    check(
        _gradient(lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction)),
        real(3, 4),
        below(4, 3, 4, low=-1),
        gradient=False,
    )
    check(
        _gradient(lambda x, t: F.multi_margin_loss(x, t, reduction=reduction)),
        real(),
        below(1),
        gradient=False,
    )
    check(
        _gradient(lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction)),
        real(),
        below(1),
        gradient=False,
    )


def test_a_target_that_is_no_class():
    """The kernel's check stays."""
    with pytest.raises((IndexError, RuntimeError)):
        shardmap.vmap(F.nll_loss)(torch.randn(3, 2, 4), torch.tensor([[0, 1], [0, 4], [1, 1]]))
