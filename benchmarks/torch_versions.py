"""Try shardmap with several versions of torch: `python -m benchmarks.torch_versions`.

Each version is installed into an environment of its own, made in a temporary folder. There the
package is imported, the tests of the rules and of the private names run, and the digits
configuration is carried out on a few samples. The exit code is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).parent.parent
DIGITS = next(
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "digits_grad" in str(path)
)
VERSIONS = ("2.11", "2.12", "2.13", "newest")
TESTS = ("tests/rules", "tests/test_torch_names.py", "tests/test_batching_rule.py")
FROM_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-|setuptools)", re.IGNORECASE)
"""Pins that belong to one version of torch, and would ask pip for the impossible with another."""

LOOK = """
import json, torch, shardmap
from shardmap import _torch
rows = torch.randn(5, 4, dtype=torch.float64)
f = lambda r: (torch.tanh(r) @ r).exp()
torch.testing.assert_close(shardmap.vmap(f)(rows), torch.stack([f(r) for r in rows]))
print(json.dumps([torch.__version__, list(_torch.missing()), _torch.absent_operators()]))
"""


@dataclass(frozen=True)
class Step:
    """One thing that was tried.

    Attributes:
        verdict: "pass", or what went wrong in a line.
        seconds: How long it took.
        output: Everything it printed.
    """

    verdict: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """Say whether it went well."""
        return self.verdict.startswith("pass")


def run(command: Sequence[str | Path], *, cwd: Path, limit_seconds: float) -> Step:
    """Run a command with the sources on its path, and keep what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return Step(f"over {limit_seconds:.0f} s", time.perf_counter() - start, "")
    seconds = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    failed = f"FAIL: {lines[-1].strip() if lines else f'exit code {done.returncode}'}"
    return Step("pass" if done.returncode == 0 else failed, seconds, done.stdout)


def available(index_listing: str) -> list[str]:
    """The versions in what `pip index versions torch` prints, newest first."""
    found = re.search(r"Available versions: (.*)", index_listing)
    return [] if found is None else [version.strip() for version in found[1].split(",")]


def choose(wanted: str, versions: Sequence[str]) -> str | None:
    """The requirement to install for `wanted`: a version, the start of one, or "newest".

    Of one version's builds the CPU build is taken if the index has it. "newest" is what pip takes
    when nothing is said.

    Args:
        wanted: Such as "2.12", "2.13.0" or "newest".
        versions: The index's versions, newest first.

    Returns:
        A requirement such as "torch==2.13.0+cpu", or None if the index has no such version.
    """
    if wanted == "newest":
        return "torch"
    parts = wanted.split(".")
    public = [v.partition("+")[0] for v in versions]
    fitting = [v for v in public if v.split(".")[: len(parts)] == parts]
    if not fitting:
        return None
    build = f"{fitting[0]}+cpu"
    return f"torch=={build if build in versions else fitting[0]}"


def requirements() -> list[str]:
    """Requirements of the package and its tests besides torch, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["run"], *extras["test"]]
    return [line for line in lines if not re.match(r"torch\b", line)]


def constraints(folder: Path) -> Path:
    """Write the project's pins without those that belong to one version of torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if not FROM_TORCH.match(line)) + "\n")
    return path


def attempt(
    wanted: str, folder: Path, versions: Sequence[str], index: Sequence[str], limit_seconds: float
) -> tuple[dict[str, Step], list[str]]:
    """Install one version of torch and try everything.

    Returns:
        The steps by name, up to the first without which the others mean nothing, and what
        `shardmap` found of torch: its version, the missing private names, the absent operators.
    """
    requirement = choose(wanted, versions)
    if requirement is None:
        return {"install": Step("FAIL: the index has no such version", 0.0, "")}, []
    environment = folder / f"torch-{wanted}"
    python = environment / "bin" / "python"
    steps: dict[str, Step] = {}
    if not python.exists():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", *index]
        step = run([*pip, requirement], cwd=folder, limit_seconds=limit_seconds)
        if step.passed:
            # Named again, or a package that wants another torch would replace it.
            rest = [*pip, "-c", constraints(folder), requirement, *requirements()]
            step = run(rest, cwd=folder, limit_seconds=limit_seconds)
        steps["install"] = Step(step.verdict, time.perf_counter() - start, step.output)
        if not step.passed:
            shutil.rmtree(environment)
            return steps, []
    steps["import"] = run([python, "-c", LOOK], cwd=folder, limit_seconds=300)
    if not steps["import"].passed:
        return steps, []
    look = json.loads(steps["import"].output.strip().splitlines()[-1])
    if wanted != "newest" and not requirement.startswith(f"torch=={look[0].partition('+')[0]}"):
        steps["import"] = Step(f"FAIL: torch {look[0]} is installed", 0.0, "")
        return steps, look
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    found = run(pytest, cwd=ROOT, limit_seconds=limit_seconds)
    counts = re.findall(r"^.*\b\d+ (?:passed|failed|error).*$", found.output, re.MULTILINE)
    if counts:
        verdict = ("pass: " if found.passed else "FAIL: ") + counts[-1].strip("= ")
        found = Step(verdict, found.seconds, found.output)
    steps["rules"] = found
    words = [DIGITS, "--output", folder / "digits", "--model.init_args.epochs", "3"]
    digits = [python, "-m", "shardmap.jobs.cli", "run", *words]
    steps["digits"] = run(digits, cwd=folder, limit_seconds=600)
    return steps, look


def row(wanted: str, steps: Mapping[str, Step], look: Sequence[object]) -> list[str]:
    """Write a version's line of the table."""

    def cell(name: str) -> str:
        step = steps.get(name)
        return "" if step is None else f"{step.verdict} ({step.seconds:.0f} s)".replace("|", "/")

    version, missing, absent = look or ("", [], [])
    lacks = ", ".join(map(str, [*missing, *absent])) if look else ""
    return [wanted, str(version), *map(cell, ("install", "import", "rules", "digits")), lacks]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_versions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--versions", nargs="+", default=VERSIONS, help="such as 2.12, 2.13.0 or newest"
    )
    parser.add_argument("--folder", type=Path, help="where to make the environments (temporary)")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the environments, several GB each; with --folder, they are used again",
    )
    parser.add_argument(
        "--index",
        metavar="URL",
        help="a further index, such as https://download.pytorch.org/whl/cpu",
    )
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="SECONDS", help="of each step (1800)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "torch_versions.md"
    )
    options = parser.parse_args(arguments)
    index = ["--extra-index-url", options.index] if options.index else []
    listing = run(
        [sys.executable, "-m", "pip", "index", "versions", "torch", *index],
        cwd=ROOT,
        limit_seconds=300,
    )
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="torch-versions-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    try:
        for wanted in options.versions:
            steps, look = attempt(wanted, folder, available(listing.output), index, options.limit)
            rows.append(row(wanted, steps, look))
            print(" | ".join(rows[-1]), flush=True)
            for name, step in steps.items():
                if not step.passed:
                    failed = True
                    print(f"-- torch {wanted}, {name}:\n{step.output[-4000:]}", file=sys.stderr)
            if not options.keep:
                shutil.rmtree(folder / f"torch-{wanted}", ignore_errors=True)
    finally:
        if not options.keep and options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    header = ["asked for", "torch", "install", "import", "rules' tests", "digits", "it lacks"]
    text = "\n\n".join([common.markdown(header, rows), common.machine_line(common.machine(()))])
    options.output.write_text(f"{text}\n")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
