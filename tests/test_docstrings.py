"""The examples in public docstrings run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "shardmap.api",
        "shardmap.transforms.jacobians",
        "shardmap.transforms.products",
        "shardmap.rules.registry",
    ],
)
def test_examples(name: str) -> None:
    """Every example of the module, of which there is at least one."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
