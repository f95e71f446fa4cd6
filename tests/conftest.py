"""Fixtures for all tests: one thread, and no mode left active by another test."""

from __future__ import annotations

import collections
import datetime
import os
import signal
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

from tests import browser


def pytest_configure() -> None:
    """Test processes run side by side: with more than one thread each they would be slower."""
    torch.set_num_threads(1)
    # A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


DAYS = 5
"""Days in which each rotating test runs once."""
MANY = 12
"""Sets of parameters from which on a test is one that rotates."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs all rotating tests."""
    parser.addoption("--all-days", action="store_true", help="run every rotating test, not a fifth")


def left_to_other_days(items: list[pytest.Item]) -> list[pytest.Item]:
    """The rotating tests that do not run today: four fifths of the parameters of each.

    A test rotates if it has many sets of parameters, or is marked; marked ones without parameters
    rotate among those of their file.
    """
    today = datetime.datetime.now(datetime.UTC).timetuple().tm_yday
    by_test: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        by_test[item.nodeid.partition("[")[0]].append(item)
    rotating: dict[object, list[pytest.Item]] = collections.defaultdict(list)
    for name, own in by_test.items():
        if len(own) >= MANY:
            rotating[name] = own
        else:
            rotating[own[0].path] += [item for item in own if item.get_closest_marker("rotating")]
    # A checksum mixes the parameters: in their own order one day might get one value only.
    return [
        item
        for own in rotating.values()
        for place, item in enumerate(sorted(own, key=lambda item: crc32(item.nodeid.encode())))
        if place % DAYS != today % DAYS
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rotating tests of other days, and browser tests where there is no browser.

    In CI, and if they are asked for, browser tests fail without one and say what to do. Where files
    or tests are named, all of theirs run on any day.
    """
    named = any(".py" in argument for argument in config.args)
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
