"""The Ray executor on this machine.

`python -m benchmarks.cluster [speed] [driver] [store]`, all three by default.

- speed: per-sample gradient norms (small results) on two workers of one core against one worker,
and against the local executor on two
  threads: medians of five interleaved rounds, each run right after two untimed ones with the same
  workers, so that no start-up is in it; and what two plain processes gain over one, which is what
  the machine allows. The stacked gradients of a part of the samples stand beside them.
- driver: CPU time of the driver's process, all of its threads, per task: with half a megabyte of
samples sent for each, and with samples
  that workers read from a file themselves.
- store: 10 GB of per-sample gradients, written to zarr by two workers: what it adds to the driver's
memory at most, and the rate against
  the disk's own sequential write, measured before and after.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from benchmarks.common import machine, machine_line, markdown, verdict, write_json
from benchmarks.models import mlp

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
TARGETS = {
    "speedup": 1.7,
    "against local": 0.85,
    "sent": 4.0,
    "read": 2.0,
    "memory": 300.0,
    "disk": 0.6,
}
MIB = 2**20


def cnn() -> nn.Module:
    """Build a small network for 28x28 pixels."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    )
    return nn.Sequential(
        nn.Unflatten(-1, (1, 28, 28)), features, nn.Flatten(-3), nn.Linear(32 * 36, 10)
    )


def gradient(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """One sample's gradient."""
    parameters = tuple(model.parameters())
    return lambda x, y: torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def norm(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm of one sample's gradient."""
    one = gradient(model)
    return lambda x, y: torch.stack([g.square().sum() for g in one(x, y)]).sum().sqrt()


def data(samples: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 784, generator=generator), torch.randint(
        10, (samples,), generator=generator
    )


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a run that follows two untimed ones.

    Workers of the peer before are gone, and the new ones start.
    """
    for _ in range(2):
        call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def plain_process(name: str, samples: int, rounds: int, barrier: Any, queue: Any) -> None:
    """The norms without Ray, on one thread, beside other processes that do the same."""
    torch.set_num_threads(1)
    x, y = data(samples)
    torch.manual_seed(0)
    mapped = shardmap.vmap(norm({"mlp": mlp, "cnn": cnn}[name]()))
    mapped(x, y)
    seconds = []
    for _ in range(rounds):
        barrier.wait()
        began = time.perf_counter()
        mapped(x, y)
        seconds.append(time.perf_counter() - began)
    queue.put(statistics.median(seconds))


def ceiling(name: str, samples: int, rounds: int) -> float:
    """Speed of two processes over one on this machine, if only its memory is shared."""
    context = multiprocessing.get_context("spawn")
    took = []
    for processes in (1, 2):
        barrier, queue = context.Barrier(processes), context.Queue()
        started = [
            context.Process(
                target=plain_process, args=(name, samples // processes, rounds, barrier, queue)
            )
            for _ in range(processes)
        ]
        for process in started:
            process.start()
        took.append(max(queue.get() for _ in started))
        for process in started:
            process.join()
    return took[0] / took[1]


def speed(rounds: int) -> list[dict[str, Any]]:
    """Two workers against one, and against two threads."""
    found = []
    for name, make, samples, stacked in (
        ("MLP 784-256-256-10", mlp, 60_000, 1_200),
        ("CNN 28x28", cnn, 60_000, 12_000),
    ):
        torch.manual_seed(0)
        model = make()
        for what, function, size in (
            ("norms", norm(model), samples),
            ("gradients, stacked", gradient(model), stacked),
        ):
            x, y = data(size)

            def run(devices: Any, function: Any = function, x: Tensor = x, y: Tensor = y) -> Any:
                return shardmap.vmap(function, devices=devices)(x, y)

            calls = {
                "two workers": lambda run=run: run(shardmap.Ray(workers=2)),
                "local, two threads": lambda run=run: run("cpu"),
                "one worker": lambda run=run: run(shardmap.Ray(workers=1)),
            }
            seconds: dict[str, list[float]] = {key: [] for key in calls}
            torch.set_num_threads(2)
            for _ in range(rounds):
                for key, call in calls.items():
                    seconds[key].append(timed(call))
            median = {key: statistics.median(values) for key, values in seconds.items()}
            ratios = [
                a / b for a, b in zip(seconds["one worker"], seconds["two workers"], strict=True)
            ]
            locals_ = [
                a / b
                for a, b in zip(seconds["local, two threads"], seconds["two workers"], strict=True)
            ]
            found.append(
                {
                    "model": name, "what": what, "samples": size, "seconds": median,
                    "speedup": statistics.median(ratios), "against local":
                    statistics.median(locals_), "ceiling": ceiling(make.__name__, size, rounds) if
                    what == "norms" else None,
                }
            )  # fmt: skip
            print(found[-1], file=sys.stderr)
    return found


def driver(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of the driver's CPU per task, samples sent or read."""
    rows, tasks = 128, 400
    x = torch.randn(rows * tasks, 1024)  # half a megabyte per task
    np.save(folder / "samples.npy", x.numpy())
    column = shardmap.source(str(folder / "samples.npy")).columns[0]
    two = shardmap.Ray(workers=2)
    mapped = shardmap.vmap(lambda v: (v.sin() * v).sum(), devices=two, chunk_size=rows)
    found = {}
    for name, argument in (("sent", x), ("read", column)):
        mapped(argument)
        costs, walls = [], []
        for _ in range(ROUNDS):
            cpu, wall = time.process_time(), time.perf_counter()
            mapped(argument)
            costs.append((time.process_time() - cpu) / tasks * 1e3)
            walls.append((time.perf_counter() - wall) / tasks * 1e3)
        found[name] = {"cpu_ms": statistics.median(costs), "wall_ms": statistics.median(walls)}
        print(name, found[name], file=sys.stderr)
    return found


def disk_bytes_per_second(folder: Path, size: int = 3 << 30) -> float:
    """Bytes per second of sequential writes to the disk, synced."""
    block = np.random.default_rng(0).bytes(32 << 20)
    path = folder / "raw"
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


class Peak:
    """The most memory of this process of its own (without pages shared with others), looked at
    every few milliseconds."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.idle = self._now()
        self.most = self.idle
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _now(self) -> int:
        return self.process.memory_info().rss

    def _look(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, self._now())

    def stop(self) -> float:
        """MiB above what there was at the beginning."""
        self.over.set()
        self.thread.join()
        return (self.most - self.idle) / MIB


def store(folder: Path, samples: int) -> dict[str, float]:
    """Gradients written by two workers."""
    torch.manual_seed(0)
    model = mlp()
    x, y = data(samples)
    two = shardmap.Ray(workers=2)
    shardmap.vmap(gradient(model), devices=two, out=shardmap.ZarrSink(folder / "warm"))(
        x[:100], y[:100]
    )
    before = disk_bytes_per_second(folder)
    peak = Peak()
    began = time.perf_counter()
    written = shardmap.vmap(
        gradient(model), devices=two, out=shardmap.ZarrSink(folder / "gradients")
    )(x, y)
    seconds = time.perf_counter() - began
    memory = peak.stop()
    after = disk_bytes_per_second(folder)
    size = samples * written.header.row_bytes
    rows = torch.randint(samples, (5,), generator=torch.Generator().manual_seed(1)).tolist()
    for i in rows:  # right as well as fast
        for k, g in enumerate(gradient(model)(x[i], y[i])):
            torch.testing.assert_close(written.read(k, i, i + 1)[0], g, rtol=1e-4, atol=1e-6)
    return {
        "gigabytes": size / 1e9, "seconds": seconds, "rate": size / seconds / 1e6, "disk": (before +
        after) / 2e6, "disk before": before / 1e6, "disk after": after / 1e6, "share": size /
        seconds / ((before + after) / 2), "driver MiB": memory, "units": written.header.units,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The results as text."""
    parts = [
        f"# The Ray executor on one machine\n\n{machine_line(found['machine'])}. `python -m "
        "benchmarks.cluster`."
    ]
    if "speed" in found:
        rows = []
        for row in found["speed"]:
            seconds, small = row["seconds"], row["what"] == "norms"
            marks = [
                verdict(-row[key], -TARGETS[key]) if small else ""
                for key in ("speedup", "against local")
            ]
            rows.append(
                [
                    f"{row['model']}, {row['what']}", f"{row['samples']:,}", *(f"{seconds[k]:.2f}"
                    for k in seconds), f"{row['speedup']:.2f} {marks[0]}", "" if row["ceiling"] is
                    None else f"{row['ceiling']:.2f}", f"{row['against local']:.2f} {marks[1]}",
                ]
            )  # fmt: skip
        header = [
            "",
            "samples",
            "two workers, s",
            "local, two threads, s",
            "one worker, s",
            "one / two (>= 1.7)",
            "plain processes",
        ]
        header.append("local / two (>= 0.85)")
        told = (
            "Medians of interleaved rounds; ratios within one round. Plain processes: the same "
            "ratio for processes without Ray, halves of "
            "the samples each: what the cores and the memory of this machine allow."
        )
        parts.append(f"## Speed\n\n{told}\n\n" + markdown(header, rows))
    if "driver" in found:
        rows = [
            [{"sent": "0.5 MB of samples sent", "read": "samples read by the workers"}[k],
            f"{v['cpu_ms']:.2f}", f"{v['wall_ms']:.2f}",
             f"{TARGETS[k]:g}", verdict(v["cpu_ms"], TARGETS[k])]
            for k, v in found["driver"].items()
        ]  # fmt: skip
        parts.append(
            "## Driver, per task\n\n" + markdown(["", "CPU, ms", "wall, ms", "at most", ""], rows)
        )
    if "store" in found:
        s = found["store"]
        rows = [
            [
                "driver's memory above idle, MiB",
                f"{s['driver MiB']:.0f}",
                "at most 300",
                verdict(s["driver MiB"], TARGETS["memory"]),
            ],
            [
                "rate / the disk's own",
                f"{s['share']:.2f}",
                "at least 0.60",
                verdict(-s["share"], -TARGETS["disk"]),
            ],
        ]
        told = (
            f"{s['gigabytes']:.1f} GB in {s['units']:.0f} units, {s['seconds']:.1f} s, "
            f"{s['rate']:.0f} MB/s; the disk alone "
            f"{s['disk before']:.0f} MB/s before, {s['disk after']:.0f} MB/s after"
        )
        parts.append(f"## Store\n\n{told}.\n\n" + markdown(["", "", "target", ""], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=["speed", "driver", "store", []], help="which; all by default"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--samples", type=int, default=9_400, help="gradients written: 1.08 MB each"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="on the disk that is to be measured",
    )
    parser.add_argument("--save", action="store_true", help="write results/cluster.md and .json")
    options = parser.parse_args()
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=1 << 30,
    )
    parts = options.parts or ["speed", "driver", "store"]
    found: dict[str, Any] = {"machine": machine(("torch", "ray", "zarr"))}
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if "speed" in parts:
            found["speed"] = speed(options.rounds)
        if "driver" in parts:
            found["driver"] = driver(folder)
        if "store" in parts:
            found["store"] = store(folder, options.samples)
    finally:
        shutil.rmtree(folder)
        ray.shutdown()
    text = report(found)
    print(text)
    if options.save:
        write_json(RESULTS / "cluster.json", found)
        (RESULTS / "cluster.md").write_text(text)


if __name__ == "__main__":
    main()
