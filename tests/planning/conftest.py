"""Each test of the planner begins with nothing learned."""

from __future__ import annotations

import pytest

from shardmap.lower import cache as engine


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    """What one test teaches about a program is not for the next."""
    engine.clear()
