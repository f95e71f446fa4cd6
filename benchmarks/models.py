"""The models, each once in PyTorch and once in JAX on the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
VOCABULARY, TOKENS, WIDTH, HEADS, LAYERS = 1000, 32, 64, 4, 2

JaxParams = Mapping[str, Any]
JaxForward = Callable[[JaxParams, Any], Any]


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and the same model for one sample in JAX."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    jax_forward: JaxForward

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    def double(self) -> Case:
        """Copy the case in float64."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return replace(self, model=copy.deepcopy(self.model).double(), inputs=inputs)


def mlp() -> nn.Module:
    """Build 784-256-256-10 with relu."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


def mlp_jax(params: JaxParams, x: Any) -> Any:
    """Apply `mlp` to one sample [784]."""
    import jax

    for index in (0, 2):
        x = jax.nn.relu(_linear(params, str(index), x))
    return _linear(params, "4", x)


def digits_cnn() -> nn.Module:
    """Build two padded 3x3 convolutions, a pool and a linear layer, for 1x8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, CLASSES),
    )  # fmt: skip


def digits_cnn_jax(params: JaxParams, x: Any) -> Any:
    """Apply `digits_cnn` to one image [1, 8, 8]."""
    import jax

    x = jax.nn.relu(_conv(params, "0", x))
    x = jax.nn.relu(_conv(params, "2", x))
    return _linear(params, "6", _max_pool(x).reshape(-1))


def cifar_cnn() -> nn.Module:
    """Build four convolutions with group norm, two of them strided and two pooled, for 3x32x32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128 * 2 * 2, CLASSES),
    )  # fmt: skip


def cifar_cnn_jax(params: JaxParams, x: Any) -> Any:
    """Apply `cifar_cnn` to one image [3, 32, 32]."""
    import jax

    x = _max_pool(jax.nn.relu(_conv(params, "0", x)))
    x = jax.nn.relu(_group_norm(params, "4", _conv(params, "3", x, stride=2), groups=8))
    x = _max_pool(jax.nn.relu(_group_norm(params, "7", _conv(params, "6", x), groups=8)))
    x = jax.nn.relu(_conv(params, "10", x, stride=2))
    return _linear(params, "13", x.reshape(-1))


class Block(nn.Module):
    """A pre-norm encoder layer of plain linear layers, so that hooks on modules see every parameter."""

    def __init__(self, fused: bool) -> None:
        """Make the layers."""
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, W] to [B, T, W]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, W / H]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small text classifier.

    Embedding, fixed positions, two encoder layers, mean over the tokens.
    """

    def __init__(self, fused: bool) -> None:
        """Make the layers.

        `fused` calls scaled_dot_product_attention, else attention is written out.
        """
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*[Block(fused) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("positions", sinusoids())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, 10]."""
        x = self.embedding(tokens) + self.get_buffer("positions")
        return self.head(self.norm(self.blocks(x)).mean(1))


def sinusoids() -> Tensor:
    """Return the fixed position code [T, W]."""
    frequency = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10_000.0) / WIDTH))
    angle = torch.arange(TOKENS)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def transformer_jax(params: JaxParams, tokens: Any) -> Any:
    """Apply `Transformer` to one sequence [T]."""
    import jax
    import jax.numpy as jnp

    x = params["embedding.weight"][tokens] + jnp.asarray(sinusoids().numpy())
    for index in range(LAYERS):
        name = f"blocks.{index}."
        qkv = _linear(params, name + "qkv", _layer_norm(params, name + "norm1", x))
        q, k, v = qkv.reshape(TOKENS, 3, HEADS, WIDTH // HEADS).transpose(
            1, 0, 2, 3
        )  # each [T, H, W / H]
        weights = jax.nn.softmax(jnp.einsum("thw,shw->hts", q, k) / (WIDTH // HEADS) ** 0.5)
        mixed = jnp.einsum("hts,shw->thw", weights, v).reshape(TOKENS, WIDTH)
        x = x + _linear(params, name + "out", mixed)
        hidden = jax.nn.gelu(
            _linear(params, name + "up", _layer_norm(params, name + "norm2", x)), approximate=False
        )
        x = x + _linear(params, name + "down", hidden)
    return _linear(params, "head", _layer_norm(params, "norm", x).mean(0))


# Torch's own layouts, [out, in] and NCHW with OIHW, served JAX best here: its per-sample gradients
# of 784-256-256-10 took half the time
# that they took with weights stored [in, out], and convolutions did not care.
def _linear(params: JaxParams, name: str, x: Any) -> Any:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _conv(params: JaxParams, name: str, x: Any, stride: int = 1) -> Any:
    from jax import lax

    convolved = lax.conv_general_dilated(
        x[None],
        params[f"{name}.weight"],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return convolved[0] + params[f"{name}.bias"][:, None, None]


def _max_pool(x: Any) -> Any:
    from jax import lax

    return lax.reduce_window(x, -math.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID")


def _group_norm(params: JaxParams, name: str, x: Any, groups: int) -> Any:
    grouped = x.reshape(groups, -1)
    mean, variance = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    normal = ((grouped - mean) / (variance + 1e-5) ** 0.5).reshape(x.shape)
    return normal * params[f"{name}.weight"][:, None, None] + params[f"{name}.bias"][:, None, None]


def _layer_norm(params: JaxParams, name: str, x: Any) -> Any:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / (variance + 1e-5) ** 0.5 * params[f"{name}.weight"] + params[f"{name}.bias"]


def cases() -> dict[str, Callable[[], Case]]:
    """Return what makes each case, by name; the same weights and data every time."""

    def images(
        name: str, model: Callable[[], nn.Module], shape: tuple[int, ...], forward: JaxForward
    ) -> Callable[[], Case]:
        def make() -> Case:
            torch.manual_seed(0)
            return Case(
                name, model(), torch.randn(shape), torch.randint(CLASSES, shape[:1]), forward
            )

        return make

    def text(name: str, fused: bool) -> Callable[[], Case]:
        def make() -> Case:
            torch.manual_seed(0)
            tokens = torch.randint(VOCABULARY, (32, TOKENS))
            return Case(
                name, Transformer(fused), tokens, torch.randint(CLASSES, (32,)), transformer_jax
            )

        return make

    return {
        "mlp": images("mlp", mlp, (128, 784), mlp_jax),
        "digits_cnn": images("digits_cnn", digits_cnn, (128, 1, 8, 8), digits_cnn_jax),
        "cifar_cnn": images("cifar_cnn", cifar_cnn, (64, 3, 32, 32), cifar_cnn_jax),
        "transformer": text("transformer", fused=False),
        "transformer_sdpa": text("transformer_sdpa", fused=True),
    }
