"""devices="ray" against the local executor, on a real Ray of this machine.

Bit for bit, in any chunks, with workers that die.
"""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.lower.batched import LoweringOptions
from shardmap.planning.device import Budget
from shardmap.program.ir import Program
from shardmap.run import driver, messages, packing, pool, remote
from shardmap.run.base import ChunkDone, Event, Output, RunFinished, RunStarted, listen
from tests.on_ray import TWO, gone, local_ray, pids

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    with local_ray():
        yield


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.ReLU()
    )
    return nn.Sequential(features, nn.Flatten(), nn.Linear(4 * 9, 3))


def per_sample_grad(model: nn.Module) -> Callable[..., Any]:
    def gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = nn.functional.mse_loss(model(x.unsqueeze(0)).squeeze(0), y)
        return torch.autograd.grad(loss, tuple(model.parameters()))

    return gradient


def same(
    func: Callable[..., Any],
    *batch: torch.Tensor,
    chunk_size: int | None = 3,
    devices: Any = TWO,
    **options: Any,
) -> None:
    """Both executors give the same bits, dtypes and strides where they cut the batch alike."""
    torch.manual_seed(7)
    there = shardmap.vmap(func, devices=devices, chunk_size=chunk_size, **options)(*batch)
    torch.manual_seed(7)
    here = shardmap.vmap(func, devices="cpu", chunk_size=chunk_size, **options)(*batch)
    torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("samples", [1, 3, 7, 13])
def test_per_sample_gradients_are_those_of_the_local_executor(
    make: Callable[[], nn.Module], samples: int
) -> None:
    x = torch.randn(samples, 6) if make is mlp else torch.randn(samples, 1, 8, 8)
    same(per_sample_grad(make()), x, torch.randn(samples, 3))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 13, 100])
def test_any_chunk_size(chunk_size: int) -> None:
    same(per_sample_grad(mlp()), torch.randn(13, 6), torch.randn(13, 3), chunk_size=chunk_size)


def test_without_a_chunk_size_there_are_about_eight_tasks_per_worker() -> None:
    events: list[Event] = []
    x = torch.randn(37, 3)
    with listen(events.append):
        out = shardmap.vmap(lambda v: v * 2, devices=TWO)(x)
    assert torch.equal(out, x * 2)
    started, *chunks, finished = events
    assert isinstance(started, RunStarted)
    assert isinstance(finished, RunFinished)
    assert (started.samples, started.chunks, sorted(started.devices)) == (
        37,
        13,
        ["ray:0", "ray:1"],
    )
    done = [c for c in chunks if isinstance(c, ChunkDone)]
    assert sorted((c.start, c.stop) for c in done) == [(i, min(i + 3, 37)) for i in range(0, 37, 3)]
    assert {c.device for c in done} <= {"ray:0", "ray:1"}


def test_dimensions_and_strides() -> None:
    square = torch.randn(5, 7)

    def flat(v: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(v, (2, 2), (v.stride(0), v.stride(0))) * 2

    same(flat, square, in_dims=1, chunk_size=2)
    same(flat, torch.randn(5, 20)[:, 3:10], in_dims=0, chunk_size=2)
    same(lambda v: v.sin(), torch.randn(4, 3, 7), in_dims=-1, out_dims=1)
    same(lambda v: v.exp(), torch.randn(1, 3).expand(7, 3))
    same(lambda v: v.exp(), torch.randn(7, 1).expand(7, 3))
    same(lambda v: v.cos(), torch.randn(9).unfold(0, 3, 1))
    same(lambda v: v * 2, torch.randn(7, 2, 3, 3).to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.complex64,
        torch.int8,
        torch.bool,
        torch.int64,
    ],
)
def test_dtypes(dtype: torch.dtype) -> None:
    same(lambda v: (v == v, v.clone()), (torch.randn(7, 3) * 3).to(dtype))


def test_lazy_conjugates_and_empty_rows() -> None:
    same(lambda v: v * 1j, torch.randn(7, 3, dtype=torch.complex64).conj())
    same(lambda v: v * 2, torch.randn(5, 0, 3))
    same(lambda v: v * 2, torch.randn(0, 3))


def test_captured_tensors_and_outputs_that_no_sample_changes() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    turned = torch.randn(3, 4).t()
    one = torch.tensor(2.5)

    def func(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return v @ turned.t(), one * 2, torch.tensor([1.0, 2.0]) + 1, weight.detach().sum(0)

    same(func, torch.randn(7, 3), out_dims=(0, None, 0, 0))
    with torch.no_grad():
        same(lambda v: weight @ v, torch.randn(7, 3))


def test_the_result_can_be_written_to() -> None:
    weight = torch.randn(3)
    for size in (3, 100):
        for out in shardmap.vmap(lambda v: (v * 2, weight), devices=TWO, chunk_size=size)(
            torch.randn(7, 3)
        ):
            out.zero_()
    assert weight.abs().sum() > 0


def test_defaults_of_the_driver_hold_on_the_workers() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        same(lambda v: v + torch.zeros(3), torch.randn(7, 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    same(lambda v: v + torch.zeros(3), torch.randn(7, 3))


def test_draws_follow_torchs_seed_whichever_worker_makes_them() -> None:
    def draw() -> torch.Tensor:
        return shardmap.vmap(torch.bernoulli, randomness="same", devices=TWO, chunk_size=4)(
            torch.full((12, 50), 0.5)
        )

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second), "the seed moves on from call to call"


def test_draws_of_each_sample_are_those_of_the_local_executor() -> None:
    same(lambda v: v + torch.rand(3), torch.randn(7, 3), randomness="different")
    same(
        lambda v: torch.nn.functional.dropout(v, 0.4),
        torch.randn(11, 5),
        randomness="different",
        chunk_size=2,
    )


def test_functions_that_cannot_be_pickled_work() -> None:
    lock_holder = iter(())  # a generator's kin: refuses pickling
    same(lambda v: (v * 2, lock_holder)[0], torch.randn(7, 3))


def test_what_travels_holds_no_code_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[remote.Constants] = []
    texts: list[str] = []
    make, dumps = driver.Driver._constants, Program.dumps
    monkeypatch.setattr(driver.Driver, "_constants", lambda *a: sent.append(make(*a)) or sent[-1])
    monkeypatch.setattr(Program, "dumps", lambda self: texts.append(dumps(self)) or texts[-1])
    model = cnn()

    def a_name_of_the_user(x: torch.Tensor) -> torch.Tensor:
        return model(x.unsqueeze(0)).squeeze(0) * 1.5

    with torch.no_grad():
        same(a_name_of_the_user, torch.randn(7, 1, 8, 8))
    assert "a_name_of_the_user" not in texts[0]
    names, strings = set(), []
    for opcode, argument, _ in pickletools.genops(pickle.dumps(sent[0], protocol=5)):
        if opcode.name == "SHORT_BINUNICODE":
            strings.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            names.add(strings[-2] if len(strings) > 1 else "")
    assert names
    assert not any("test_ray" in s or s.startswith(("tests.", "__main__")) for s in strings), (
        strings
    )


def test_outer_gradients_are_refused() -> None:
    weight = torch.randn(3, requires_grad=True)
    with pytest.raises(
        errors.OptionError, match=r"gradients from outside do not flow.*torch\.no_grad"
    ):
        shardmap.vmap(lambda v: v @ weight, devices="ray")(torch.randn(7, 3))
    with pytest.raises(errors.OptionError, match="gradients from outside"):
        shardmap.vmap(lambda v: v.sin(), devices="ray")(torch.randn(7, 3, requires_grad=True))


def test_writes_to_the_batch_are_refused() -> None:
    x = torch.ones(7, 3)
    with pytest.raises(errors.CapturedWriteError, match="mapped argument 0.*clone the argument"):
        shardmap.vmap(lambda v: v.add_(1), devices="ray")(x)
    assert torch.equal(x, torch.ones(7, 3))


def test_options() -> None:
    for bad in (
        {"workers": 0},
        {"workers": 1.5},
        {"num_cpus": -1},
        {"num_gpus": "1"},
        {"idle_seconds": float("nan")},
    ):
        with pytest.raises(errors.OptionError, match=next(iter(bad))):
            shardmap.Ray(**bad)
    with pytest.raises(errors.OptionError, match="no machine of the cluster has that"):
        shardmap.vmap(torch.sin, devices=shardmap.Ray(num_gpus=7))(torch.randn(3, 3))


def test_a_call_that_comes_into_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler's: the workers are in use, and waiting for them would be for ever."""
    monkeypatch.setattr(pool, "_in_use", True)
    with pytest.raises(errors.ClusterError, match="pass devices='cpu' there"):
        shardmap.vmap(torch.sin, devices=TWO)(torch.ones(3, 2))
    torch.testing.assert_close(
        shardmap.vmap(torch.sin, devices="cpu")(torch.ones(3, 2)), torch.ones(3, 2).sin()
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.MissingExtraError, match=r'pip install "shardmap\[ray\]"'):
        shardmap.vmap(torch.sin, devices="ray")(torch.randn(3, 3))


def test_an_error_names_the_samples_and_brings_the_workers_traceback() -> None:
    table = torch.arange(5.0)
    x = torch.arange(26).view(13, 2) % 5
    x[7] = 9
    look_up = lambda r: table.index_select(0, r)
    with pytest.raises(errors.WorkerError, match=r"samples 6 to 8 failed") as caught:
        shardmap.vmap(look_up, devices=TWO, chunk_size=3)(x)
    assert "out of range" in str(caught.value)
    assert "On the worker:\nTraceback" in str(caught.value)
    same(look_up, x[:7])


def test_a_sample_that_torch_linalg_refuses_raises_what_the_loop_raises() -> None:
    """A function may catch it, so that it is a question, and the sample is run by itself."""
    x = torch.eye(3).repeat(13, 1, 1)
    x[7] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        shardmap.vmap(torch.linalg.inv, devices=TWO, chunk_size=3)(x)
    same(torch.linalg.inv, x[:7])


def test_a_worker_that_is_killed_is_replaced_and_its_chunks_are_redone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(40, 3, 3)
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, ChunkDone) and not killed:
            assert pool._pool is not None
            (worker,) = [w for w in pool._pool.workers if w.name == event.device]
            assert worker.pid is not None
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    events: list[Event] = []
    with listen(kill_once), listen(events.append), caplog.at_level(logging.WARNING, "shardmap"):
        out = shardmap.vmap(lambda m: (m @ m).sum(0), devices=TWO, chunk_size=1)(x)
    assert torch.equal(out, shardmap.vmap(lambda m: (m @ m).sum(0), chunk_size=1)(x))
    starts = [e.start for e in events if isinstance(e, ChunkDone)]
    assert sorted(starts) == list(range(40)), "each chunk is gathered once"
    assert "died with samples" in caplog.text
    assert killed[0] not in pids()


def test_a_chunk_whose_workers_always_die_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = driver.Driver._submit
    attempts: list[int] = []

    def poisoned(self: Any, worker: Any, chunk: Any) -> None:
        if chunk.start == 2:
            attempts.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        submit(self, worker, chunk)

    monkeypatch.setattr(driver.Driver, "_submit", poisoned)
    monkeypatch.setattr(driver, "WINDOW", 1)
    with pytest.raises(errors.WorkerError, match="samples 2 to 3 failed.*died 4 times"):
        shardmap.vmap(torch.sin, devices=shardmap.Ray(workers=1), chunk_size=2)(torch.randn(6, 3))
    assert len(set(attempts)) == 1 + driver.RETRIES


def test_workers_are_kept_for_the_next_call_and_end_when_idle() -> None:
    quick = shardmap.Ray(workers=1, idle_seconds=2.0)
    same(torch.sin, torch.randn(7, 3), devices=quick)
    first = pids()
    same(torch.cos, torch.randn(7, 3), devices=quick)
    assert pids() == first
    assert gone(first[0])
    assert pool._pool is None
    same(torch.cos, torch.randn(7, 3), devices=quick)


def test_ctrl_c_ends_the_workers() -> None:
    same(torch.sin, torch.randn(7, 3))
    before = pids()

    def interrupt(event: Event) -> None:
        if isinstance(event, ChunkDone):
            raise KeyboardInterrupt

    with listen(interrupt), pytest.raises(KeyboardInterrupt):
        shardmap.vmap(torch.sin, devices=TWO, chunk_size=1)(torch.randn(20, 3))
    assert all(gone(pid) for pid in before)
    same(torch.sin, torch.randn(7, 3))


def test_a_script_needs_no_cluster_and_leaves_none() -> None:
    script = """
        import torch, shardmap
        from shardmap.run import pool

        class Shift(torch.nn.Module):  # of __main__: what no worker could import
            def forward(self, x):
                return x.sin() + 1

        x, model = torch.randn(7, 3), Shift()
        assert torch.equal(shardmap.vmap(model, devices="ray")(x), x.sin() + 1)
        print(*[w.pid for w in pool._pool.workers if w.pid])
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Ray is quiet"
    assert all(gone(int(pid)) for pid in done.stdout.split())


def test_packing_sends_elements_once_and_restores_strides() -> None:
    cpu = torch.device("cpu")
    whole = torch.arange(1000.0).view(10, 100)
    for t in (
        whole[2:4],
        whole[:, 3:7],
        whole.t()[:5],
        whole[:1].expand(6, 100),
        whole[0, 0],
        whole[:0],
        whole[0].unfold(0, 3, 1),
    ):
        packed = packing.pack(t)
        back = packing.unpack(pickle.loads(pickle.dumps(packed)), cpu)
        assert torch.equal(back, t)
        assert back.stride() == t.stride() or back.numel() == 0
    assert packing.pack(whole[2:4]).data.nbytes == 800
    assert packing.pack(whole[:1].expand(6, 100)).data.nbytes == 400
    assert packing.unpack(packing.pack(torch.empty(3, device="meta")), cpu).device.type == "meta"


def test_a_worker_forgets_old_programs() -> None:
    worker = remote.Worker(1, "cpu")
    x = torch.randn(2, 3)
    texts: list[str] = []
    dumps = Program.dumps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "dumps", lambda self: texts.append(dumps(self)) or texts[-1])
        shardmap.vmap(lambda v: v.sin() * 2, devices=TWO)(x)
    text = np.frombuffer(texts[0].encode(), np.uint8)
    options = LoweringOptions(
        device_type="cpu",
        randomness="error",
        strict=False,
        grad=False,
        transformed=False,
        call="call",
    )
    outputs = (Output((3,), torch.float32, torch.device("cpu"), True, 0, None, False),)
    constants = remote.Constants(
        options,
        (),
        (),
        (2.0,),
        (0,),
        {},
        messages.Settings.current(),
        outputs,
        budget=Budget(None, 0.9),
    )
    task = remote.Task(0, 2, (packing.pack(x),), True)
    for i in range(remote.Worker.PROGRAMS + 3):
        done = worker.task(f"call {i}", f"digest {i}", text, constants, task)
        assert isinstance(done, remote.Done)
        (out,) = done.outputs
        assert torch.equal(packing.unpack(out, torch.device("cpu")), x.sin() * 2)
    assert worker.info()["programs"] == remote.Worker.PROGRAMS
    failed = worker.task("another", "unknown", np.frombuffer(b"[]", np.uint8), constants, task)
    assert isinstance(failed, remote.Failure)
    assert "Traceback" in failed.traceback
