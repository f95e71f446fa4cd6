"""Large maps with automatic chunks against torch.func: `python -m benchmarks.planner`.

Four questions, each answered in one run, interleaved, minimum of the rounds (identical code varies
here by tens of percent when other work shares the machine, and the first touch of fresh memory can
take 20 times as long, so each run comes right after an untimed one):

- stacked: per-sample gradients of a 784-256-256-10 MLP, 4,096 samples, 4.4 GB of results, against `torch.func.vmap(grad)` at its best
  chunk_size, and against filling the results' memory once on huge pages. The peak is measured in a
  process of its own.
- reduced: the same gradients reduced to their mean, with the norm of each, against torch.func in a chunk loop written by hand at its
  best chunk. A slice is timed and scaled to 1,000,000 samples; `--million` runs them all, in a
  process of its own, for the peak.
- chunks: for each of some models, the default chunk size against each fixed one (`benchmarks.chunks`).
- planning: what a plan costs against a run of about a second, and what automatic chunks cost a call that is too small to need any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import shardmap
from benchmarks import chunks as chunk_sizes
from benchmarks.common import (
    Timer,
    machine,
    machine_line,
    markdown,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.models import mlp

RESULTS = Path(__file__).parent / "results"
MILLION = 1_000_000


def problem(samples: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The model and a batch."""
    torch.manual_seed(0)
    return mlp(), torch.randn(samples, 784), torch.randint(10, (samples,))


def gradient(model: torch.nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """One sample's gradient, as a shardmap user writes it."""
    parameters = tuple(model.parameters())
    return lambda x, y: torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def gradient_and_norm(
    model: torch.nn.Module,
) -> Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor]]:
    """One sample's gradient and its norm."""
    one = gradient(model)

    def function(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        gradients = one(x, y)
        return gradients, sum((g.square().sum() for g in gradients), torch.zeros(())).sqrt()

    return function


def functional(model: torch.nn.Module) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """The parameters, and one sample's gradient as a torch.func user writes it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, grad(lambda p, x, y: F.cross_entropy(functional_call(model, p, (x,)), y))


def by_hand(
    model: torch.nn.Module, x: Tensor, y: Tensor, chunk: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean gradient and norms with torch.func, chunked by hand."""
    parameters, one = functional(model)
    mapped = vmap(one, (None, 0, 0))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for start in range(0, len(x), chunk):
        gradients = mapped(parameters, x[start : start + chunk], y[start : start + chunk])
        for name, g in gradients.items():
            total[name] += g.sum(0)
        norms.append(
            sum((g.square().flatten(1).sum(1) for g in gradients.values()), torch.zeros(())).sqrt()
        )
    return {name: t / len(x) for name, t in total.items()}, torch.cat(norms)


def filled(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The results' memory, filled once: numpy's allocator asks for huge pages."""
    arrays = [np.empty(shape, np.float32) for shape in shapes]
    for array in arrays:
        torch.from_numpy(array).fill_(1.0)
    return arrays


def stacked(samples: int, rounds: int, chunks: list[int | None]) -> dict[str, Any]:
    """Seconds for all per-sample gradients, stacked."""
    model, x, y = problem(samples)
    parameters, one = functional(model)
    mapped = shardmap.vmap(gradient(model))
    shapes = [(samples, *p.shape) for p in model.parameters()]
    calls: dict[str, Callable[[], object]] = {
        "shardmap": lambda: mapped(x, y),
        "fill": lambda: filled(shapes),
    }
    for chunk in chunks:
        calls[f"torch.func {chunk}"] = lambda chunk=chunk: vmap(
            one, (None, 0, 0), chunk_size=chunk
        )(parameters, x, y)
    seconds = Timer(rounds=rounds, warmup=1, primed=True).run(calls)
    for ours, theirs in zip(
        mapped(x[:64], y[:64]),
        vmap(one, (None, 0, 0))(parameters, x[:64], y[:64]).values(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    return {"samples": samples, "seconds": seconds}


def reduced(samples: int, rounds: int, chunks: list[int]) -> dict[str, Any]:
    """Seconds for the mean gradient and all norms."""
    model, x, y = problem(samples)
    mapped = shardmap.vmap(gradient_and_norm(model), reduce=("mean", None))
    calls: dict[str, Callable[[], object]] = {"shardmap": lambda: mapped(x, y)}
    for chunk in chunks:
        calls[f"torch.func {chunk}"] = lambda chunk=chunk: by_hand(model, x, y, chunk)
    seconds = Timer(rounds=rounds, warmup=1).run(calls)
    (mean, norms), (wanted, wanted_norms) = mapped(x, y), by_hand(model, x, y, 64)
    torch.testing.assert_close(list(mean), list(wanted.values()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms, wanted_norms)
    return {"samples": samples, "seconds": seconds}


def planning(rounds: int) -> dict[str, Any]:
    """Seconds for a plan against a run of about a second, and for small calls with and without automatic chunks."""
    model, x, y = problem(12_000)
    norms = gradient_and_norm(model)
    first = time.perf_counter()
    planned = shardmap.plan(norms, reduce=("mean", None))(x, y)
    first = time.perf_counter() - first
    small, weights = torch.randn(32, 3), torch.randn(3)
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: shardmap.plan(norms, reduce=("mean", None))(x, y),
        "run": planned.run,
    }
    for trace in ("each", "once"):
        for size in ("auto", None):
            mapped = shardmap.vmap(lambda row: row.dot(weights), trace=trace, chunk_size=size)
            calls[f"small, trace={trace}, chunk_size={size}"] = lambda mapped=mapped: [
                mapped(small) for _ in range(200)
            ]
    return {
        "samples": len(x),
        "first_plan": first,
        "seconds": Timer(rounds=rounds, warmup=1).run(calls),
    }


PROBE = """
import ctypes, json, sys, torch
import shardmap
from benchmarks import planner
torch.set_num_threads({threads})
model, x, y = planner.problem({samples})
mapped = {mapped}
{warm}
ctypes.CDLL(None).malloc_trim(0)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
result = mapped(x, y)
size = sum(t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(result))
print(json.dumps(dict(peak=status("VmHWM") - before, result=size)))
"""


def peak(samples: int, mapped: str, threads: int) -> dict[str, int]:
    """Peak resident bytes of one map above what its process held before, in a process of its own."""
    code = PROBE.format(
        samples=samples, mapped=mapped, threads=threads, warm="mapped(x[:8], y[:8])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, Any]) -> str:
    """The tables."""
    parts = []

    def best(seconds: dict[str, list[float]]) -> dict[str, float]:
        return {name: min(values) for name, values in seconds.items()}

    def table(title: str, low: dict[str, float], scale: float, unit: str) -> None:
        ours = low["shardmap"]
        rows = [
            [name, f"{scale * value:.3g}", f"{value / ours:.2f}"] for name, value in low.items()
        ]
        parts.append(f"{title}\n\n" + markdown(["", unit, "over shardmap"], rows))

    if "stacked" in results:
        low, memory = best(results["stacked"]["seconds"]), results["stacked"].get("memory")
        table(
            f"Per-sample gradients, stacked, {results['stacked']['samples']} samples; minimum of "
            "the rounds",
            low,
            1.0,
            "seconds",
        )
        theirs = min(v for k, v in low.items() if k.startswith("torch.func"))
        parts.append(
            f"speed against torch.func at its best: {theirs / low['shardmap']:.2f} (at least 3): "
            f"{verdict(3, theirs / low['shardmap'])}"
        )
        parts.append(
            f"time over filling the result once: {low['shardmap'] / low['fill']:.2f} (at most 2): "
            f"{verdict(low['shardmap'] / low['fill'], 2)}"
        )
        if memory:
            limit = 1.05 * memory["result"] + (50 << 20)
            mib = 1 << 20
            parts.append(
                f"peak: {memory['peak'] / mib:.0f} MiB for a result of "
                f"{memory['result'] / mib:.0f} MiB (at most {limit / mib:.0f}): "
                f"{verdict(memory['peak'], limit)}"
            )
    if "reduced" in results:
        low = best(results["reduced"]["seconds"])
        scale = MILLION / results["reduced"]["samples"]
        table(
            f"Mean gradient and norms, a slice of {results['reduced']['samples']} scaled to a "
            "million samples",
            low,
            scale,
            "seconds",
        )
        theirs = min(v for k, v in low.items() if k.startswith("torch.func"))
        parts.append(
            f"speed against torch.func at its best: {theirs / low['shardmap']:.2f} (at least 1.5): "
            f"{verdict(1.5, theirs / low['shardmap'])}"
        )
        memory = results["reduced"].get("memory")
        if memory:
            parts.append(
                f"peak above the inputs, {memory['samples']} samples: "
                f"{memory['peak'] / (1 << 20):.0f} MiB (under 1024): "
                f"{verdict(memory['peak'], 1 << 30)}"
            )
    if "chunks" in results:
        parts.append(chunk_sizes.report(results["chunks"]))
    if "planning" in results:
        low = best(results["planning"]["seconds"])
        parts.append(
            f"planning: {low['plan'] * 1e3:.1f} ms, the first time "
            f"{results['planning']['first_plan'] * 1e3:.1f} ms, for a run of "
            f"{low['run']:.2f} s: {100 * low['plan'] / low['run']:.1f}% (under 5%): "
            f"{verdict(low['plan'] / low['run'], 0.05)}"
        )
        for trace in ("each", "once"):
            ratio = (
                low[f"small, trace={trace}, chunk_size=auto"]
                / low[f"small, trace={trace}, chunk_size=None"]
            )
            parts.append(
                f"a small call, trace={trace!r}, planned automatically over not: {ratio:.3f} (at "
                f"most 1.10): {verdict(ratio, 1.1)}"
            )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run the requested benchmarks and write the tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["stacked", "reduced", "planning", "chunks"],
        choices=["stacked", "reduced", "planning", "chunks"],
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096, help="of the stacked part")
    parser.add_argument("--slice", type=int, default=8192, help="of the reduced part")
    parser.add_argument(
        "--million", action="store_true", help="run all million samples once, for the peak"
    )
    parser.add_argument(
        "--models", nargs="+", default=list(chunk_sizes.MAPS), help="of the chunks part"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the chunks part alone, four samples of each model and two rounds; nothing is written",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "planner",
        help="without ending: .md and .json are written",
    )
    options = parser.parse_args()
    use_threads(options.threads)
    if options.smoke:
        sys.stdout.write(chunk_sizes.report(chunk_sizes.measured(options.models, 2, 0, 4)) + "\n")
        return 0
    results: dict[str, Any] = {"machine": machine(("torch", "numpy"))}
    if "reduced" in options.parts:
        results["reduced"] = reduced(options.slice, options.rounds, [4, 8, 16, 32, 64, 256])
        samples = MILLION if options.million else 10 * options.slice
        mapped = 'shardmap.vmap(planner.gradient_and_norm(model), reduce=("mean", None))'
        results["reduced"]["memory"] = peak(samples, mapped, options.threads) | {"samples": samples}
    if "planning" in options.parts:
        results["planning"] = planning(options.rounds)
    if "chunks" in options.parts:
        results["chunks"] = chunk_sizes.measured(options.models, options.rounds, 12, 0)
    if "stacked" in options.parts:
        results["stacked"] = stacked(options.samples, options.rounds, [None, 1024, 256, 64, 16])
        results["stacked"]["memory"] = peak(
            options.samples, "shardmap.vmap(planner.gradient(model))", options.threads
        )
    text = f"{machine_line(results['machine'])}\n\n{report(results)}"
    sys.stdout.write(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), results)
    return int("FAIL" in text)


if __name__ == "__main__":
    sys.exit(main())
