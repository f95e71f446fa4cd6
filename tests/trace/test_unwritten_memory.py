"""Memory of `torch.empty`: refused where a result depends on it, right where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardmap
from shardmap import errors

Function = Callable[[torch.Tensor], Any]

torch.manual_seed(0)
conv = nn.Conv1d(1, 2, 3).requires_grad_(False)
strided = nn.Conv1d(1, 4, 3, stride=2, padding=1, groups=1).requires_grad_(False)
across = nn.ConvTranspose1d(1, 2, 3).requires_grad_(False)
flat = nn.Conv2d(1, 2, 3).requires_grad_(False)


def piecewise(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2)
    out[0] = r.sum()
    out[1] = r.max()
    return out


def by_view(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(3, 2)
    for row in out:
        row.copy_(r[:2])
    return out * r[0]


def never_used(r: torch.Tensor) -> torch.Tensor:
    waste = torch.empty(6) * 2 + r
    assert waste.shape == (6,)
    return r.sin()


def overwritten(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(6) * 2
    out.copy_(r)
    return out


def weighted(net: nn.Module) -> Function:
    """The second derivative by the weights, too."""

    def function(r: torch.Tensor) -> torch.Tensor:
        def loss(w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(net, {"weight": w}, (q[None],)).tanh().sum()

        weight = net.weight
        assert isinstance(weight, torch.Tensor)
        return torch.func.jacrev(torch.func.grad(loss), argnums=1)(weight, r)

    return function


ctc: Any = F.ctc_loss  # takes lists of lengths, which its annotations leave out


def gradient_of_ctc(r: torch.Tensor) -> torch.Tensor:
    q = r.detach().requires_grad_()
    logits = q.outer(q).log_softmax(-1)[:, None]
    return torch.autograd.grad(ctc(logits, torch.tensor([[1, 2]]), [6], [2]), q)[0]


RIGHT: dict[str, Function] = {
    "piece by piece": piecewise,
    "by a view": by_view,
    "never used": never_used,
    "overwritten after a read": overwritten,
    "jacrev of a convolution": torch.func.jacrev(lambda r: conv(r[None]).tanh().sum()),
    "hessian of a convolution": torch.func.hessian(lambda r: conv(r[None]).tanh().sum()),
    "hessian of a strided convolution": torch.func.hessian(
        lambda r: strided(r[None]).tanh().square().sum()
    ),
    "hessian of a transposed convolution": torch.func.hessian(
        lambda r: across(r[None]).tanh().sum()
    ),
    "hessian of a flat convolution": torch.func.hessian(
        lambda r: flat(r.outer(r)[None]).tanh().sum()
    ),
    "mixed derivatives of a convolution": weighted(conv),
    "circular padding": lambda r: F.pad(r[None, None], (2, 2), mode="circular")[0, 0] * 2,
    "gradient of circular padding": torch.func.grad(
        lambda r: (F.pad(r[None, None], (2, 2), mode="circular") ** 3).sum()
    ),
    "circular convolution": lambda r: F.conv1d(
        F.pad(r[None, None], (1, 1), mode="circular"), conv.weight
    ),
    "ctc with lists": lambda r: ctc(
        r.outer(r).log_softmax(-1)[:, None], torch.tensor([[1, 2]]), [6], [2]
    ),
    "gradient of ctc with lists": gradient_of_ctc,
    "empty of no elements": lambda r: torch.cat([torch.empty(0), r]),
    "made in the likeness": lambda r: torch.zeros_like(torch.empty(6)) + r,
    "full": lambda r: torch.empty(6).fill_(2) * r,
    "resized": lambda r: torch.empty(12)[:6].copy_(r) + 1,
}
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"]},
    {"trace": "once", "chunk_size": 2},
]


@pytest.mark.parametrize("name", RIGHT)
def test_equals_the_loop(name: str) -> None:
    f = RIGHT[name]
    for size in (1, 3, 5):
        x = torch.randn(size, 6)
        want = torch.stack([f(r) for r in x])
        for way in WAYS:
            for _ in range(2):
                torch.testing.assert_close(shardmap.vmap(f, **way)(x), want, msg=None)
        nested = shardmap.vmap(shardmap.vmap(f))(torch.stack([x, x + 1, x * 2]))
        torch.testing.assert_close(nested[1], torch.stack([f(r) for r in x + 1]))


DROPOUTS: dict[str, Function] = {
    "dropout": lambda r: F.dropout(r, 0.5, training=True),
    "alpha": lambda r: F.alpha_dropout(r, 0.5, training=True),
    "feature": lambda r: F.dropout1d(r.view(3, 2), 0.5, training=True),
    "feature alpha": lambda r: F.feature_alpha_dropout(r.view(1, 3, 2), 0.5, training=True),
    "rrelu": lambda r: F.rrelu(r, training=True),
    "encoder": lambda r: encoder(r.view(1, 3, 2)),
}
encoder = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.5, batch_first=True).requires_grad_(False)


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("way", ["plain", "func.grad", "autograd.grad"])
def test_dropout_in_training(name: str, way: str) -> None:
    """Draws have the loop's mean and spread, within six standard errors."""
    f = DROPOUTS[name]

    def by_autograd(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        return torch.autograd.grad(f(q).square().sum(), q)[0]

    ways: dict[str, Function] = {
        "plain": f,
        "func.grad": torch.func.grad(lambda r: f(r).square().sum()),
        "autograd.grad": by_autograd,
    }
    draws = 1500
    torch.manual_seed(0)
    r = torch.rand(6) + 1
    want = torch.stack([ways[way](r) for _ in range(draws)]).double().flatten(1)
    got = shardmap.vmap(ways[way], randomness="different")(r.expand(draws, 6)).double().flatten(1)
    error = ((want.var(0) + got.var(0)) / draws).sqrt() + 1e-6
    assert ((want.mean(0) - got.mean(0)).abs() < 6 * error).all()
    if name != "encoder":  # whose gradients have few large values
        torch.testing.assert_close(got.std(0), want.std(0), rtol=0.2, atol=1e-3)
    one = shardmap.vmap(ways[way], randomness="same")(r.expand(5, 6))
    assert (one == one[0]).all()


def from_numpy_view(r: torch.Tensor) -> torch.Tensor:
    out = torch.empty(6)
    np.asarray(out)[:] = 3
    return out * r


def returned(r: torch.Tensor) -> torch.Tensor:
    return torch.empty(3)


def added(r: torch.Tensor) -> torch.Tensor:
    return r + torch.empty(6)


def copied(r: torch.Tensor) -> torch.Tensor:
    return r.clone().copy_(torch.empty(6))


def through_a_clone(r: torch.Tensor) -> torch.Tensor:
    return torch.empty(6).expand(2, 6).clone().view(-1)[:6].sin() * r


def scattered(r: torch.Tensor) -> torch.Tensor:
    return r.index_put((torch.tensor([1]),), torch.empty(1))


def asked(r: torch.Tensor) -> torch.Tensor:
    return r * 2 if torch.empty(3, dtype=torch.bool).any() else r


def by_probability(r: torch.Tensor) -> torch.Tensor:
    # Memory that is reused may hold NaN, which is no probability.
    return torch.bernoulli(torch.empty(6).nan_to_num().clamp(0, 1)) + r


def of_a_convolution(r: torch.Tensor) -> torch.Tensor:
    return F.conv1d(torch.empty(1, 1, 6), conv.weight)[0, 0] + r[:4]


def written_into_a_sample(r: torch.Tensor) -> torch.Tensor:
    r.copy_(torch.empty(6))
    return torch.zeros(1)


def in_a_hook(r: torch.Tensor) -> torch.Tensor:
    def hook(g: torch.Tensor) -> torch.Tensor:
        return g * torch.empty(6)

    q = r.detach().requires_grad_()
    y = q * 2
    y.register_hook(hook)
    return torch.autograd.grad(y.sum(), q)[0]


REFUSED = [
    from_numpy_view,
    returned,
    added,
    copied,
    through_a_clone,
    scattered,
    asked,
    by_probability,
    of_a_convolution,
    written_into_a_sample,
    in_a_hook,
]


@pytest.mark.parametrize("f", REFUSED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("nested", [False, True])
def test_a_result_that_depends_on_it_is_refused(f: Function, nested: bool) -> None:
    mapped = shardmap.vmap(f, randomness="different")
    x = torch.randn(3, 6)
    if nested:
        mapped, x = shardmap.vmap(mapped, randomness="different"), x[None]
    for _ in range(2):
        with pytest.raises(errors.EscapeError, match="empty|numpy"):
            mapped(x)
