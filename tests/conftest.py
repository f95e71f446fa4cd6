"""Fixtures for all tests: one thread, and no mode left active by another test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests import browser


def pytest_configure() -> None:
    """Test processes run side by side: with more than one thread each they would be slower."""
    torch.set_num_threads(1)
    # A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what opens a browser where there is none.

    Not in CI, and not on request: there it fails with instructions.
    """
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
