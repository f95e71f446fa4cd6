"""A lower bound of a map's memory, known before anything has run, compared with a budget.

Trying a lowering and measuring a chunk take memory themselves. One recorded sample tells enough
to refuse a map that cannot fit, and to choose the number of samples for a trial.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch

from shardmap.planning import device as devices
from shardmap.planning.lower_bound import chunk_bound, recorded_peak
from shardmap.planning.memory import Level, MemoryModel
from shardmap.program import analysis
from shardmap.run.base import Job
from shardmap.run.gather import wider

CHEAP_BYTES = 4 << 20
"""Bytes of one sample's recorded results up to which a trial is made even if the map cannot fit: it
takes a moment and next to no memory, and makes the refusal more precise."""
OBSERVED = 2, 3
"""Samples in the measured chunks: two sizes tell fixed bytes from bytes per sample."""


def recorded_bytes(job: Job) -> int:
    """Bytes of all recorded results of one sample: found without running anything."""
    known = job.lowerings.notes(job.home.type).recorded_bytes
    if not known:
        known.append(analysis.recorded_bytes(job.recording.program))
    return known[0]


def direct(job: Job, device: torch.device) -> bool:
    """True if chunks on `device` write their results to where they are collected."""
    # fake devices have memory in name only
    here = device.type == "cpu" or devices.accelerated(device)
    plain = not (job.grad or job.transformed or job.places is not None)
    return here and plain and all(o.device == device and not o.dim for o in job.outputs)


def held_rows(job: Job, lanes: int) -> int:
    """Number of rows of results that are in memory at once.

    All rows, or those of the store's units that are being filled.
    """
    return job.samples if job.unit is None else min(job.samples, job.unit * (lanes + 1))


def stacked_bytes(job: Job, device: torch.device) -> int:
    """Bytes of one sample's results that are stacked on `device`."""
    return sum(o.sample_bytes for o in job.outputs if o.device == device and o.stacked)


def results_bytes(job: Job, device: torch.device, lanes: int) -> int:
    """Bytes of the results that stay on `device` during the whole run."""
    here = [o for o in job.outputs if o.device == device]
    rows = held_rows(job, lanes)
    total = stacked_bytes(job, device) * rows
    total += sum(
        o.sample_bytes * (1 if o.dim is None else rows + 1)
        for o in here
        if not o.mapped and o.reduction is None
    )
    # of a reduction the total, and a chunk's share
    return total + sum(
        (1 + wider(o.dtype)) * o.sample_bytes for o in here if o.reduction is not None
    )


class Results(TypedDict):
    """The fields of `MemoryModel` about the bytes of the stacked results.

    Also the bytes that they would take with `out=` and with `reduce=`.
    """

    result_bytes: int
    stacked_bytes: int
    stored_bytes: int | None
    reduced_bytes: int | None


def stacked_results(job: Job, device: torch.device, lanes: int) -> Results:
    """The bytes of stacked results, and those that `out=` and `reduce=` would keep in memory."""
    each = stacked_bytes(job, device)
    stored = None
    if job.unit is None and not job.grad:
        stored = each * min(job.samples, lanes + 1)
    wide = max([1 + wider(o.dtype) for o in job.outputs if o.stacked], default=1)
    return {
        "result_bytes": each,
        "stacked_bytes": each * held_rows(job, lanes),
        "stored_bytes": stored,
        "reduced_bytes": each * wide if job.unit is None else None,
    }


def least_memory(job: Job, device: torch.device, lanes: int, scale: float | None) -> MemoryModel:
    """Lower bound of the memory that a map needs on a device, found without running anything.

    Args:
        job: The mapped call.
        device: The device that computes it.
        lanes: Number of entries of `devices` that name the device.
        scale: Measured bytes of chunks over those of their tensors, if any have run.
    """
    each = stacked_bytes(job, device)
    kept = each * job.samples if job.remat else 0
    one = _chunk_bound(job, device)
    return MemoryModel(
        results_bytes(job, device, lanes) + kept,
        (Level(0, one),),
        1.0 if scale is None else scale,
        bound=True,
        loose=Level(0, each if _counted_elsewhere(job, device) else 0),
        kept_bytes=kept,
        kept_results_bytes=kept,
        batch_bytes=kept + (each * job.samples if job.unit is None else 0),
        **stacked_results(job, device, lanes),
    )


def _counted_elsewhere(job: Job, device: torch.device) -> bool:
    """True if the results of a chunk are counted with those of the whole run."""
    return direct(job, device) or job.grad


def _chunk_bound(job: Job, device: torch.device) -> int:
    batched = job.lowerings.outline(device.type)
    observed = job.lowerings.notes(device.type).observed
    here = [k for k, o in enumerate(job.outputs) if o.device == device and o.stacked]
    elsewhere = tuple(here) if _counted_elsewhere(job, device) else ()
    key = "least", elsewhere
    kept = observed.get(key)
    if kept is None or kept[0] is not batched:
        kept = batched, chunk_bound(job.recording.program, batched, elsewhere)
        observed[key] = kept
    return kept[1]


def trial_affordable(job: Job, device: torch.device, size: int, budget_bytes: int | None) -> bool:
    """True if a trial of the lowering on `size` samples stays within a budget."""
    if budget_bytes is None:
        return True
    outputs = job.lowerings.outline(device.type).outputs
    results = sum(v.numel * v.dtype.itemsize for v in outputs)
    each = _recorded_peak(job, device) + _sent_bytes(job) + 2 * results  # compared in copies
    return MemoryModel(0, (Level(0, each),)).peak_bytes(size) <= budget_bytes


def hopeless(job: Job, device: torch.device, least: MemoryModel, budget_bytes: int | None) -> bool:
    """True if a map is refused before anything is tried.

    The least that it needs exceeds the budget, and trying it would take time or memory.
    """
    if budget_bytes is None or least.peak_bytes(1) <= budget_bytes:
        return False
    return _recorded_peak(job, device) + _sent_bytes(job) > CHEAP_BYTES


def observed_sizes(job: Job, device: torch.device, budget_bytes: int | None) -> list[int]:
    """Numbers of samples in the chunks that are measured, as far as a budget allows.

    One sample is always measured: recording it has taken as much.
    """
    full = sorted({min(size, job.samples) for size in OBSERVED})
    if budget_bytes is None:
        return full
    each = _chunk_bound(job, device) + _sent_bytes(job)
    each += sum(o.sample_bytes for o in job.outputs if o.sliced)
    model = MemoryModel(0, (Level(0, each),))
    fitting = [size for size in range(1, full[-1] + 1) if model.peak_bytes(size) <= budget_bytes]
    return full if len(fitting) == full[-1] else (fitting[-2:] or [1])


def _recorded_peak(job: Job, device: torch.device) -> int:
    observed = job.lowerings.notes(device.type).observed
    found = observed.get("recorded")
    if found is None:
        found = observed["recorded"] = recorded_peak(job.recording.program)
    return found


def _sent_bytes(job: Job) -> int:
    """Bytes of one sample."""
    return sum(math.prod(t.shape[1:]) * t.element_size() for t in job.inputs)
