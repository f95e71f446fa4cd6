"""What all tests share: one thread, and no mode left behind by another test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Test processes run side by side: with more than one thread each they would be slower."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _modes_are_left_alone() -> Iterator[None]:
    """A test that changes a global mode fails itself, not the next one."""
    torch.manual_seed(0)
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    assert before == after
