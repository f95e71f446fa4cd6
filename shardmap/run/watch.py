"""Measure what a chunk costs: run two or three samples under a mode that sees all allocations."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._threads import default_generator_states, restore_default_generators
from shardmap.lower.codegen import Replay
from shardmap.planning.observe import Observation, observe
from shardmap.planning.shapes import Shapes, without_memory
from shardmap.run.affordable import direct, observed_sizes, recorded_bytes
from shardmap.run.base import Job
from shardmap.run.prepare import Devices, Ready, known, there
from shardmap.trace.saved_hooks import saved_hooks_set_aside

logger = logging.getLogger("shardmap")


def watched(ready: Ready, job: Job, budget_bytes: int | None = None) -> Observation:
    """Cost of a chunk on this device.

    It is found once per lowering, by running two and three samples, or fewer if the budget is
    small.
    """
    low, into = ready.low, direct(job, ready.device)
    how = _how(ready, job)
    found = low.notes.observed.get((*how, 2))
    if found is not None:
        return found
    pretended = _pretended(ready, job)
    if pretended is not None:
        low.notes.observed[(*how, 2)] = pretended
        return pretended
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
        """Prepare a chunk of `size` samples, and drop the one before."""
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

    with torch.set_grad_enabled(job.grad and not job.remat), saved_hooks_set_aside():
        try:
            found = observe(low, run, sizes, known)
        finally:
            restore_default_generators(states)
    if job.grad and not job.recording.written_inputs:
        try:
            found = dataclasses.replace(found, backward=_with_backward(ready, job, sizes).levels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A derivative is missing, or forbidden. The map itself may not need it, and if it does
            # it raises this error; the plan says that the memory of gradients is not known.
            found = dataclasses.replace(found, backward_unknown=str(error).partition("\n")[0])
    low.notes.observed[key] = found
    return found


def before_trial(
    on: Devices, name: str, several: bool, budget_bytes: int | None
) -> tuple[Ready, Observation]:
    """A device and the cost of a chunk there, if it can be without a trial of the lowering.

    The chunks that are planned by it may be of one sample, or of several: then one trial is enough.
    """
    job, device = on.job, torch.device(name)
    tried = known(job, device, several, direct(job, device)) is not None
    if not tried and _is_worth_pretending(job, device):
        ready = on.untried(name)
        found = _pretended(ready, job)
        if found is not None:
            ready.low.notes.observed[(*_how(ready, job), 2)] = found
            return ready, found
    ready = on.on(name, several)
    return ready, watched(ready, job, budget_bytes)


def _how(ready: Ready, job: Job) -> tuple[str, str]:
    """The device and the way that a chunk runs, which its cost depends on."""
    into = direct(job, ready.device)
    return ready.device.type, "into" if into else "remat" if job.remat else "plain"


PRETENDED_FROM = 1 << 17
"""Bytes of recorded results per recorded call from which calls are run without memory: computing
five samples takes longer than the shapes of two chunks."""


def _is_worth_pretending(job: Job, device: torch.device) -> bool:
    """True if a chunk of large calls can be measured on tensors without memory.

    Not if what runs depends on the device (factors, accelerators) or is recorded by autograd.
    """
    if device.type != "cpu" or job.grad or job.remat or job.lowerings.instead is not None:
        return False
    calls, batched = len(job.recording.program.equations), job.lowerings.outline(device.type)
    plain = not (batched.factored or batched.summed)
    return plain and recorded_bytes(job) >= PRETENDED_FROM * calls


def _pretended(ready: Ready, job: Job) -> Observation | None:
    """Cost of a chunk by its calls on tensors without memory; None if it has to be computed."""
    low, into = ready.low, direct(job, ready.device)
    if not (_is_worth_pretending(job, ready.device) and isinstance(low.replay, Replay)):
        return None
    chunk, shapes = low.replay.marked(slices=into), Shapes()
    device = torch.device("meta")
    inputs: list[torch.Tensor] = []
    slices: list[torch.Tensor] = []

    def known(size: int) -> Sequence[torch.Tensor]:
        inputs[:] = [without_memory(t.narrow(0, 0, size)) for t in job.inputs]
        sliced = [o for o in job.outputs if o.sliced and into]
        slices[:] = [torch.empty((size, *o.shape), dtype=o.dtype, device=device) for o in sliced]
        return [*inputs, *slices, *fixed]

    def run(size: int, mark: Callable[[int], None]) -> object:
        arguments = (size, 0, device, job.seed, job.recording.scalars, fixed, list(inputs))
        return chunk(*arguments, slices, mark) if into else chunk(*arguments, mark)

    states = default_generator_states(ready.device)
    try:
        with torch.no_grad(), saved_hooks_set_aside():
            fixed = tuple([without_memory(t) for t in ready.fixed])
            return observe(low, run, observed_sizes(job, ready.device, None), known, shapes)
    except Exception as error:  # values are needed, or a call knows no such device
        logger.debug("%s: a chunk has to be computed to be measured: %s", job.call, error)
        return None
    finally:
        restore_default_generators(states)


def _with_backward(ready: Ready, job: Job, sizes: Sequence[int]) -> Observation:
    """Cost of a chunk with its gradients computed at once, as `remat=True` does in backward.

    Gradients are of new leaves that share memory with the call's tensors: nothing reaches the
    caller's graph.

    Raises:
        RuntimeError: A derivative raises it.
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
        # the graph of values made once for all chunks is kept; that of chunks dies with `outs`
        gradients = torch.autograd.grad(roots, leaves, ones, retain_graph=True, allow_unused=True)
        return outs, gradients

    with torch.enable_grad(), saved_hooks_set_aside():
        try:
            fixed = low.replay.fixed(
                ready.device, job.seed, recording.scalars, captured, ready.literals
            )
            return observe(low, run, sizes, known)
        finally:
            restore_default_generators(states)


def _copy_of(t: torch.Tensor) -> torch.Tensor:
    """Copy of rows that the program may write to, with their strides."""
    return (
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        .copy_(t.detach())
        .requires_grad_(t.requires_grad)
    )
