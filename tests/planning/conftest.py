"""Each test of the planner begins with nothing learned."""

from __future__ import annotations

import pytest

from shardmap.lower import cache as engine


@pytest.fixture(autouse=True)
def _nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test teaches about a program is not for the next."""
    for name in ("_cache", "_notes", "_by_identity"):
        monkeypatch.setattr(engine, name, type(getattr(engine, name))())
