"""Functions that compute in numpy and map themselves, as torch's documentation writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function

calls: list[str] = []
"""An entry for each call of a `vmap` staticmethod."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


class NumpySort(Function):
    """Sort along a dimension: https://docs.pytorch.org/docs/stable/notes/extending.func.html."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        device = x.device
        values = to_numpy(x)
        ind = np.argsort(values, axis=dim)
        ind_inv = np.argsort(ind, axis=dim)
        result = np.take_along_axis(values, ind, axis=dim)
        return (
            torch.tensor(result, device=device),
            torch.tensor(ind, device=device),
            torch.tensor(ind_inv, device=device),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, ind, ind_inv = output
        ctx.mark_non_differentiable(ind, ind_inv)
        ctx.save_for_backward(ind, ind_inv)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ind, ind_inv = ctx.saved_tensors
        return NumpyTake.apply(grads[0], ind_inv, ind, ctx.dim), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, dim: int) -> tuple[Any, tuple[int, int, int]]:
        calls.append(f"sort {info.batch_size} {info.randomness}")
        x = x.movedim(in_dims[0], 0)
        dim = dim if dim >= 0 else dim + x.dim() - 1
        return NumpySort.apply(x, dim + 1), (0, 0, 0)


class NumpyTake(Function):
    """Gather along a dimension."""

    @staticmethod
    def forward(x: Tensor, ind: Tensor, ind_inv: Tensor, dim: int) -> Tensor:
        return torch.tensor(np.take_along_axis(to_numpy(x), to_numpy(ind), dim), device=x.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ind, ind_inv, dim = inputs
        ctx.save_for_backward(ind, ind_inv)
        ctx.dim = dim

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ind, ind_inv = ctx.saved_tensors
        return NumpyTake.apply(grads[0], ind_inv, ind, ctx.dim), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, ind: Tensor, ind_inv: Tensor, dim: int
    ) -> tuple[Any, int]:
        calls.append(f"take {info.batch_size}")
        logical = x.dim() if in_dims[0] is None else x.dim() - 1
        dim = dim if dim >= 0 else dim + logical

        def expanded(t: Tensor, d: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)

        given = [expanded(t, d) for t, d in zip((x, ind, ind_inv), in_dims[:3], strict=True)]
        return NumpyTake.apply(*given, dim + 1), 0


class NumpyScale(Function):
    """The product of two tensors and a number; the batch comes last in its `vmap`."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tensor(to_numpy(x) * to_numpy(y) * scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        by_x = NumpyScale.apply(grads[0], y, ctx.scale)
        return by_x, NumpyScale.apply(grads[0], x, ctx.scale), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, int]:
        calls.append(f"scale {info.batch_size}")
        last = [
            t.unsqueeze(-1) if d is None else t.movedim(d, -1)
            for t, d in zip((x, y), in_dims[:2], strict=True)
        ]
        out = NumpyScale.apply(*last, scale)
        return out, out.dim() - 1


class Wrong(NumpyScale):
    """Its `vmap` is that of another function."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        out, dim = NumpyScale.vmap(info, in_dims, *args)
        return out * 1.5, dim


class Writes(NumpyScale):
    """It writes to its argument."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        to_numpy(x)[...] *= scale
        return torch.tensor(to_numpy(x) * to_numpy(y))


class Draws(NumpyScale):
    """It draws numbers."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tensor(to_numpy(x)) * torch.rand(())


class Unmapped(Function):
    """It has no `vmap`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tensor(to_numpy(x) * 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2
