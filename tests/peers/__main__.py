"""Run a peer's tests with torch's `vmap` and with ours, and print what passes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.peers.table import PEERS, Peer

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "shardmap_in_the_place_of_torch"
Outcomes = dict[str, dict[str, Any]]


def ours(work: Path) -> Path:
    """A folder that has shardmap and the plugin, and not our `tests`, as the peer's may be named."""
    folder = work / "ours"
    folder.mkdir(exist_ok=True)
    link = folder / "shardmap"
    link.unlink(missing_ok=True)  # an earlier run's may lead to another checkout
    link.symlink_to(ROOT / "shardmap")
    shutil.copy(Path(__file__).with_name("plugin.py"), folder / f"{PLUGIN}.py")
    return folder


def pip(command: str, *arguments: str) -> None:
    """Run pip, quietly, also for a peer that asks for a newer python than it needs (torch-jet)."""
    options = ["--quiet", "--no-deps", "--ignore-requires-python"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def installed(peer: Peer, work: Path) -> Path:
    """The folder in which the peer is installed, without the packages that are here already."""
    site = work / "site"
    if not site.exists():
        pip("install", "--target", str(site), peer.package, *peer.needs)
    return site


def tests_of(peer: Peer, work: Path) -> Path:
    """The tests in the peer's source distribution."""
    sources = work / "sources"
    if not sources.exists():
        pip("download", "--no-binary", ":all:", "--dest", str(sources), peer.package)
        for archive in sources.glob("*.tar.gz"):
            with tarfile.open(archive) as opened:
                opened.extractall(sources, filter="data")
    found = [folder / peer.tests for folder in sources.iterdir() if folder.is_dir()]
    if not found:
        raise SystemExit(f"{peer.package} has no source distribution: name its tests by --tests")
    return found[0]


def run(
    whose: str,
    tests: Path,
    paths: list[Path],
    options: list[str],
    report: Path,
    timeout: float,
    limit: float,
    only: Path | None = None,
) -> Outcomes:
    """The outcome of each test with one of the two maps; of those that map in a report, if given."""
    report.unlink(missing_ok=True)
    search = [str(path) for path in paths if path] + [os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PEERS_VMAP": whose,
        "PEERS_REPORT": str(report),
        "PEERS_LIMIT": str(limit),
        "PEERS_ONLY": str(only or ""),
    }
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider"]
    command += ["-q", "--tb=no", "-o", "addopts=", "--continue-on-collection-errors"]
    command += [*options, str(tests)]
    with open(report.with_suffix(".log"), "w") as log:
        running = subprocess.Popen(
            command, cwd=tests.parent, env=environment, stdout=log, stderr=log
        )
        try:
            running.wait(timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            print(f"with {whose}'s map the run was cut off after {timeout:g} seconds")
    if not report.exists():
        raise SystemExit(f"pytest wrote no report: see {report.with_suffix('.log')}")
    return json.loads(report.read_text())


def compared(torch: Outcomes, ours: Outcomes) -> str:
    """The counts, and each test that passes with torch's map and not with ours."""
    called = [test for test in torch if torch[test]["calls"]]
    passed = [test for test in called if torch[test]["outcome"] == "passed"]
    lost = [test for test in passed if ours.get(test, {}).get("outcome") != "passed"]
    gained = [test for test in called if torch[test]["outcome"] != "passed"]
    gained = [test for test in gained if ours.get(test, {}).get("outcome") == "passed"]
    lines = [
        f"{len(torch)} tests, of which {len(called)} call vmap; {len(passed)} of these pass with "
        f"torch.func.vmap, and {len(passed) - len(lost)} of those with shardmap.vmap"
    ]
    lines += [f"  passes with ours only: {test}" for test in gained]
    for test in lost:
        error = ours.get(test, {}).get("error", "did not run").replace("\n", " ")
        lines.append(f"  {test}: {error[:300]}")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--tests", type=Path, help="tests to run instead of the distribution's")
    parser.add_argument("--work", type=Path, help="where packages and reports are kept")
    parser.add_argument("--here", action="store_true", help="the peer is installed: leave pip out")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one test")
    parser.add_argument("--kept", action="store_true", help="keep what torch's map gave last time")
    parser.add_argument("-k", default="", help="as for pytest")
    given = parser.parse_args()
    peer = PEERS[given.peer]
    work = given.work or Path(tempfile.gettempdir()) / "shardmap_peers" / given.peer
    work.mkdir(parents=True, exist_ok=True)
    if given.tests is None and not peer.tests:
        raise SystemExit(f"{peer.package}: its distribution has no tests; name them by --tests")
    tests = given.tests.resolve() if given.tests else tests_of(peer, work)
    paths = [ours(work)] if given.here else [ours(work), installed(peer, work)]
    options = [*peer.options, *(["-k", given.k] if given.k else [])]
    limits = given.timeout, given.limit
    report = work / "torch.json"
    if given.kept:
        theirs = json.loads(report.read_text())
    else:
        theirs = run("torch", tests, paths, options, report, *limits)
    mine = run("shardmap", tests, paths, options, work / "shardmap.json", *limits, only=report)
    print(f"{given.peer}: {compared(theirs, mine)}")


if __name__ == "__main__":
    main()
