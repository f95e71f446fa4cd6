"""Time counter-based dropout against torch's own on the same batch.

    python -m benchmarks.dropout [--rounds N] [--threads N] [--output PATH]

Torch draws one mask for the whole batch; a map gives each sample numbers of its own, the same for
any chunk size and number of devices. The target is at most 1.5 times torch's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import shardmap
from benchmarks import common

TARGET = 1.5
SIZES = {"narrow": (4096, 256), "wide": (256, 16384), "image": (64, 3, 128, 128)}
"""Shapes of the batches, samples first."""


def calls(rows: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Torch's own dropout, the map's, and the map's without recording."""

    def drop(row: Tensor) -> Tensor:
        return F.dropout(row, 0.1)

    each = shardmap.vmap(drop, randomness="different")
    once = shardmap.vmap(drop, randomness="different", trace="once")
    return {
        "torch": lambda: F.dropout(rows, 0.1),
        "shardmap": lambda: each(rows),
        "shardmap, trace='once'": lambda: once(rows),
    }


def check(rows: Tensor) -> None:
    """Assert that each way keeps nine tenths of the elements, scaled, and drops the others."""
    for name, call in calls(rows).items():
        out = call()
        kept = out != 0
        assert abs(float(kept.float().mean()) - 0.9) < 0.01, name
        torch.testing.assert_close(out[kept], rows[kept] / 0.9)


def measure(timer: common.Timer) -> dict[str, dict[str, common.Quartiles]]:
    """Ratios to torch's time, by size and way."""
    found = {}
    for size, shape in SIZES.items():
        rows = torch.rand(shape) + 1
        check(rows)
        seconds = timer.run(calls(rows))
        found[size] = {
            name: common.ratio(seconds, name, "torch") for name in seconds if name != "torch"
        }
    return found


def table(found: dict[str, dict[str, common.Quartiles]]) -> str:
    """The ratios as a table in Markdown."""
    lines = ["| batch | way | time / torch's | target |", "|---|---|---|---|"]
    for size, ways in found.items():
        shape = "x".join(map(str, SIZES[size]))
        for name, ratio in ways.items():
            said = common.verdict(ratio.median, TARGET)
            lines.append(f"| {size}, {shape} | {name} | {ratio.text()} | {TARGET} {said} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a ratio is above the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    common.use_threads(options.threads)
    found = measure(common.Timer(rounds=options.rounds))
    text = table(found)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    medians = [ratio.median for ways in found.values() for ratio in ways.values()]
    return int(any(median > TARGET for median in medians))


if __name__ == "__main__":
    raise SystemExit(main())
