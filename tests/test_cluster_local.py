"""`python -m cluster.local`.

Several real Ray nodes on this machine, with workers that are killed, and nothing left of them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from cluster.local import WORKER, main
from shardmap.run.remote import Worker

pytestmark = pytest.mark.rotating

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LOCAL = [sys.executable, "-m", "cluster.local"]

MAP_UNTIL_A_WORKER_DIED = """
    import logging, time
    import ray, torch, shardmap

    class Deaths(logging.Handler):
        count = 0
        def emit(self, record):
            self.count += "is replaced" in record.getMessage()

    deaths, x = Deaths(), torch.randn(600, 40, 40)
    logging.getLogger("shardmap").addHandler(deaths)
    def function(matrix):
        return torch.linalg.matrix_exp(matrix).sum(0)
    expected = shardmap.vmap(function, chunk_size=5)(x)
    until = time.monotonic() + 60
    while deaths.count < 1 and time.monotonic() < until:
        assert torch.equal(shardmap.vmap(function, devices="ray", chunk_size=5)(x), expected)
    print(len(ray.nodes()), "nodes,", deaths.count, "deaths")
    raise SystemExit(7)
"""


def local(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LOCAL, *words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=250
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "argument --nodes: '0' is not a positive whole number"),
        (["--nodes", "1.5"], "argument --nodes: '1.5' is not a positive whole number"),
        (["--chaos", "nan"], "argument --chaos: 'nan' is not a positive number"),
        (
            ["--chaos-nodes", "--nodes", "1"],
            "--chaos-nodes: needs --nodes 2 or more, since the head stays",
        ),
        (["--node", "2"], "unrecognized arguments: --node 2"),
        (["--"], "--: no command follows; leave it out, or name one"),
        (["--", "no-such-command", "--nodes"], "no-such-command: no such command"),
    ],
)
def test_a_wrong_argument_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 2
    assert capsys.readouterr().err == f"cluster.local: {said}\n"


def test_chaos_knows_what_ray_calls_the_workers() -> None:
    assert f"ray::{Worker.__name__}" == WORKER


@pytest.mark.ray
def test_a_map_on_three_nodes_survives_chaos() -> None:
    done = local(
        "--nodes",
        "3",
        "--chaos",
        "8",  # longer than a worker takes to start on a busy machine
        "--",
        sys.executable,
        "-c",
        textwrap.dedent(MAP_UNTIL_A_WORKER_DIED),
    )
    assert done.returncode == 7, done.stderr  # the command's own
    found = re.search(
        r"^(\d+) nodes, (\d+) deaths$", done.stdout, re.MULTILINE
    )  # Ray prints there too
    assert found is not None, done.stdout
    nodes, deaths = int(found[1]), int(found[2])
    assert nodes == 3
    assert deaths >= 1
    said = [line for line in done.stderr.splitlines() if line.startswith("cluster.local: ")]
    assert re.fullmatch(r"cluster\.local: 3 nodes with 1 cores each at \S+:\d+", said[0])
    kills = [
        line
        for line in said
        if re.fullmatch(r"cluster\.local: chaos killed ray::Worker\S*, process \d+", line)
    ]
    assert len(kills) >= deaths


@pytest.mark.ray
def test_it_ends_with_a_signal_and_leaves_nothing() -> None:
    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*LOCAL, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        )

    def first_line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        with process.stdout:
            return process.stdout.readline()

    with contextlib.ExitStack() as clean:
        waiting = start("--nodes", "2")
        clean.callback(waiting.kill)  # where a check fails; the nodes go with it
        running = start("--nodes", "1", "--", "sh", "-c", "echo $RAY_ADDRESS; exec sleep 600")
        clean.callback(running.terminate)
        assert re.fullmatch(r"export RAY_ADDRESS=\S+:\d+\n", first_line(waiting))
        assert re.fullmatch(r"\S+:\d+\n", first_line(running))
        for process, nodes, number, code in (
            (waiting, 2, signal.SIGINT, 0),
            (running, 1, signal.SIGTERM, 143),
        ):
            started = psutil.Process(process.pid).children(recursive=True)
            raylets = [one for one in started if one.name() == "raylet"]
            assert len(raylets) == nodes
            folder = Path(
                next(
                    word.partition("=")[2]
                    for word in raylets[0].cmdline()
                    if word.startswith("--temp_dir=")
                )
            )
            assert folder.exists()
            process.send_signal(number)
            assert process.wait(60) == code
            assert not any(
                one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started
            )
            assert not folder.exists()
