"""Models that users have, with default options, against torch.func: `python -m benchmarks.users`.

Per-sample gradients of 32 samples of GPT-2, BERT, a small transformer, a CNN, ResNet-18, an LSTM, a
ViT, an equivariant network and a neural ODE; the gradients of an ensemble, batch Jacobians, a
Hessian, the Jacobian of a flow map, and a map that does next to nothing. torch.func runs at its
best: every chunk size (and mode) that a user would try is tried first, the fastest are timed, and
the best of them is the peer. All peers of a row run in turn; a ratio is the median of those taken
within a round. Before anything is timed, each peer's numbers are compared with those of the plain
loop, sample by sample. A first call records and plans; calls two to four are thrown away too.

`--compile` adds torch.compile of torch.func's map, and ours compiled where the library has the
option. `--with '{"trace": "once"}'` adds a column of ours with these options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import shardmap
from benchmarks.common import (
    Quartiles,
    Timer,
    machine,
    machine_line,
    markdown,
    milliseconds,
    ratio,
    use_threads,
    verdict,
    write_report,
)
from benchmarks.user_cases import SAMPLES, Call, Case, cases

RESULTS = Path(__file__).parent / "results"
FINALISTS = 3
"""Ways of torch.func that are timed beside us, the fastest of the search."""
MEAN_TARGET = 0.75
"""The geometric mean of the rows' ratios of ours to torch.func at its best."""
TOLERANCE, KINKED, MOST_KINKED = 1e-4, 0.15, 0.05
"""The largest difference over the norm of a sample's result; a part of the samples may be further
off where rounding moves an activation across the kink of a relu or a pool, and how far."""
OURS = "shardmap"

Way = tuple[float, str, int | None]
"""Seconds, mode and chunk size of a way of torch.func."""


def errors(found: Any, expected: list[Any]) -> list[float]:
    """Return for each sample the difference over the result's norm, infinite for other shapes."""
    held = dict(found) if isinstance(found, Mapping) else found
    leaves = [
        leaf if isinstance(leaf, Tensor) else torch.from_numpy(numpy.array(leaf))
        for leaf in pytree.tree_leaves(held)
    ]
    wanted = [
        pytree.tree_leaves(
            {name: row[name] for name in found} if isinstance(found, Mapping) else row
        )
        for row in expected
    ]
    result = []
    for index, row in enumerate(wanted):
        pairs = [
            (leaf[index].detach().cpu(), w.detach().cpu())
            for leaf, w in zip(leaves, row, strict=True)
        ]
        if any(a.shape != b.shape for a, b in pairs):
            return [math.inf]
        norm = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
        apart = math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in pairs))
        result.append(
            apart / norm if math.isfinite(apart) and norm > 0 else math.inf if apart else 0.0
        )
    return result if all(len(leaf) == len(expected) for leaf in leaves) else [math.inf]


def check(case: str, peer: str, found: list[float]) -> None:
    """Refuse to time wrong numbers.

    Raises:
        SystemExit: A sample differs from the loop's.
    """
    far = [e for e in found if e > TOLERANCE]
    if max(found) > MOST_KINKED or len(far) > KINKED * len(found) + 1:
        raise SystemExit(
            f"{case}: {peer} differs from the loop in {len(far)} of {len(found)} samples, by up to "
            f"{max(found):.2g} of the result's norm"
        )


def seconds_of(call: Call) -> float:
    """Time a call once."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def search(case: Case, settle: Callable[[Call], Call]) -> list[Way] | str:
    """Time the ways of torch.func, the fastest first; what it refuses with, if it refuses all.

    Ways that are four times slower than the best are tried once, and a mode that is twenty times
    slower with one chunk size is not tried with others.
    """
    found: list[Way] = []
    refusal = ""
    for mode, make in case.func.items():
        for chunk in case.chunks:
            mapped = make(chunk)
            call = settle(lambda mapped=mapped: mapped(*case.arguments))
            try:
                seconds = seconds_of(call)
            except torch.OutOfMemoryError as error:  # a smaller chunk may do
                refusal = f"torch.func.{mode}: {str(error).splitlines()[0]}"
                continue
            except RuntimeError as error:  # the table says what torch.func refuses
                refusal = f"torch.func.{mode}: {str(error).splitlines()[0]}"
                break
            if not found or seconds < 4 * min(found)[0]:
                seconds = min(seconds, *[seconds_of(call) for _ in range(2)])
            found.append((seconds, mode, chunk))
            if seconds > 20 * min(found)[0]:
                break
    return sorted(found, key=lambda way: way[0]) or refusal


def settled(device: str) -> Callable[[Call], Call]:
    """Return what makes a call wait until the device is idle."""
    if not device.startswith("cuda"):
        return lambda call: call

    def waiting(call: Call) -> Call:
        def run() -> object:
            found = call()
            torch.cuda.synchronize()
            return found

        return run

    return waiting


def peers(
    case: Case, ways: list[Way], options: argparse.Namespace
) -> tuple[dict[str, Call], dict[str, str]]:
    """Make the calls that are timed, and say of others why they are missing."""
    calls: dict[str, Call] = {OURS: case.ours({})}
    missing: dict[str, str] = {}
    for given in options.others:
        calls[f"{OURS} {given}"] = case.ours(json.loads(given))
    for _, mode, chunk in ways[:FINALISTS]:
        mapped = case.func[mode](chunk)
        calls[f"torch.func {mode}, {chunk or 'whole'}"] = lambda m=mapped: m(*case.arguments)
    if options.compile and ways:
        _, mode, chunk = ways[0]
        for size in dict.fromkeys((None, chunk)):
            compiled = torch.compile(case.func[mode](size))
            calls[f"torch.compile {size or 'whole'}"] = lambda m=compiled: m(*case.arguments)
        if "compile" in inspect.signature(shardmap.vmap).parameters:
            calls[f"{OURS} compile=True"] = case.ours({"compile": True})
    for peer in ("opacus", "jax"):
        make = getattr(case, peer)
        if isinstance(make, str):
            missing[peer] = make
        elif peer not in options.peers:
            missing[peer] = "left out by --peers"
        else:
            try:
                calls[peer] = make()
            except ImportError as error:
                missing[peer] = f"not installed ({error})"
    return calls, missing


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Check and time one case."""
    settle = settled(options.device)
    expected = case.loop()
    ways = search(case, settle)
    refusal = ways if isinstance(ways, str) else ""
    calls, missing = peers(case, [] if isinstance(ways, str) else ways, options)
    apart = {}
    for peer, call in list(calls.items()):
        try:
            found = call()
        except Exception as error:
            if peer.startswith(OURS):
                raise
            # a peer that does not serve this model has no row; what it says stands in the table
            missing[peer] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            del calls[peer]
            continue
        rows = errors(found, expected)
        check(name, peer, rows)
        apart[peer] = max(rows)
        del found
    del expected
    timer = Timer(options.rounds, warmup=options.warmup)
    seconds = timer.run({peer: settle(call) for peer, call in calls.items()})
    for peer in ("torch.func", "torch.compile"):
        tried = [key for key in seconds if key.startswith(f"{peer} ")]
        if tried:
            best = min(tried, key=lambda key: statistics.median(seconds[key]))
            apart[peer], missing_name = apart[best], best.removeprefix(f"{peer} ")
            seconds = {peer: seconds[best]} | {k: s for k, s in seconds.items() if k not in tried}
            missing[f"{peer} at its best"] = missing_name
    base = "torch.func" if "torch.func" in seconds else OURS
    return {
        "refusal": refusal,
        "ways": ways,
        "missing": missing,
        "errors": apart,
        "target": case.target,
        "milliseconds": {peer: asdict(milliseconds(s)) for peer, s in seconds.items()},
        "ratio": {peer: asdict(ratio(seconds, peer, base)) for peer in seconds},
    }


def mean(results: Mapping[str, Any], peer: str) -> float | None:
    """The geometric mean of a peer's ratios to torch.func, over the rows that have one."""
    found = [
        math.log(r["ratio"][peer]["median"])
        for r in results.values()
        if peer in r["ratio"] and "torch.func" in r["ratio"]
    ]
    return math.exp(sum(found) / len(found)) if found else None


def report(results: Mapping[str, Any]) -> str:
    """Write the table, the means and what is missing."""
    names = list(dict.fromkeys(peer for r in results.values() for peer in r["ratio"]))
    shown = [OURS, *[n for n in names if n not in (OURS, "torch.func")]]
    rows, said = [], []
    for name, r in results.items():
        base = "torch.func" in r["ratio"]
        time_of = r["milliseconds"]["torch.func" if base else OURS]["median"]
        row = [name, r["missing"].get("torch.func at its best", "refuses"), f"{time_of:.2f} ms"]
        for peer in shown:
            row.append(Quartiles(**r["ratio"][peer]).text() if peer in r["ratio"] else "")
        row.append(verdict(r["ratio"][OURS]["median"], r["target"]) if base else "")
        rows.append(row)
        if r["refusal"]:
            said.append(f"- {name}: torch.func refuses, so ratios are over ours: {r['refusal']}")
        said += [
            f"- {name}, {peer}: {why}"
            for peer, why in r["missing"].items()
            if not peer.endswith("at its best")
        ]
    means = {peer: mean(results, peer) for peer in shown}
    last = ["geometric mean", "", "", *["" if m is None else f"{m:.2f}" for m in means.values()]]
    ours = means[OURS]
    last.append("" if ours is None else verdict(ours, MEAN_TARGET))
    header = [
        "",
        "torch.func at its best",
        "its time",
        *shown,
        "at most 1.0 (0.9 derivatives, 0.75 mean)",
    ]
    return "\n\n".join(
        [
            "Times over torch.func's in the same round, median (quartiles).",
            markdown(header, [*rows, last]),
            "Missing:\n" + "\n".join(said or ["- nothing"]),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the requested rows and write the table; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.users",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="parts of the rows' names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="add the compiled maps")
    parser.add_argument(
        "--with", dest="others", action="append", default=[], metavar="JSON",
        help="add a column of ours with these options",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="*", default=["opacus", "jax"], help="besides torch.func")
    parser.add_argument("--smoke", action="store_true", help="three samples, two rounds")
    parser.add_argument(
        "--output", type=Path, default=None, help="without ending: .md and .json are written"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rounds, options.warmup = 2, 0
    warnings.filterwarnings("ignore", message=".*(non-full backward hook|backward hook is firing)")
    warnings.filterwarnings("ignore", message="There is a performance drop")  # torch.func's own
    use_threads(options.threads)
    description = machine(("torch", "numpy", "transformers", "opacus", "jax"))
    results: dict[str, Any] = {}
    for name, make in cases(options.device, 3 if options.smoke else SAMPLES).items():
        if not options.only or any(part.lower() in name.lower() for part in options.only):
            start = time.perf_counter()
            results[name] = measure(name, make(), options)
            sys.stderr.write(f"{name}: {time.perf_counter() - start:.0f} s\n")
    text = f"{machine_line(description)}\n\n{report(results)}\n"
    return write_report(text, options.output, description, results)


if __name__ == "__main__":
    sys.exit(main())
