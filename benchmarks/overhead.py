"""Time of a call beyond its arithmetic, against torch.func: `python -m benchmarks.overhead`.

The arithmetic is next to nothing (4x4 matrices, a batch of 8), so the time is that of recording, of
replaying and of calling torch. One thread; the calls run in turn, many rounds, and are compared
within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardmap
from benchmarks import common

ROOT = Path(__file__).parent.parent
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
            "default, torch.autograd.grad inside": (shardmap.vmap(with_autograd), 0.25),
            "recorded, torch.autograd.grad inside": (
                shardmap.vmap(with_autograd, trace="each"),
                3.0,
            ),
            "recorded, torch.func.grad inside": (shardmap.vmap(with_func, trace="each"), None),
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


def one_addition(dtype: torch.dtype) -> dict[str, Subject]:
    """Make `x + 1` over eight numbers, the smallest map."""
    return _plain(lambda x: (x + 1,), torch.arange(BATCH).to(dtype), most=1.0)


def _plain(
    function: Callable[..., Any], *batch: Tensor, most: float | None = None
) -> dict[str, Subject]:
    ours = {
        "default": (shardmap.vmap(function), most),
        "replay": (shardmap.vmap(function, trace="once"), None),
        "recorded": (shardmap.vmap(function, trace="each"), None),
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
    "x + 1": one_addition,
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


MOST_OVER_OTHER = 1.05
"""The most that a later call may cost over the other checkout's: the spread of the medians."""


def timed(tree: Path, rounds: int, warmup: int) -> dict[str, float]:
    """The time of each of this benchmark's calls over torch.func's, with the shardmap of `tree`.

    One process; each call takes turns with torch.func's alone. Next to our other calls, the one
    that records would find the processor's caches as those have left them: warm in a checkout
    whose default call records too, cold in one whose default call replays.
    """
    code = (
        "import json, sys, pathlib, torch, shardmap\n"
        f"found, wanted = pathlib.Path(shardmap.__file__).parents[1], pathlib.Path({str(tree)!r})\n"
        "assert found == wanted, found\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"  # the same calls for both
        "from benchmarks import common, overhead\n"
        "torch.set_num_threads(1)\n"
        f"timer = common.Timer({rounds}, {warmup}, settle_seconds=0.0)\n"
        "found = {}\n"
        "for group, make in overhead.GROUPS.items():\n"
        "    subjects = make(torch.float32)\n"
        "    base = subjects.pop(overhead.BASELINE).call\n"
        "    for name, subject in subjects.items():\n"
        "        seconds = timer.run({overhead.BASELINE: base, name: subject.call})\n"
        "        ratio = common.ratio(seconds, name, overhead.BASELINE)\n"
        "        found[f'{group}: {name}'] = ratio.median\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"shardmap in {tree}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def against(other: Path, rounds: int, warmup: int, output: Path | None) -> int:
    """Compare the calls of this tree with those of another checkout, in processes that take turns.

    Each process's calls are measured by what torch.func takes in the same process, so that a slow
    spell of the machine falls on both.
    """
    trees, processes = {"here": ROOT, "there": other}, 9
    over: dict[str, dict[str, list[float]]] = {tree: {} for tree in trees}
    for index in range(processes):
        for tree in list(trees) if index % 2 else list(reversed(trees)):
            found = timed(trees[tree], max(2, rounds // processes), warmup)
            for name, ratio in found.items():
                over[tree].setdefault(name, []).append(ratio)
    ratios = {
        name: common.ratio({t: over[t][name] for t in over}, "here", "there")
        for name in over["here"]
    }
    rows = [
        [
            name,
            ratio.text(3),
            f"<= {MOST_OVER_OTHER}",
            common.verdict(ratio.median, MOST_OVER_OTHER),
        ]
        for name, ratio in ratios.items()
    ]
    print(f"Medians (quartiles) of {processes} pairs of processes, each call over {BASELINE}.\n")
    print(common.markdown(["call", "over the other checkout", "target", ""], rows))
    print(f"\n{common.machine_line(common.machine())}")
    if output:
        common.write_json(output, {name: asdict(ratio) for name, ratio in ratios.items()})
    return 1 if any(ratio.median > MOST_OVER_OTHER for ratio in ratios.values()) else 0


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
    parser.add_argument(
        "--against", type=Path, metavar="PATH", help="compare with another checkout of shardmap"
    )
    options = parser.parse_args(arguments)

    if options.against:
        return against(options.against.absolute(), options.rounds, options.warmup, options.json)
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
