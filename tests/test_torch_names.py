"""Private names of torch are bound in shardmap/_torch.py, and this torch has all of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardmap import _torch
from shardmap.errors import TorchVersionError
from shardmap.rules import registry

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "shardmap").rglob("*.py") if path.name != "_torch.py")
NOT_TORCHS = {"_replace", "_asdict", "_fields", "_make", "_getframe", "_strip_protocol", "_mmap"}
"""Underscored names of python's named tuples and `sys`, and of fsspec and numpy."""
LOCKS = {"lock._is_owned", "lock._at_fork_reinit"}
"""Private methods of python's own locks that `_threads.py` uses, as `threading` does."""


def is_private(name: str) -> bool:
    """True if a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def defined(trees: list[ast.Module]) -> set[str]:
    """The names that shardmap defines: functions, classes, variables, attributes, fields.

    An attribute that a file sets on what it imported is not shardmap's own.
    """
    found = set()
    for tree in trees:
        foreign = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node).partition(".")[0] not in foreign:
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def private_torch_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """The private names of torch that a file imports or reaches as attributes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if any(is_private(part) for part in path.split(".")):
                    yield f"{node.lineno}: {path}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "torch" and any(map(is_private, parts)):
                    yield f"{node.lineno}: {alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(aten, "):
            if len(node.args) == 3:
                yield f"{node.lineno}: {ast.unparse(node)}, for which _torch.packet stands in"
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if path == "torch.ops.aten":
                yield f"{node.lineno}: {path}, for which _torch.aten stands in"
            elif path.startswith(("aten.", "registry.")) or node.attr in NOT_TORCHS:
                continue  # operators are looked up by _torch.aten
            elif is_private(node.attr) and (path.startswith("torch.") or node.attr not in own):
                yield f"{node.lineno}: {path}"


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils import _pytree as pytree",
        "from torch._ops import OpOverload",
        "import torch._dynamo.config",
        "depth = torch._C._len_torch_dispatch_stack()",
        "names = func._schema.arguments",
        "aten = torch.ops.aten",
        "found = getattr(aten, name, None)",
        "from torch.autograd import forward_ad; forward_ad._current_level = -1",
    ],
)
def test_the_search_finds_a_private_name(line: str) -> None:
    tree = ast.parse(line)
    assert list(private_torch_names(tree, defined([tree])))


@pytest.mark.parametrize(
    "line",
    [
        "from shardmap._torch import pytree",
        "out = aten._softmax_backward_data.default",
        "eq = eq._replace(outs=())",
        "self._own = 1; print(self._own, __name__, torch.__version__)",
    ],
)
def test_the_search_leaves_other_names_alone(line: str) -> None:
    tree = ast.parse(line)
    assert list(private_torch_names(tree, defined([tree]))) == []


def test_private_names_of_torch_are_bound_in_one_place() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    own = defined(list(trees.values()))
    found = {
        str(path.relative_to(ROOT)): names
        for path, tree in trees.items()
        if (names := sorted(set(private_torch_names(tree, own))))
    }
    locks = found.pop("shardmap/_threads.py", [])
    assert {name.partition(": ")[2] for name in locks} <= LOCKS
    assert found == {}


def test_this_torch_has_every_private_name() -> None:
    assert _torch.missing() == {}


def test_a_name_that_torch_lacks_is_named_with_what_fails_and_refuses_when_used() -> None:
    code = (
        "import torch\n"
        "del torch._C._dispatch_tls_local_include_set, torch._debug_has_internal_overlap\n"
        "from shardmap import _torch, errors\n"
        "print(sorted(_torch.missing()))\n"
        "try:\n"
        "    _torch.has_internal_overlap(torch.ones(1))\n"
        "except errors.TorchVersionError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = done.stdout.splitlines()
    names = ["torch._C._dispatch_tls_local_include_set", "torch._debug_has_internal_overlap"]
    assert lines[0] == str(names), done.stderr
    assert (
        "has no torch._debug_has_internal_overlap, which shardmap needs for this: telling whether"
    ) in lines[1]


def test_an_operator_that_torch_lacks_is_left_out_and_listed() -> None:
    before = _torch.absent_operators()
    found = list(registry.overloads("add.Tensor", "no_such_operator", "add.NoSuchOverload"))
    assert found == [torch.ops.aten.add.Tensor]
    absent = _torch.aten.no_such_operator_either
    assert absent.default is absent
    assert absent.overloads() == []
    with pytest.raises(TorchVersionError, match="no operator aten.no_such_operator_either"):
        absent.default(torch.ones(1))

    @registry.register("test", absent.default)
    def rule(*_: object) -> None:
        """Never called."""

    assert not registry.has_rule(absent.default)
    new = {"no_such_operator", "add.NoSuchOverload", "no_such_operator_either"}
    assert set(_torch.absent_operators()) - set(before) == new


def test_an_import_goes_through_without_an_operator_and_ops_lists_it() -> None:
    code = (
        "import sys, torch\n"
        "kind = type(torch.ops.aten)\n"
        "for name in ('cholesky_inverse', '_fused_rms_norm'):\n"
        "    vars(torch.ops.aten).pop(name, None)\n"
        "found = kind.__getattr__\n"
        "def without(self, name):\n"
        "    if name in ('cholesky_inverse', '_fused_rms_norm'):\n"
        "        raise AttributeError(name)\n"
        "    return found(self, name)\n"
        "kind.__getattr__ = without\n"
        "import shardmap\n"
        "from shardmap.jobs.cli import main\n"
        "rows = torch.randn(3, 4, 4)\n"
        "same = shardmap.vmap(torch.linalg.det)(rows)\n"
        "assert torch.allclose(same, torch.stack([torch.linalg.det(r) for r in rows]))\n"
        "sys.exit(main(['ops']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    lacks = [line for line in done.stdout.splitlines() if " lacks, and so " in line]
    assert len(lacks) == 1
    assert "_fused_rms_norm" in lacks[0]
    assert "cholesky_inverse" in lacks[0]
