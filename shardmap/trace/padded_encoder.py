"""Padding in `nn.TransformerEncoder`: its nested-tensor path returns zeros at padded positions.

Without gradients, in eval mode, the encoder packs the tokens that are not padding into a nested
tensor, and pads the last layer's result with zeros. While a function is recorded this path is not
taken: torch leaves it where a function mode is active. Its zeros are written by `torch.where`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from shardmap import _torch, errors

_ENCODER: CodeType = nn.TransformerEncoder.forward.__code__
_LAYER: CodeType = nn.TransformerEncoderLayer.forward.__code__
_REACH = 24
"""Most frames between an attention and its encoder; each module's call has three."""


class PaddedEncoder:
    """The encoder whose last layer is running, and the positions where its result is zero."""

    def __init__(self, layer: nn.TransformerEncoderLayer, zero: torch.Tensor):
        self.layer = layer
        self.zero = zero  # [batch, tokens, 1]
        self.sums = 0

    def is_last_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if a call of torch's interface gives the result of the layer."""
        if not self.layer.norm_first:
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            return func is nn.functional.layer_norm and weight is self.layer.norm2.weight
        caller = sys._getframe(2)
        if func is torch.Tensor.add and caller.f_code is _LAYER:
            self.sums += 1  # the first is the attention's, the second the other block's
        return self.sums == 2

    def zeroed(self, result: torch.Tensor) -> torch.Tensor:
        """The layer's result with the zeros of the nested path."""
        return torch.where(self.zero, result.new_zeros(()), result)


def padded_encoder(call: str) -> PaddedEncoder | None:
    """The encoder around the attention that is being called, if the loop would pack its tokens.

    Raises:
        UnsupportedOperatorError: Its last layer has a forward of its own.
    """
    frame: FrameType | None = sys._getframe(2)
    layer: Any = None
    for _ in range(_REACH):
        if frame is None:
            return None
        if frame.f_code is _LAYER:
            layer = frame.f_locals["self"]
        if frame.f_code is _ENCODER:
            break
        frame = frame.f_back
    else:
        return None
    assert frame is not None
    encoder, src = frame.f_locals["self"], frame.f_locals["src"]
    padding, mask = frame.f_locals["src_key_padding_mask"], frame.f_locals["mask"]
    if padding is None or mask is not None or not _packs(encoder, src):
        return None
    if frame.f_locals.get("mod") is not encoder.layers[-1]:
        return None
    if layer is not encoder.layers[-1]:
        raise errors.UnsupportedOperatorError(
            f"{call}: nn.TransformerEncoder with src_key_padding_mask would pack its tokens into a "
            f"nested tensor, and its layer {type(encoder.layers[-1]).__name__} has a forward of "
            "its own; pass enable_nested_tensor=False to nn.TransformerEncoder"
        )
    padded = padding.logical_not().logical_not()  # [batch, tokens]; a float mask is 0 or -inf
    if getattr(encoder, "mask_check", True):
        aligned = (padded[:, :-1] <= padded[:, 1:]).all()
        padded = padded & aligned
    return PaddedEncoder(layer, padded.unsqueeze(-1))


def _packs(encoder: nn.TransformerEncoder, src: torch.Tensor) -> bool:
    """True if `nn.TransformerEncoder.forward` would pack, whatever the masks' values."""
    first: Any = encoder.layers[0]
    attention = first.self_attn
    tensors: tuple[torch.Tensor, ...] = (
        src,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        *(
            p
            for m in (first.norm1, first.norm2, first.linear1, first.linear2)
            for p in (m.weight, m.bias)
        ),
    )
    return (
        _fast_paths_enabled()
        and getattr(encoder, "use_nested_tensor", False)
        and not first.training
        and src.dim() == 3
        and not torch.is_autocast_enabled()
        and src.device.type in ("cpu", "cuda", "xpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _fast_paths_enabled() -> bool:
    """True if the user enabled `torch.backends.mha`, which recordings may have switched off."""
    switch: Any = getattr(_torch, "transformer_fast_paths", None)
    return switch.before if switch is not None and switch.users else _enabled()


_enabled: Callable[[], bool] = torch.backends.mha.get_fastpath_enabled
