"""A pytest plugin that counts calls of `torch.func.vmap`, and may put `shardmap.vmap` in its place.

`PEERS_VMAP` says whose `vmap` runs ("torch" or "shardmap"), `PEERS_REPORT` where the outcomes are
written as json while the tests run, `PEERS_LIMIT` the seconds that a test may take, and
`PEERS_ONLY` an earlier report: tests that called no map then are left out.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.func

import shardmap

OF_TORCH = torch.func.vmap
INSIDE = ("torch", "shardmap")
"""Packages whose own calls go to torch's `vmap` in either mode."""


class Calls:
    """Counts the calls of a mapped function since the last test."""

    def __init__(self) -> None:
        self.count = 0

    def taken(self) -> int:
        """The count, which then starts anew."""
        count, self.count = self.count, 0
        return count


CALLS = Calls()
OUTCOMES: dict[str, dict[str, Any]] = {}
WRITTEN = [0.0]
"""When the report was last written: not after every test, as some peers have thousands."""


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """`torch.func.vmap`, or ours with the same arguments, counted."""
    caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
    if caller in INSIDE:
        return OF_TORCH(func, in_dims, out_dims, randomness, chunk_size=chunk_size)
    if os.environ.get("PEERS_VMAP") == "shardmap":
        mapped = shardmap.vmap(
            func,
            in_dims,
            out_dims,
            randomness,
            chunk_size="auto" if chunk_size is None else chunk_size,
        )
    else:
        mapped = OF_TORCH(func, in_dims, out_dims, randomness, chunk_size=chunk_size)

    @functools.wraps(func, updated=())
    def counted(*args: object, **kwargs: object) -> Any:
        CALLS.count += 1
        return mapped(*args, **kwargs)

    return counted


def put_in_place() -> None:
    """Replace torch's `vmap` for all later imports of it."""
    torch.func.vmap = torch.vmap = vmap
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import functorch
    functorch.vmap = vmap


def too_long(*_: object) -> None:
    """Fail the test that runs."""
    raise TimeoutError(f"the test took more than {os.environ['PEERS_LIMIT']} seconds")


put_in_place()
signal.signal(signal.SIGALRM, too_long)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that called no map in the earlier report."""
    path = os.environ.get("PEERS_ONLY")
    if path:
        with open(path) as file:
            earlier = json.load(file)
        items[:] = [item for item in items if earlier.get(item.nodeid, {}).get("calls")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Bound the time of the test."""
    signal.setitimer(signal.ITIMER_REAL, float(os.environ.get("PEERS_LIMIT", "0")))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, Any, None]:
    """Note how each test ended, and how often it called a map."""
    report = (yield).get_result()
    found = OUTCOMES.setdefault(item.nodeid, {"outcome": "passed", "calls": 0, "error": ""})
    found["calls"] += CALLS.taken()
    if report.outcome != "passed" and found["outcome"] == "passed":
        found["outcome"] = report.outcome
        if call.excinfo is not None:
            found["error"] = f"{call.excinfo.typename}: {call.excinfo.value}"
    if report.when == "teardown" and time.monotonic() > WRITTEN[-1] + 2:
        write()


def pytest_sessionfinish() -> None:
    """Write the report even if no test ran."""
    write()


def write() -> None:
    """Write the outcomes so far, so that a run which is cut off leaves them."""
    path = os.environ.get("PEERS_REPORT")
    if path:
        with open(path, "w") as file:
            json.dump(OUTCOMES, file)
    WRITTEN[:] = [time.monotonic()]
