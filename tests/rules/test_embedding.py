"""Embedding rules against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.rules.against_loop import below, check, real


def _gradient(func):
    def with_gradient(index, weight, *rest):
        weight = weight.detach().requires_grad_()
        rest = [r.detach().requires_grad_() for r in rest]
        out = func(index, weight, *rest)
        return (out.detach(), *torch.autograd.grad((out * out).sum(), [weight, *rest]))

    return with_gradient


@pytest.mark.parametrize("shape", [(4,), (2, 3), (), (0,)])
def test_lookup(shape):
    """Every shape of index, shared or mapped tables."""
    check(F.embedding, below(5, *shape), real(5, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 1},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"padding_idx": 0, "scale_grad_by_freq": True},
    ],
)
@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
def test_gradient(options, shape):
    """The gradient of a table for each sample."""
    check(
        _gradient(lambda i, w: F.embedding(i, w, **options)),
        below(5, *shape),
        real(5, 2),
        gradient=False,
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode):
    """Bags of equal and unequal lengths, empty ones among them."""
    check(
        _gradient(lambda i, w: F.embedding_bag(i, w, mode=mode)),
        below(5, 3, 2),
        real(5, 4),
        gradient=False,
    )
    offsets = torch.tensor([0, 2, 2])
    check(
        _gradient(lambda i, w: F.embedding_bag(i, w, offsets, mode=mode)),
        below(5, 6),
        real(5, 4),
        gradient=False,
    )
    check(lambda i, w: F.embedding_bag(i, w, offsets, mode=mode), below(5, 6), real(5, 4))


def test_weighted_bags():
    """A weight for each index."""

    def weighted(i, w, s):
        return F.embedding_bag(i, w, per_sample_weights=s, mode="sum")

    check(_gradient(weighted), below(5, 3, 2), real(5, 4), real(3, 2), gradient=False)


def test_offsets_of_each_sample():
    """Bags that begin elsewhere in each sample."""
    check(
        _gradient(
            lambda i, w: F.embedding_bag(
                i[1:], w, torch.cat([torch.zeros_like(i[:1]), i[:1]]), mode="mean"
            )
        ),
        below(5, 7, low=1),
        real(5, 4),
        gradient=False,
        always=(0,),
    )


def test_twice():
    """Gradients of gradients."""

    def twice(i, w):
        w = w.detach().requires_grad_()
        (g,) = torch.autograd.grad((F.embedding(i, w) ** 3).sum(), w, create_graph=True)
        return torch.autograd.grad((g * g).sum(), w)[0]

    check(twice, below(5, 4), real(5, 2), gradient=False)


@pytest.mark.parametrize("bad", [5, -1])
def test_a_bad_index_raises(bad):
    """An index that a sample's table lacks must not read the next sample's table."""
    import shardmap

    with pytest.raises((IndexError, RuntimeError)):
        shardmap.vmap(F.embedding)(torch.tensor([[0], [bad], [1]]), torch.randn(3, 5, 2))
