"""The guide to rules, docs/rules.md: its blocks run, in order, as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardmap.rules import registry

GUIDE = Path(__file__).parents[2] / "docs" / "rules.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _rules_are_put_back() -> Iterator[None]:
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


def test_the_blocks_run() -> None:
    """One after another in one module, as a reader would paste them."""
    text = GUIDE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 6, "the guide has lost its blocks"
    module: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        source = "\n" * line + block.group(1)
        exec(compile(source, str(GUIDE), "exec"), module)


def test_the_rule_of_the_title_has_ten_lines_at_most() -> None:
    """With its decorator, as the title says."""
    text = GUIDE.read_text()
    rule = re.search(r"@shardmap.batching_rule.*?\n    return [^\n]*", text, re.DOTALL)
    assert rule is not None
    assert rule.group().count("\n") + 1 <= 10
