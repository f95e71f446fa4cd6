"""The cluster job: on a local Ray, and submitted to one as `ray job submit` does."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardmap.config import bind, load
from shardmap.jobs.run import execute

ROOT = Path(__file__).parent.parent
QUICK = ["--model.args.epochs", "2", "--chunk_size", "300"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
ALONE = {**ENVIRONMENT, "RAY_ADDRESS": "local"}  # a Ray of its own, whatever else runs on this machine


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> torch.Tensor:
    """The scores of the same run in this process."""
    words = [*QUICK, "--output", str(tmp_path_factory.mktemp("runs") / "here")]
    folder, _ = execute(bind(load(ROOT / "configs" / "digits_gradients.yaml", words)))
    return load_file(folder / "scores.safetensors")["score"]


def assert_complete(folder: Path, expected: torch.Tensor):
    torch.testing.assert_close(load_file(folder / "scores.safetensors")["score"], expected, rtol=1e-3, atol=1e-4)
    assert json.loads((folder / "summary.json").read_text())["samples"] == 1797
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    spans = sorted((row["start"], row["stop"]) for row in rows if row["event"] == "chunk done")
    assert [start for start, _ in spans] == [0, *[stop for _, stop in spans[:-1]]]  # chunks come as they are ready, none is missing
    assert spans[-1][1] == 1797


@pytest.mark.ray
def test_the_job_on_a_local_ray(tmp_path, expected):
    command = [sys.executable, "cluster/per_sample_gradients.py", "--output", str(tmp_path / "run"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ALONE, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "flipped labels are among the first" in done.stdout
    assert_complete(tmp_path / "run", expected)


@pytest.mark.ray
def test_a_mistake_is_one_line_before_ray_starts(tmp_path):
    command = [sys.executable, "cluster/per_sample_gradients.py", "--output", str(tmp_path / "run"), "--chunk_size", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ALONE, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "shardmap: chunk_size: 0 is out of range; give a whole number of at least 1 or auto or null\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cluster(tmp_path_factory):
    """A one-machine cluster with its dashboard, as `ray start --head` makes it: its own ports, and a token of its own."""
    ray = str(Path(sys.executable).parent / "ray")
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray's socket paths have a limit
    port = 20000 + os.getpid() % 10000
    environment = {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = [ray, "start", "--head", "--block", "--num-cpus", "2", "--port", str(port), "--dashboard-port", str(port + 1)]
    command += ["--dashboard-agent-listen-port", str(port + 2), "--temp-dir", str(temporary), "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    address = f"http://127.0.0.1:{port + 1}"
    try:
        deadline = time.monotonic() + 120
        while subprocess.run([ray, "job", "list", "--address", address], capture_output=True, env=environment).returncode != 0:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        yield ray, address, environment
    finally:
        process.terminate()  # with --block, the whole cluster ends with it
        process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.ray
def test_the_job_as_it_is_submitted(cluster, tmp_path, expected):
    ray, address, environment = cluster
    command = [ray, "job", "submit", "--address", address, "--working-dir", str(ROOT)]
    command += ["--", sys.executable, "cluster/per_sample_gradients.py", "--output", str(tmp_path / "run"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flipped labels are among the first" in done.stdout
    assert_complete(tmp_path / "run", expected)


def test_the_page_says_how():
    page = (ROOT / "cluster" / "README.md").read_text()
    assert "ray job submit" in page
    for path in re.findall(r"python (cluster/\S+\.py)", page):
        assert (ROOT / path).exists()
