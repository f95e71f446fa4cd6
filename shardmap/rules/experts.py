"""Batching rules of products by groups (`torch._grouped_mm`), as mixture-of-experts layers call.

The groups of all samples are those of one larger call: rows that share an expert are brought
together, and experts of a sample's own are more experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Given, Lowering, Named, arguments
from shardmap.rules.registry import register


def group_of(ends: Tensor, n: int) -> Tensor:
    """The group of each of `n` rows, or the number of groups behind the last end.

    `[B, groups] -> [B, n]`.
    """
    at = torch.arange(n, device=ends.device, dtype=ends.dtype).expand(ends.shape[0], n)
    return torch.searchsorted(ends.contiguous(), at.contiguous(), right=True)


def shared_experts(x: Tensor, experts: Tensor, ends: Tensor, dtype: Any) -> Tensor:
    """Multiply rows by experts that all samples share: `[B, m, k], [groups, k, n] -> [B, m, n]`."""
    size, m, k = x.shape
    count = experts.shape[0]
    group = group_of(ends, m).flatten()
    order = group.argsort(stable=True)
    rows = group.new_zeros(count + 1).scatter_add(0, group, torch.ones_like(group))
    all_ends = rows[:count].cumsum(0).to(torch.int32)
    out = aten._grouped_mm(x.reshape(size * m, k)[order], experts, all_ends, None, dtype)
    back = torch.zeros_like(order).scatter(0, order, torch.arange(size * m, device=x.device))
    return out[back].view(size, m, -1)


def all_ends(ends: Tensor, n: int) -> Tensor:
    """The ends of all samples' groups, one sample behind the other: `[B, groups] -> [B*groups]`."""
    start = torch.arange(ends.shape[0], device=ends.device, dtype=ends.dtype).unsqueeze(1) * n
    return (ends + start).flatten()


def own_experts(x: Tensor, experts: Tensor, ends: Tensor, dtype: Any) -> Tensor:
    """Multiply rows by each sample's experts: `[B, m, k], [B, groups, k, n] -> [B, m, n]`."""
    size, m, k = x.shape
    rows, flat = x.reshape(size * m, k), experts.flatten(0, 1)
    return aten._grouped_mm(rows, flat, all_ends(ends, m), None, dtype).view(size, m, -1)


def sums_by_group(x: Tensor, y: Tensor, ends: Tensor, dtype: Any) -> Tensor:
    """Multiply groups of columns and rows: `[B, m, k], [B, k, n] -> [B, groups, m, n]`."""
    size, m, k = x.shape
    inside = (torch.arange(k, device=x.device) < ends[:, -1:]).unsqueeze(-1)
    columns = torch.where(inside, x.transpose(1, 2), 0).reshape(size * k, m).t()
    rows = torch.where(inside, y, 0).reshape(size * k, -1)
    out = aten._grouped_mm(columns, rows, all_ends(ends, k), None, dtype)
    return out.view(size, ends.shape[1], m, -1)


@register("experts", aten._grouped_mm.default)
def grouped_mm(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch products by groups of rows, of columns, of what is summed, or of whole matrices."""
    a = arguments(eq, args, kwargs)
    x, y, ends, dtype = a["self"], a["mat2"], a["offs"], a["out_dtype"]
    if a["bias"] is not None:
        return NotImplemented
    spec, kinds = eq.outs[0].spec, (x.ndim, y.ndim)
    shared = kinds == (2, 3) and not y.mapped or kinds == (3, 2) and not x.mapped

    def product(x: Tensor, y: Tensor, ends: Tensor | None) -> Tensor:
        size = (ends if ends is not None else x).shape[0]
        if not size:
            return x.new_empty((0, *spec.shape), dtype=spec.dtype)
        if ends is None:
            out = aten._grouped_mm(x.flatten(0, 1), y.flatten(0, 1), None, None, dtype)
            return out.view(size, *spec.shape)
        if kinds == (2, 2):
            return sums_by_group(x, y, ends, dtype)
        by_expert = shared_experts if shared else own_experts
        if kinds == (2, 3):
            return by_expert(x, y, ends, dtype)
        turned = by_expert(y.transpose(-2, -1), x.transpose(-2, -1), ends, dtype)
        return turned.transpose(1, 2).contiguous()

    first = x if shared and kinds == (3, 2) else b.batch(x)
    second = y if shared and kinds == (2, 3) else b.batch(y)
    given = first, second, None if ends is None else b.batch(ends)
    return b.call(product, *given, shape=spec.shape, dtype=spec.dtype, mapped=True)
