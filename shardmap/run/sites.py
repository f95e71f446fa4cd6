"""Facts for the planner about each device.

They are the map's memory there, its budget, and measurements of earlier runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from shardmap._torch import storage_id
from shardmap.planning import device as devices
from shardmap.planning.memory import NOTHING, Level, MemoryModel, envelope
from shardmap.planning.observe import Observation
from shardmap.planning.speeds import Learned
from shardmap.planning.split import Collected, Site
from shardmap.run import graphed
from shardmap.run.affordable import (
    direct,
    hopeless,
    least_memory,
    recorded_bytes,
    results_bytes,
    stacked_bytes,
    stacked_results,
)
from shardmap.run.base import Job
from shardmap.run.prepare import Devices, Ready, learned
from shardmap.run.watch import before_trial, watched

SUMS = ("sum", "mean")
"""Reductions whose derivatives read nothing of what they combine."""
WATCHED_FROM = 4 << 20
"""Bytes of all samples' recorded results from which a map is measured and planned; below, it is one
chunk."""


def small(job: Job) -> bool:
    """True if a map is too small for its memory and its chunks to matter."""
    if job.transformed or not job.samples:
        return True
    read = sum(_row_bytes(job.inputs[i]) for i in job.columns)
    return (read + recorded_bytes(job)) * job.samples < WATCHED_FROM


def memory_model(
    ready: Ready, job: Job, seen: Observation, share: int, lanes: int, known: Learned
) -> MemoryModel:
    """The memory of the map on one device.

    Args:
        ready: The program on the device.
        job: The mapped call.
        seen: Cost of a chunk.
        share: Samples that the device is expected to compute: activations that outer autograd saves
            for them stay there.
        lanes: Entries that name the device; on an accelerator their chunks are in flight side by
            side.
        known: Measurements of earlier chunks.
    """
    device = ready.device
    each = stacked_bytes(job, device)
    resident = results_bytes(job, device, lanes)
    growing = each if job.unit is None else 0  # with each sample of the batch
    resident += sum(
        _bytes(t)
        for t, there in zip(ready.captured, job.recording.captured, strict=True)
        if t is not there
    )
    held = {storage_id(t.untyped_storage()) for t in (*ready.captured, *ready.literals)}
    fresh = {storage_id(t.untyped_storage()): t.untyped_storage().nbytes() for t in ready.fixed}
    resident += sum(size for key, size in fresh.items() if key not in held)
    moved = sum(
        _row_bytes(t) for i, t in enumerate(job.inputs) if t.device != device or i in job.columns
    )
    accelerated = devices.accelerated(device)
    extra = Level(
        0, moved * (2 if accelerated else 1)
    )  # an accelerator gets the next chunk's samples while it computes
    folds = sum(
        o.sample_bytes
        for o in job.outputs
        if o.reduction is not None and o.reduction.name == "fold"
    )
    extra += Level(folds, folds)  # combined and concatenated pairs, while the chunk's results exist
    loose = Level(0, 0)
    if direct(job, device):
        loose = Level(each, each)
        extra += Level(0, sum(o.sample_bytes for o in job.outputs if o.sliced and not o.stacked))
    elif accelerated:
        extra += seen.kept  # the chunk before, while it is copied to the result
    levels = [level + extra for level in seen.levels]
    # glibc keeps memory that backward frees between live blocks: 8 layers of 512 in chunks of 2.7
    # MB took 2.4 times their tensors with remat=True and 1.24 times without
    remat_gaps = 2.5 if device.type == "cpu" else 1.25
    gaps = remat_gaps if job.remat else 1.25
    backward = [_scaled(a, gaps) + extra for a in seen.backward]
    if job.cuda_graphs and not graphed.refusal(job, ready.low):
        # the graph's pool beside chunks that are warmed up, in flight or the last, smaller one;
        # copies of what it reads
        rows = sum(_row_bytes(t) for t in job.inputs)
        levels = [level + level + Level(0, rows) for level in levels]
        resident += sum(fresh.values())
    if job.grad:
        # gradients add up beside those of the chunk; the slices of a batch that requires grad are
        # filled up with zeros to its size, and added
        resident += sum(_bytes(t) for t in ready.captured if t.requires_grad)
        resident += 2 * sum(_bytes(t) for t in job.inputs if t.requires_grad)
        growing += 2 * sum(_row_bytes(t) for t in job.inputs if t.requires_grad)
    kept, kept_results, growing_share, again = 0, 0, 0, ()
    if job.remat:
        kept = kept_results = each * job.samples  # the chunks, and their concatenation
        growing += each
    elif job.grad:
        # a sum keeps nothing of the results that it adds
        added = all(o.reduction is not None and o.reduction.name in SUMS for o in job.outputs)
        left = seen.saved if added else seen.kept
        kept, growing_share = left.at(share), left.sample_bytes * share
        kept_results = kept - min(kept, seen.saved.at(share))
        if not (job.recording.written_inputs or seen.backward_unknown):
            again = envelope([*levels, *[_scaled(a, remat_gaps) + extra for a in seen.backward]])
        loose += _beside(seen.saved, left)
        levels = [_beside(left, a) for a in levels]
        backward = [_beside(left, a) for a in backward]
    resident += kept
    if accelerated and lanes > 1:
        levels = [Level(lanes * a.fixed_bytes, lanes * a.sample_bytes) for a in levels]
    return MemoryModel(
        resident,
        envelope(levels),
        1.0 if known.scale is None else known.scale,
        backward=envelope(backward) if backward else (),
        loose=loose,
        kept_bytes=kept,
        kept_results_bytes=kept_results,
        again=again,
        batch_bytes=growing * job.samples + growing_share,
        **stacked_results(job, device, lanes),
    )


def _scaled(level: Level, factor: float) -> Level:
    return Level(int(level.fixed_bytes * factor), int(level.sample_bytes * factor))


def _beside(kept: Level, level: Level) -> Level:
    """A level without the bytes that each chunk leaves behind, which are counted together."""
    return Level(
        max(0, level.fixed_bytes - kept.fixed_bytes), max(0, level.sample_bytes - kept.sample_bytes)
    )


def _bytes(t: torch.Tensor) -> int:
    return math.prod(t.shape) * t.element_size()


def _row_bytes(t: torch.Tensor) -> int:
    return math.prod(t.shape[1:]) * t.element_size()


def sites(
    job: Job,
    on: Devices,
    names: Sequence[str],
    budget: Callable[[torch.device], int | None],
    several: bool,
    always: bool,
    untried: bool = False,
) -> list[Site]:
    """The facts about each device that `names` names.

    Args:
        job: The mapped call.
        on: Its devices.
        names: One per lane.
        budget: Bytes that the map may add on a device.
        several: True if chunks have more than one sample.
        always: True to measure even a map that is too small for it to matter.
        untried: True if lowerings may be measured before they are tried; `Devices.changed` tries
            them afterwards.
    """
    found: dict[str, Site] = {}
    for name in names:
        if name in found:
            continue
        device = torch.device(name)
        known = learned(job, name)
        if job.transformed or not job.samples or (small(job) and not always):
            found[name] = Site(name, NOTHING, None, known, False, None)
            continue
        lanes, room = names.count(name), budget(device)
        if room is not None and job.cuda_graphs:
            room += graphed.held_bytes(device)  # else each run would plan smaller chunks
        least = least_memory(job, device, lanes, known.scale)
        if hopeless(job, device, least, room):
            # a trial, or a measured chunk, would exceed the budget by itself
            found[name] = Site(name, least, room, known, job.grad and not job.remat, None)
            continue
        if untried:
            ready, seen = before_trial(on, name, several, room)
        else:
            ready = on.on(name, several)
            seen = watched(ready, job, room)
        share = -(-job.samples * lanes // len(names))
        found[name] = Site(
            name,
            memory_model(ready, job, seen, share, lanes, known),
            room,
            known,
            job.grad and not job.remat,
            seen,
            probing=_alike(job) and not torch.are_deterministic_algorithms_enabled(),
            unit=job.unit,
        )
    return [found[name] for name in names]


def _alike(job: Job) -> bool:
    """True if all samples take the same calls, so that chunks of them can be compared by time."""
    return not (job.bounds or job.parts or job.lowerings.instead is not None)


def collected(
    job: Job, names: Sequence[str], budget: Callable[[torch.device], int | None]
) -> Collected | None:
    """The results, if they are collected on a device that is not among `names`; else None."""
    elsewhere = [o for o in job.outputs if str(o.device) not in names]
    if not elsewhere or small(job):
        return None
    size = sum(o.sample_bytes * (job.samples if o.stacked else 1) for o in elsewhere) * (
        2 if job.grad else 1
    )
    device = elsewhere[0].device
    return Collected(str(device), size, budget(device), job.grad)
