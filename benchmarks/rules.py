"""Every operator of PyTorch's database, mapped: `python -m benchmarks.rules`.

    python -m benchmarks.rules [--only NAME,NAME] [--part K/N] [--rounds N] [--output PATH]

The largest of an operator's sample inputs of at most 20,000 elements is made a batch of 256 samples
that differ, and all its tensors are mapped. Later calls of the map, with default options and with
trace="once", are timed against torch.func.vmap of the same call and against the loop: CPU time of
one thread, one peer after the other, medians of the ratios within a round. Each sample is compared
with the loop before anything is timed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gc
import itertools
import logging
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import shardmap
from benchmarks import common
from shardmap.lower import cache

BATCH = 256
LARGEST_SAMPLE = 20_000
"""Elements."""
LONG_CALL_MS = 1.0
"""From this time of torch.func on a ratio is judged by itself: below, a call is overhead."""
MOST_MEDIAN, MOST_SINGLE, LEAST_OVER_A_LOOP, MOST_OF_THE_LOOP = 1.0, 1.5, 5.0, 1.1
"""Targets."""
UNINITIALISED = "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"
DTYPES = torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool
Function = Callable[..., list[torch.Tensor]]


class LeftOutError(Exception):
    """An operator that has no call to time, with the reason."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The times of one operator."""

    name: str
    elements: int
    """Of one sample's tensors."""
    tier: str
    """The lowest tier that serves one of its calls."""
    peer: str
    """What torch.func.vmap makes of it: "batched", "loop" or "refused"."""
    ms: dict[str, float]
    """Median of each peer."""
    of_peer: float | None
    """Ratio to torch.func.vmap, replayed."""
    of_loop: float
    """Ratio to the loop, replayed."""


class Draws(TorchDispatchMode):
    """Refuse calls that draw random numbers, which no two peers draw alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call."""
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
            raise LeftOutError("draws random numbers")
        return func(*args, **(kwargs or {}))


def operators() -> dict[str, Any]:
    """Return the database's operators with one right answer, by name and variant."""
    from torch.testing._internal.common_methods_invocations import op_db

    kept = [op for op in op_db if op.name not in UNINITIALISED and op.name != "new_empty_strided"]
    return {op.formatted_name: op for op in kept if not op.has_nondeterministic_output}


def batched(op: Any) -> tuple[Function, list[torch.Tensor]]:
    """Return an operator as a function of one sample's tensors, and a batch of each."""
    dtype = next((d for d in DTYPES if d in op.supported_dtypes("cpu")), None)
    if dtype is None:
        raise LeftOutError("no dtype")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # the database draws from the global generator
    best: tuple[int, Any] | None = None
    for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 60):
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        elements = sum(t.numel() for t in tensors)
        dense = all(t.layout == torch.strided for t in tensors)
        if dense and elements <= LARGEST_SAMPLE and elements > (best[0] if best else 0):
            best = elements, (leaves, spec)
    if best is None:
        raise LeftOutError("no dense tensors of a medium size")
    leaves, spec = best[1]
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    call = op.op
    rest = [None if i in at else leaf for i, leaf in enumerate(leaves)]

    def function(*tensors: torch.Tensor) -> list[torch.Tensor]:
        own = list(rest)
        for i, tensor in zip(at, tensors, strict=True):
            own[i] = tensor
        first, args, kwargs = pytree.tree_unflatten(own, spec)
        found = pytree.tree_leaves(call(first, *args, **kwargs))
        results = [t for t in found if isinstance(t, torch.Tensor)]
        if not results or any(t.layout != torch.strided for t in results):
            raise LeftOutError("no dense tensor comes out")
        return results

    return function, [spread(leaves[i].detach()) for i in at]


def spread(sample: torch.Tensor) -> torch.Tensor:
    """Make a batch: the sample scaled by numbers from 1 to 0.6, integers as they are."""
    rows = sample.expand(BATCH, *sample.shape).clone()
    if not (sample.is_floating_point() or sample.is_complex()):
        return rows
    factors = torch.linspace(1, 0.6, BATCH, dtype=torch.float64).to(sample.dtype)
    return rows * factors.reshape(BATCH, *[1] * sample.ndim)


def looped(function: Function, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the plain loop's results."""
    rows = [function(*row) for row in zip(*tensors, strict=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def cpu_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each call in each round; short calls are made several times."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        begun = time.process_time()
        call()
        counts[name] = max(1, min(20, int(2e-3 / max(1e-6, time.process_time() - begun))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                begun = time.process_time()
                for _ in range(counts[name]):
                    call()
                seconds[name].append((time.process_time() - begun) / counts[name])
    finally:
        gc.enable()
    return seconds


def measured(name: str, op: Any, rounds: int) -> Row:
    """Compare an operator's batch with the loop, then time it."""
    function, tensors = batched(op)
    try:
        with Draws():
            function(*[t[0] for t in tensors])
        want = looped(function, tensors)
    except LeftOutError:
        raise
    except Exception as error:
        raise LeftOutError(f"the loop raises {type(error).__name__}") from None
    shardmap.clear_caches()
    mapped = shardmap.vmap(function)
    replayed = shardmap.vmap(function, trace="once")
    try:
        got = mapped(*tensors)
    except shardmap.errors.ShardmapError as error:
        raise LeftOutError(f"refused: {type(error).__name__}") from None
    tiers = [tier for low in cache.lowerings() for tier in low.batched.tiers.values()]
    tier = next((t for t in ("loop", "functorch") if t in tiers), "rule")
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)
    calls: dict[str, Callable[[], object]] = {
        "shardmap": functools.partial(mapped, *tensors),
        "replayed": functools.partial(replayed, *tensors),
        "the loop": functools.partial(looped, function, tensors),
    }
    peer = "batched"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            torch.func.vmap(function)(*tensors)
        except Exception:  # of any kind: torch.func does not map it
            peer = "refused"
        if any("performance drop" in str(w.message) for w in said):
            peer = "loop"
    if peer != "refused":
        calls["torch.func"] = functools.partial(torch.func.vmap(function), *tensors)
    for call in calls.values():
        call()
        call()
    seconds = cpu_seconds(calls, rounds)
    ms = {peer: statistics.median(values) * 1e3 for peer, values in seconds.items()}
    return Row(
        name,
        sum(t[0].numel() for t in tensors),
        tier,
        peer,
        ms,
        common.ratio(seconds, "replayed", "torch.func").median if peer != "refused" else None,
        common.ratio(seconds, "replayed", "the loop").median,
    )


def summary(rows: Sequence[Row], left_out: Mapping[str, str], wrong: Mapping[str, str]) -> str:
    """Write the lines below the table, each with its target."""
    both = [(r, r.of_peer) for r in rows if r.of_peer is not None and r.peer == "batched"]
    slow = [
        r.name for r, ratio in both if ratio > MOST_SINGLE and r.ms["torch.func"] >= LONG_CALL_MS
    ]
    theirs = [(r.name, 1 / r.of_peer) for r in rows if r.of_peer and r.peer == "loop"]
    ours = [r for r in rows if r.tier == "loop"]
    lines = [f"{len(rows)} operators, {len(left_out)} left out, {len(wrong)} wrong."]
    if both:
        middle = statistics.median([ratio for _, ratio in both])
        lines.append(
            f"Of torch.func.vmap's time where it batches ({len(both)}), median: {middle:.2f} "
            f"(at most {MOST_MEDIAN}: {common.verdict(middle, MOST_MEDIAN)})."
        )
        lines.append(
            f"Above {MOST_SINGLE} of it where that takes {LONG_CALL_MS} ms: "
            f"{', '.join(slow) or 'none'} ({common.verdict(len(slow), 0)})."
        )
    if theirs:
        middle = statistics.median([speed for _, speed in theirs])
        behind = [f"{name} {speed:.1f}" for name, speed in theirs if speed < LEAST_OVER_A_LOOP]
        lines.append(
            f"Times torch.func.vmap's speed where it loops ({len(theirs)}), median: {middle:.1f} "
            f"(at least {LEAST_OVER_A_LOOP}: {common.verdict(-middle, -LEAST_OVER_A_LOOP)}); "
            f"below: {', '.join(behind) or 'none'}."
        )
    if ours:
        most = max(ours, key=lambda r: r.of_loop)
        lines.append(
            f"Of the loop's time where ours runs sample by sample ({len(ours)}), most: "
            f"{most.of_loop:.2f} ({most.name}; at most {MOST_OF_THE_LOOP}: "
            f"{common.verdict(most.of_loop, MOST_OF_THE_LOOP)})."
        )
    lines += [f"FAIL: {name} is wrong: {why}" for name, why in wrong.items()]
    reasons = collections.Counter(left_out.values())
    lines += [f"Left out: {why}: {count}" for why, count in sorted(reasons.items())]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Write a line for each operator."""
    header = ["operator", "elements", "tier", "shardmap ms", "replayed", "torch.func", "the loop",
              "of torch.func", "of the loop"]  # fmt: skip
    lines = []
    for r in sorted(rows, key=lambda r: r.name):
        func = f"{r.ms['torch.func']:.2f}" if r.of_peer else ""
        func += " (loop)" if r.peer == "loop" else ""
        lines.append(
            [r.name, str(r.elements), r.tier, f"{r.ms['shardmap']:.2f}", f"{r.ms['replayed']:.2f}",
             func or "refused", f"{r.ms['the loop']:.2f}",
             f"{r.of_peer:.2f}" if r.of_peer else "", f"{r.of_loop:.3f}"]
        )  # fmt: skip
    return common.markdown(header, lines)


def chosen(names: Sequence[str], only: str, part: str) -> list[str]:
    """Return the operators to time: all, those named, or every N-th from the K-th on."""
    if only:
        return only.split(",")
    k, n = map(int, part.split("/"))
    return list(names)[k - 1 :: n]


def main(arguments: list[str] | None = None) -> int:
    """Time the operators and write the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.rules")
    parser.add_argument("--only", default="", help="operators, with commas between")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th operator from the K-th on")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the table and its numbers")
    options = parser.parse_args(arguments)
    common.use_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    known = operators()
    unknown = set(options.only.split(",")) - set(known) if options.only else set()
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: not in the database, or left out of it")
    description = common.machine()
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in chosen(list(known), options.only, options.part):
        try:
            rows.append(measured(name, known[name], options.rounds))
        except LeftOutError as why:
            left_out[name] = str(why)
        except AssertionError as why:
            wrong[name] = str(why).strip().splitlines()[0]
        print(f"\r{len(rows) + len(left_out)} {name:40s}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    text = (
        f"{table(rows)}\n\n{summary(rows, left_out, wrong)}\n{common.machine_line(description)}\n"
    )
    results = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "left_out": left_out,
        "wrong": wrong,
    }
    return common.write_report(text, options.output, description, results)


if __name__ == "__main__":
    raise SystemExit(main())
