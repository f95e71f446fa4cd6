"""Functions to differentiate, and torch.func's derivatives of them in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import shardmap

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jacrev": (shardmap.jacrev, torch.func.jacrev),
    "jacfwd": (shardmap.jacfwd, torch.func.jacfwd),
    "jacobian": (shardmap.jacobian, torch.func.jacrev),
    "hessian": (shardmap.hessian, torch.func.hessian),
}


WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loop(function: Callable[..., Any], *batch: torch.Tensor) -> Any:
    """The function's results for each row, stacked."""
    rows = [function(*row) for row in zip(*batch, strict=True)]
    return pytree.tree_map(lambda *t: torch.stack(t), *rows)


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """The same structure, shapes, dtypes, and values to rounding."""
    a, b = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def mlp(x: torch.Tensor) -> torch.Tensor:
    """Two layers."""
    return WEIGHT.to(x.dtype).t() @ torch.tanh(WEIGHT.to(x.dtype) @ x)


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "mlp": mlp,
    "elementwise": lambda x: x.sin() * x.exp(),
    "scalar": lambda x: (x**3).sum() * x[0],
    "one element": lambda x: x[:1] * x[1:2],
    "matrix": lambda x: torch.outer(x, x.cos()),
    "norm and softmax": lambda x: F.softmax(x / x.norm(), 0),
    "tuple and dict": lambda x: {"a": x.sum(), "b": (x * x, x.exp()[:2])},
    "constant": lambda x: torch.ones(2, dtype=x.dtype),
    "partly constant": lambda x: (torch.ones(2, dtype=x.dtype), x * x),
    "identity": lambda x: x,
    "in place inside": lambda x: torch.zeros(3, dtype=x.dtype).index_put_(
        (torch.tensor([0, 2]),), x[:2] * x[2]
    ),
    "sorted": lambda x: x.sort().values.cumsum(0) ** 2,
    "an inverse": lambda x: torch.linalg.inv(torch.outer(x, x) + 3 * torch.eye(6, dtype=x.dtype)),
    "gradient inside": torch.func.grad(lambda x: x.sin().prod()),
    "forward inside": lambda x: torch.func.jacfwd(lambda y: y.sin() * y)(x).sum(0),
    "tangent inside": lambda x: torch.func.jvp(lambda y: y**3, (x,), (x.cos(),))[1],
}


class NoForward(torch.autograd.Function):
    """A sine that has no forward formula."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The sine."""
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Its derivative."""
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos()
