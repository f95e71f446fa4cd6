"""Norms and clipped sums of users' models against an ordinary backward: `python -m benchmarks.model_norms`.

GPT-2, BERT, a ViT and ResNet-18 with group norm, 32 samples. All run in turn: the gradient of the
summed loss of the whole batch (which gives no norms), and `per_sample_grad(model, loss, reduce=...)`
with default options. Before anything is timed every norm, and every entry of the clipped sums, is
compared with those of the loop's materialised gradients.

`--cpu-time` counts the process's processor seconds on one thread instead: what remains comparable
on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardmap
from benchmarks import user_cases, user_models
from benchmarks.common import (
    Quartiles,
    machine,
    machine_line,
    markdown,
    use_threads,
    verdict,
    write_report,
)

SAMPLES = 32
MOST = 1.6
"""Time over an ordinary backward's."""
TOLERANCE = 1e-3
BACKWARD = "backward"

Problem = tuple[nn.Module, user_cases.Loss, Tensor, Tensor]


def problems() -> dict[str, Callable[[], Problem]]:
    """Return what makes each model with its loss and batch."""

    def text(model: Callable[[], nn.Module], loss: user_cases.Loss, classes: int) -> Problem:
        torch.manual_seed(0)
        x = torch.randint(user_models.VOCABULARY, (SAMPLES, user_models.TOKENS))
        return model(), loss, x, torch.randint(classes, (SAMPLES,)) if classes else x

    def images(model: Callable[[], nn.Module], size: int) -> Problem:
        torch.manual_seed(0)
        x, y = torch.randn(SAMPLES, 3, size, size), torch.randint(10, (SAMPLES,))
        return model(), user_cases.classified, x, y

    return {
        "GPT-2": lambda: text(user_models.gpt2, user_cases.predicted, 0),
        "BERT": lambda: text(user_models.bert, user_cases.classified, 2),
        "ViT": lambda: images(user_models.ViT, 32),
        "ResNet-18": lambda: images(user_models.resnet18, 64),
    }


def check(name: str, problem: Problem, options: dict[str, Any]) -> float:
    """Compare with the materialised gradients of the loop; return the median norm.

    Raises:
        SystemExit: A norm or a clipped sum differs.
    """
    model, loss, x, y = problem
    params = tuple(model.parameters())
    rows = [
        torch.autograd.grad(loss(model(a[None]), b[None]), params)
        for a, b in zip(x, y, strict=True)
    ]
    norms = torch.stack([torch.stack([g.norm() for g in row]).norm() for row in rows])
    found = shardmap.per_sample_grad(model, loss, reduce="norm", batch_of_one=True, **options)(x, y)
    apart = float(((found - norms).abs() / norms).max())
    limit = float(norms.median())
    weights = (limit / norms).clamp(max=1).tolist()
    sums = shardmap.per_sample_grad(
        model, loss, reduce=shardmap.reduce.clipped_sum(limit), batch_of_one=True, **options
    )(x, y)
    for index, value in enumerate(sums.values()):
        wanted = torch.zeros_like(value)
        for weight, row in zip(weights, rows, strict=True):
            wanted += weight * row[index]
        apart = max(apart, float((value - wanted).norm() / (wanted.norm() + 1e-6 * limit)))
    if not apart < TOLERANCE:
        raise SystemExit(f"{name}: differs from the loop's gradients by {apart:.1e} of their size")
    return limit


def measure(name: str, problem: Problem, options: argparse.Namespace) -> dict[str, list[float]]:
    """Check a model, then time it: the ratios to an ordinary backward, round by round."""
    model, loss, x, y = problem
    params = tuple(model.parameters())
    limit = check(name, problem, options.options)
    reductions = {"norm": "norm", "clipped_sum": shardmap.reduce.clipped_sum(limit)}
    calls: dict[str, Callable[[], object]] = {
        BACKWARD: lambda: torch.autograd.grad(loss(model(x), y), params)
    }
    for key, reduce in reductions.items():
        mapped = shardmap.per_sample_grad(
            model, loss, reduce=reduce, batch_of_one=True, **options.options
        )
        calls[key] = lambda mapped=mapped: mapped(x, y)
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for index in range(options.warmup + options.rounds):
        for key, call in calls.items():
            start = clock()
            call()
            if index >= options.warmup:
                seconds[key].append(clock() - start)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Run the models and write the table; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_norms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", choices=list(problems()), default=list(problems()))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, one thread")
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON", help="options of our maps"
    )
    parser.add_argument("--output", type=Path, help="without ending: .md and .json are written")
    options = parser.parse_args(arguments)
    use_threads(1 if options.cpu_time else options.threads)
    description, results, rows = machine(("torch", "transformers")), {}, []
    for name in options.only:
        found = results[name] = measure(name, problems()[name](), options)
        base = found[BACKWARD]
        row = [name, f"{1e3 * statistics.median(base):.0f} ms"]
        for key in ("norm", "clipped_sum"):
            over = Quartiles.of([a / b for a, b in zip(found[key], base, strict=True)])
            row += [over.text(), verdict(over.median, MOST)]
        rows.append(row)
    header = ["", "ordinary backward", "norm", f"at most {MOST}", "clipped_sum", f"at most {MOST}"]
    text = f"{machine_line(description)}\n\n{markdown(header, rows)}\n"
    return write_report(text, options.output, description, results)


if __name__ == "__main__":
    sys.exit(main())
