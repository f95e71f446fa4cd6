"""Operators on `[n, channels, *space]`: pooling, resizing, padding, shuffling. The map joins `n`.

Reasons for rules of ours: half of them have no kernel in `torch.func.vmap` and loop there
(3-dimensional max pooling, anti-aliased resizing, most backward calls); the others pay its dispatch
at each call. All are one table of the arguments with spatial dimensions, and their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shardmap._torch import aten, schema_of
from shardmap.program.ir import Equation, Var
from shardmap.rules.fold import fold, unfold
from shardmap.rules.lowering import Given, Lowering, Named, V
from shardmap.rules.registry import overloads, register


def over_space(ndim: int, sized: str | None = None) -> Any:
    """Make the rule of an operator on channels and space, with or without a batch in front.

    Args:
        ndim: Number of dimensions besides the one that the map joins.
        sized: Name of an argument that holds the size of the input, the first of which grows with
            the map.
    """

    def rule(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
        tensors = [a for a in args if type(a) is V]
        batched = tensors[0].ndim == ndim + 1
        drawn = _draws(eq, args)
        if not batched and any(v.ndim != ndim for v in tensors if v is not drawn):
            return NotImplemented
        if drawn is not None and drawn.shape[0] != (tensors[0].shape[0] if batched else 1):
            return NotImplemented
        given = [
            (fold(b, a) if batched or a is drawn else b.batch(a)) if type(a) is V else a
            for a in args
        ]
        outs = [o for o in eq.outs if type(o) is Var]
        op = eq.op
        if op is aten.max_pool2d_with_indices.default and batched and _by_channels(b, tensors[0]):
            found = b.calls_several(max_pool_by_channels, 2, *given, **kwargs)
        elif sized is not None:
            at = next(i for i, a in enumerate(schema_of(op).arguments) if a.name == sized)
            size = tuple(args[at])
            if len(size) != ndim + 1:
                return NotImplemented  # the backward of resizing always has a batch

            def sized_call(t: torch.Tensor, *rest: Any) -> torch.Tensor:
                return op(t, *rest[: at - 1], [t.shape[0], *size[1:]], *rest[at - 1 :])

            out = b.call(sized_call, *given[:at], *given[at + 1 :], **kwargs)
            found: Any = (out,)
        else:
            found = (
                b.calls_several(op, len(outs), *given, **kwargs)
                if len(outs) > 1
                else (b.call(op, *given, **kwargs),)
            )
        shaped = [
            unfold(b, v, o.spec.shape) if batched else v for v, o in zip(found, outs, strict=True)
        ]
        return tuple(shaped) if len(shaped) > 1 else shaped[0]

    return rule


def _draws(eq: Equation, args: Sequence[Any]) -> V | None:
    """The random numbers of fractional pooling: with a batch dimension though images lack one."""
    names = [a.name for a in schema_of(eq.op).arguments]
    return args[names.index("random_samples")] if "random_samples" in names else None


CHANNELS = 8
"""Least number of channels from which images are pooled with their channels last."""


def _by_channels(b: Lowering, images: V) -> bool:
    """True if images are pooled faster with their channels last.

    Only that form of the kernel is vectorised. Measured on one CPU core, microseconds, the copies
    included: 32 images of 16x28x28 by 2x2 2470 and 665, 16 of 64x32x32 by 3x3 26700 and 3060, 32
    of 6x24x24 by 2x2 700 and 460.
    """
    plain = images.dtype in (torch.float32, torch.float64)
    return (
        b.device_type == "cpu"
        and plain
        and images.shape[1] >= CHANNELS
        and not (b.grad or b.transformed)
    )


def max_pool_by_channels(
    x: torch.Tensor, *options: object, **named: object
) -> tuple[torch.Tensor, ...]:
    """Pool images with their channels last, and return results as the plain kernel does."""
    if not x.is_contiguous():
        return aten.max_pool2d_with_indices(x, *options, **named)
    last = x.contiguous(memory_format=torch.channels_last)
    out, indices = aten.max_pool2d_with_indices(last, *options, **named)
    return out.contiguous(), indices.contiguous()


def operators(names: Sequence[str]) -> Iterator[Any]:
    """The operators of these names, those with a dot as overloads."""
    return overloads(*names)


WITH_BACKWARD = {
    2: ("reflection_pad1d", "replication_pad1d", "col2im:"),
    3: (
        "max_pool2d_with_indices",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "fractional_max_pool2d",
        "reflection_pad2d",
        "replication_pad2d",
        "max_unpool2d:",
        "im2col:",
    ),
    4: (
        "max_pool3d_with_indices",
        "avg_pool3d",
        "_adaptive_avg_pool3d",
        "adaptive_max_pool3d",
        "fractional_max_pool3d",
        "reflection_pad3d",
        "replication_pad3d",
        "max_unpool3d:",
    ),
}
"""Names by number of dimensions; a colon marks those without a backward operator."""

for _ndim, _names in WITH_BACKWARD.items():
    for _name in _names:
        _plain = _name.rstrip(":")
        _all = [_plain] if _name.endswith(":") else [_plain, f"{_plain}_backward"]
        register("pool", *operators(_all))(over_space(_ndim))

RESIZING = {
    2: ("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d"),
    3: (
        "upsample_nearest2d",
        "_upsample_nearest_exact2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ),
    4: ("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d"),
}

for _ndim, _names in RESIZING.items():
    for _name in _names:
        register("pool", *operators([_name]))(over_space(_ndim))
        register("pool", *operators([f"{_name}_backward"]))(over_space(_ndim, "input_size"))


@register("pool", aten.channel_shuffle.default)
def channel_shuffle(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `channel_shuffle` of any number of dimensions, the first of which is the batch."""
    v = args[0]
    return unfold(b, b.call(aten.channel_shuffle.default, fold(b, v), args[1]), v.shape)


# -- sampling at positions


def _grid(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch by folding image and grid into the batch."""
    given = [fold(b, a) if type(a) is V else a for a in args]
    outs = [o for o in eq.outs if type(o) is Var]
    op, kept = eq.op, [type(o) is Var for o in eq.outs]
    if len(kept) == 1:
        return unfold(b, b.call(op, *given, **kwargs), outs[0].spec.shape)

    def backward(*values: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t for t, k in zip(op(*values), kept, strict=True) if k)

    found = b.calls_several(backward, len(outs), *given)
    return tuple(unfold(b, v, o.spec.shape) for v, o in zip(found, outs, strict=True))


register(
    "pool",
    *operators(
        [
            "grid_sampler_2d",
            "grid_sampler_3d",
            "grid_sampler_2d_backward",
            "grid_sampler_3d_backward",
        ]
    ),
)(_grid)


@register("pool", aten.affine_grid_generator.default)
def affine_grid(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `affine_grid`, whose size argument includes the batch."""
    theta, size, corners = args
    rest = tuple(size[1:])

    def generate(theta: torch.Tensor) -> torch.Tensor:
        return aten.affine_grid_generator(theta, [theta.shape[0], *rest], corners)

    return unfold(b, b.call(generate, fold(b, theta)), eq.outs[0].spec.shape)
