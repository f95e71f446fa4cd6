"""Preparation of a device for its first chunk.

The lowering is checked, captured tensors are copied, and values that do not depend on the sample
are computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shardmap._threads import default_generator_states, restore_default_generators
from shardmap.lower import cache
from shardmap.lower.cache import Lowered
from shardmap.planning.speeds import Learned
from shardmap.program.schema import span
from shardmap.rules.philox import counted
from shardmap.run.affordable import (
    direct,
    trial_affordable,
)
from shardmap.run.base import Job
from shardmap.trace.batch import recorded_part
from shardmap.trace.record import (
    outer_recordings_suspended,
    transforms_set_aside,
)
from shardmap.trace.recording import element, is_empty_outside
from shardmap.trace.traced import tracing_aside

logger = logging.getLogger("shardmap")


@dataclass(frozen=True, slots=True)
class Ready:
    """A program on one device, ready for chunks."""

    low: Lowered
    device: torch.device
    captured: list[torch.Tensor]
    literals: list[torch.Tensor]
    fixed: tuple[torch.Tensor, ...]
    """Values that do not depend on the sample."""


class Devices:
    """The devices of one call, each made ready for chunks of one sample and of several."""

    def __init__(
        self, job: Job, budget: Callable[[torch.device], int | None] = lambda device: None
    ):
        self.job = job
        self.budget = budget
        """Bytes that the call may add on a device: a trial of the lowering stays within it."""
        self._ready: dict[tuple[str, bool, bool], Ready] = {}
        self._held: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        """Captured tensors and literals of each device."""
        self._untried: set[str] = set()
        """Devices whose chunks were measured by a lowering that no trial has compared."""

    def on(self, name: str, several: bool, slices: bool | None = None) -> Ready:
        """The device by its name, ready for chunks of one sample, or of several.

        Args:
            name: The device.
            several: True if chunks have more than one sample.
            slices: True if results may be computed into slices of the whole; by default where
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
        low = _lowered(job, device, several, slices, captured, literals, self.budget)
        # Plans, and calls that are kept for later ones, come here in the caller's mode. Without
        # outer gradients nothing may require one: some operators refuse it, as `scale` of a fake
        # quantisation does where the function passed a detached tensor.
        with torch.set_grad_enabled(job.grad and torch.is_grad_enabled()):
            fixed = low.replay.fixed(device, job.seed, job.recording.scalars, captured, literals)
        found = self._ready[key] = Ready(low, device, captured, literals, fixed)
        return found

    def untried(self, name: str) -> Ready:
        """The device with the lowering as the rules make it, to measure a chunk before a trial."""
        job, device = self.job, torch.device(name)
        captured, literals = self._tensors(name)
        low = job.lowerings.untried(device)
        with torch.no_grad():
            fixed = low.replay.fixed(device, job.seed, job.recording.scalars, captured, literals)
        self._untried.add(name)
        return Ready(low, device, captured, literals, fixed)

    def changed(self, sizes: Mapping[str, int]) -> bool:
        """Try what was measured untried; True if that changed a lowering, to be measured again.

        Args:
            sizes: Samples in a chunk, by device.
        """
        names = self._untried & sizes.keys()
        self._untried.clear()
        found = [self.on(name, sizes[name] > 1) for name in sorted(names)]
        wrong = [ready for ready in found if ready.low.fixes != self.job.lowerings.fixes]
        for ready in wrong:
            ready.low.notes.observed.clear()
        return bool(wrong)

    def _tensors(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        held = self._held.get(name)
        if held is None:
            job, device = self.job, torch.device(name)
            captured = [captured_to(t, device) for t in job.recording.captured]
            literals = [t.to(device) if t.device == job.home else t for t in job.recording.literals]
            held = self._held[name] = captured, literals
        return held

    def forget(self) -> None:
        """Drop all tensors."""
        self._ready.clear()
        self._held.clear()


def _lowered(
    job: Job,
    device: torch.device,
    several: bool,
    slices: bool,
    captured: list[torch.Tensor],
    literals: list[torch.Tensor],
    budget: Callable[[torch.device], int | None],
) -> Lowered:
    """The lowering for chunks on a device, tried on the first and the last sample if it is new.

    The trial leaves no trace.
    """
    found = known(job, device, several, slices)
    if found is not None:
        return found
    # Free memory is read here only: reading it takes as long as a small map.
    if several and not trial_affordable(job, device, 2, budget(device)):
        return _lowered(job, device, False, slices, captured, literals, budget)
    # Another lowering has found the fixes that give the right values.
    sibling = tried(job, device, not several)
    other = known(job, device, several, not slices) or sibling
    size = _trial_size(job, several)
    if size != 1 or not trial_affordable(job, device, 2, budget(device)):
        sibling = None

    def ends(size: int) -> list[torch.Tensor]:
        rows = samples_at_the_ends(job, size)
        return [r if r.device == device else to_device(r, device) for r in rows]

    states = default_generator_states(device)
    with (
        torch.no_grad(),
        outer_recordings_suspended(),
        transforms_set_aside(),
        tracing_aside() if job.lowerings.options.traced else contextlib.nullcontext(),
    ):
        try:
            return job.lowerings.on(
                device,
                size,
                slices,
                ends,
                [element(t).detach() for t in captured],
                [element(t) for t in literals],
                counted(job.seed),
                None if other is None else other.fixes,
                sibling,
            )
        finally:
            restore_default_generators(states)


def _trial_size(job: Job, several: bool) -> int:
    """Number of samples for a trial; the batch size may be a symbol.

    None where a `torch.func.vmap` around the call has none.
    """
    if job.transformed and any(map(is_empty_outside, (*job.inputs, *job.recording.captured))):
        return 0
    most = 2 if several else 1
    return most if job.samples >= most else int(job.samples)


def known(job: Job, device: torch.device, several: bool, slices: bool) -> Lowered | None:
    """The lowering for chunks on a device, if there is one already."""
    lowerings = job.lowerings
    if lowerings.instead is not None:
        return lowerings.instead
    size = _trial_size(job, several)
    how = lowerings.how(device.type)
    program, layout = job.recording.program, lowerings.layout
    found = cache.known(program, how, layout, size, slices)
    # A lowering that was tried on slices too also serves where none are used.
    return found if found is not None or slices else cache.known(program, how, layout, size, True)


def tried(job: Job, device: torch.device, several: bool) -> Lowered | None:
    """A lowering for chunks on a device whose values have been compared, if there is one."""
    return known(job, device, several, False) or known(job, device, several, True)


def samples_at_the_ends(job: Job, size: int) -> list[torch.Tensor]:
    """The first sample of each input, and for two samples also the last, with the rows' strides.

    Each is `[size, *shape]`.
    """
    # The number of samples may be a symbol, for which a stride would be a condition of the graph.
    last = 1 if job.lowerings.options.traced else job.samples - 1
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
    """Measurements of the program's earlier chunks on a device."""
    notes = job.lowerings.notes(torch.device(name).type)
    return notes.learned.setdefault(name, Learned())


def captured_to(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A captured tensor on `device`."""
    t = recorded_part(t)
    return t if t.device == device or t.device.type == "meta" else t.to(device)


def there(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows `t` on `device`."""
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
            rows = compact.stride()[1:]
            whole = [span(compact.shape[1:], rows), *rows]
        moved = torch.empty_strided(compact.shape, whole, dtype=t.dtype, device=device).copy_(
            compact, non_blocking=non_blocking
        )
    return moved.expand(t.shape) if repeated else moved
