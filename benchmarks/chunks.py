"""The chunk size that a call takes by itself against each that a user could give.

Per-sample gradients of small models, run in turn in one process: the default, then each fixed chunk
size, again and again. The default's first calls, in which it measures sizes, are thrown away as
warm-up; `warmup` says how many.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from benchmarks.common import Timer, markdown, ratio, verdict
from benchmarks.models import Transformer, cifar_cnn, digits_cnn, mlp

TARGET = 1.10
"""Time of the default chunk size over that of the best fixed one, at most."""
WIDTH, HEADS, TOKENS, VOCABULARY = 256, 4, 64, 1000


@dataclass(frozen=True)
class Map:
    """A mapped function with a batch for it."""

    function: Callable[..., Any]
    batch: tuple[Tensor, ...]


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm, added to their input."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        """Make the layers."""
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out),
        )  # fmt: skip
        same = stride == 1 and channels == out
        self.short = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, out, H / stride, W / stride]."""
        return F.relu(self.inner(x) + self.short(x))


def resnet18() -> nn.Module:
    """Build a ResNet-18 with group norm for 3x32x32 images."""
    blocks, channels = [], 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(channels, out, stride), Residual(out, out, 1)]
        channels = out
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Text(nn.Module):
    """Embeddings, encoder layers, and logits: of the next token, or of the class of the text."""

    def __init__(self, layers: int, causal: bool) -> None:
        """Make the layers; `causal` as GPT-2 has them, else as BERT has them."""
        super().__init__()
        self.causal = causal
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "norm1": nn.LayerNorm(WIDTH),
                        "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                        "out": nn.Linear(WIDTH, WIDTH),
                        "norm2": nn.LayerNorm(WIDTH),
                        "up": nn.Linear(WIDTH, 4 * WIDTH),
                        "down": nn.Linear(4 * WIDTH, WIDTH),
                    }
                )
                for _ in range(layers)
            ]
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY if causal else 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits, [B, T, VOCABULARY] or [B, 10]."""
        batch, length = tokens.shape
        x = self.words(tokens) + self.places(torch.arange(length))
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            qkv = layer["qkv"](layer["norm1"](x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, W / H]
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + layer["out"](mixed.transpose(1, 2).reshape(batch, length, WIDTH))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        x = self.norm(x)
        return self.head(x if self.causal else x[:, 0])


def classified(model: nn.Module, inputs: Tensor) -> Map:
    """Per-sample gradients of a classifier's cross entropy."""
    parameters = tuple(model.parameters())

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)

    return Map(gradient, (inputs, torch.randint(10, (len(inputs),))))


def next_token(model: nn.Module, tokens: Tensor) -> Map:
    """Per-sample gradients of the cross entropy of each next token."""
    parameters = tuple(model.parameters())

    def gradient(row: Tensor) -> tuple[Tensor, ...]:
        logits = model(row[None])[0]
        return torch.autograd.grad(F.cross_entropy(logits[:-1], row[1:]), parameters)

    return Map(gradient, (tokens,))


MAPS: dict[str, Callable[[int], Map]] = {
    "GPT-2, 6 layers": lambda n: next_token(
        Text(6, causal=True), torch.randint(VOCABULARY, (n or 32, TOKENS))
    ),
    "BERT, 4 layers": lambda n: classified(
        Text(4, causal=False), torch.randint(VOCABULARY, (n or 32, TOKENS))
    ),
    "ResNet-18, group norm": lambda n: classified(resnet18(), torch.randn(n or 32, 3, 32, 32)),
    "CNN, 32x32": lambda n: classified(cifar_cnn(), torch.randn(n or 64, 3, 32, 32)),
    "CNN, 8x8": lambda n: classified(digits_cnn(), torch.randn(n or 512, 1, 8, 8)),
    "MLP": lambda n: classified(mlp(), torch.randn(n or 512, 784)),
    "transformer": lambda n: classified(
        Transformer(fused=True), torch.randint(VOCABULARY, (n or 64, 32))
    ),
}
"""Makes each map for a number of samples, 0 for the usual one."""


def fixed_sizes(samples: int) -> list[int]:
    """Powers of four from 1 on, the powers of two between them from 8 to 64, and the whole batch."""
    found = {size for size in (1, 4, 8, 16, 32, 64, 256, 1024) if size < samples}
    return sorted(found | {samples})


def measured(names: Sequence[str], rounds: int, warmup: int, samples: int) -> dict[str, Any]:
    """Seconds of each map with the default chunk size and with each fixed one.

    Args:
        names: Maps of `MAPS`.
        rounds: Timed runs of each.
        warmup: Runs before those, in which the default measures sizes.
        samples: Samples of each map; 0 for the usual numbers.
    """
    found = {}
    for name in names:
        torch.manual_seed(0)
        case = MAPS[name](samples)
        batch = case.batch
        count = len(batch[0])
        calls = {
            size: shardmap.vmap(case.function, trace="once", chunk_size=size)
            for size in ("auto", *fixed_sizes(count))
        }
        reference = calls[count](*batch)
        torch.testing.assert_close(calls["auto"](*batch), reference, rtol=1e-3, atol=1e-5)
        del reference
        for _ in range(warmup):
            calls["auto"](*batch)
        seconds = Timer(rounds=rounds, warmup=1).run(
            {str(size): functools.partial(call, *batch) for size, call in calls.items()}
        )
        lane = shardmap.plan(case.function, trace="once")(*batch).lanes[0]
        found[name] = {
            "samples": count,
            "seconds": seconds,
            "estimated": lane.estimated,
            "chosen": lane.chunk,
            "speeds": [speed._asdict() for speed in lane.speeds],
        }
    return found


def over_best(seconds: dict[str, list[float]]) -> tuple[str, float]:
    """The best fixed size by its median, and the median of the paired ratios to it."""
    best = min((s for s in seconds if s != "auto"), key=lambda s: statistics.median(seconds[s]))
    return best, ratio(seconds, "auto", best).median


def report(found: dict[str, Any]) -> str:
    """The table: medians, and the default's time over the best fixed size's in the same round."""
    rows = []
    for name, case in found.items():
        best, part = over_best(case["seconds"])
        fixed = ", ".join(
            f"{size}: {1e3 * statistics.median(seconds):.3g}"
            for size, seconds in case["seconds"].items()
            if size != "auto"
        )
        rows.append(
            [
                name,
                str(case["samples"]),
                f"{case['estimated']}",
                f"{case['chosen']}",
                f"{1e3 * statistics.median(case['seconds']['auto']):.3g}",
                fixed,
                best,
                f"{part:.2f}",
                verdict(part, TARGET),
            ]
        )
    header = [
        "map", "samples", "estimate", "chosen", "default, ms", "fixed, ms", "best", "default / best", "",
    ]  # fmt: skip
    return (
        f"Default chunk size against each fixed one; medians, ratios paired (at most {TARGET})\n\n"
        + markdown(header, rows)
    )
