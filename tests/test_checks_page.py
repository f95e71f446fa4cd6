"""The page on checks: its blocks run, in order, and hold what they assert."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "checks.md").read_text()


def test_the_blocks_run_in_order() -> None:
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/checks.md", "exec"), scope)
