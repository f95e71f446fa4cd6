"""Fixtures for tests of stores."""

from __future__ import annotations

import pytest

from tests.store.kinds import SINKS


@pytest.fixture(params=list(SINKS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of store, by its name in `SINKS`."""
    return request.param
