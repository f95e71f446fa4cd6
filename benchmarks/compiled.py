"""Compiled maps against `torch.compile(torch.func.vmap(...))`: `python -m benchmarks.compiled`.

Per-sample gradients of a small transformer, an MLP and a CNN, the Jacobian of a two-layer net, and
the flow map of Lorenz-96. Four peers run in turn, a, b, c, d, a, b, c, d: the map
as it is, the map with `compile=True`, torch.func, and `torch.compile` of torch.func, which is what
its users would write. Ratios are taken within a round. All results are compared before anything is
timed, and the seconds of the first calls, which compile, are shown beside.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F

import shardmap
from benchmarks import models
from benchmarks.common import (
    Timer,
    machine,
    machine_line,
    markdown,
    milliseconds,
    ratio,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.jacobians import dense, flow

RESULTS = Path(__file__).parent / "results"
WORST, MEAN = 1.0, 0.8
"""The most that a compiled map may take of `torch.compile`'s time: each case, and on average."""
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A function of one sample, its batch, and the dims that are mapped."""

    function: Callable[..., object]
    batch: tuple[object, ...]
    in_dims: int | tuple[int | None, ...] = 0


def gradients(model: nn.Module, inputs: Tensor) -> Case:
    """Per-sample gradients of a classifier's loss by its parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    targets = torch.randint(0, models.CLASSES, (len(inputs),))

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), target[None])

    return Case(grad(loss), (params, inputs, targets), (None, 0, 0))


def cases(smoke: bool) -> dict[str, Callable[[], Case]]:
    """The cases by name; small ones for a smoke test."""
    size = 4 if smoke else 32
    steps = 2 if smoke else 10
    return {
        "transformer": lambda: gradients(
            models.Transformer(fused=False), torch.randint(0, models.VOCABULARY, (size, 32))
        ),
        "MLP": lambda: gradients(models.mlp(), torch.randn(4 * size, 784)),
        "CNN": lambda: gradients(models.cifar_cnn(), torch.randn(size, 3, 32, 32)),
        "Jacobian": lambda: Case(jacrev(dense(64, 128, 64)), (torch.randn(2 * size, 64),)),
        "Lorenz-96": lambda: Case(lambda x: flow(x, steps), (torch.randn(64 * size, 40),)),
    }


def first(call: Callable[..., object], batch: tuple[object, ...]) -> tuple[float, list[Tensor]]:
    """Seconds of the first call, and its results as a flat list."""
    began = time.perf_counter()
    found = call(*batch)
    seconds = time.perf_counter() - began
    return seconds, [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]


def measure(name: str, case: Case, timer: Timer) -> dict[str, object]:
    """Compare the peers' results, then time them in turn."""
    torch._dynamo.reset()
    mapped = torch.func.vmap(case.function, in_dims=case.in_dims)
    peers: dict[str, Callable[..., object]] = {
        "eager": shardmap.vmap(case.function, case.in_dims, trace="once"),
        "compiled": shardmap.vmap(case.function, case.in_dims, trace="once", compile=True),
        "torch.func": mapped,
        "torch.compile": torch.compile(mapped),
    }
    with torch.no_grad():
        opened = {peer: first(call, case.batch) for peer, call in peers.items()}
        expected = opened["torch.func"][1]
        for peer, (_, found) in opened.items():
            for a, b in zip(expected, found, strict=True):
                error = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
                assert error < TOLERANCE, f"{name}: {peer} differs by {error:.1e}"
        calls = {peer: lambda call=call: call(*case.batch) for peer, call in peers.items()}
        seconds = timer.run(calls)
    against = ratio(seconds, "compiled", "torch.compile")
    return {
        "name": name,
        "milliseconds": {peer: milliseconds(found).median for peer, found in seconds.items()},
        "first_seconds": {peer: found[0] for peer, found in opened.items()},
        "against_torch_compile": against.median,
        "quartiles": [against.lower, against.upper],
        "against_eager": ratio(seconds, "compiled", "eager").median,
    }


def report(rows: list[dict[str, object]]) -> str:
    """The table, and the verdict on the targets."""
    header = ["case", "as it is", "compile=True", "torch.func", "torch.compile of it",
              "compiled / torch.compile", "compiled / as it is", "first calls (s)"]  # fmt: skip
    lines, ratios = [], []
    for row in rows:
        times, opened = row["milliseconds"], row["first_seconds"]
        assert isinstance(times, dict)
        assert isinstance(opened, dict)
        value, around = row["against_torch_compile"], row["quartiles"]
        assert isinstance(value, float)
        assert isinstance(around, list)
        ratios.append(value)
        lines.append([
            str(row["name"]), *[f"{times[p]:.2f} ms" for p in times],
            f"{value:.2f} ({around[0]:.2f}-{around[1]:.2f}) {verdict(value, WORST)}",
            f"{row['against_eager']:.2f}",
            f"{opened['compiled']:.0f}, {opened['torch.compile']:.0f}",
        ])  # fmt: skip
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return (
        f"{markdown(header, lines)}\n\ngeometric mean of compiled / torch.compile: {mean:.2f} "
        f"(at most {MEAN}) {verdict(mean, MEAN)}"
    )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="small cases, two rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled.json")
    args = parser.parse_args()
    use_threads(args.threads)
    timer = Timer(rounds=2 if args.smoke else args.rounds, warmup=1 if args.smoke else 3)
    rows = []
    described = machine()
    for name, make in cases(args.smoke).items():
        if args.only and name not in args.only:
            continue
        torch.manual_seed(0)
        rows.append(measure(name, make(), timer))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{machine_line(described)}\n\n{report(rows)}")
    if not args.smoke:
        write_json(args.out, {"machine": described, "cases": rows})


if __name__ == "__main__":
    main()
