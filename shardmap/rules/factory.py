"""Rules of the factory family: tensors made in the likeness of a mapped one.

They depend on its shape, strides, dtype and device, which all samples share. So the result
is not mapped: it is made once, not once per chunk, and so are values that depend on it alone
(the cotangent of every backward starts as `ones_like(loss)`). Where samples write to it later, the
batcher gives each sample its copy. All have the sample's strides: a kernel that is given the batch
may repeat strides that no sample has, such as those of an expanded batch, whose samples share one
memory and cannot be written to.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap.program.ir import SAMPLE_DEVICE, Equation
from shardmap.program.schema import base_name, span
from shardmap.rules.lowering import B, Lowering, V, arguments
from shardmap.rules.registry import overloads, register

_VALUES = {
    "empty_like": None,
    "zeros_like": 0,
    "ones_like": 1,
    "new_empty": None,
    "new_empty_strided": None,
    "new_zeros": 0,
    "new_ones": 1,
    "_new_zeros_with_same_feature_meta": 0,  # the memory of a tangent: forward mode copies into it
}


def filled(
    shape: list[int], stride: list[int], value: Any, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor with these strides, filled with `value` unless that is None."""
    out = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return out if value is None else out.fill_(value)


def filled_rows(
    like: torch.Tensor,
    size: int,
    shape: list[int],
    stride: list[int],
    value: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A batch of such tensors, made by `like`, the tensor that they resemble."""
    rows = (span(shape, stride), *stride)
    out = like.new_empty_strided((size, *shape), rows, dtype=dtype, device=device)
    return out if value is None else out.fill_(value)


@register("factory", *overloads(*_VALUES, "full_like", "new_full"))
def likeness(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> V:
    """A tensor with the recorded metadata, the same for all samples."""
    name = base_name(eq.op)
    value = _VALUES[name] if name in _VALUES else arguments(eq, args, kwargs)["fill_value"]
    spec = eq.outs[0].spec
    device = SAMPLE_DEVICE if spec.device == b.sample_device else torch.device(spec.device)
    # an outer torch.func.vmap batches tensors made from its tensors, and lets no others be
    # written to
    if b.transformed:
        like = next((v for v in args if type(v) is V and v.mapped), args[0])
        sizes = [list(spec.shape), list(spec.stride)]
        return b.call(
            filled_rows,
            like,
            B,
            *sizes,
            value,
            spec.dtype,
            device,
            shape=spec.shape,
            dtype=spec.dtype,
            mapped=True,
        )
    return b.call(
        filled,
        list(spec.shape),
        list(spec.stride),
        value,
        spec.dtype,
        device,
        shape=spec.shape,
        dtype=spec.dtype,
    )
