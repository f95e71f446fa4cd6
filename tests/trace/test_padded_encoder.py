"""`nn.TransformerEncoder` with padded tokens, whose fast path gives zeros at padded positions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from tests import oracle

x = torch.randn(4, 5, 8)
PADS = {
    "left aligned": [5, 3, 4, 1],
    "none": [5, 5, 5, 5],
    "one is not aligned": [5, 3, -1, 4],
    "the first is not aligned": [-1, 3, 2, 4],
}
WAYS: list[dict[str, Any]] = [{}, {"chunk_size": 2}, {"trace": "once", "chunk_size": 3}]


def masks(name: str) -> torch.Tensor:
    rows = [torch.arange(5) >= n if n > 0 else torch.arange(5) < 2 for n in PADS[name]]
    return torch.stack(rows)


def encoder(norm_first: bool = False, norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8) if norm else None)
    return made.eval()


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_padded_positions_are_the_loops(pad: str, norm_first: bool, norm: bool, grad: bool) -> None:
    net, mask = encoder(norm_first, norm), masks(pad)

    def f(r: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return net(r[None], src_key_padding_mask=m[None])[0]

    with torch.set_grad_enabled(grad):
        want = torch.stack([f(r, m) for r, m in zip(x, mask, strict=True)])
        for way in WAYS:
            oracle.assert_same(shardmap.vmap(f, **way)(x, mask).detach(), want.detach(), str(way))


def test_zeros_are_there_without_gradients_only() -> None:
    net, mask = encoder(), masks("left aligned")
    f = lambda r, m: net(r[None], src_key_padding_mask=m[None])[0]
    with torch.no_grad():
        assert not shardmap.vmap(f)(x, mask)[mask].any()
    assert shardmap.vmap(f)(x, mask)[mask].all()


@pytest.mark.parametrize("change", ["training", "fast path off", "mask", "float mask", "unbatched"])
def test_where_the_loop_packs_nothing(change: str) -> None:
    net, mask = encoder(dropout=0.0), masks("left aligned")
    before = torch.backends.mha.get_fastpath_enabled()
    net.train(change == "training")

    def f(r: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        if change == "unbatched":
            return net(r, src_key_padding_mask=m)
        if change == "float mask":
            m = torch.zeros(m.shape).masked_fill(m, float("-inf"))
        attend = torch.zeros(5, 5, dtype=torch.bool) if change == "mask" else None
        return net(r[None], mask=attend, src_key_padding_mask=m[None])[0]

    try:
        torch.backends.mha.set_fastpath_enabled(change != "fast path off")
        with torch.no_grad():
            want = torch.stack([f(r, m) for r, m in zip(x, mask, strict=True)])
            oracle.assert_same(shardmap.vmap(f)(x, mask), want, change)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_several_sequences_in_one_sample() -> None:
    """One sequence that is not left aligned keeps the whole sample from being packed."""
    net = encoder()
    rows = torch.randn(3, 2, 5, 8)
    mask = torch.stack(
        [masks("left aligned")[:2], masks("one is not aligned")[1:3], masks("none")[:2]]
    )
    f = lambda r, m: net(r, src_key_padding_mask=m)
    with torch.no_grad():
        want = torch.stack([f(r, m) for r, m in zip(rows, mask, strict=True)])
        oracle.assert_same(shardmap.vmap(f)(rows, mask), want, "several")


def test_layers_and_attention_alone() -> None:
    """Their fast paths give the same numbers, and are not taken while a function is recorded."""
    mask = masks("left aligned")
    layer = encoder().layers[0]
    attention = layer.self_attn
    assert isinstance(attention, nn.MultiheadAttention)

    def of_layer(r: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return layer(r[None], src_key_padding_mask=m[None])[0]

    def of_attention(r: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        torch.backends.mha.set_fastpath_enabled(True)  # the function mode alone keeps it off
        return attention(r[None], r[None], r[None], key_padding_mask=m[None])[0][0]

    with torch.no_grad():
        for f in (of_layer, of_attention):
            want = torch.stack([f(r, m) for r, m in zip(x, mask, strict=True)])
            oracle.assert_same(shardmap.vmap(f)(x, mask), want, f.__name__)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Own(nn.TransformerEncoderLayer):
        def forward(self, src: torch.Tensor, **options: Any) -> torch.Tensor:
            return (
                src
                + self.self_attn(src, src, src, key_padding_mask=options["src_key_padding_mask"])[0]
            )

    net = nn.TransformerEncoder(Own(8, 2, 16, batch_first=True), 2).eval()
    f = lambda r, m: net(r[None], src_key_padding_mask=m[None])[0]
    with torch.no_grad(), pytest.raises(errors.UnsupportedOperatorError, match="enable_nested"):
        shardmap.vmap(f)(x, masks("left aligned"))
    plain = nn.TransformerEncoder(
        Own(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    g = lambda r, m: plain(r[None], src_key_padding_mask=m[None])[0]
    with torch.no_grad():
        mask = masks("left aligned")
        want = torch.stack([g(r, m) for r, m in zip(x, mask, strict=True)])
        oracle.assert_same(shardmap.vmap(g)(x, mask), want, "the remedy")
