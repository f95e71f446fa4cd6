"""The package: what it needs, what it pins, and that its two commands are the ones that CI runs."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shardmap._extras import require
from shardmap.errors import MissingExtraError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = ("ray", "jsonargparse", "rich", "yaml", "zarr", "safetensors", "matplotlib", "sklearn")
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_import_and_a_map_need_no_extra():
    code = (
        "import torch, shardmap; ones = torch.ones(2, 3); "
        "print(shardmap.vmap(torch.dot)(ones, ones).tolist())"
    )
    done = run_without_extras(code)
    assert done.stderr == ""
    assert done.stdout == "[3.0, 3.0]\n"


def test_import_loads_no_extra():
    code = f"import sys, shardmap; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "[]\n"


def test_the_command_line_names_the_extra_that_is_missing():
    done = run_without_extras(
        "from shardmap.jobs.cli import main; sys.exit(main(['run', "
        "'configs/digits_gradients/run.yaml']))"
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "shardmap: yaml is needed to read configurations and is not installed: pip install "
        '"shardmap[run]"\n'
    )


def test_a_missing_extra_is_an_import_error_with_the_packages_name():
    with pytest.raises(
        MissingExtraError, match=r'no_such_package is needed to test and .*"shardmap\[run\]"'
    ) as caught:
        require("no_such_package.part", extra="run", purpose="to test")
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "no_such_package"


def test_extras_name_what_the_package_imports():
    names = {
        extra: {canonicalize_name(Requirement(line).name) for line in lines}
        for extra, lines in EXTRAS.items()
    }
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} == {
        "torch",
        "numpy",
        "psutil",
    }
    assert names["ray"] == {"ray"}
    assert names["run"] == {
        "jsonargparse",
        "rich",
        "pyyaml",
        "zarr",
        "safetensors",
        "fsspec",
        "matplotlib",
        "jinja2",
        "scikit-learn",
    }
    assert EXTRAS["all"] == ["shardmap[ray,run]"]
    assert {"test", "dev", "bench"} <= set(names)


OTHER_NAMES = {"yaml": "pyyaml", "sklearn": "scikit-learn", "functorch": "torch"}
"""For a module that is imported: the package that brings it, where that has another name."""
WRITTEN = {"users_tasks"}
"""Modules that tests write before they import them."""


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by statements or by name, without what is inside them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0] if node.args else None
            if node.func.attr in ("importorskip", "import_module"):
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    return {name.partition(".")[0] for name in found}


def undeclared(folder: str, extras: tuple[str, ...]) -> dict[str, str]:
    """The packages that files of a folder import and no extra of these brings, each with a file."""
    own = {p.stem for p in ROOT.rglob("*.py")} | {p.parent.name for p in ROOT.rglob("*.py")}
    lines = [*PROJECT["dependencies"], *[line for extra in extras for line in EXTRAS[extra]]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    return {
        package: str(path.relative_to(ROOT))
        for path in sorted((ROOT / folder).rglob("*.py"))
        for package in imported(path) - own - WRITTEN - set(sys.stdlib_module_names)
        if canonicalize_name(OTHER_NAMES.get(package, package)) not in declared
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("shardmap", ("ray", "run")),
        ("tests", ("ray", "run", "test", "zoo")),
        ("benchmarks", ("ray", "run", "test", "bench")),
        ("examples", ("ray", "run")),
        ("configs", ("ray", "run")),
        ("cluster", ("ray", "run")),
    ],
)
def test_everything_that_is_imported_is_declared(folder: str, extras: tuple[str, ...]):
    assert undeclared(folder, extras) == {}


def test_what_is_not_declared_is_found(tmp_path: Path):
    path = tmp_path / "some.py"
    path.write_text(
        "import os, pandas.core as p\nfrom scipy.special import erf\nfrom . import here\n"
        "import pytest\npytest.importorskip('jsonschema')\n"
    )
    assert imported(path) == {"os", "pandas", "scipy", "pytest", "jsonschema"}
    assert "benchmarks/user_cases.py" in undeclared("benchmarks", ("ray", "run")).values()


def test_every_requirement_has_an_exact_pin():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {
        canonicalize_name(Requirement(line).name): str(Requirement(line).specifier)
        for line in lines
    }
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in pins.values()), (
        "exact, and without a local version such as +cpu"
    )
    wanted = [
        Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group
    ]
    missing = {
        item.name for item in wanted if canonicalize_name(item.name) not in {*pins, "shardmap"}
    }
    assert missing == set()
    for item in wanted:
        if item.name != "shardmap":
            assert item.specifier.contains(pins[canonicalize_name(item.name)].removeprefix("=="))


def test_the_readme_gives_two_whole_commands_and_ci_runs_the_second():
    commands = [
        block
        for block in re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    ]
    start = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e"
    assert (
        commands[0]
        == f'{start} ".[all]" && .venv/bin/shardmap run configs/digits_gradients/run.yaml'
    )
    assert commands[1] == f'{start} ".[all,test]" && .venv/bin/pytest'
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme_command" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_entry_point_is_there():
    from shardmap.jobs import cli

    assert PROJECT["scripts"] == {"shardmap": "shardmap.jobs.cli:main"}
    assert callable(cli.main)


def test_what_is_no_python_is_shipped_too():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    others = {
        path
        for path in (ROOT / "shardmap").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert shipped == others


def test_the_licence_and_the_type_marker_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:100]
    assert (ROOT / "shardmap" / "py.typed").exists()
