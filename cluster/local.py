"""A Ray cluster of several nodes on this machine, for trying things out.

With chaos, its workers are killed while they work.

    python -m cluster.local --nodes 3                                         # until Ctrl-C python
    -m cluster.local --nodes 3 --chaos 5 -- shardmap run configs/digits_gradients/run.yaml --devices
    ray

Each node has a raylet, an object store and worker processes of its own, as on a machine of its own;
what it lacks is the network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import psutil

from shardmap._extras import require
from shardmap.errors import MissingExtraError

USAGE_ERROR, INTERRUPTED, TERMINATED = 2, 128 + signal.SIGINT, 128 + signal.SIGTERM

STORE_BYTES = 200 * 2**20
"""Object store of each node. It lies in /dev/shm, which containers often keep small."""

WORKER = "ray::Worker"
"""Ray's name for the processes of shardmap's pool: after the actor's class,
`shardmap.run.remote.Worker`."""
STARTING = (".__init__", ".bind")
"""Endings of the title of a worker that has computed nothing yet."""

_TICK_SECONDS = 0.1
"""Between looks at the command and at the clock of chaos: Ctrl-C and SIGTERM end the pause, and
nothing else has to."""
_GRACE_SECONDS = 10.0
"""Time in which a command that is told to end must end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the cluster, run the command on it if there is one, and take the cluster down.

    Args:
        arguments: The words after `python -m cluster.local`; those of the process by default.

    Returns:
        The command's exit code. Without a command 0 after Ctrl-C; 2 for wrong arguments, 143 after
        SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    command = words[cut + 1 :]
    try:
        options = parse(words[:cut], command if cut < len(words) else None)
        require("ray", extra="ray", purpose="to start a cluster")
        with _cluster(options.nodes, options.cpus_per_node) as cluster:
            chaos = [_WorkerChaos(cluster, options.chaos)] if options.chaos else []
            chaos += (
                [_NodeChaos(cluster, options.chaos_nodes, options.cpus_per_node)]
                if options.chaos_nodes
                else []
            )
            _tell(
                f"{options.nodes} nodes with {options.cpus_per_node} cores each at "
                f"{cluster.address}"
            )
            if command:
                return _run(command, {"RAY_ADDRESS": cluster.address}, chaos)
            print(f"export RAY_ADDRESS={cluster.address}", flush=True)
            _tell(
                "with that line in another shell, devices='ray' runs here; Ctrl-C ends the cluster"
            )
            while True:
                _pause(chaos)
    except MissingExtraError as error:
        _tell(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED if command else 0
    except _Terminated:
        return TERMINATED


class _Terminated(BaseException):
    """SIGTERM arrived."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"cluster.local: {message}\n")


def parse(words: Sequence[str], command: Sequence[str] | None = None) -> argparse.Namespace:
    """Check the arguments; a wrong one ends the process with a line on stderr.

    Args:
        words: Those before `--`.
        command: Those after it; None where there is no `--`.
    """
    parser = _Parser(
        prog="python -m cluster.local",
        allow_abbrev=False,
        usage="python -m cluster.local [options] [-- COMMAND ...]",
        description="A Ray cluster on this machine. COMMAND runs with RAY_ADDRESS set; without "
        "one, Ctrl-C ends the cluster.",
    )
    parser.add_argument(
        "--nodes",
        type=_positive(int),
        default=3,
        help="how many; the first is the head, which works too; %(default)s",
    )
    parser.add_argument(
        "--cpus-per-node",
        type=_positive(int),
        default=1,
        help="cores that Ray hands out on each; %(default)s",
    )
    seconds = {"type": _positive(float), "nargs": "?", "metavar": "SECONDS"}
    parser.add_argument(
        "--chaos",
        const=2.0,
        help="kill one of shardmap's workers every so often; every %(const)g seconds",
        **seconds,
    )
    parser.add_argument(
        "--chaos-nodes",
        const=20.0,
        help="replace one node by a new one, every %(const)g seconds",
        **seconds,
    )
    options = parser.parse_args(words)
    if options.chaos_nodes and options.nodes == 1:
        parser.error("--chaos-nodes: needs --nodes 2 or more, since the head stays")
    if command == []:
        parser.error("--: no command follows; leave it out, or name one")
    if command and shutil.which(command[0]) is None:
        parser.error(f"{command[0]}: no such command")
    return options


def _positive(kind: type[int] | type[float]) -> Any:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a positive {'whole ' if kind is int else ''}number"
            )
        return value

    return read


@contextlib.contextmanager
def _cluster(nodes: int, cpus: int) -> Iterator[Any]:
    """A running `ray.cluster_utils.Cluster`; afterwards no process and no file of it is left.

    Should this process be killed, the kernel ends the nodes with it: Ray asks for that on Linux.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's socket paths have a limit
    # Ray notes the newest cluster of a machine in its folder, for ray.init(address="auto"): other
    # clusters here keep theirs.
    os.environ["RAY_TMPDIR"] = folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(nodes):
            _add_node(cluster, cpus)
        yield cluster
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # an impatient second Ctrl-C would leave processes
        workers = psutil.Process().children(recursive=True)
        cluster.shutdown()
        for process in psutil.wait_procs(workers, timeout=_GRACE_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _add_node(cluster: Any, cpus: int) -> None:
    """Add a node, from the main thread: the kernel ends it with the thread that started it."""
    cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES, include_dashboard=False)
    signal.signal(
        signal.SIGTERM, _terminate
    )  # each node installs a handler of its own, which would leave the others' files


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _run(command: Sequence[str], variables: Mapping[str, str], chaos: Sequence[_Chaos]) -> int:
    """Run a command to its end, with chaos around it; the command ends with this process."""
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        while process.poll() is None:
            _pause(chaos)
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(_GRACE_SECONDS)
            process.kill()
        process.wait()
    return (
        process.returncode if process.returncode >= 0 else 128 - process.returncode
    )  # ended by a signal: as shells report it


def _pause(chaos: Sequence[_Chaos]) -> None:
    for one in chaos:
        one.strike_if_due()
    time.sleep(_TICK_SECONDS)


class _Chaos(ABC):
    """Something that goes wrong every so often."""

    def __init__(self, cluster: Any, seconds: float):
        self.cluster, self.seconds = cluster, seconds
        self.due = time.monotonic() + seconds

    def strike_if_due(self) -> None:
        if time.monotonic() >= self.due and self.strike():
            self.due = time.monotonic() + self.seconds

    @abstractmethod
    def strike(self) -> bool:
        """Do it; False where there is nothing to do it to, to try again soon."""


class _WorkerChaos(_Chaos):
    """Kills a worker process, as the kernel does when memory runs out.

    Workers that are still starting, or loading the program, are spared: several in a row that do
    not start mean a wrong installation, and end the map.
    """

    def strike(self) -> bool:
        found = []
        for process in psutil.Process().children(recursive=True):  # only this cluster's
            with contextlib.suppress(psutil.Error, IndexError):
                title = process.cmdline()[0]
                if title.partition(".")[0] == WORKER and not title.endswith(STARTING):
                    found.append((process, title))
        if not found:
            return False
        process, title = random.choice(found)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            _tell(f"chaos killed {title}, process {process.pid}")
        return True


class _NodeChaos(_Chaos):
    """Takes a node away with everything on it, as a spot instance goes, and adds a new one."""

    def __init__(self, cluster: Any, seconds: float, cpus: int):
        super().__init__(cluster, seconds)
        self.cpus = cpus

    def strike(self) -> bool:
        node = random.choice(list(self.cluster.worker_nodes))
        self.cluster.remove_node(node, allow_graceful=False)
        _tell(f"chaos removed node {node.node_id[:8]}")
        _add_node(self.cluster, self.cpus)
        _tell("chaos added a node")
        return True


def _tell(text: str) -> None:
    print(f"cluster.local: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
