"""Fixtures for tests of transforms."""

from tests.call.conftest import paths_pay_early

__all__ = ["paths_pay_early"]
