"""Record a function on the first sample of a batch, without side effects."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from shardmap import errors
from shardmap._threads import alone
from shardmap._torch import (
    FakeTensor,
    dispatch_depth,
    dispatch_modes,
    forward_level,
    functorch,
    has_internal_overlap,
    pytree,
)
from shardmap.program.schema import span
from shardmap.rules import registry
from shardmap.trace import mapped_functions
from shardmap.trace import repeat as follow
from shardmap.trace.batch import Batch, flatten_outputs
from shardmap.trace.compiled import CompiledCodeRunsEagerly
from shardmap.trace.escapes import Doors
from shardmap.trace.generator import Generator
from shardmap.trace.given_generators import GivenGenerators
from shardmap.trace.graphs import ends_of
from shardmap.trace.kept import forget_interpreted, kept_tensors, references_before
from shardmap.trace.lifted import Lifted, levels_around
from shardmap.trace.outside import computed_outside, origins
from shardmap.trace.outside_graphs import histories_of, refuse_deep
from shardmap.trace.own_backwards import record_backwards
from shardmap.trace.recorder import Recorder
from shardmap.trace.recording import Recording, element
from shardmap.trace.refusals import QuestionsOfNone, WrittenCopyError, refuse_swaps
from shardmap.trace.saved_hooks import saved_hooks_set_aside
from shardmap.trace.shared_writes import refuse_shared_writes
from shardmap.trace.surroundings import (
    RandomStates,
    forward_mode_alone,
    outer_recordings_suspended,
    overrides_enabled,
    transforms_set_aside,
)
from shardmap.trace.traced import is_traced, tracing_aside
from shardmap.trace.watch import PythonWatch
from shardmap.trace.zero_gradients import with_hidden_histories


def _lazily(tensors: Sequence[torch.Tensor]) -> str:
    """How the mapped tensors are other than their samples are while they are recorded, or empty."""
    if any(t.is_conj() or t.is_neg() for t in tensors):
        return (
            "is a lazy conjugate or negative, which a sample is not while it is recorded: pass "
            "batch.resolve_conj().resolve_neg()"
        )
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors):
        return (
            "was made under torch.inference_mode(), which a sample is not while it is recorded: "
            "use torch.no_grad() instead"
        )
    return ""


def sample_of(row: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A copy of one row with the row's exact strides: recorded views depend on them.

    A sample that requires grad is not a leaf: a leaf refuses `add_`, a row does not.
    """
    shape, stride = tuple(row.shape), row.stride()
    if type(row) is FakeTensor:  # no values to copy, and perhaps no numbers for sizes
        sample = row.new_empty_strided(tuple(map(int, shape)), tuple(map(int, stride)))
        return sample.requires_grad_().view_as(sample) if requires_grad else sample
    if row.is_contiguous() and not requires_grad:
        sample = row.clone()
        if sample.stride() == stride:  # that of a dimension of size 1 may be any
            return sample
    with torch.no_grad():
        repeated = [d for d in range(row.ndim) if stride[d] == 0 and shape[d] > 1]
        compact = row
        for d in repeated:
            compact = compact.narrow(d, 0, 1)
        if has_internal_overlap(compact) == 1:
            memory = row.as_strided((span(shape, stride),), (1,), row.storage_offset())
            sample = memory.clone().as_strided(shape, stride)
        else:
            sample = compact.clone()
            if sample.stride() != compact.stride():
                sample = torch.empty_strided(
                    compact.shape, compact.stride(), dtype=row.dtype, device=row.device
                ).copy_(compact)
            if repeated:
                sample = sample.expand(shape)
    if not requires_grad:
        return sample
    with torch.enable_grad():
        leaf = sample.requires_grad_()
        if repeated or has_internal_overlap(sample) == 1:
            return leaf.view_as(leaf)
        return torch.empty_strided(shape, stride, dtype=row.dtype, device=row.device).copy_(leaf)


def has_tangent(tensor: torch.Tensor) -> bool:
    """True if forward-mode AD around the call differentiates by `tensor`.

    Its samples require grad then, as under transforms: only so does the function's recording show
    a `torch.autograd.Function`, of which forward mode must not take the forward's own derivative.
    """
    if forward_level(forward_ad) < 0 or functorch.is_functorch_wrapped_tensor(tensor):
        return False  # of transforms around the call nobody can ask
    return forward_ad.unpack_dual(tensor).tangent is not None


def rows_of(batch: Batch, number: int, transformed: bool) -> list[tuple[torch.Tensor, bool]]:
    """Row `number` of each mapped tensor, each with True if its sample requires grad.

    If the batch is empty, the rows are zeros.

    Args:
        batch: The call's arguments.
        number: Index of the sample.
        transformed: True if `torch.func` transforms are active around the call. What they will
            differentiate is not known here, so that every floating-point sample requires grad.
    """
    rows = []
    for position, (i, d) in enumerate(batch.mapped):
        tensor = batch.leaves[i]
        if position in batch.columns and batch.size:
            rows.append((batch.columns[position].rows_between(number, number + 1)[0], False))
            continue
        if batch.size == 0:
            shape = tensor.shape[:d] + tensor.shape[d + 1 :]
            row = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        else:
            row = element(tensor).select(d, number)
        wanted = tensor.requires_grad or transformed or has_tangent(tensor)
        grad = torch.is_grad_enabled() and wanted
        rows.append((row, grad and (row.is_floating_point() or row.is_complex())))
    return rows


def record(
    func: Callable[..., Any],
    batch: Batch,
    randomness: str,
    once: bool,
    call: str,
    number: int = 0,
    look: bool = False,
    generators: tuple[torch.Generator, ...] = (),
    watch: PythonWatch | None = None,
) -> tuple[Recording, pytree.TreeSpec]:
    """Run `func` on one sample of `batch`; return the recording and the structure of its outputs.

    Args:
        func: The user's function.
        batch: The call's arguments.
        randomness: As for `shardmap.vmap`.
        once: True if the recording is kept for later calls.
        call: The user's call, for errors.
        number: Index of the sample.
        look: True to look for tensors that the function keeps even if the recording is one
            that was expected.
        generators: Generators that it draws from by an earlier recording.
        watch: Notes what python runs.

    Raises:
        ShardmapError: The function does something that cannot be followed; an exception of its own
            passes through unchanged.
    """
    transformed = functorch.peek_interpreter_stack() is not None
    zeros = views = places = False
    while True:
        try:
            with saved_hooks_set_aside(), mapped_functions.recorded_as_operators():
                return _recorded(
                    func, batch, randomness, once, call, number, look, generators, zeros, views,
                    places, watch,
                )  # fmt: skip
        except RuntimeError as error:
            if isinstance(error, errors.ShardmapError):
                if isinstance(error, errors.EscapeError) and mapped_functions.met(error):
                    continue
                if places or not isinstance(error, WrittenCopyError):
                    raise
                places = True
                continue
            if not zeros and "ZeroTensors are immutable" in str(error):
                # Autograd's formulas for some second derivatives (`mse_loss`) write to a symbolic
                # zero of forward mode, which torch forbids.
                zeros = True
            elif not views and transformed and _forbidden_view(error, batch):
                # Samples require grad where the loop's rows have tangents only.
                views = True
            else:
                raise


def _forbidden_view(error: RuntimeError, batch: Batch) -> bool:
    """True if an error is autograd's refusal of views that forward mode allows to be written.

    For views that are made under no_grad, only if nothing else is recorded that no_grad would
    stop.
    """
    if "function that returns multiple views" in str(error):
        return True
    return "view was created in no_grad mode" in str(error) and forward_mode_alone(
        [leaf for leaf in batch.leaves if isinstance(leaf, torch.Tensor)]
    )


def _recorded(
    func: Callable[..., Any],
    batch: Batch,
    randomness: str,
    once: bool,
    call: str,
    number: int,
    look: bool,
    generators: tuple[torch.Generator, ...],
    zeros_have_memory: bool,
    separate_views: bool,
    places_asked: bool,
    watch: PythonWatch | None,
) -> tuple[Recording, pytree.TreeSpec]:
    outer = next((m for m in reversed(dispatch_modes()) if isinstance(m, Recorder)), None)
    with (
        outer_recordings_suspended(),
        overrides_enabled(),
        CompiledCodeRunsEagerly(),
        tracing_aside() if is_traced(batch.leaves) else contextlib.nullcontext(),
    ):
        # Tangents of captured tensors are not known before they are read.
        transformed = functorch.peek_interpreter_stack() is not None or (
            outer is None and forward_level(forward_ad) >= 0
        )
        levels = levels_around()
        with transforms_set_aside() as depth:
            rows = rows_of(batch, number, transformed)
            mapped = [batch.leaves[i] for i, _ in batch.mapped]
            around = None if outer is None else outer.lifted
            lifted = transformed or around is not None
            lifted |= any(g and not t.requires_grad for t, (_, g) in zip(mapped, rows, strict=True))
            tries = _TRIES
            while True:
                recorder = Recorder(
                    call,
                    randomness,
                    registry.has_rule,
                    registry.decomposition,
                    outer,
                    once,
                    zeros_have_memory,
                )
                recorder.depth, recorder.watch = depth, watch
                recorder.given = GivenGenerators(call, (*generators, *batch.generators()))
                recorder.separate_views, recorder.places_asked = separate_views, places_asked
                if batch.size == 0:
                    recorder.asked = QuestionsOfNone(call)
                recorder.lazily = _lazily([element(batch.leaves[i]) for i, _ in batch.mapped])
                samples = [sample_of(row.detach(), grad) for row, grad in rows]
                if lifted:
                    recorder.lifted = Lifted(recorder, around, levels, samples, mapped)
                recorder.expect(follow.expected(func, [tuple(t.shape) for t in samples]))
                tries -= 1
                found = _record(func, batch, samples, recorder, tries == 0, look, watch)
                if found is not None:
                    if recorder.grad_lifted and not forward_mode_alone(found[0].captured):
                        raise errors.TransformError(
                            f"{call}: a view that was made under torch.no_grad() is written under "
                            "an outer transform, and captured tensors require grad; make the view "
                            "outside of torch.no_grad(), or clone it"
                        )
                    return found


_TRIES = 3
"""Number of recordings that must each find python's random numbers changed before the function is
said to draw them: other threads may be the cause."""


def _record(
    func: Callable[..., Any],
    batch: Batch,
    samples: list[torch.Tensor],
    recorder: Recorder,
    last: bool,
    look: bool,
    watch: PythonWatch | None,
) -> tuple[Recording, pytree.TreeSpec] | None:
    """Record `func` once; None where it must be recorded again.

    That is so if python's random numbers changed and another thread may be the cause, and if the
    function applied another `torch.autograd.Function` than the last time.
    """
    call, randomness = recorder.call, recorder.randomness
    device = samples[0].device
    states = RandomStates(device)
    try:
        for sample, (i, _) in zip(samples, batch.mapped, strict=True):
            recorder.add_input(sample)
            if batch.leaves[i].requires_grad and batch.leaves[i].is_leaf:
                recorder.groups_of_leaves.add(recorder.inputs[-1].group)
        recorder.histories = histories_of(batch.leaves[i] for i, _ in batch.mapped)
        recorder.tangents = any(has_tangent(batch.leaves[i]) for i, _ in batch.mapped)
        ends, sources, before = ends_of(samples), origins(samples), references_before(samples)
        args, kwargs = batch.unflatten(samples)
        doors = Doors(recorder)
        try:
            with doors, recorder:
                doors.depth = dispatch_depth()
                recorder.given.start()
                recorder.generator = Generator(watched=randomness != "error")
                with recorder.generator.watch or contextlib.nullcontext():
                    with watch or contextlib.nullcontext():
                        out = func(*args, **kwargs)
                    leaves, structure = flatten_outputs(out, call)  # numbers become tensors
                recorder.refuse_seeds()
            if doors.saved_changed and any(leaf.requires_grad for leaf in leaves):
                raise errors.AutogradFunctionError(
                    f"{call}: saved_tensors_hooks change what they save, before an output that "
                    "requires grad, and gradients from outside would not see the change; take the "
                    "gradient inside the mapped function (torch.autograd.grad), or put the hooks "
                    "around the call of the map"
                )
            if doors.saved_copied and any(leaf.requires_grad for leaf in leaves):
                raise errors.AutogradFunctionError(
                    f"{call}: saved_tensors_hooks copy what they save, and a gradient inside the "
                    "function with create_graph=True reads the copies, whose history gradients "
                    "from outside would miss; let the hooks give back the tensor itself, or leave "
                    "out create_graph=True if the gradient is not differentiated again"
                )
            refuse_deep(recorder, leaves)
            recorder.refuse_frozen(leaves)
            if torch.is_grad_enabled() and not record_backwards(recorder, doors, out, samples):
                follow.forget(func)
                return None
            doors.regions.clear()  # their hooks hold the sample's tensors
        except Exception as error:
            refuse_swaps(call, error)
            if recorder.lifted is not None:
                recorder.lifted.refuse_number(error)
            if batch.size == 0 and not isinstance(error, errors.ShardmapError):
                raise errors.EmptyBatchError(
                    f"{call}: the batch is empty, and the function raised {type(error).__name__} "
                    "on a sample of zeros, so the "
                    "shape of the result "
                    "cannot be inferred; skip the call when there are no samples"
                ) from error
            raise
        finally:
            recorder.given.restore()
            drawn = states.restore()
            changed = _restore_grads(recorder)
            given = [tuple(t.shape) for t in ends if t.grad is not None]
            del ends
        if drawn is not None and randomness != "same":
            if not last and not alone():
                return None
            own = "random.Random()" if drawn == "random" else "numpy.random.default_rng()"
            raise errors.RandomnessError(
                f"{call}: the function draws from python's {drawn}, which would give every sample "
                "the same number; use torch's random functions with randomness='different'"
                + (
                    ""
                    if alone()
                    else " (if it does not, another thread draws all the time: give that one a "
                    f"generator of its own, {own})"
                )
            )
        if changed:
            raise errors.CapturedWriteError(
                f"{call}: .backward() inside the function accumulates into the .grad of a tensor "
                f"of shape {changed[0]} that all "
                "samples share; use "
                "torch.autograd.grad(loss, parameters), which returns the gradients, and "
                "use_reentrant=False for a checkpoint"
            )
        if given:
            raise errors.CapturedWriteError(
                f"{call}: .backward() inside the function accumulates into the .grad of what a "
                f"mapped argument of shape {given[0]} per sample was computed from; use "
                "torch.autograd.grad(loss, sample), which returns the gradient, pass inputs= of "
                "what is made inside, or detach the argument"
            )
        leaves = [recorder.peeled(t) if recorder.is_outer(t) else t for t in leaves]
        leaves = with_hidden_histories(recorder, samples, sources, leaves)
        recording = recorder.finish(leaves, batch.size > 0)
        del out, leaves, args, kwargs  # what the function wrote into the sample's own containers
        recorder.optimizers.forget()  # one that the function has made dies with it
        # A program that was expected and recorded again has been checked before.
        known = any(recording.program is p for p in recorder.remembered) and not look
        if known:
            forget_interpreted(recorder, before)
        recording = dataclasses.replace(
            recording,
            sources=follow.remember(func, recording.program, recording.sources),
            kept=None if known else kept_tensors(recorder, before),
            outside=computed_outside(sources, recording.captured),
            asks_later=recorder.asks_later,
        )
        refuse_shared_writes(recording, batch, call)
        return recording, structure
    except BaseException:
        for tensor, grad in recorder.grads_before:
            tensor.grad = grad
        recorder.optimizers.put_back()
        raise
    finally:
        recorder.release()


def _restore_grads(recorder: Recorder) -> list[tuple[int, ...]]:
    changed = []
    for tensor, grad in recorder.captured_grads:
        if tensor.grad is not grad:
            tensor.grad = grad
            changed.append(tuple(tensor.shape))
    return changed
