"""What a call costs beyond its arithmetic, against torch.func: `python -m benchmarks.overhead`.

The arithmetic is next to nothing (4x4 matrices, a batch of 8), so the time is that of recording, of
replaying and of calling torch. One thread; the calls run in turn, many rounds, and are compared
within each round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardmap
from benchmarks import common

LAYERS, WIDTH, BATCH = 100, 4, 8
BASELINE = "torch.func"
TOLERANCE = 1e-9
"""Rounding in float64, relative to the largest magnitude of one sample's gradient of one layer."""

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """One call to time.

    Attributes:
        call: Computes the same values as the baseline of its group.
        target: The most its time may be over the baseline's; None if it is shown for information.
    """

    call: Call
    target: float | None = None


def gradient_of_a_deep_net(dtype: torch.dtype) -> dict[str, Subject]:
    """Make the per-sample gradient of a 100-layer 4x4 tanh net.

    About 500 calls forward and 800 backward, most of them views.
    """
    generator = torch.Generator().manual_seed(0)
    # 1.4 times an orthogonal matrix: neither saturated nor vanishing after 100 layers, so that
    # wrong values would show.
    weights = tuple(
        1.4
        * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[
            0
        ].to(dtype)
        for _ in range(LAYERS)
    )
    leaves = tuple(weight.clone().requires_grad_() for weight in weights)
    batch = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    def loss(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        for weight in weights:
            x = torch.tanh(x @ weight)
        return x.sum()

    def with_autograd(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(leaves, x), leaves)

    def with_func(x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(loss)(weights, x)

    return _against_torch_func(
        torch.func.vmap(with_func),
        {
            "replay, torch.autograd.grad inside": (
                shardmap.vmap(with_autograd, trace="once"),
                0.25,
            ),
            "replay, torch.func.grad inside": (shardmap.vmap(with_func, trace="once"), 0.25),
            "recorded, torch.autograd.grad inside": (shardmap.vmap(with_autograd), 3.0),
            "recorded, torch.func.grad inside": (shardmap.vmap(with_func), None),
        },
        batch,
    )


def forward_of_a_deep_chain(dtype: torch.dtype) -> dict[str, Subject]:
    """Make 100 pointwise operators, without any gradient."""
    batch = torch.randn(
        BATCH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)

    def chain(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(LAYERS):
            x = torch.sin(x)
        return (x,)

    return _plain(chain, batch)


def one_operator(dtype: torch.dtype) -> dict[str, Subject]:
    """Make a batched dot product: what a call costs whatever the function."""
    batch = torch.randn(
        2, BATCH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)

    def dot(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (torch.dot(x, y),)

    return _plain(dot, *batch.unbind())


def _plain(function: Callable[..., Any], *batch: Tensor) -> dict[str, Subject]:
    ours = {
        "replay": (shardmap.vmap(function, trace="once"), None),
        "recorded": (shardmap.vmap(function), None),
    }
    return _against_torch_func(torch.func.vmap(function), ours, *batch)


def _against_torch_func(
    baseline: Callable[..., Any],
    ours: Mapping[str, tuple[Callable[..., Any], float | None]],
    *batch: Tensor,
) -> dict[str, Subject]:
    def bind(mapped: Callable[..., Any]) -> Call:
        return lambda: mapped(*batch)

    return {BASELINE: Subject(bind(baseline))} | {
        name: Subject(bind(mapped), target) for name, (mapped, target) in ours.items()
    }


GROUPS: dict[str, Callable[[torch.dtype], dict[str, Subject]]] = {
    "gradient, 100 layers": gradient_of_a_deep_net,
    "forward, 100 operators": forward_of_a_deep_chain,
    "one operator": one_operator,
}


def check(group: str, subjects: Mapping[str, Subject]) -> None:
    """Compare every call's values with the baseline's, twice.

    The second call is the one that replays.

    Raises:
        SystemExit: A value is wrong.
    """
    expected = subjects[BASELINE].call()
    for name, subject in subjects.items():
        for attempt in ("first", "second"):
            found = subject.call()
            if len(found) != len(expected):
                raise SystemExit(
                    f"{group}, {name}, {attempt} call: {len(found)} values instead of "
                    f"{len(expected)}"
                )
            worst = max(
                common.relative_errors(a, b).max().item()
                for a, b in zip(found, expected, strict=True)
            )
            if worst > TOLERANCE:
                raise SystemExit(
                    f"{group}, {name}, {attempt} call: wrong by up to {worst:.2g} of its size"
                )


def measure(group: str, timer: common.Timer) -> dict[str, Any]:
    """Check one group in float64, then time it in float32."""
    check(group, GROUPS[group](torch.float64))
    subjects = GROUPS[group](torch.float32)
    seconds = timer.run({name: subject.call for name, subject in subjects.items()})
    return {
        name: {
            "milliseconds": asdict(common.milliseconds(seconds[name])),
            "ratio": asdict(common.ratio(seconds, name, BASELINE)),
            "target": subject.target,
        }
        for name, subject in subjects.items()
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write one row per call."""
    rows = []
    for group, result in results.items():
        for name, row in result.items():
            target = row["target"]
            time, over = common.Quartiles(**row["milliseconds"]), common.Quartiles(**row["ratio"])
            limit = "" if target is None else f"<= {target}"
            rows.append(
                [
                    f"{group}: {name}",
                    time.text(3),
                    over.text(),
                    limit,
                    common.verdict(over.median, target),
                ]
            )
    return common.markdown(["call", "ms", f"over {BASELINE}", "target", ""], rows)


def missed(results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Say whether any call is over its target."""
    rows = [row for result in results.values() for row in result.values()]
    return any(row["target"] is not None and row["ratio"]["median"] > row["target"] for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=101, help="timed runs of each call (default: 101)"
    )
    parser.add_argument(
        "--warmup", type=int, default=10, help="discarded runs of each call (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    timer = common.Timer(
        options.rounds, options.warmup, settle_seconds=0.0
    )  # one thread: no pool to settle
    description = common.machine()
    results = {group: measure(group, timer) for group in GROUPS}
    print(
        f"Medians (quartiles) of {options.rounds} interleaved runs.",
        table(results),
        common.machine_line(description),
        sep="\n\n",
    )
    if options.json:
        common.write_json(options.json, {"machine": description, "results": results})
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
