"""A run on a cluster.

Submitted through the job API to a Ray that was started as cluster/README.md says.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import shardmap
from shardmap.jobs.config import bind, load
from shardmap.jobs.run import execute

pytestmark = [pytest.mark.ray, pytest.mark.rotating]
jobs = pytest.importorskip("ray.job_submission")

ROOT = Path(__file__).parent.parent
CONFIG = "configs/digits_gradients/run.yaml"
QUICK = ["--model.init_args.epochs", "2", "--chunk_size", "300"]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The scores of the same run in this process."""
    words = [*QUICK, "--output", str(tmp_path_factory.mktemp("runs") / "here")]
    folder, _ = execute(bind(load(ROOT / CONFIG, words)))
    return load_file(folder / "scores.safetensors")["score"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A one-machine cluster with its dashboard, as `ray start --head` makes it.

    Its own ports, folder and token.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's socket paths have a limit
    port, token = 20000 + os.getpid() % 10000, secrets.token_hex(16)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus",
        "2",
        "--object-store-memory",
        "200000000",
    ]
    command += [
        "--port",
        str(port),
        "--dashboard-port",
        str(port + 1),
        "--dashboard-agent-listen-port",
        str(port + 2),
    ]
    command += ["--temp-dir", folder, "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as file:
        head = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield connect(f"http://127.0.0.1:{port + 1}", token, head, log)
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)
        head.terminate()  # with --block the whole cluster ends with it
        head.wait(timeout=60)
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def connect(
    address: str, token: str, head: subprocess.Popen[bytes], log: Path, seconds: float = 120
) -> Any:
    """A client of the dashboard, once that answers."""
    deadline = time.monotonic() + seconds
    while head.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(
            Exception
        ):  # a refused connection is a RuntimeError or a ConnectionError, an early answer a 500
            client = jobs.JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
            client.list_jobs()
            return client
        time.sleep(0.3)
    pytest.fail(f"the cluster does not answer: {log.read_text()}")


def submit(client: Any, *words: str) -> str:
    """Submit `shardmap run` with these words; its id."""
    entrypoint = " ".join(["shardmap", "run", CONFIG, "--devices", "ray", *words])
    return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)})


def finished(client: Any, job: str, seconds: float = 120) -> tuple[str, str]:
    """A job's status in the end, and its log."""
    deadline = time.monotonic() + seconds
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.2)
    return status.value, client.get_job_logs(job)


def chunks(folder: Path) -> list[tuple[int, int]]:
    """The samples of each chunk that a run has computed since it was begun or resumed, in order."""
    rows = [
        json.loads(line)
        for line in (folder / "log.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    rows = rows[max(i for i, row in enumerate(rows) if row["event"] in ("started", "resumed")) :]
    return sorted((row["start"], row["stop"]) for row in rows if row["event"] == "chunk done")


def test_a_submitted_run_gives_what_the_local_one_does(
    client: Any, tmp_path: Path, expected: torch.Tensor
) -> None:
    status, log = finished(client, submit(client, *QUICK, "--output", str(tmp_path / "run")))
    assert status == "SUCCEEDED", log
    assert "flipped labels are among the first" in log
    scores = load_file(tmp_path / "run" / "scores.safetensors")["score"]
    torch.testing.assert_close(
        scores, expected, rtol=1e-3, atol=1e-4
    )  # the network is trained in another process
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 1797
    spans = chunks(tmp_path / "run")
    assert [start for start, _ in spans] == [
        0,
        *[stop for _, stop in spans[:-1]],
    ]  # chunks come as they are ready, none is missing
    assert spans[-1][1] == 1797


def test_a_driver_that_is_killed_is_submitted_again_and_goes_on(
    client: Any, tmp_path: Path, expected: torch.Tensor
) -> None:
    manifest = tmp_path / "gradients.zarr" / "manifest.jsonl"
    words = [*QUICK[:2], "--chunk_size", "6", "--workers", "2"]
    words += [
        "--store",
        str(manifest.parent),
        "--resume",
        "true",
        "--output",
        str(tmp_path / "run"),
    ]
    job = submit(client, *words)
    deadline = time.monotonic() + 100
    while not (manifest.exists() and len(manifest.read_bytes().splitlines()) > 30):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.02)
    os.kill(int(client.get_job_info(job).driver_info.pid), signal.SIGKILL)
    assert finished(client, job)[0] == "FAILED"
    stored = 300 - len(shardmap.open_store(manifest.parent).missing())
    assert 0 < stored < 300

    status, log = finished(client, submit(client, *words))
    assert status == "SUCCEEDED", log
    assert len(chunks(tmp_path / "run")) == 300 - stored
    assert shardmap.open_store(manifest.parent).corrupt() == []
    scores = load_file(tmp_path / "run" / "scores.safetensors")["score"]
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


def test_a_wrong_configuration_fails_with_one_line_in_the_jobs_log(
    client: Any, tmp_path: Path
) -> None:
    status, log = finished(
        client, submit(client, "--chunk_size", "0", "--output", str(tmp_path / "run"))
    )
    assert status == "FAILED"
    assert (
        "shardmap: chunk_size: 0 is out of range; give a whole number of at least 1 or auto or "
        "null\n" in log
    )
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []
