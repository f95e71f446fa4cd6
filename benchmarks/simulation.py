"""True if one driver keeps a thousand workers busy: `python -m benchmarks.simulation`.

- schedule: a million chunks on 10, 100, 1,000 and 10,000 simulated workers, some of which die, with
the code that hands out chunks on a
  real cluster (`shardmap.run.schedule`): its own time for each chunk, which must not grow with the
  workers, and that of the whole run.
- driver: what the driver spends on a chunk outside of that code (cutting samples, calling Ray,
taking results in), measured on a Ray of
  this machine with two workers. `--no-ray` leaves it out.
- bottleneck: simulated, how much longer a run takes than with a driver that costs nothing, for
chunks of different length, and the
  shortest one for which that is 5%, if the driver takes 2 ms or 4 ms for each chunk, or what its
  thread took on Ray.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import shardmap
from benchmarks.common import machine, machine_line, markdown, verdict, write_json
from shardmap.run.simulate import Cluster, Outcome, simulate

RESULTS = Path(__file__).parent / "results"
MOST_SECONDS = 20.0
"""For a simulated run of a million chunks."""
MOST_GROWTH = 2.0
"""Largest growth of the schedule's time per chunk from 10 workers to 1,000: its data no longer fit
the fastest cache, and nothing else grows."""
SLOWER = 1.05
"""Than with a driver that costs nothing: from here on it is called a bottleneck."""


def schedule(workers: Sequence[int], chunks: int) -> list[dict[str, Any]]:
    """Runs with deaths: each worker lives for about 300 chunks."""
    rows = []
    for count in workers:
        cluster = Cluster(count, chunk_seconds=0.004 * count, lifetime_seconds=300 * 0.004 * count)
        began = time.perf_counter()
        outcome = simulate(cluster, chunks)
        rows.append(
            {
                "workers": count, "chunks": chunks, "deaths": outcome.deaths, "redone":
                outcome.redone, "schedule_seconds": outcome.schedule_seconds, "real_seconds":
                time.perf_counter() - began,
            }
        )  # fmt: skip
    return rows


def driver(chunks: int) -> list[dict[str, Any]]:
    """Processor time that the driver's process, Ray's threads in it included, spends on a chunk of
    two workers."""
    rows = []
    for elements in (1, 1 << 18):  # of each chunk's sample and result: 4 bytes, 1 MiB
        batch = torch.zeros(chunks, elements)
        mapped = shardmap.vmap(lambda x: x + 1, devices=shardmap.Ray(workers=2), chunk_size=1)
        mapped(batch[:8])  # starts the workers
        began, began_thread = time.process_time(), time.thread_time()
        mapped(batch)
        rows.append(
            {
                "bytes": 4 * elements, "chunks": chunks, "process_seconds": (time.process_time() -
                began) / chunks, "thread_seconds": (time.thread_time() - began_thread) / chunks,
            }
        )  # fmt: skip
    return rows


def long_run(workers: int, chunk_seconds: float, driver_seconds: float) -> Outcome:
    """Workers that are there already, and fifty chunks for each.

    Long enough that the first and the last ones weigh little.
    """
    return simulate(
        Cluster(workers, chunk_seconds, driver_seconds=driver_seconds, start_seconds=0),
        50 * workers,
    )


def slowdown(workers: int, chunk_seconds: float, driver_seconds: float) -> float:
    """Time of a run over that with a driver that costs nothing."""
    return (
        long_run(workers, chunk_seconds, driver_seconds).seconds
        / long_run(workers, chunk_seconds, 0.0).seconds
    )


def shortest(workers: int, driver_seconds: float) -> float:
    """The shortest chunk, in seconds, for which the driver is no bottleneck, within 2%."""
    low, high = 0.0, 4 * workers * driver_seconds
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if slowdown(workers, middle, driver_seconds) <= SLOWER else (middle, high)
        )
    return high


def bottleneck(
    workers: int, driver_seconds: Sequence[float], chunk_seconds: Sequence[float]
) -> list[dict[str, Any]]:
    """Growth of the run time, and load of the driver."""
    return [
        {
            "driver_seconds": spent,
            "runs": [
                {
                    "chunk_seconds": each,
                    "slowdown": slowdown(workers, each, spent),
                    "driver_busy": long_run(workers, each, spent).driver_busy,
                }
                for each in chunk_seconds
            ],
            "shortest_seconds": shortest(workers, spent),
        }
        for spent in driver_seconds
    ]


def judged(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Measurements with a target: the text, the number, and its limit."""
    rows = results["schedule"]
    few, many = (
        next((row["schedule_seconds"] for row in rows if row["workers"] == n), None)
        for n in (10, 1000)
    )
    targets = [
        (
            f"{row['workers']} workers, seconds for {row['chunks']} chunks",
            row["real_seconds"],
            MOST_SECONDS,
        )
        for row in rows
    ]
    if few is not None and many is not None:
        targets.append(
            ("schedule's time per chunk, 1,000 workers over 10", many / few, MOST_GROWTH)
        )
    return targets


def report(results: dict[str, Any]) -> str:
    """The tables."""
    cells = [
        [
            f"{row['workers']:,}", f"{1e6 * row['schedule_seconds']:.2f}",
            f"{row['real_seconds']:.1f}", f"{row['deaths']:,}", f"{row['redone']:,}",
        ]
        for row in results["schedule"]
    ]  # fmt: skip
    chunks = results["schedule"][0]["chunks"]
    parts = [
        f"{chunks:,} chunks through the executor's schedule, simulated",
        markdown(
            ["workers", "schedule, us per chunk", "whole simulation, s", "deaths", "chunks redone"],
            cells,
        ),
    ]
    if results["driver"]:
        cells = [
            [
                f"{row['bytes']:,}",
                f"{1e3 * row['thread_seconds']:.2f}",
                f"{1e3 * row['process_seconds']:.2f}",
            ]
            for row in results["driver"]
        ]
        parts += [
            f"Driver's processor time for each of {results['driver'][0]['chunks']:,} chunks on a "
            "Ray of this machine, two workers",
            markdown(
                ["bytes in and out", "its thread, ms", "with Ray's threads in the process, ms"],
                cells,
            ),
        ]
    rows = results["bottleneck"]
    cells = [
        [
            f"{1e3 * row['driver_seconds']:.2f} ms", *(f"{run['slowdown']:.2f} "
                f"({run['driver_busy']:.0%})" for run in row["runs"]),
            f"{row['shortest_seconds']:.2f} s",
        ]
        for row in rows
    ]  # fmt: skip
    lengths = [f"{run['chunk_seconds']:g} s" for run in rows[0]["runs"]]
    parts += [
        f"{results['workers']:,} workers, simulated: time over that with a driver that costs "
        "nothing, and how busy the driver is, by the "
        "length of a chunk",
        markdown(["driver, per chunk", *lengths, f"shortest for {SLOWER:g}"], cells),
        *(
            f"{name}: {value:.2f} (at most {most:g}): {verdict(value, most)}"
            for name, value, most in judged(results)
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measure, and write the tables; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--schedule-workers", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--workers", type=int, default=1000, help="of the last table")
    parser.add_argument("--driver-ms", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument(
        "--chunk-seconds", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    )
    parser.add_argument("--driver-chunks", type=int, default=1000, help="measured on Ray")
    parser.add_argument("--no-ray", action="store_true", help="measure nothing on Ray")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "simulation",
        help="without ending: .md and .json are written",
    )
    options = parser.parse_args()
    description = machine(("torch", "numpy") if options.no_ray else ("torch", "numpy", "ray"))
    results: dict[str, Any] = {"machine": description, "workers": options.workers}
    results["schedule"] = schedule(options.schedule_workers, options.chunks)
    results["driver"] = [] if options.no_ray else driver(options.driver_chunks)
    spent = sorted(
        {each / 1e3 for each in options.driver_ms}
        | {row["thread_seconds"] for row in results["driver"]}
    )
    results["bottleneck"] = bottleneck(options.workers, spent, options.chunk_seconds)
    text = f"{machine_line(description)}\n\n{report(results)}"
    sys.stdout.write(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), results)
    return int(any(value > most for _, value, most in judged(results)))


if __name__ == "__main__":
    sys.exit(main())
