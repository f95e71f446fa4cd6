"""What a device needs before its first chunk: the lowering, checked; captured tensors, copied.

What no sample changes, computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._torch import storage_id
from shardmap.lower import cache
from shardmap.lower.cache import Lowered
from shardmap.planning import device as devices
from shardmap.planning.cost import Learned
from shardmap.planning.memory import NOTHING, Level, MemoryModel, envelope
from shardmap.planning.observe import Observation, observe
from shardmap.planning.split import Collected, Site
from shardmap.program.ir import Program
from shardmap.run.base import Job
from shardmap.run.gather import wider
from shardmap.trace.record import (
    outer_recordings_suspended,
    recording_settings,
    transforms_set_aside,
)
from shardmap.trace.recording import element

WATCHED_FROM = 4 << 20
"""Bytes of recorded results, all samples together, from which a map is worth watching and
planning; below, it is one chunk."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A program on one device, ready for chunks."""

    low: Lowered
    device: torch.device
    captured: list[torch.Tensor]
    literals: list[torch.Tensor]
    fixed: tuple[torch.Tensor, ...]
    """What no sample changes."""


class Devices:
    """The devices of one call, each made ready once for chunks of one sample and once for several."""

    def __init__(self, job: Job):
        self.job = job
        self._ready: dict[tuple[str, bool], Ready] = {}
        self._held: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        """Captured tensors and literals, by device."""

    def on(self, name: str, several: bool) -> Ready:
        """The device by its name, ready for chunks of one sample, or of several."""
        found = self._ready.get((name, several))
        if found is not None:
            return found
        job, device = self.job, torch.device(name)
        captured, literals = self._tensors(name)
        low = _lowered(job, device, several, captured, literals)
        fixed = low.replay.fixed(device, job.seed, job.recording.scalars, captured, literals)
        found = Ready(low, device, captured, literals, fixed)
        self._ready[name, several] = found
        return found

    def _tensors(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        held = self._held.get(name)
        if held is None:
            job, device = self.job, torch.device(name)
            captured = [captured_to(t, device) for t in job.recording.captured]
            literals = [t.to(device) if t.device == job.home else t for t in job.recording.literals]
            held = self._held[name] = captured, literals
        return held

    def forget(self) -> None:
        """Let go of all tensors."""
        self._ready.clear()
        self._held.clear()


def _lowered(
    job: Job,
    device: torch.device,
    several: bool,
    captured: list[torch.Tensor],
    literals: list[torch.Tensor],
) -> Lowered:
    """The lowering for chunks on a device, tried on the first and the last sample if it is new.

    Leaves no trace of having been tried.
    """
    found = known(job, device, several)
    if found is not None:
        return found
    size = min(2 if several else 1, job.samples)

    def ends() -> list[torch.Tensor]:
        rows = samples_at_the_ends(job, size)
        return [r if r.device == device else to_device(r, device) for r in rows]

    state = torch.default_generator.get_state()
    with (
        torch.no_grad(),
        recording_settings(device.type),
        outer_recordings_suspended(),
        transforms_set_aside(),
    ):
        try:
            return job.lowerings.on(
                device,
                size,
                direct(job, device),
                ends,
                [element(t).detach() for t in captured],
                [element(t) for t in literals],
                job.seed,
            )
        finally:
            torch.default_generator.set_state(state)


def known(job: Job, device: torch.device, several: bool) -> Lowered | None:
    """The lowering for chunks on a device, if there is one already."""
    lowerings = job.lowerings
    if lowerings.instead is not None:
        return lowerings.instead
    size = min(2 if several else 1, job.samples)
    how = lowerings.how(device.type)
    program = job.recording.program
    return cache.known(program, how, lowerings.layout, size, direct(job, device))


def samples_at_the_ends(job: Job, size: int) -> list[torch.Tensor]:
    """The first sample of each input, and of two also the last, with the rows' strides: `[size, *shape]`."""
    last = job.samples - 1
    found = []
    for i, t in enumerate(job.inputs):
        if i in job.columns:
            parts = [job.columns[i].rows_between(0, 1)]
            if size == 2:
                parts.append(job.columns[i].rows_between(last, job.samples))
            found.append(torch.cat(parts))
            continue
        rows = element(t).detach()
        if size == 2:
            strides = (last * rows.stride(0), *rows.stride()[1:])
            found.append(rows.as_strided((2, *rows.shape[1:]), strides, rows.storage_offset()))
        else:
            found.append(rows.narrow(0, 0, size))
    return found


def learned(job: Job, name: str) -> Learned:
    """What earlier chunks of the program have shown on a device."""
    notes = job.lowerings.notes(torch.device(name).type)
    return notes.learned.setdefault(name, Learned())


def captured_to(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A captured tensor on `device`."""
    return t if t.device == device or t.device.type == "meta" else t.to(device)


def there(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows on `device`."""
    return t if t.device == device else to_device(t, device)


def to_device(t: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
    """A copy of `t` on `device` with its strides behind the first dimension.

    Recorded views depend on them.
    """
    repeated = [d for d in range(1, t.dim()) if t.stride(d) == 0 and t.shape[d] > 1]
    compact = t
    for d in repeated:
        compact = compact.narrow(d, 0, 1)
    moved = compact.to(device, non_blocking=non_blocking)
    if moved.stride()[1:] != compact.stride()[1:]:
        least = min((s for s in compact.stride()[1:] if s), default=1)
        if least >= t.shape[0] and t.stride(0) == 1:
            # The samples lie side by side (in_dims other than 0): rows keep their strides in a
            # tensor as large as this one.
            whole = [1, *compact.stride()[1:]]
        else:
            whole = [
                1
                + sum(
                    (n - 1) * s
                    for n, s in zip(compact.shape[1:], compact.stride()[1:], strict=True)
                ),
                *compact.stride()[1:],
            ]
        moved = torch.empty_strided(compact.shape, whole, dtype=t.dtype, device=device).copy_(
            compact, non_blocking=non_blocking
        )
    return moved.expand(t.shape) if repeated else moved


# -- what a chunk costs
# ------------------------------------------------------------------------------------------------


def direct(job: Job, device: torch.device) -> bool:
    """Whether chunks on `device` write their results where they are to be, instead of into memory of their own."""
    here = device.type == "cpu" or devices.accelerated(
        device
    )  # fake devices have memory in name only
    return (
        here
        and not (job.grad or job.transformed)
        and all(o.device == device and not o.dim for o in job.outputs)
    )


def watched(ready: Ready, job: Job) -> Observation:
    """What a chunk costs on this device.

    Found once per lowering, by running two and three samples.
    """
    low, into = ready.low, direct(job, ready.device)
    key = ready.device.type, "into" if into else "remat" if job.remat else "plain"
    found = low.notes.observed.get(key)
    if found is not None:
        return found
    state = torch.default_generator.get_state()
    sizes = [min(2, job.samples), min(3, job.samples)]
    chunk = low.replay.marked(slices=into)
    if into:
        _ = low.replay.chunk_into  # compiled now, so that the run's memory is the run's
    inputs: dict[int, list[torch.Tensor]] = {}
    slices: dict[int, list[torch.Tensor]] = {}
    for size in sizes:
        taken = [there(t.narrow(0, 0, size), ready.device) for t in job.inputs]
        written = job.recording.written_inputs
        inputs[size] = [_copy_of(t) if i in written else t for i, t in enumerate(taken)]
        slices[size] = (
            [
                torch.empty((size, *o.shape), dtype=o.dtype, device=ready.device)
                for o in job.outputs
                if o.sliced
            ]
            if into
            else []
        )

    def run(size: int, mark: Callable[[int], None]) -> Any:
        arguments = (
            size,
            0,
            ready.device,
            job.seed,
            job.recording.scalars,
            ready.fixed,
            list(inputs[size]),
        )
        return chunk(*arguments, slices[size], mark) if into else chunk(*arguments, mark)

    def known(size: int) -> Sequence[torch.Tensor]:
        return [
            *inputs[size],
            *slices[size],
            *ready.captured,
            *ready.literals,
            *ready.fixed,
        ]

    with torch.set_grad_enabled(job.grad and not job.remat):
        try:
            found = observe(low, run, sorted(set(sizes)), known)
        finally:
            torch.default_generator.set_state(state)
    low.notes.observed[key] = found
    return found


def _copy_of(t: torch.Tensor) -> torch.Tensor:
    """Rows that the program may write to, with their strides."""
    return (
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        .copy_(t.detach())
        .requires_grad_(t.requires_grad)
    )


def recorded_bytes(program: Program) -> int:
    """Bytes of all recorded results of one sample: found without running anything."""
    results = [v.spec for eq in program.equations for v in eq.results()]
    return sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in results)


def small(job: Job) -> bool:
    """Whether a map is too small for its memory and its chunks to matter."""
    if job.transformed or not job.samples:
        return True
    read = sum(_row_bytes(job.inputs[i]) for i in job.columns)
    return (read + recorded_bytes(job.recording.program)) * job.samples < WATCHED_FROM


def memory_model(
    ready: Ready, job: Job, seen: Observation, share: int, lanes: int, known: Learned
) -> MemoryModel:
    """The memory of the map on one device.

    Args:
        ready: The program on the device.
        job: The mapped call.
        seen: What a chunk costs.
        share: Samples that the device is expected to compute: what outer autograd saves of them
            stays there.
        lanes: How often the device is named; on an accelerator their chunks are in flight side by
            side.
        known: What earlier chunks have shown.
    """
    device = ready.device
    here = [o for o in job.outputs if o.device == device]
    stacked = sum(o.sample_bytes for o in here if o.stacked)
    held_rows = (
        job.samples if job.unit is None else min(job.samples, job.unit * (lanes + 1))
    )  # of a store: units being put together
    resident = stacked * held_rows
    resident += sum(
        o.sample_bytes * (1 if o.dim is None else held_rows + 1)
        for o in here
        if not o.mapped and o.reduction is None
    )
    resident += sum(
        (1 + wider(o.dtype)) * o.sample_bytes for o in here if o.reduction is not None
    )  # the total, and a chunk's share
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
    extra += Level(
        folds, folds
    )  # pairs combined and put beside each other, while the chunk's results are there
    if direct(job, device):
        extra += Level(0, sum(o.sample_bytes for o in job.outputs if o.sliced and not o.stacked))
    elif accelerated:
        extra += seen.kept  # the chunk before, on its way home
    levels = [level + extra for level in seen.levels]
    if job.remat:
        resident += stacked * job.samples  # the chunks, and what they are concatenated to
    elif job.grad:
        kept = seen.kept
        resident += kept.at(share)
        levels = [
            Level(
                max(0, a.fixed_bytes - kept.fixed_bytes), max(0, a.sample_bytes - kept.sample_bytes)
            )
            for a in levels
        ]
    if accelerated and lanes > 1:
        levels = [Level(lanes * a.fixed_bytes, lanes * a.sample_bytes) for a in levels]
    return MemoryModel(resident, envelope(levels), 1.0 if known.scale is None else known.scale)


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
) -> list[Site]:
    """What is known of each entry of `devices`.

    Args:
        job: The mapped call.
        on: Its devices.
        names: One per lane.
        budget: What the map may add on a device.
        several: Whether chunks have more than one sample.
        always: Whether to look closely also where the map is too small for it to matter.
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
        ready = on.on(name, several)
        seen = watched(ready, job)
        lanes = names.count(name)
        share = -(-job.samples * lanes // len(names))
        found[name] = Site(
            name,
            memory_model(ready, job, seen, share, lanes, known),
            budget(device),
            known,
            job.grad and not job.remat,
            seen,
        )
    return [found[name] for name in names]


def collected(
    job: Job, names: Sequence[str], budget: Callable[[torch.device], int | None]
) -> Collected | None:
    """The results, where they are collected on a device that is not among `names`."""
    elsewhere = [o for o in job.outputs if str(o.device) not in names]
    if not elsewhere or small(job):
        return None
    size = sum(o.sample_bytes * (job.samples if o.stacked else 1) for o in elsewhere) * (
        2 if job.grad else 1
    )
    return Collected(str(elsewhere[0].device), size, budget(elsewhere[0].device))
