"""Timing by interleaved runs, paired ratios, the machine in words, tables."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# OpenMP's workers spin for some milliseconds after a parallel region, on the cores that the next
# peer is about to use.
SETTLE_SECONDS = 0.01


@dataclass(frozen=True)
class Quartiles:
    """A median and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Take the quartiles of at least two values."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def text(self, digits: int = 2) -> str:
        """Write `median (lower-upper)`."""
        return f"{self.median:.{digits}f} ({self.lower:.{digits}f}-{self.upper:.{digits}f})"


@dataclass(frozen=True)
class Timer:
    """Time several callables in turn, a, b, c, a, b, c, so that a slow spell of the machine falls on all of them.

    Attributes:
        rounds: Timed runs of each callable, at least two.
        warmup: Runs of each callable before those, discarded: first touch of memory, caches,
            compilation.
        settle_seconds: Pause before each run.
        primed: Whether each timed run comes right after an untimed one of the same callable, so
            that it meets memory as it left it itself. Where results are gigabytes, what the peer
            before left (4 KiB pages instead of huge ones, pages gone back to the host of a virtual
            machine) can cost ten times the work.
    """

    rounds: int = 15
    warmup: int = 3
    settle_seconds: float = SETTLE_SECONDS
    primed: bool = False

    def run(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each timed run, by name and in order.

        The i-th values belong to the same round.
        """
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round_index in range(self.warmup + self.rounds):
            gc.collect()  # between rounds rather than wherever it happens to strike
            for name, call in calls.items():
                if self.primed:
                    self._once(call)
                elapsed = self._once(call)
                if round_index >= self.warmup:
                    seconds[name].append(elapsed)
        return seconds

    def _once(self, call: Callable[[], object]) -> float:
        time.sleep(self.settle_seconds)
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()
        # freeing the result is not part of the time, and must be over before the next peer
        # allocates
        del result
        return elapsed


def ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> Quartiles:
    """Return the quartiles of the ratios `name / baseline`, each ratio taken within one round."""
    return Quartiles.of([a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)])


def milliseconds(seconds: Sequence[float]) -> Quartiles:
    """Return the quartiles of a list of seconds, in milliseconds."""
    return Quartiles.of([1e3 * value for value in seconds])


def verdict(value: float, target: float | None) -> str:
    """Return "pass" or "FAIL" for a value that should be at most `target`, nothing if there is no target."""
    if target is None:
        return ""
    return "pass" if value <= target else "FAIL"


def relative_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return per row the largest difference over the largest expected magnitude.

    Infinite for another shape, another dtype or a NaN.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.full((1,), torch.inf)
    scale = expected.reshape(len(expected), -1).abs().amax(1)
    difference = (found - expected).reshape(len(expected), -1).abs().amax(1)
    errors = torch.where(difference == 0, 0.0, difference / scale)
    return errors.nan_to_num(nan=torch.inf)


def use_threads(threads: int) -> None:
    """Restrict this process to `threads` threads.

    Torch's pool and, by CPU affinity, pools that are made later (JAX's).
    """
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def machine(packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Describe what the numbers were measured on.

    Args:
        packages: Distributions whose version matters; those that are not installed are left out.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_line(description: Mapping[str, Any]) -> str:
    """Write a description made by `machine` as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    return (
        f"{description['cpu']}, {description['cores']} cores, threads used: "
        f"{description['threads']}, "
        f"load before: {description['load']:.1f}; {description['system']}, "
        f"Python {description['python']}, {versions}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def write_json(path: Path, data: object) -> None:
    """Write results for machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_report(
    text: str, output: Path | None, description: Mapping[str, Any], results: object
) -> int:
    """Print a report, write it and its numbers beside `output`; 1 if a target is missed."""
    sys.stdout.write(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text, encoding="utf-8")
        write_json(output.with_suffix(".json"), {"machine": description, "results": results})
    return int("FAIL" in text)
