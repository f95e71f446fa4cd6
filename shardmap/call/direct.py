"""A small map that has been replayed before, run again without a plan.

For a small map, the work around the replay costs more than the replay: flattening arguments,
describing the call, finding lowerings, planning. All that follows from the properties of the
arguments. So a call with the same properties goes from its tensors to the replay directly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardmap._torch import (
    dispatch_depth,
    forward_ad,
    forward_level,
    function_depth,
    functorch,
    set_grad,
)
from shardmap.call.here import is_whole
from shardmap.call.memo import Prepared, modes
from shardmap.call.options import Options
from shardmap.lower import cache as engine
from shardmap.lower.saved_results import unsaved
from shardmap.run.base import Job, heard
from shardmap.run.gather import placed
from shardmap.run.prepare import Devices, Ready
from shardmap.trace.batch import Batch, recorded_part, unflatten_outputs


def form_of(arguments: Sequence[object]) -> tuple[object, ...] | None:
    """The properties of arguments that decide how they are mapped, and torch's modes.

    It is None if an argument is no plain tensor, or if something around the call matters: a
    transform, a mode, a listener.
    """
    form: list[object] = []
    for t in arguments:
        if type(t) is not torch.Tensor or t.requires_grad or t.layout is not torch.strided:
            return None
        if t.is_inference() or t.is_neg() or (t.is_complex() and t.is_conj()):
            return None
        form += (t.shape, t.stride(), t.dtype, t.device)
    if dispatch_depth() or function_depth() or forward_level(forward_ad) >= 0:
        return None
    if functorch.peek_interpreter_stack() is not None or heard():
        return None
    if len(arguments) > 1:
        form.append(_twins(arguments))
    form.append(modes())
    return tuple(form)


def _twins(arguments: Sequence[object]) -> tuple[int, ...]:
    """For each argument the position of the first one that is the same object."""
    firsts: dict[int, int] = {}
    return tuple([firsts.setdefault(id(t), i) for i, t in enumerate(arguments)])


@dataclass(frozen=True, slots=True)
class Direct:
    """A map of plain tensors that is replayed in one piece on the device of the samples."""

    form: tuple[object, ...]
    """The properties of the arguments and torch's modes (`form_of`)."""
    mapped: tuple[tuple[int, int], ...]
    """`(position among the arguments, dimension)` of each mapped one."""
    positions: frozenset[int]
    job: Job
    """The call, without its tensors."""
    ready: Ready
    prepared: Prepared
    dims: tuple[int | None, ...]

    def run(self, arguments: Sequence[torch.Tensor], captured: tuple[torch.Tensor, ...]) -> object:
        """The results.

        Args:
            arguments: The call's arguments.
            captured: The captured tensors of this call.
        """
        job, replay = self.job, self.ready.low.replay
        inputs = [arguments[i].movedim(d, 0) if d else arguments[i] for i, d in self.mapped]
        grad = torch.is_grad_enabled()
        try:
            with engine.plain_numerics():
                set_grad(False)
                scalars = job.recording.scalars
                fixed = replay.fixed(job.home, job.seed, scalars, captured, self.ready.literals)
                outs = replay.chunk(
                    job.samples, job.offset, job.home, job.seed, scalars, fixed, inputs
                )
                found = unsaved(outs, self.ready.low.batched.saved)
                result = [
                    placed(t, o, job.samples) for t, o in zip(found, job.outputs, strict=True)
                ]
        finally:
            set_grad(grad)
        return unflatten_outputs(result, self.prepared.structure, self.dims, job.samples)


def direct_of(
    prepared: Prepared, batch: Batch, options: Options, job: Job, form: tuple[object, ...]
) -> Direct | None:
    """The direct form of a call that has just been replayed; None if it needs more than a replay.

    Args:
        prepared: The recording.
        batch: The call's arguments.
        options: The call's options.
        job: What ran.
        form: The properties of its arguments.
    """
    recording = prepared.recording
    needs = (
        recording.random, recording.asked, recording.written_inputs, batch.columns, batch.copies,
        batch.opened, job.grad, job.transformed, options.reduce is not None,
        options.out is not None, options.progress, options.compile, options.cuda_graphs,
        options.check == "always",
        any(o.device != job.home for o in job.outputs), job.samples == 0,
        len(batch.leaves) != len(batch.mapped) and not _all_tensors(batch),
    )  # fmt: skip
    if any(needs) or not is_whole(job, options):
        return None
    on = Devices(job, options.budget.on)
    ready = on.on(str(job.home), bool(job.samples > 1), slices=False)
    captured = job.recording.captured
    if any(t.device != job.home or recorded_part(t) is not t for t in captured):
        return None
    ready = dataclasses.replace(ready, captured=[], fixed=())
    dims = tuple([o.dim for o in job.outputs])
    empty = dataclasses.replace(recording, captured=(), sample=())
    lean = dataclasses.replace(job, inputs=[], recording=empty, lowerings=job.lowerings)
    kept = dataclasses.replace(prepared, recording=empty)
    positions = frozenset([i for i, _ in batch.mapped])
    return Direct(form, batch.mapped, positions, lean, ready, kept, dims)


def _all_tensors(batch: Batch) -> bool:
    return all(isinstance(leaf, torch.Tensor) for leaf in batch.leaves)
