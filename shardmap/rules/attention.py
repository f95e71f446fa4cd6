"""Batching rules for fused attention.

The map is folded into the batch dimension, `[B, b, heads, length, features] -> [B*b, ...]`, one
call for all samples.

Reasons for rules of ours: `torch.func.vmap` has no kernel for the CPU's fused attention and loops
over the samples with a warning. And a kernel exists on one kind of device only, while a program
recorded on one must run on another: there it is lowered to products and a softmax, forward and
backward, with the log-sum-exp where the recorded backward expects it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation, Var
from shardmap.program.schema import in_form
from shardmap.rules.fold import fold, unfold
from shardmap.rules.lowering import B, Lowering, V, arguments
from shardmap.rules.registry import register

Tensor = torch.Tensor


def fold_mask(b: Lowering, mask: V | None, batch: int) -> V | None:
    """Make a mask for the folded batch.

    A shared mask of one batch stays as it is, others get a row for each sample and batch.
    """
    if mask is None:
        return None
    leading = mask.shape[0] if mask.ndim == 4 else 1
    if not mask.mapped and leading == 1:
        return mask
    if mask.ndim == 2:
        mask = b.view(mask, (1, 1, *mask.shape))
    mask = b.batch(mask)
    if leading != batch:
        shape = (batch, *mask.shape[1:])
        mask = b.call(aten.expand.default, mask, [B, *shape], shape=shape)
    return fold(b, mask)


# -- attention by products, on any device


def scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The scores, whose softmax is taken.

    `[n, h, l, d], [n, h, s, d] -> [n, h, l, s]`, in the precision of the fused kernels' sums.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = q @ k.transpose(-2, -1) * scale
    if out.dtype in (torch.float16, torch.bfloat16):
        out = out.float()
    if causal:
        rows, columns = (torch.arange(n, device=q.device) for n in out.shape[-2:])
        out = out.masked_fill(columns > rows.unsqueeze(-1), -math.inf)
    if mask is not None:
        out = out.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else out + mask
    return out


def widened(t: Tensor, heads: int) -> Tensor:
    """Keys or values with one head for each of the queries', if several queries share one."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def narrowed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of `widened`."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The attention and the log-sum-exp of its scores.

    Rows without any key attend to nothing, as in the fused kernels.
    """
    k, v = widened(k, q.shape[1]), widened(v, q.shape[1])
    s = scores(q, k, mask, causal, scale)
    nothing = (s == -math.inf).all(-1)
    s = s.masked_fill(
        nothing.unsqueeze(-1), 0.0
    )  # infinities only would make the softmax and its gradient NaN
    lse = s.logsumexp(-1)
    p = (s - lse.unsqueeze(-1)).exp().masked_fill(nothing.unsqueeze(-1), 0.0)
    return p.to(v.dtype) @ v, lse.masked_fill(nothing, -math.inf)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by query, key, value and (float) mask.

    The softmax is recomputed from its log-sum-exp.
    """
    heads = k.shape[1]
    k, v = widened(k, q.shape[1]), widened(v, q.shape[1])
    s = scores(q, k, mask, causal, scale)
    lse = lse.to(s.dtype).unsqueeze(-1)
    p = torch.where(lse == -math.inf, 0.0, (s - lse.masked_fill(lse == -math.inf, 0.0)).exp())
    along = (grad * out).sum(-1, keepdim=True).to(s.dtype)
    ds = p * ((grad @ v.transpose(-2, -1)).to(s.dtype) - along)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq = ds.to(k.dtype) @ k * factor
    dk = ds.to(q.dtype).transpose(-2, -1) @ q * factor
    dv = p.to(grad.dtype).transpose(-2, -1) @ grad
    return dq, narrowed(dk, heads), narrowed(dv, heads), ds


def same_device(b: Lowering, eq: Equation) -> bool:
    """True if the program runs on the kind of device whose kernel was recorded."""
    recorded = next(eq.results()).spec.device.partition(":")[0]
    return recorded == b.device_type


def padded(t: Tensor, length: int) -> Tensor:
    """Pad `[n, h, l]` with zeros up to `length`: some kernels pad their log-sum-exp."""
    return t if t.shape[-1] == length else torch.nn.functional.pad(t, (0, length - t.shape[-1]))


# -- forward

FORWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


@register("attention", *FORWARD)
def attention(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch attention as one call on a larger batch; not dropout, whose draws differ by sample."""
    a = arguments(eq, args, kwargs)
    if a.get("dropout_p") or a.get("return_debug_mask") or a["query"].ndim != 4:
        return NotImplemented
    query, key, value = a["query"], a["key"], a["value"]
    name = "attn_mask" if "attn_mask" in a else "attn_bias"
    mask, causal, scale, batch = a.get(name), a["is_causal"], a["scale"], query.shape[0]
    mapped = any(v is not None and v.mapped for v in (query, key, value, mask))
    if mapped:
        query, key, value = (fold(b, v) for v in (query, key, value))
        mask = fold_mask(b, mask, batch)
    outs = list(eq.outs)
    if same_device(b, eq):
        given = {"query": query, "key": key, "value": value, name: mask}
        positional, named = in_form(eq.op, a | given)
        kinds = [type(o) is Var for o in outs]
        got = list(b.calls_several(eq.op, len(kinds), *positional, **named, mapped=mapped))
        got = [v for v, kept in zip(got, kinds, strict=True) if kept]
    else:
        rest = outs[1].spec.shape[1:]
        kinds = [(o.spec.shape, o.spec.dtype) for o in outs[2:] if type(o) is Var]

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
            out, lse = attend(q, k, v, mask, causal, scale)
            return (
                out,
                padded(lse, math.prod(rest[1:])).view(-1, *rest),
                *(torch.zeros(shape, dtype=dtype, device=q.device) for shape, dtype in kinds),
            )

        got = list(b.calls_several(plain, 2 + len(kinds), query, key, value, mask, mapped=mapped))
    if not mapped:
        return tuple(got)
    specs = [o.spec for o in outs if type(o) is Var]
    found = [
        unfold(b, V(v.index, True, s.shape, s.dtype), s.shape)
        for v, s in zip(got[:2], specs[:2], strict=True)
    ]
    # Seeds and similar results belong to the call, not to the samples.
    shared = [V(v.index, False, s.shape, s.dtype) for v, s in zip(got[2:], specs[2:], strict=True)]
    return (
        *found,
        *(
            b.call(torch.Tensor.expand, v, [B, *v.shape], shape=v.shape, dtype=v.dtype, mapped=True)
            for v in shared
        ),
    )


# -- backward

BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
)


def first_row(b: Lowering, v: Any) -> Any:
    """The call's own result that a value was expanded from over the samples."""
    if type(v) is not V or not v.mapped:
        return v
    return V(
        b.call(aten.select.int, v, 0, 0, shape=v.shape, dtype=v.dtype).index, True, v.shape, v.dtype
    )


@register("attention", *BACKWARD)
def attention_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward as one call of the kernel on a larger batch."""
    a = arguments(eq, args, kwargs)
    if a.get("dropout_p") or a["query"].ndim != 4:
        return NotImplemented
    names = [
        "grad_out_" if "grad_out_" in a else "grad_out",
        "query",
        "key",
        "value",
        "out",
        "logsumexp",
    ]
    tensors, batch = [a[n] for n in names], a["query"].shape[0]
    mask_name = "attn_mask" if "attn_mask" in a else "attn_bias"
    mask, causal, scale = a.get(mask_name), a["is_causal"], a["scale"]
    kept = [type(o) is Var for o in eq.outs]
    by_mask = len(kept) == 4 and kept[3]
    shapes = [o.spec.shape for o in eq.outs if type(o) is Var]
    if by_mask and (mask is None or len(shapes[-1]) != 4 or shapes[-1][0] != batch):
        return NotImplemented
    folded = [fold(b, v) for v in tensors]
    mask = fold_mask(b, b.batch(mask) if by_mask and mask is not None else mask, batch)
    if same_device(b, eq):
        given = dict(zip(names, folded, strict=True)) | {mask_name: mask}
        shared = {name: first_row(b, v) for name, v in a.items() if name not in given}
        positional, named = in_form(eq.op, shared | given)
        got = b.calls_several(eq.op, len(kept), *positional, **named, mapped=True)
        got = [v for v, k in zip(got, kept, strict=True) if k]
    else:

        def plain(
            grad: Tensor,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            out: Tensor,
            lse: Tensor,
            mask: Tensor | None,
        ) -> tuple[Tensor, ...]:
            dq, dk, dv, ds = attend_backward(
                grad, q, k, v, mask, out, lse.flatten(2)[..., : q.shape[-2]], causal, scale
            )
            found = [dq, dk, dv]
            if by_mask and mask is not None:
                found.append(ds.sum_to_size(mask.shape).to(mask.dtype))
            return tuple(t for t, k in zip(found, kept, strict=False) if k)

        got = b.calls_several(plain, sum(kept), *folded, mask, mapped=True)
    return tuple(
        unfold(b, V(v.index, True, s, tensors[1].dtype), s)
        for v, s in zip(got, shapes, strict=True)
    )
