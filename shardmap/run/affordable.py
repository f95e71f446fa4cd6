"""The part of a map's memory that is known before anything has run, set against a budget.

Trying a lowering and watching a chunk take memory themselves. What one recorded sample shows is
enough to refuse a map that cannot fit, and to choose on how many samples trying is affordable.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch

from shardmap.planning import device as devices
from shardmap.planning.lower_bound import chunk_bound, recorded_peak
from shardmap.planning.memory import Level, MemoryModel
from shardmap.run.base import Job
from shardmap.run.gather import wider

CHEAP_BYTES = 4 << 20
"""Of recorded results of one sample: up to there trying takes a moment and next to no memory, and
the refusal can say more."""
OBSERVED = 2, 3
"""Samples in the chunks that are watched: two sizes tell fixed bytes from bytes per sample."""


def direct(job: Job, device: torch.device) -> bool:
    """Whether chunks on `device` write their results to where they are collected."""
    # fake devices have memory in name only
    here = device.type == "cpu" or devices.accelerated(device)
    plain = not (job.grad or job.transformed or job.places is not None)
    return here and plain and all(o.device == device and not o.dim for o in job.outputs)


def held_rows(job: Job, lanes: int) -> int:
    """Rows of results that are in memory at once.

    All, or those of a store's units in the making.
    """
    return job.samples if job.unit is None else min(job.samples, job.unit * (lanes + 1))


def stacked_bytes(job: Job, device: torch.device) -> int:
    """Bytes of one sample's results among those that are stacked on `device`."""
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
    """The fields of `MemoryModel` that say what the stacked results take.

    And could take instead.
    """

    result_bytes: int
    stacked_bytes: int
    stored_bytes: int | None
    reduced_bytes: int | None


def stacked_results(job: Job, device: torch.device, lanes: int) -> Results:
    """The bytes of stacked results, and what would stay of them with `out=` and with `reduce=`."""
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
    """The least that a map needs on a device, found without running anything.

    Args:
        job: The mapped call.
        device: Where it is to be computed.
        lanes: How often the device is named.
        scale: What chunks were measured to need over what their tensors say, if any have run.
    """
    resident = results_bytes(job, device, lanes)
    if job.remat:
        resident += stacked_bytes(job, device) * job.samples
    one = _chunk_bound(job, device)
    return MemoryModel(
        resident,
        (Level(0, one),),
        1.0 if scale is None else scale,
        bound=True,
        **stacked_results(job, device, lanes),
    )


def _chunk_bound(job: Job, device: torch.device) -> int:
    batched = job.lowerings.outline(device.type)
    observed = job.lowerings.notes(device.type).observed
    here = [k for k, o in enumerate(job.outputs) if o.device == device and o.stacked]
    elsewhere = tuple(here) if direct(job, device) or job.grad else ()
    key = "least", elsewhere
    kept = observed.get(key)
    if kept is None or kept[0] is not batched:
        kept = batched, chunk_bound(job.recording.program, batched, elsewhere)
        observed[key] = kept
    return kept[1]


def trial_affordable(job: Job, device: torch.device, size: int, budget_bytes: int | None) -> bool:
    """Whether trying the lowering on `size` samples, value by value, stays within a budget."""
    if budget_bytes is None:
        return True
    outputs = job.lowerings.outline(device.type).outputs
    results = sum(v.numel * v.dtype.itemsize for v in outputs)
    each = _recorded_peak(job, device) + _sent_bytes(job) + 2 * results  # compared in copies
    return MemoryModel(0, (Level(0, each),)).peak_bytes(size) <= budget_bytes


def hopeless(job: Job, device: torch.device, least: MemoryModel, budget_bytes: int | None) -> bool:
    """Whether a map is to be refused before anything is tried.

    The least that it needs exceeds the budget, and trying it would take time or memory.
    """
    if budget_bytes is None or least.peak_bytes(1) <= budget_bytes:
        return False
    return _recorded_peak(job, device) + _sent_bytes(job) > CHEAP_BYTES


def observed_sizes(job: Job, device: torch.device, budget_bytes: int | None) -> list[int]:
    """Numbers of samples in the chunks that are watched, as far as a budget allows.

    One sample is always watched: recording it has taken as much.
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
