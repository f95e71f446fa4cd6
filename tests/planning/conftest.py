"""Each test of the planner begins with nothing learned."""

from __future__ import annotations

import pytest

from shardmap.lower import cache as engine


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    """Clear the measurements of programs, so that tests do not depend on each other."""
    engine.clear()
