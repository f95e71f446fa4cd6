"""Make the job that executors run from a recording and a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import forward_level, functorch, generator_id, without_functions
from shardmap.call import outputs as out_edges
from shardmap.call.first_use import FirstUse
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.lower import cache as engine
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Lowered
from shardmap.planning import device as device_names
from shardmap.planning.split import Split, split
from shardmap.rules.philox import Seeds, TorchDraws
from shardmap.run import prepare
from shardmap.run.base import Job, Output, unheard
from shardmap.run.graphed import refuse_devices
from shardmap.run.lowerings import Lowerings
from shardmap.run.sites import collected, sites
from shardmap.trace.batch import Batch, recorded_part
from shardmap.trace.recording import Recording

Pairs = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Maps a function of two tensors over many pairs of them."""


def job_of(
    prepared: Prepared,
    batch: Batch,
    options: Options,
    inlined: bool,
    transformed: bool,
    pairs: Pairs,
    by_sample: Callable[[LoweringOptions], Lowered] | None = None,
    seed: Seeds | None = None,
    traced: bool = False,
) -> Job:
    """Make the job of a call, or refuse what no executor can run.

    Args:
        prepared: The recording.
        batch: The call's arguments.
        options: The call's options.
        inlined: True if the call is a part of a recording.
        transformed: True if transforms, or forward-mode AD, are active around the call.
        pairs: Maps a function that combines two results over many pairs.
        by_sample: Makes the lowering that runs the function itself, instead of a replay.
        seed: Seeds for random draws; None to draw it from torch's generator and the user's.
        traced: True if the call is traced.
    """
    recording, call = prepared.recording, options.call
    program = recording.program
    inputs = [recorded_part(t) for t in batch.tensors()]
    if (
        not recording.written_inputs
    ):  # the sample was resolved: recorded calls may view it as real numbers
        inputs = [t.resolve_conj().resolve_neg() for t in inputs]
    if torch.is_grad_enabled() and not (transformed or traced):
        inputs = [_with_plain_gradient(t) for t in inputs]
    home = inputs[0].device
    writes_with_grad = bool(recording.written_inputs) and any(
        t.requires_grad for t in (*inputs, *recording.captured)
    )
    grad = torch.is_grad_enabled() and (any(program.output_flags) or writes_with_grad)
    layout = tuple([t.is_contiguous() for t in inputs])
    summed = () if options.reduce is None or grad or transformed else _summed(prepared, options)
    how = LoweringOptions(
        home.type, options.randomness, options.strict, grad, transformed, call, summed, traced
    )
    instead = None if by_sample is None else by_sample(how)
    lowerings = Lowerings(recording, how, layout, instead=instead)
    batched = lowerings.outline(home.type)
    mapped = [v.mapped for v in batched.outputs]
    sums = [v.index in batched.summed for v in batched.outputs]
    if recording.random and traced:
        raise errors.RandomnessError(
            f"{call}: the function draws random numbers and the call is traced (make_fx, "
            "torch.export, FakeTensorMode), which would keep this call's draws for all calls; draw "
            "them outside (torch.randn for the whole batch) and pass them in as an argument"
        )
    nested = recording.random and (inlined or (transformed and _inside_functorch_vmap()))
    if nested and by_sample is not None:
        raise errors.RandomnessError(
            f"{call}: the function draws random numbers, has to be run sample by sample, and the "
            "call stands inside another map, where each outer sample would need draws of its own; "
            "draw them outside (torch.randn for the whole batch) and pass them in as an argument"
        )
    size = -1 if traced else batch.size  # which may be a symbol
    known = (home, grad, size, by_sample is None)
    outputs = prepared.outputs.get(known)
    if outputs is None:
        outputs = prepared.outputs[known] = _outputs(
            prepared, mapped, sums, home, options, batch.size, grad, pairs
        )
    remat = options.remat and grad and not transformed
    if remat and recording.written_inputs:
        raise errors.CapturedWriteError(
            f"{call}: remat=True computes chunks twice, and the function writes in place to mapped "
            "argument "
            f"{min(recording.written_inputs)}; clone the argument inside the function, or pass "
            "remat=False"
        )
    written = recording.written_inputs & batch.columns.keys()
    if written:
        raise errors.CapturedWriteError(
            f"{call}: the function writes in place to mapped argument {min(written)}, which is "
            "read from a source; clone the argument "
            "inside the function"
        )
    if seed is None:
        seed = seeds_of(recording, nested)
    return Job(
        recording,
        inputs,
        batch.size,
        home,
        outputs,
        lowerings,
        seed,
        grad,
        transformed,
        remat,
        call,
        columns=batch.columns,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
    )


def _with_plain_gradient(t: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient is no lazy conjugate, as that of a loop is none: rows are stacked."""
    if not (t.is_complex() and t.requires_grad):
        return t
    view = t.view_as(t)
    view.register_hook(torch.Tensor.resolve_conj)
    return view


def seeds_of(
    recording: Recording, nested: bool, drawn: tuple[Recording, Seeds] | None = None
) -> Seeds:
    """The seeds of a call; inside another map torch draws, and that map records it.

    Args:
        recording: The recording to be run.
        nested: True if the call stands inside another map.
        drawn: Another recording of the same call, and the seeds that were drawn for it.
    """
    if nested:
        return tuple([TorchDraws(generator) for generator in (None, *recording.generators)])
    known: dict[object, int | TorchDraws] = {}
    if drawn is not None:
        names = [generator_id(g) for g in drawn[0].generators]
        known = dict(zip(names, drawn[1][1:], strict=True))
        if drawn[0].torchs_own:
            known[None] = drawn[1][0]
    own = known[None] if None in known else engine.draw_seed() if recording.torchs_own else 0
    return (own, *[known.get(generator_id(g)) or engine.draw_seed(g) for g in recording.generators])


def _summed(prepared: Prepared, options: Options) -> tuple[bool, ...]:
    """For each output: True if a sum over the samples suffices.

    It can be computed without the terms.
    """
    program = prepared.recording.program
    reduced = out_edges.spread_reductions(options.reduce, prepared.structure, options.call)
    exact = (torch.float32, torch.float64)
    wanted = zip(program.outputs, reduced, strict=True)
    return tuple(
        [r is not None and r.name in ("sum", "mean") and v.spec.dtype in exact for v, r in wanted]
    )


def _outputs(
    prepared: Prepared,
    mapped: list[bool],
    sums: list[bool],
    home: torch.device,
    options: Options,
    samples: int,
    grad: bool,
    pairs: Pairs,
) -> tuple[Output, ...]:
    """Describe each output: its device, position of the mapped dimension, reduction."""
    program, call = prepared.recording.program, options.call
    reduced = out_edges.spread_reductions(options.reduce, prepared.structure, call)
    dims = out_edges.place_outputs(
        [v.spec.ndim for v in program.outputs],
        mapped,
        prepared.structure,
        options.out_dims,
        call,
        reduced,
    )
    target = (
        device_names.one(options.output_device, call) if options.output_device is not None else None
    )
    if options.out is not None:
        target = torch.device("cpu")
    outputs = []
    for v, m, s, d, flag, reduction in zip(
        program.outputs, mapped, sums, dims, program.output_flags, reduced, strict=True
    ):
        if reduction is not None:
            reductions.refuse(reduction, v.spec.dtype, samples, bool(grad and flag), call)
            reduction = _batched(reduction, call, pairs)
        outputs.append(
            Output(
                tuple(v.spec.shape),
                v.spec.dtype,
                target or home,
                m,
                d,
                reduction,
                bool(grad and flag),
                s,
            )
        )
    return tuple(outputs)


def _batched(reduction: reductions.Reduction, call: str, pairs_of: Pairs) -> reductions.Reduction:
    """A reduction whose `combine` takes many pairs at once."""
    if reduction.combine is None:
        return reduction
    pairs = pairs_of(reduction.combine)

    def combine(a: torch.Tensor, b: torch.Tensor) -> Any:
        with unheard():
            out = pairs(a, b)
        if not isinstance(out, torch.Tensor) or out.shape != a.shape or out.dtype != a.dtype:
            found = (
                f"{out.dtype} {tuple(out.shape[1:])}"
                if isinstance(out, torch.Tensor)
                else type(out).__name__
            )
            raise errors.OptionError(
                f"{call}: reduce={reduction.combine!r} combines results of {a.dtype} "
                f"{tuple(a.shape[1:])} to {found}; return a tensor of "
                "the same shape and dtype"
            )
        return out

    return dataclasses.replace(reduction, combine=combine)


def names_of(job: Job, options: Options, inlined: bool) -> tuple[str, ...]:
    """The devices of the call, one per lane."""
    names = (
        (str(job.home),)
        if inlined
        else device_names.resolve(options.devices, job.home, options.call)
    )
    if job.recording.written_inputs and any(torch.device(name) != job.home for name in names):
        raise errors.CapturedWriteError(
            f"{options.call}: the function writes in place to mapped argument "
            f"{min(job.recording.written_inputs)}, which lives on "
            f"{job.home}, and devices={options.devices!r} computes on copies, so the write would "
            "not reach the caller's batch; clone the "
            "argument inside the function and return it, or use devices='auto'"
        )
    if job.home.type == "meta" and any(torch.device(name) != job.home for name in names):
        raise errors.DeviceError(
            f"{options.call}: the samples are on the meta device, where tensors hold no values, "
            f"and devices={options.devices!r} computes on others; use devices='auto'"
        )
    if options.cuda_graphs and not inlined:
        refuse_devices(names, options.call)
    return names


def split_of(
    job: Job,
    on: prepare.Devices,
    names: tuple[str, ...],
    options: Options,
    inlined: bool,
    always: bool = False,
) -> Split:
    """Plan the lanes of the call: rows for each, and chunk sizes."""
    size = None if inlined else options.chunk_size
    if isinstance(size, Mapping):
        _check_devices_of(size, names, options.call)
    if size == "auto" and job.transformed:
        size = None  # outer transforms keep each chunk's values: cutting saves nothing
    several = job.samples > 1 and size != 1
    forced = always or options.memory_budget is not None
    given = job, on, names, options.budget.on, several, forced and not inlined
    uniform = len(names) > 1 and any(o.reduction is not None for o in job.outputs)
    rest = size, uniform, collected(job, names, options.budget.on)
    found = split(job.samples, sites(*given, untried=True), *rest)
    if found.fits and on.changed({lane.device: lane.chunk for lane in found.lanes}):
        found = split(job.samples, sites(*given), *rest)
    return found


def _check_devices_of(chunk_size: Mapping[str, Any], names: tuple[str, ...], call: str) -> None:
    used = {*names, *[name.partition(":")[0] for name in names]}
    for device in chunk_size:
        if device not in used:
            raise errors.OptionError(
                f"{call}: chunk_size={dict(chunk_size)!r} names {device!r}, and the call computes "
                f"on {', '.join(dict.fromkeys(names))}; "
                "name one of these, or its kind"
            )


def _inside_functorch_vmap() -> bool:
    """True if an outer sample of a `torch.func.vmap` around may want draws of its own."""
    levels = functorch.get_interpreter_stack() or []
    maps = [level for level in levels if level.key() == functorch.TransformType.Vmap]
    return any(functorch.CVmapInterpreterPtr(level).randomness() != _SAME for level in maps)


_SAME = functorch.RandomnessType.Same


def with_expected(job: Job, names: Sequence[str], use: FirstUse) -> Job:
    """The job with the function's own results for samples on which a new lowering is tried.

    The function is run here, as it was called, and not where the lowering is made.

    Args:
        job: The call.
        names: The devices that it runs on.
        use: The function run on the call's samples.
    """
    several = bool(job.samples > 1)
    if all(prepare.tried(job, torch.device(name), several) for name in set(names)):
        return job
    lowerings = dataclasses.replace(job.lowerings, expected=use.expected())
    return dataclasses.replace(job, lowerings=lowerings)


def has_tangents(batch: Batch, captured: Sequence[torch.Tensor]) -> bool:
    """True if forward-mode AD around the call has tangents for one of its tensors.

    Under transforms, which count as such already, nobody can ask.
    """
    if forward_level(forward_ad) < 0 or functorch.peek_interpreter_stack() is not None:
        return False
    tensors = [t for t in (*batch.leaves, *captured) if isinstance(t, torch.Tensor)]
    with without_functions():  # inside another map's function, whose own look it is not
        return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
