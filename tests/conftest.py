"""Fixtures for all tests: one thread, and no mode left active by another test."""

from __future__ import annotations

import collections
import datetime
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import browser


def pytest_configure() -> None:
    """Test processes run side by side: with more than one thread each they would be slower."""
    torch.set_num_threads(1)
    # A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


DAYS = 3
"""Days in which each rotating test runs once."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs all rotating tests."""
    parser.addoption("--all-days", action="store_true", help="run every rotating test, not a third")


def left_to_other_days(items: list[pytest.Item]) -> list[pytest.Item]:
    """The rotating tests that do not run today: two thirds of each file's."""
    today = datetime.datetime.now(datetime.UTC).timetuple().tm_yday
    by_file: dict[Path, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("rotating"):
            by_file[item.path].append(item)
    return [
        item
        for own in by_file.values()
        for place, item in enumerate(sorted(own, key=lambda item: item.nodeid))
        if place % DAYS != today % DAYS
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rotating tests of other days, and browser tests where there is no browser.

    In CI, and if they are asked for, browser tests fail without one and say what to do. Rotating
    tests that are named one by one run on any day.
    """
    named = any("::" in argument for argument in config.args)
    if not named and not config.getoption("--all-days"):
        out = left_to_other_days(items)
        dropped = set(out)
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=out)
    if browser.find() or os.environ.get("CI") == "true" or "browser" in config.option.markexpr:
        return
    out = [item for item in items if item.get_closest_marker("browser")]
    if out:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)


@pytest.fixture(autouse=True)
def _modes_are_left_alone() -> Iterator[None]:
    """A test that changes a global mode fails itself, not the next one."""
    torch.manual_seed(0)
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    assert before == after
