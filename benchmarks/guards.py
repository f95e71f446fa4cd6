"""Time of the comparison that `trace="auto"` makes at each call: `python -m benchmarks.guards`.

A function is mapped until its recording is kept; then the comparison of everything that it was seen
to read is timed by itself. One thread, least of many rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import shardmap
from shardmap.call import automatic
from shardmap.call.root import Root

SCALE = 2.0


def small() -> tuple[Callable[..., Any], Tensor]:
    """Make a function of a line that reads a global number and a captured tensor."""
    weight = torch.ones(3)
    return lambda x: (x * weight * SCALE).sum(), torch.randn(8, 3)


def modules() -> tuple[Callable[..., Any], Tensor]:
    """Make a tree of a hundred modules."""
    parts: list[nn.Module] = []
    for _ in range(11):
        parts.append(
            nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())])
        )
    model = nn.Sequential(*parts)
    assert len(list(model.modules())) == 100
    return lambda x: model(x), torch.randn(8, 4)


def gradient() -> tuple[Callable[..., Any], Tensor]:
    """Make the per-sample gradient of a transformer of six layers, by torch.func."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    parameters = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None],)).square().mean()

    return lambda x: torch.func.grad(loss)(parameters, x), torch.randn(4, 7, 32)


CASES: dict[str, tuple[Callable[[], tuple[Callable[..., Any], Tensor]], float | None]] = {
    "a small function": (small, 50.0),
    "a tree of 100 modules": (modules, 200.0),
    "gradient of a transformer, 6 layers": (gradient, None),
}


def microseconds(function: Callable[..., Any], batch: Tensor, rounds: int) -> tuple[float, int]:
    """Microseconds of one comparison, and the number of facts that it compares."""
    automatic.clear()
    mapped = shardmap.vmap(function)
    for _ in range(10):
        mapped(batch)
    (known,) = automatic.known()
    (kept,) = known.kept.values()
    assert kept.confirmed

    def once() -> None:
        root = Root(function, [])
        assert root.key == kept.key
        assert kept.guards.check(root.parts) is not None

    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(20):
            once()
        best = min(best, (time.perf_counter() - began) / 20)
    return best * 1e6, len(kept.guards)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each function; 1 if a comparison takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.guards")
    parser.add_argument("--rounds", type=int, default=100)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    missed = False
    for name, (make, most) in CASES.items():
        found, facts = microseconds(*make(), chosen.rounds)
        missed |= most is not None and found > most
        bound = "" if most is None else f" (at most {most:.0f})"
        print(f"{name}: {found:.0f} us{bound}, {facts:,} facts")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
