"""What tests of recordings share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

ALLOWING = "__allow_nonbracketed_mutation"


@pytest.fixture
def settable_backends() -> Iterator[None]:
    """Let flags of `torch.backends` be set: torch's own tests, once imported, forbid it."""
    with getattr(torch.backends, ALLOWING)():
        yield
