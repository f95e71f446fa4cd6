"""The plan of a run on this machine, and a forecast for a cluster, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardmap.call.options import MapOptions
from shardmap.call.planned import Plan
from shardmap.errors import ConfigError, RaggedError
from shardmap.jobs import tasks
from shardmap.jobs.config import BoundRun, RunConfig
from shardmap.jobs.folder import RESULTS
from shardmap.jobs.parts import Parts, check_machine, load_parts, map_options
from shardmap.jobs.reproducible import one_seed
from shardmap.planning.forecast import Forecast, Workload, forecast
from shardmap.planning.memory import format_bytes
from shardmap.run.storing import unit_of

MEASURED_SECONDS = 1.0
"""Approximate computing time of a measurement, by the guess that it replaces."""
MEASURED_BYTES = 256 << 20
"""The most bytes of results that a measurement keeps."""


def plan(
    run: BoundRun,
    *,
    workers: int | None = None,
    measure: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, Forecast | None]:
    """Plan a run's map for this machine's devices, and forecast it for a cluster of such machines.

    Data and model are made as for the run; the map computes at most three samples, or some
    seconds' worth for a measurement.

    Args:
        run: The configuration with its import paths resolved.
        workers: Number of workers to forecast for; by default the configuration's, if it names
            Ray's.
        measure: True to compute some samples, so that the seconds are measured.
        say: Receives the plan and the forecast.

    Raises:
        ConfigError: The configuration does not fit the data.
    """
    workers = workers or run.config.workers
    config = (
        dataclasses.replace(run.config, devices="auto", workers=None)
        if run.config.devices == "ray"
        else run.config
    )
    options = map_options(dataclasses.replace(run, config=config))
    check_machine(config)
    with one_seed(config.seed):
        parts = load_parts(run, say)
        try:
            planned = tasks.planned(parts, config, options)
        except RaggedError as error:
            raise ConfigError(f"function: {error}") from error
        if measure and planned.samples:
            _measure(planned, parts, config, options)
            planned = tasks.planned(parts, config, options)
    say(str(planned))
    if run.config.stored:
        say(_to_store(planned, config))
    if run.config.devices == "ray" and workers is None:
        say(
            "The plan is of this machine: how many workers Ray has is known when it runs; "
            "--workers N forecasts for N of them."
        )
    if workers is None:
        return planned, None
    found = forecast(_workload(planned, config, workers, run.config.store is not None), workers)
    say(f"\n{found}")
    return planned, found


def _measure(planned: Plan, parts: Parts, config: RunConfig, options: MapOptions) -> None:
    """Compute some samples, so that the next plan has their measured time."""
    most = MEASURED_BYTES // max(1, sum(o.sample_bytes for o in planned.job.outputs))
    rows = max(
        2,
        min(
            int(MEASURED_SECONDS * planned.samples / max(planned.seconds, 1e-9)),
            most,
            planned.samples,
        ),
    )
    tasks.planned(parts.between(0, rows), config, options).run()


def _workload(planned: Plan, config: RunConfig, workers: int, stored: bool) -> Workload:
    job, samples = planned.job, planned.samples
    jobs = job.parts or (job,)
    recording = job.recording
    captured = sum(t.nbytes for t in (*recording.captured, *recording.literals))
    given = sum(one.samples * sum(t[:1].nbytes for t in one.inputs) for one in jobs)
    programs = sum(len(one.recording.program.dumps().encode()) for one in jobs)
    return Workload(
        samples=samples,
        sample_bytes=given // max(1, samples),
        result_bytes=sum(o.sample_bytes for o in job.outputs),
        program_bytes=programs + captured,
        sample_seconds=planned.seconds / max(1, samples),
        measured=all(lane.measured for lane in planned.lanes),
        chunk_size=config.chunk_size,
        reduced=config.reduce is not None,
        unit_rows=None if not stored else unit_of(job, config.chunk_size, None, workers),
        unit_objects=1 if config.store_kind == "safetensors" else len(job.outputs),
    )


def _to_store(planned: Plan, config: RunConfig) -> str:
    unit = unit_of(planned.job, config.chunk_size, None)
    row = sum(o.sample_bytes for o in planned.job.outputs)
    units = -(-planned.samples // unit)
    held = min(planned.samples, unit * (len(planned.lanes) + 1))
    place = config.store or f"{RESULTS} in the run folder"
    each, most, whole = (format_bytes(rows * row) for rows in (unit, held, planned.samples))
    return (
        f"\nOutputs go to {place}, {units} units of {unit} rows, {each} each: memory holds {most} "
        "of them at most, where the table "
        f"counts all {whole}."
    )
