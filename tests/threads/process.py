"""A program of these tests in a process of its own, with a time limit: what hangs says where."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: object, seconds: float) -> str:
    """The output of `python -m tests.threads.<module>`; fails with all stacks if it hangs."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.threads.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SHARDMAP_TEST_SECONDS": str(seconds)},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-20000:]}"
    return done.stdout


def limit() -> None:
    """End this process with the stacks of all threads when its time is over."""
    seconds = float(os.environ.get("SHARDMAP_TEST_SECONDS", "600"))
    faulthandler.dump_traceback_later(seconds, exit=True)
