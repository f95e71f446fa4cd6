"""The house: one package for each stage, imports go one way, private names stay inside.

Everything is read from the sources' syntax trees; imports for the type checker count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shardmap"

RANKS = (
    {"errors", "_torch", "_threads", "_extras"},
    {"program"},
    {"store"},
    {"trace", "rules"},
    {"factors"},
    {"lower"},
    {"reduce", "planning"},
    {"run"},
    {"call"},
    {"api"},
    {"transforms"},
    {"__init__"},
    {"jobs"},
)
"""From the ground up. A file imports from lower ranks and from its own package; `__init__` is the
whole package's own, the names that users import, on which jobs are built. Packages of one rank
import each other one way at most."""

MOST_MODULES, MOST_LINES = 8, 450

MOST_ANY = {
    "_threads": 2,
    "_torch": 9,
    "api": 27,
    "call": 111,
    "factors": 28,
    "jobs": 112,
    "lower": 58,
    "planning": 16,
    "program": 24,
    "reduce": 53,
    "rules": 445,
    "run": 74,
    "store": 47,
    "trace": 137,
    "transforms": 132,
}
"""Most uses of `Any` in each package; these ceilings may only fall."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def room(module: str) -> str:
    """The package or top module that a module belongs to: `rules` for `shardmap.rules.view`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rank(module: str) -> int:
    """Rank of a module in the order of imports."""
    return next(i for i, names in enumerate(RANKS) if room(module) in names)


def imported(name: str, tree: ast.Module) -> Iterator[tuple[str, str | None, bool]]:
    """The imports of shardmap's own modules.

    Yields:
        The module, the name taken from it or None, and whether it is imported when the file is.
    """
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                if MODULES[name].name != "__init__.py":
                    parts = parts[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in MODULES:
                    yield whole, None, id(node) not in late
                elif base in MODULES:
                    yield base, alias.name, id(node) not in late


def is_for_types(node: ast.AST) -> bool:
    """True if a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    yield from found


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert list(circles(edges)) == [["b", "c"]]


def test_every_module_has_a_rank() -> None:
    unknown = {room(name) for name in MODULES} - set().union(*RANKS)
    assert unknown == set()


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count, for a circle of meaning is one whenever it is walked."""
    edges = {
        name: {module for module, _, _ in imported(name, tree)} - {name}
        for name, tree in TREES.items()
    }
    assert not ({" <-> ".join(circle) for circle in circles(edges)})


def test_imports_go_down() -> None:
    found = {
        f"{name} -> {module}"
        for name, tree in TREES.items()
        for module, _, _ in imported(name, tree)
        if rank(module) > rank(name)
    }
    assert not (found)


def test_packages_of_one_rank_do_not_import_each_other_both_ways() -> None:
    pairs = {
        (room(name), room(module))
        for name, tree in TREES.items()
        for module, _, _ in imported(name, tree)
        if rank(module) == rank(name) and room(module) != room(name)
    }
    assert not ({f"{a} <-> {b}" for a, b in pairs if a < b and (b, a) in pairs})


def is_private(name: str) -> bool:
    """True if a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """The names that a file defines: functions, classes, variables, attributes, fields, slots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_nothing_private_is_imported_or_reached_from_another_package() -> None:
    own: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        own.setdefault(room(name), set()).update(defined(tree))
    everywhere = set().union(*own.values())
    found = set()
    for name, tree in TREES.items():
        for module, taken, _ in imported(name, tree):
            last = module.rpartition(".")[2]
            for private in filter(is_private, [last, taken or ""]):
                if room(module) != room(name) and private not in ("_torch", "_threads", "_extras"):
                    found.add(f"{name}: {module} {taken or ''}".strip())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                elsewhere = node.attr in everywhere and node.attr not in own[room(name)]
                if elsewhere and not ast.unparse(node).startswith(("aten.", "torch.")):
                    found.add(f"{name}: {ast.unparse(node)}")
    assert not (found)


def test_the_top_level_has_few_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not ({name for name, lines in lengths.items() if lines > MOST_LINES})


def count_any(tree: ast.AST) -> int:
    """Number of uses of `Any` in a file's annotations and type arguments."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def test_any_is_counted() -> None:
    assert count_any(ast.parse("def f(x: Any, y: dict[str, Any]) -> int: ...")) == 2


def test_any_is_not_said_more_often_than_before() -> None:
    found: dict[str, int] = {}
    for name, tree in TREES.items():
        found[room(name)] = found.get(room(name), 0) + count_any(tree)
    over = {package: count for package, count in found.items() if count > MOST_ANY.get(package, 0)}
    assert over == {}, "more than before: say what type it is"
