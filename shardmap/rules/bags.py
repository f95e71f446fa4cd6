"""Bags of embedding rows: their sums, means and maxima, and the gradients of those.

Samples become more bags of one flat table. Every sample's padding is that of the first sample, so
that the kernel knows it by one number; of that row nothing is read.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.embedding import counted, look_up, scatter_rows
from shardmap.rules.lowering import Given, Lowering, Named, V, arguments
from shardmap.rules.registry import register

SUM, MEAN, MAX = 0, 1, 2
_FAST = (torch.float32, torch.float16, torch.bfloat16)


@register("embedding", aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch bags as one call on more bags, with flat row numbers if tables are mapped."""
    a = arguments(eq, args, kwargs)
    if b.grad and (a["sparse"] or a["scale_grad_by_freq"]):
        # The kernel that divides by frequency divides by the count of another index of its sample.
        return NotImplemented
    weight, indices, offsets = a["weight"], a["indices"], a["offsets"]
    scales, padding = a["per_sample_weights"], a["padding_idx"]
    count, mode, mapped = weight.shape[0], a["mode"], weight.mapped
    sizes = tuple(out.spec.shape for out in eq.outs)
    ended = a["include_last_offset"]
    # Where no row is left out, the CPU's kernel of these dtypes ends the last bag at the last
    # offset, and still divides a mean by the number of all indices behind its first. The others
    # read up to the last index.
    to_offset = ended and padding < 0 and mode != MAX and weight.dtype in _FAST
    to_offset = to_offset and b.device_type == "cpu" and eq.args[0].spec.stride[1] == 1

    def bags(
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        size, n = indices.shape
        if ended and not to_offset:
            offsets = offsets[..., :-1]
        m = offsets.shape[-1]
        at = counted(indices, count) if mapped else indices
        if padding >= 0:
            at = torch.where(indices == padding, padding, at)
        starts = torch.arange(size, device=offsets.device, dtype=offsets.dtype).view(size, 1)
        scales = None if scales is None else scales.reshape(-1)
        out, of, lengths, largest = aten._embedding_bag(
            weight.flatten(0, 1) if mapped else weight,
            at.reshape(-1),
            (offsets + starts * n).view(-1),
            False,
            mode,
            False,
            scales,
            False,
            padding if size else -1,
        )
        kept, features = sizes[0]  # the last offset begins a bag of its own, which is not kept
        out = out.view(size, m, features)[:, :kept]
        if to_offset and mode == MEAN and kept:
            first, end = offsets[..., -2], offsets[..., -1]
            share = ((end - first) / (n - first).clamp(min=1)).to(out.dtype).view(-1, 1, 1)
            out = torch.cat([out[:, :-1], out[:, -1:] * share], 1)
        of = (
            of.view(size, n) - starts * m
            if sizes[1] != (0,) and of.numel()
            else of.new_zeros(size, *sizes[1])
        )
        lengths = (
            lengths.view(size, m)[:, : sizes[2][0]]
            if lengths.numel() == size * m and sizes[2][0] <= m
            else lengths.new_zeros(size, *sizes[2])
        )
        if mode == MAX:
            largest = largest.view(size, m, features)[:, :kept]
            if mapped:
                filled = lengths[:, :kept].unsqueeze(-1) > 0
                largest = torch.where(filled, largest - starts.unsqueeze(-1) * count, largest)
        else:
            largest = lengths if sizes[3] == sizes[2] else lengths.new_zeros(size, *sizes[3])
        return out, of, lengths, largest

    batched = [b.batch(indices), offsets, None if scales is None else b.batch(scales)]
    return b.calls_several(bags, 4, weight, *batched, mapped=True)


def bag_of(offsets: torch.Tensor, n: int) -> torch.Tensor:
    """The bag of each of `n` indices: `[m] or [B, m] -> [n] or [B, n]`."""
    at = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    return (
        torch.searchsorted(
            offsets.contiguous(), at.expand(*offsets.shape[:-1], n).contiguous(), right=True
        )
        - 1
    )


def bag_rows(values: torch.Tensor, bag: torch.Tensor) -> torch.Tensor:
    """The value of each index's bag: `[B, m, features], [n] or [B, n] -> [B, n, features]`.

    An index behind the last offset belongs to the last bag.
    """
    bag = bag.clamp(max=values.shape[1] - 1)
    if bag.dim() == 1:
        return values.index_select(1, bag)
    return values.gather(1, bag.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


@register(
    "embedding", aten._embedding_bag_backward.default, aten._embedding_bag_dense_backward.default
)
def embedding_bag_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the backward: each index adds its bag's gradient to its row of the table."""
    a = arguments(eq, args, kwargs)
    if a.get("sparse") or "offsets" not in a or a["scale_grad_by_freq"]:
        return NotImplemented
    mode, count = a["mode"], a["num_weights"]
    padding, spec = a["padding_idx"], eq.outs[0].spec

    def backward(
        grad: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        lengths: Any,
        largest: Any,
        scales: Any,
    ) -> torch.Tensor:
        if mode == MAX:
            m = grad.shape[1]
            rows = grad.masked_fill(lengths[..., :m].unsqueeze(-1) == 0, 0.0)
            at = largest[..., :m, :].clamp(min=0).expand(rows.shape)
            return grad.new_zeros(grad.shape[0], count, grad.shape[-1]).scatter_add(1, at, rows)
        if mode == MEAN:
            grad = grad / lengths[..., : grad.shape[1]].clamp(min=1).unsqueeze(-1)
        rows = bag_rows(grad, bag_of(offsets, indices.shape[-1]))
        if scales is not None:
            rows = rows * scales.unsqueeze(-1)
        return scatter_rows(rows, indices, count, padding, False)

    tensors = (
        a["indices"],
        a["offsets"],
        a["bag_size"],
        a["maximum_indices"],
        a["per_sample_weights"],
    )
    return b.call(backward, b.batch(a["grad"]), *tensors, shape=spec.shape, dtype=spec.dtype)


@register("embedding", aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_weights_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the weights' gradient: the product of each index's row with its bag's gradient."""
    grad, weight, indices, offsets, _, mode, *rest = args
    if mode != SUM:
        return NotImplemented
    padding = rest[0] if rest else -1
    spec = eq.outs[0].spec

    def backward(
        grad: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        found = (bag_rows(grad, bag_of(offsets, rows.shape[-2])) * rows).sum(-1)
        return found.masked_fill(indices == padding, 0.0) if padding >= 0 else found

    if weight.mapped and indices.mapped:
        rows: V = b.call(look_up, weight, indices)
    else:
        rows = b.call(_rows_of, weight, indices, weight.mapped)
    given = b.batch(grad), rows, offsets, indices
    return b.call(backward, *given, shape=spec.shape, dtype=spec.dtype)


def _rows_of(weight: torch.Tensor, indices: torch.Tensor, several: bool) -> torch.Tensor:
    return (
        weight.index_select(1, indices)
        if several
        else torch.nn.functional.embedding(indices, weight)
    )


# -- rows of a largest norm


@register("embedding", aten.embedding_renorm_.default)
def embedding_renorm_(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> None:
    """Batch `embedding_renorm_`: the rows that are looked up are scaled down to a largest norm."""
    table, index, most, norm_type = args
    b.effect(renorm_rows_, table, b.batch(index), most, norm_type)


def renorm_rows_(tables: torch.Tensor, index: torch.Tensor, most: float, kind: float) -> None:
    """Scale the rows `index[b]` of each table `b` down to the norm `most`, in place."""
    at = index.flatten(1) if index.dim() > 1 else index.unsqueeze(1)
    at = at.unsqueeze(-1).expand(-1, -1, tables.shape[-1])
    rows = tables.gather(1, at)
    norms = torch.linalg.vector_norm(rows, kind, -1, keepdim=True).to(torch.float64)
    scaled = rows * (most / (norms + 1e-7)).to(rows.dtype)
    tables.scatter_(1, at, torch.where(norms > most, scaled, rows))
