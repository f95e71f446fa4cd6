"""What all tests share: one thread, and no mode left behind by another test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests import browser


def pytest_configure() -> None:
    """Test processes run side by side: with more than one thread each they would be slower."""
    torch.set_num_threads(1)


SLOW_PARTS = 8


def run_part_of_the_slow(items: Sequence[pytest.Item], part: int) -> None:
    """Have every eighth slow test run as if it were not slow.

    CI sets SLOW_PART to the day's part, so that each slow test runs once in eight days.
    """
    slow = [item for item in items if any(mark.name == "slow" for mark in item.own_markers)]
    for item in sorted(slow, key=lambda item: item.nodeid)[part % SLOW_PARTS :: SLOW_PARTS]:
        item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "slow"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what opens a browser where there is none.

    Not in CI, and not when it is asked for: there it fails and says what to do. With SLOW_PART set,
    that part of the slow tests runs too.
    """
    if os.environ.get("SLOW_PART"):
        run_part_of_the_slow(items, int(os.environ["SLOW_PART"]))
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
