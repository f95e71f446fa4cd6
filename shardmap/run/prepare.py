"""What a device needs before its first chunk: the lowering, checked; captured tensors, copied.

What no sample changes, computed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._threads import default_generator_states, restore_default_generators
from shardmap.lower import cache
from shardmap.lower.cache import Lowered
from shardmap.planning import device as devices
from shardmap.planning.cost import Learned
from shardmap.planning.memory import NOTHING, Level, MemoryModel, envelope
from shardmap.planning.observe import Observation, observe
from shardmap.planning.split import Collected, Site
from shardmap.program.ir import Program
from shardmap.run.affordable import (
    direct,
    hopeless,
    least_memory,
    observed_sizes,
    results_bytes,
    stacked_bytes,
    stacked_results,
    trial_affordable,
)
from shardmap.run.base import Job
from shardmap.trace.record import (
    outer_recordings_suspended,
    transforms_set_aside,
)
from shardmap.trace.recording import element

logger = logging.getLogger("shardmap")

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

    def __init__(
        self, job: Job, budget: Callable[[torch.device], int | None] = lambda device: None
    ):
        self.job = job
        self.budget = budget
        """What the call may add on a device: trying the lowering stays within it."""
        self._ready: dict[tuple[str, bool, bool], Ready] = {}
        self._held: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        """Captured tensors and literals, by device."""

    def on(self, name: str, several: bool, slices: bool | None = None) -> Ready:
        """The device by its name, ready for chunks of one sample, or of several.

        Args:
            name: The device.
            several: Whether chunks have more than one sample.
            slices: Whether their results may be computed into slices of the whole; by default where
                that can be.
        """
        job, device = self.job, torch.device(name)
        if slices is None:
            slices = direct(job, device)
        key = name, several, slices
        found = self._ready.get(key)
        if found is not None:
            return found
        captured, literals = self._tensors(name)
        low = _lowered(job, device, several, slices, captured, literals, self.budget(device))
        fixed = low.replay.fixed(device, job.seed, job.recording.scalars, captured, literals)
        found = self._ready[key] = Ready(low, device, captured, literals, fixed)
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
    slices: bool,
    captured: list[torch.Tensor],
    literals: list[torch.Tensor],
    budget_bytes: int | None,
) -> Lowered:
    """The lowering for chunks on a device, tried on the first and the last sample if it is new.

    Leaves no trace of having been tried.
    """
    found = known(job, device, several, slices)
    if found is not None:
        return found
    if several and not trial_affordable(job, device, 2, budget_bytes):
        return _lowered(job, device, False, slices, captured, literals, None)
    other = known(job, device, several, not slices)  # found what is needed to give the right values
    size = min(2 if several else 1, job.samples)

    def ends() -> list[torch.Tensor]:
        rows = samples_at_the_ends(job, size)
        return [r if r.device == device else to_device(r, device) for r in rows]

    states = default_generator_states(device)
    with (
        torch.no_grad(),
        outer_recordings_suspended(),
        transforms_set_aside(),
    ):
        try:
            return job.lowerings.on(
                device,
                size,
                slices,
                ends,
                [element(t).detach() for t in captured],
                [element(t) for t in literals],
                job.seed,
                None if other is None else other.fixes,
            )
        finally:
            restore_default_generators(states)


def known(job: Job, device: torch.device, several: bool, slices: bool) -> Lowered | None:
    """The lowering for chunks on a device, if there is one already."""
    lowerings = job.lowerings
    if lowerings.instead is not None:
        return lowerings.instead
    size = min(2 if several else 1, job.samples)
    how = lowerings.how(device.type)
    program, layout = job.recording.program, lowerings.layout
    found = cache.known(program, how, layout, size, slices)
    # One that was tried on slices too serves where none are.
    return found if found is not None or slices else cache.known(program, how, layout, size, True)


def tried(job: Job, device: torch.device, several: bool) -> Lowered | None:
    """A lowering for chunks on a device whose values have been compared, if there is one."""
    return known(job, device, several, False) or known(job, device, several, True)


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


def watched(ready: Ready, job: Job, budget_bytes: int | None = None) -> Observation:
    """What a chunk costs on this device.

    Found once per lowering, by running two and three samples, or fewer where the budget is small.
    """
    low, into = ready.low, direct(job, ready.device)
    how = ready.device.type, "into" if into else "remat" if job.remat else "plain"
    found = low.notes.observed.get((*how, 2))
    if found is not None:
        return found
    sizes = observed_sizes(job, ready.device, budget_bytes)
    key = (*how, len(sizes))
    found = low.notes.observed.get(key)
    if found is not None:
        return found
    states = default_generator_states(ready.device)
    chunk = low.replay.marked(slices=into)
    if into:
        _ = low.replay.chunk_into  # compiled now, so that the run's memory is the run's
    inputs: dict[int, list[torch.Tensor]] = {}
    slices: dict[int, list[torch.Tensor]] = {}

    def take(size: int) -> None:
        """Make ready a chunk of that many samples, and let go of the one before."""
        inputs.clear()
        slices.clear()
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
        take(size)
        return [
            *inputs[size],
            *slices[size],
            *ready.captured,
            *ready.literals,
            *ready.fixed,
        ]

    with torch.set_grad_enabled(job.grad and not job.remat):
        try:
            found = observe(low, run, sizes, known)
        finally:
            restore_default_generators(states)
    if job.grad and not job.recording.written_inputs:
        backward = _with_backward(ready, job, sizes)
        if backward is not None:
            found = dataclasses.replace(found, backward=backward.levels)
    low.notes.observed[key] = found
    return found


def _with_backward(ready: Ready, job: Job, sizes: Sequence[int]) -> Observation | None:
    """What a chunk costs whose gradients are computed at once, as `remat=True` does in backward.

    Of leaves of its own that share memory with the call's tensors: nothing reaches the caller's
    graph. None where a derivative raises an error: whoever asks for it will see that.
    """
    low, recording = ready.low, job.recording
    captured = [t.detach().requires_grad_(t.requires_grad) for t in ready.captured]
    chunk = low.replay.marked(slices=False)
    states = default_generator_states(ready.device)
    inputs: list[torch.Tensor] = []

    def known(size: int) -> Sequence[torch.Tensor]:
        inputs[:] = [
            there(t.narrow(0, 0, size), ready.device).detach().requires_grad_(t.requires_grad)
            for t in job.inputs
        ]
        return [*inputs, *captured, *ready.literals, *fixed]

    def run(size: int, mark: Callable[[int], None]) -> Any:
        arguments = (size, 0, ready.device, job.seed, recording.scalars, fixed, list(inputs))
        outs = chunk(*arguments, mark)
        leaves = [t for t in (*inputs, *captured) if t.requires_grad]
        roots = [t for t in outs if isinstance(t, torch.Tensor) and t.requires_grad]
        if not roots or not leaves:
            return outs
        ones = [torch.ones_like(t) for t in roots]
        # the graph is kept for what is made once for all chunks; theirs dies with `outs`
        gradients = torch.autograd.grad(roots, leaves, ones, retain_graph=True, allow_unused=True)
        return outs, gradients

    with torch.enable_grad():
        try:
            fixed = low.replay.fixed(
                ready.device, job.seed, recording.scalars, captured, ready.literals
            )
            return observe(low, run, sizes, known)
        except RuntimeError as error:
            logger.info("%s: the backward pass cannot be watched: %s", job.call, error)
            return None
        finally:
            restore_default_generators(states)


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
    stacked = stacked_bytes(job, device)
    resident = results_bytes(job, device, lanes)
    resident += sum(
        _bytes(t)
        for t, there in zip(ready.captured, job.recording.captured, strict=True)
        if t is not there
    )
    held = {t.untyped_storage()._cdata for t in (*ready.captured, *ready.literals)}
    fresh = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in ready.fixed}
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
    # glibc keeps what backward frees among what stays: 8 layers of 512 in chunks of 2.7 MB took
    # 2.4 times their tensors with remat=True and 1.24 times without
    gaps = 2.5 if job.remat and device.type == "cpu" else 1.25
    backward = [
        Level(int(a.fixed_bytes * gaps), int(a.sample_bytes * gaps)) + extra for a in seen.backward
    ]
    if job.grad:
        # gradients add up beside those of the chunk; the slices of a batch that requires grad are
        # filled up with zeros to its size, and added
        resident += sum(_bytes(t) for t in ready.captured if t.requires_grad)
        resident += 2 * sum(_bytes(t) for t in job.inputs if t.requires_grad)
    if job.remat:
        resident += stacked * job.samples  # the chunks, and what they are concatenated to
    elif job.grad:
        kept = seen.kept
        resident += kept.at(share)
        levels = [_beside(kept, a) for a in levels]
        backward = [_beside(kept, a) for a in backward]
    if accelerated and lanes > 1:
        levels = [Level(lanes * a.fixed_bytes, lanes * a.sample_bytes) for a in levels]
    return MemoryModel(
        resident,
        envelope(levels),
        1.0 if known.scale is None else known.scale,
        backward=envelope(backward) if backward else (),
        **stacked_results(job, device, lanes),
    )


def _beside(kept: Level, level: Level) -> Level:
    """A level without what stays of each chunk, which is counted for all of them together."""
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
        lanes, room = names.count(name), budget(device)
        least = least_memory(job, device, lanes, known.scale)
        if hopeless(job, device, least, room):
            # trying it, or watching a chunk, would break the budget by itself
            found[name] = Site(name, least, room, known, job.grad and not job.remat, None)
            continue
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
