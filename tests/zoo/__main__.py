"""Run the models: `python -m tests.zoo [--only NAME ...] [--output PATH]`.

Each model runs in a process of its own with a time limit. One line per model; the exit code is 1 if
one is not equal to the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.zoo import Entry, entries

MARK = "verdict "
"""What the line with a process's verdict begins with."""


def alone(name: str) -> None:
    """Judge one model in this process."""
    import logging
    import warnings

    import torch

    from tests.zoo.judge import judge

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    verdict = judge(entries()[name])
    print(MARK + json.dumps(verdict.as_dict()), flush=True)


def run(entry: Entry, timeout_s: float) -> dict[str, object]:
    """Judge one model in a process of its own."""
    command = [sys.executable, "-m", "tests.zoo", "--alone", entry.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.perf_counter()
    failed: dict[str, object] = {"name": entry.name, "kind": "crash", "seconds": timeout_s}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return failed | {"kind": "timed out", "detail": f"longer than {timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return failed | {"seconds": time.perf_counter() - started, "detail": last[0]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models, or families")
    parser.add_argument("--output", type=Path, help="also write the verdicts, as JSON")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone)
        return 0
    from tests.zoo.judge import Verdict

    every = entries()
    families = {name: entry.build.__module__.rpartition(".")[2] for name, entry in every.items()}
    wanted = given.only or list(every)
    unknown = [name for name in wanted if name not in every and name not in families.values()]
    if unknown:
        parser.error(f"no such model or family: {', '.join(unknown)}")
    chosen = [name for name in every if name in wanted or families[name] in wanted]
    verdicts = []
    for name in chosen:
        verdicts.append(Verdict(**run(every[name], given.timeout)))  # pyright: ignore
        print(verdicts[-1], flush=True)
    if given.output:
        given.output.write_text(json.dumps([v.as_dict() for v in verdicts], indent=1) + "\n")
    kinds = [verdict.kind for verdict in verdicts]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"{len(verdicts)} models: {counts}")
    return 0 if all(verdict.right for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
