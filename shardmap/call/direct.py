"""A small map that has been replayed before, run again without a plan.

For a small map, the work around the replay costs more than the replay: flattening arguments,
describing the call, finding lowerings, planning. All that follows from the properties of the
arguments. So a call with the same properties goes from its tensors to the replay directly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardmap._torch import (
    dispatch_depth,
    forward_ad,
    forward_level,
    function_depth,
    functorch,
    pytree,
    set_grad,
)
from shardmap.call.here import is_whole
from shardmap.call.job import seeds_of
from shardmap.call.keepable import asks
from shardmap.call.memo import Prepared, modes
from shardmap.call.options import Options
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.saved_results import unsaved
from shardmap.program.autocast import plain_numerics
from shardmap.run.base import Job, heard
from shardmap.run.gather import placed
from shardmap.run.prepare import Devices, Ready
from shardmap.trace.batch import Batch, recorded_part, unflatten_outputs, unsubclassed
from shardmap.trace.thread_state import thread_state_kept

NOT_DIRECT = object()
"""Returned for a call that is not like the last one."""


def form_of(
    arguments: Sequence[object], named: Mapping[str, object]
) -> tuple[tuple[object, ...], list[object]] | None:
    """The properties of arguments that decide how they are mapped, with torch's modes; the leaves.

    It is None if an argument holds anything but plain tensors, numbers and texts, or if something
    around the call matters: a transform, a mode, a listener.
    """
    form: list[object] = []
    leaves: list[object] = []
    if not _taken(arguments, form, leaves) or (named and not _taken(named, form, leaves)):
        return None
    if dispatch_depth() or function_depth() or forward_level(forward_ad) >= 0:
        return None
    if functorch.peek_interpreter_stack() is not None or heard():
        return None
    if len(leaves) > 1:
        form.append(_twins(leaves))
    form.append(modes())
    return tuple(form), leaves


def _taken(container: object, form: list[object], leaves: list[object]) -> bool:
    """Note the contents of a tuple, list or dict; False if there is something else in it."""
    values: Iterable[object]
    kind = type(container)
    if kind is tuple or kind is list:
        assert isinstance(container, tuple | list)
        form.append((kind, len(container)))
        values = container
    elif kind is dict:
        assert isinstance(container, dict)
        if not all(type(key) is str for key in container):
            return False
        form.append(tuple(container))
        values = container.values()
    else:
        return False
    for t in values:
        kind = type(t)
        if isinstance(t, torch.Tensor):
            if kind is not torch.Tensor and kind is not torch.nn.Parameter:
                return False
            if t.layout is not torch.strided or t.is_inference() or t.is_neg():
                return False
            if t.is_complex() and t.is_conj():
                return False
            form += (kind, t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_leaf)
            leaves.append(t)
        elif kind in _VALUES:
            form += (kind, repr(t))
            leaves.append(t)
        elif not _taken(t, form, leaves):
            return False
    return True


_VALUES = frozenset((bool, int, float, str, type(None)))


def _twins(leaves: Sequence[object]) -> tuple[int, ...]:
    """For each leaf the position of the first one that is the same tensor."""
    firsts: dict[int, int] = {}
    return tuple(
        [
            firsts.setdefault(id(t), i) if isinstance(t, torch.Tensor) else i
            for i, t in enumerate(leaves)
        ]
    )


@dataclass(frozen=True, slots=True)
class Direct:
    """A map of plain tensors that is replayed in one piece on the device of the samples."""

    form: tuple[object, ...]
    """The properties of the arguments and torch's modes (`form_of`)."""
    mapped: tuple[tuple[int, int], ...]
    """`(position among the leaves, dimension)` of each mapped one."""
    positions: frozenset[int]
    job: Job
    """The call, without its tensors."""
    ready: Ready
    prepared: Prepared
    dims: tuple[int | None, ...]
    bare: bool
    """True if nothing but torch's own kernels runs: neither python code of the user's, nor what
    changes torch's state. An error, or Ctrl-C, then leaves nothing to be restored."""
    single: bool
    """True if the result is one plain tensor."""
    cast: bool
    """True if autocast is on, and has to be off during a replay."""

    def called(self, leaves: Sequence[object], captured: tuple[torch.Tensor, ...]) -> object:
        """The results as `run` gives them; an error leaves torch's state as it was.

        Raises:
            StaleRecordingError: A question about a value has another answer.
        """
        if self.bare:
            return self.run(leaves, captured)
        with thread_state_kept() as restored, restored.twice:
            return self.run(leaves, captured)

    def run(self, leaves: Sequence[object], captured: tuple[torch.Tensor, ...]) -> object:
        """The results.

        Args:
            leaves: The leaves of the call's arguments.
            captured: The captured tensors of this call.
        """
        inputs = [_rows(leaves[i], d) for i, d in self.mapped]
        grad = torch.is_grad_enabled()
        try:
            try:
                if not self.job.grad:
                    set_grad(False)
                result = self._replayed(inputs, captured)
            finally:
                set_grad(grad)
        finally:
            set_grad(grad)  # an interrupt may strike before the line above
        if self.single:
            return unsubclassed(result[0])
        return unflatten_outputs(result, self.prepared.structure, self.dims, self.job.samples)

    def _replayed(
        self, inputs: Sequence[torch.Tensor], captured: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        job, low, recording = self.job, self.ready.low, self.job.recording
        home, scalars, replay = job.home, recording.scalars, low.replay
        seed = seeds_of(recording, nested=False) if recording.random else job.seed
        with plain_numerics() if self.cast else _AS_IT_IS:
            fixed = replay.fixed(home, seed, scalars, captured, self.ready.literals)
            outs = replay.chunk(job.samples, job.offset, home, seed, scalars, fixed, inputs)
            found = unsaved(outs, low.batched.saved)
            return [placed(t, o, job.samples) for t, o in zip(found, job.outputs, strict=True)]


def _rows(leaf: object, dim: int) -> torch.Tensor:
    assert isinstance(leaf, torch.Tensor)
    return leaf.movedim(dim, 0) if dim else leaf


_AS_IT_IS = contextlib.nullcontext()


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
    mapped = [batch.leaves[i] for i, _ in batch.mapped]
    undone = recording.random or job.grad  # if an answer differs, seeds were drawn, results saved
    needs = (
        job.grad and any(t.is_complex() for t in mapped),
        recording.differentiated and any(t.requires_grad for t in mapped),
        undone and asks(recording), recording.asks_later, recording.written_inputs, batch.columns,
        batch.copies, batch.opened, job.remat, job.numbers is not None, job.transformed,
        options.reduce is not None, options.out is not None, options.progress,
        options.compile, options.cuda_graphs, options.check == "always", job.samples == 0,
        any(o.device != job.home for o in job.outputs),
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
    lowerings = dataclasses.replace(job.lowerings, recording=empty, expected=())
    lean = dataclasses.replace(job, inputs=[], recording=empty, lowerings=lowerings)
    kept = dataclasses.replace(prepared, recording=empty)
    positions = frozenset([i for i, _ in batch.mapped])
    single = prepared.structure == _ONE
    cast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    bare = _is_bare(ready.low.batched)
    return Direct(form, batch.mapped, positions, lean, ready, kept, dims, bare, single, cast)


_ONE = pytree.tree_structure(0)


def _is_bare(batched: BatchedProgram) -> bool:
    """True if each call of a program is of torch's own, and written in C."""
    return all(
        isinstance(call.target, _OF_C) if call.op is None else call.op.namespace == "aten"
        for call in (*batched.fixed, *batched.chunk)
    )


_OF_C = types.BuiltinFunctionType | types.MethodDescriptorType
