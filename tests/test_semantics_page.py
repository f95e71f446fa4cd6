"""The page on what a function may do: its blocks run, and what it names as backing is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "semantics.md").read_text()
BACKING = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def parsed(file: str) -> tuple[set[str], set[str]]:
    """The functions of a file that tests run: those decorated, and those that are read by name."""
    tree = ast.parse((ROOT / file).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = {function.name for function in functions}
    return names, (names & read) | {one.name for one in functions if one.decorator_list}


def test_the_blocks_run_in_order() -> None:
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/semantics.md", "exec"), scope)


@pytest.mark.parametrize(("file", "name"), BACKING)
def test_what_backs_a_line_is_there(file: str, name: str) -> None:
    names, used = parsed(file)
    assert name in (names if name.startswith("test_") else used)
    assert name.startswith("test_") or file.startswith("tests/cases") or "test_" in Path(file).name


def test_every_line_of_every_table_is_backed() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not re.match(r"\| (the function|what is done) \|", line)]
    assert len(lines) - len(rows) == PAGE.count("|---|---|---|---|\n")
    assert len(rows) > 80
    bare = [row for row in rows if not re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", row)]
    assert bare == []


def test_the_links_lead_to_pages() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert targets
    assert [t for t in targets if not (ROOT / "docs" / t).exists()] == []
