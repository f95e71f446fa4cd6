"""Time of the refusal of a map that cannot fit: `python -m benchmarks.refusal`.

One sample's result is 860 MiB (`--mebibytes`), the budget 100 MiB (`--budget`). Planning must find
out from the one sample that is recorded: the seconds from its end to `OverBudget`, and the most
memory that the process ever had (VmHWM) over what running the function on one sample takes by
itself. Each of the two runs in a process of its own.

`--budget default` gives none: then what is free is the budget, here set to 1 MiB a sample.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import shardmap
from shardmap.planning import device as devices

MIB = 1 << 20


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say what a process had in use at most")


def _measured(mebibytes: int, budget: str, samples: int, mapped: bool) -> dict[str, object]:
    """One process: the function on one sample, or the map that is refused."""
    size = int((mebibytes * MIB / 4) ** 0.5)
    batch = torch.randn(samples, size)
    shardmap.vmap(torch.sin, memory_budget="1GiB")(torch.randn(3, 5))  # imports what is lazy
    ended = 0.0

    def function(row: torch.Tensor) -> torch.Tensor:
        nonlocal ended
        out = row[:, None] * row[None, :]
        ended = time.perf_counter()
        return out

    if not mapped:
        function(batch[0])
        return {"peak": _peak_bytes()}
    options = {} if budget == "default" else {"memory_budget": budget}
    if budget == "default":
        devices.free_bytes = lambda device: samples * MIB
    error = "none"
    try:
        shardmap.vmap(function, **options)(batch)
    except shardmap.errors.OverBudget as refused:
        error = f"OverBudget: {refused}"
    return {"peak": _peak_bytes(), "seconds": time.perf_counter() - ended, "error": error}


def main() -> None:
    """Measure both, and say the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=860, help="of one sample's result")
    parser.add_argument("--budget", default="100MiB", help="memory_budget, or 'default'")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--part", choices=["sample", "map"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        mapped = given.part == "map"
        print(json.dumps(_measured(given.mebibytes, given.budget, given.samples, mapped)))
        return
    alone, refused = (
        json.loads(
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--part", part],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for part in ("sample", "map")
    )
    found = {
        "seconds_after_the_sample": refused["seconds"],
        "bytes_over_one_sample": refused["peak"] - alone["peak"],
        "error": refused["error"],
    }
    if given.json:
        print(json.dumps(found))
        return
    print(f"refused {found['seconds_after_the_sample']:.2f} s after the sample had run")
    print(f"{found['bytes_over_one_sample'] / MIB:.0f} MiB over what one sample takes")
    print(found["error"])


if __name__ == "__main__":
    main()
