"""Fixtures for tests of calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

import shardmap
from shardmap.call import routes, spread


@pytest.fixture
def paths_pay_early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths are recorded for a few samples already: the batches here are small."""
    monkeypatch.setattr(routes, "WORTH", 4)
    monkeypatch.setattr(routes, "WORTH_KNOWN", 2)
    monkeypatch.setattr(spread, "SHARE", 0.0)
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield
