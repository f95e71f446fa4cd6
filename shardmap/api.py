"""The public calls: check the arguments, then trace, batch, plan, run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import dispatch_modes, functorch
from shardmap.call import arguments as edges
from shardmap.call import ragged
from shardmap.call.gram_passes import compared
from shardmap.call.memo import Memory, Prepared
from shardmap.call.options import Options
from shardmap.call.planned import Plan
from shardmap.lower import cache as engine
from shardmap.lower.batched import LoweringOptions
from shardmap.planning import device as device_names
from shardmap.planning.split import Split, split
from shardmap.reduce import per_sample as joint
from shardmap.run import local, prepare, storing
from shardmap.run import ray as on_ray
from shardmap.run.base import Job, Output, unheard
from shardmap.store import Header, OutputSpec, Sink, Store
from shardmap.trace.batch import Batch
from shardmap.trace.record import record, refuse_shared_writes
from shardmap.trace.recorder import Recorder


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    kw_in_dims: Any = None,
    devices: Any = "auto",
    chunk_size: Any = "auto",
    output_device: Any = None,
    memory_budget: int | str | None = None,
    memory_fraction: float = 0.9,
    trace: str = "each",
    strict: bool = False,
    remat: bool = False,
    reduce: Any = None,
    out: Sink | None = None,
    resume: bool = False,
    progress: bool | str = False,
) -> Callable[..., Any]:
    """Map `func`, a function of one sample, over a batch.

    `vmap(func)(*batch)` returns what the loop `torch.stack([func(*row) for row in rows])` returns:
    values, dtypes, structure and gradients. `func` runs once, on the first sample; what it does is
    recorded and replayed for the whole batch.

    Args:
        func: Takes one sample (tensors in any pytree, and other python values) and returns a pytree
            of tensors.
        in_dims: Which dimension of each positional argument holds the samples: an int for all, or a
            tuple of ints, Nones and pytrees of them; None shares an argument among all samples.
            Negative dimensions count from the end.
        out_dims: Where the dimension of samples goes in each output.
        randomness: "error" refuses random calls; "different" gives each sample draws of its own,
            which depend on torch's seed and the sample's index only; "same" gives all samples one
            draw.
        kw_in_dims: A dict of dims for keyword arguments, or an int for all; by default they are
            shared.
        devices: "auto" (where the inputs are), "cpu", "cuda:*", "cuda:0,2", a list (a device named
            twice takes two shares), or a Ray cluster: "ray" or `shardmap.Ray(...)`.
        chunk_size: Most samples computed at a time. "auto" plans: what fits in memory and stays in
            the CPU's cache, or saturates the GPU. An int; None for all of a device's share; or a
            mapping from devices ("cuda:0", "cuda") to any of these.
        output_device: Where results go; by default where the first mapped input is.
        memory_budget: What the map may add on each device to what is in use there: bytes, or text
            such as "6GiB". By default what is free.
        memory_fraction: How much of the free memory may be taken where no budget is given, above 0
            and at most 1.
        trace: "each" records `func` at each call; "once" records once per signature of the
            arguments and replays that while the tensors and numbers that `func` reads are the same
            objects.
        strict: Refuse operators that only a loop over the batch can serve.
        remat: Where gradients are recorded from outside, compute each chunk again in backward, so
            that memory stays that of one chunk. Costs one more forward pass.
        reduce: Instead of stacking: "sum", "mean", "max", "min", a pair `(combine, finish)`, or one
            of `shardmap.reduce`; for each output, as a pytree prefix, None to stack. Memory does
            not grow with the batch.
        out: Write the results to a store as they are computed, instead of keeping them:
            `shardmap.ZarrSink(path)`, `SafetensorsSink(folder)` or `MemmapSink(folder)`. The call
            then returns the `Store`. Results may be larger than memory.
        resume: Go on with what the store holds of the same call, after it was killed: the function,
            what it captures, the samples and the seed must be the same.
        progress: True draws a progress bar on a terminal, "always" anywhere.

    Returns:
        A function of the batch. It returns the results, or the store that holds them.

    Raises:
        OptionError: An option has a value that it cannot have.
        ShardmapError: Raised by the returned function for anything that cannot be followed: see
            `shardmap.errors`; among them `OverBudget`, before anything runs, where the map needs
            more memory than it may take, and `StoreError`.

    Example:
        >>> import torch, shardmap
        >>> x, y = torch.arange(6.).view(3, 2), torch.ones(3, 2)
        >>> shardmap.vmap(torch.dot)(x, y)
        tensor([1., 5., 9.])
        >>> shardmap.vmap(torch.dot, reduce="mean")(x, y)
        tensor(5.)
    """
    call = edges.call_name(func, in_dims)
    joined = joint.contains(reduce)
    options = Options(
        in_dims, out_dims, randomness, kw_in_dims, devices, chunk_size, output_device, memory_budget, memory_fraction, trace, strict, remat,
        joint.plain(reduce), out, resume, progress, call,
    )  # fmt: skip
    options.check(func)
    of_sample = joint.composed(func, reduce, call) if joined else func
    memory = Memory(of_sample, call) if trace == "once" else None

    @functools.wraps(func, updated=())
    def mapped(*args: Any, **kwargs: Any) -> Any:
        if ragged.among(args, kwargs):
            result = ragged.run(
                lambda batch: _run(of_sample, batch, options, memory), args, kwargs, options
            )
        else:
            batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
            result = _run(of_sample, batch, options, memory)
        return joint.finished(reduce, result, call) if joined and out is None else result

    return mapped


def plan(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    kw_in_dims: Any = None,
    devices: Any = "auto",
    chunk_size: Any = "auto",
    output_device: Any = None,
    memory_budget: int | str | None = None,
    memory_fraction: float = 0.9,
    trace: str = "each",
    strict: bool = False,
    remat: bool = False,
    reduce: Any = None,
    progress: bool | str = False,
) -> Callable[..., Plan]:
    """Plan a map without running it.

    `plan(func, ...)(*batch)` takes what `vmap` takes and returns the `Plan`.

    The function is recorded, lowered and tried on at most three samples, which is where the plan's
    numbers come from. A plan that does not fit is returned all the same, marked, and refuses to
    run.

    Args:
        func: As for `vmap`, like every other argument.
        in_dims: As for `vmap`.
        out_dims: As for `vmap`.
        randomness: As for `vmap`.
        kw_in_dims: As for `vmap`.
        devices: As for `vmap`; a cluster is joined, and its workers asked for their memory.
        chunk_size: As for `vmap`.
        output_device: As for `vmap`.
        memory_budget: As for `vmap`.
        memory_fraction: As for `vmap`.
        trace: As for `vmap`.
        strict: As for `vmap`.
        remat: As for `vmap`.
        reduce: As for `vmap`.
        progress: As for `vmap`, for `plan.run()`.

    Returns:
        A function of the batch that returns a `Plan`: print it, `explain()` it, `run()` it.

    Raises:
        OptionError: An option has a value that it cannot have.
        ShardmapError: As for `vmap`, but for memory.

    Example:
        >>> import torch, shardmap
        >>> planned = shardmap.plan(torch.dot, chunk_size=2)(torch.ones(5, 3), torch.ones(5, 3))
        >>> [(lane.device, lane.rows, lane.chunk, lane.chunks) for lane in planned.lanes]
        [('cpu', 5, 2, 3)]
        >>> planned.run()
        tensor([3., 3., 3., 3., 3.])
    """
    call = edges.call_name(func, in_dims, maker="plan")
    joined = joint.contains(reduce)
    options = Options(
        in_dims, out_dims, randomness, kw_in_dims, devices, chunk_size, output_device, memory_budget, memory_fraction, trace, strict, remat,
        joint.plain(reduce), None, False, progress, call,
    )  # fmt: skip
    options.check(func)
    of_sample = joint.composed(func, reduce, call) if joined else func
    cluster = on_ray.asked_for(devices)

    @functools.wraps(func, updated=())
    def planned(*args: Any, **kwargs: Any) -> Plan:
        if _under_recording() or functorch.peek_interpreter_stack() is not None:
            raise errors.OptionError(
                f"{call}: inside another map or transform there is nothing to plan; plan the "
                "outermost call"
            )
        ragged.refuse_plan(args, kwargs, call)
        batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
        recording, structure = record(of_sample, batch, randomness, False, call)
        prepared = Prepared(recording, structure)
        grad = torch.is_grad_enabled() and any(recording.program.output_flags)
        comparison = compared(prepared, options, batch.size, grad, several=False)
        notes = [] if comparison is None else comparison.notes
        direct = compared(prepared, options, batch.size, grad, several=True)
        if direct is not None and len(direct.passes) > 1:
            notes.append(
                "gram: this plan keeps all of it at once; a call of the mapped function takes "
                f"{len(direct.passes)} passes instead"
            )
        what = (prepared, options) if comparison is None else comparison.passes[0][1:]
        job = _job(what[0], batch, what[1], False, False)
        on = prepare.Devices(job, options.budget.on)
        if cluster is not None:
            cut = on_ray.planned(job, chunk_size, cluster, options.budget)
        else:
            cut = _split(job, on, _names(job, options, False), options, False, always=True)

        def finish(outputs: list[torch.Tensor]) -> Any:
            found = (
                outputs
                if comparison is None
                else comparison.outputs(lambda _, __: outputs, batch.size)
            )
            result = pytree.tree_unflatten(found, structure)
            return joint.finished(reduce, result, call) if joined else result

        return Plan(job, cut, on, options, finish, notes)

    return planned


def _run(func: Callable[..., Any], batch: Batch, options: Options, memory: Memory | None) -> Any:
    """One call of a mapped function: trace (or recall), batch, plan, run."""
    inlined = _under_recording()
    transformed = functorch.peek_interpreter_stack() is not None
    if inlined or transformed or memory is None:
        recording, structure = record(func, batch, options.randomness, False, options.call)
        return _execute(Prepared(recording, structure), batch, options, inlined, transformed)
    remembered = memory.recall(batch)
    if remembered is not None:
        prepared = remembered.rebound(batch)
        refuse_shared_writes(prepared.recording, batch, options.call)
        try:
            return _execute(prepared, batch, options, False, False)
        except errors.StaleRecordingError:
            memory.forget(batch)
    recording, structure = record(func, batch, options.randomness, True, options.call)
    prepared = Prepared(recording, structure)
    memory.keep(batch, prepared)
    return _execute(prepared, batch, options, False, False)


def _execute(
    prepared: Prepared, batch: Batch, options: Options, inlined: bool, transformed: bool
) -> Any:
    within = inlined or transformed
    plain = within or (torch.is_grad_enabled() and any(prepared.recording.program.output_flags))
    comparison = compared(prepared, options, batch.size, plain, several=not within)
    if comparison is not None:
        outputs = comparison.outputs(
            lambda p, o: _execute(p, batch, o, inlined, transformed), batch.size
        )
        return pytree.tree_unflatten(outputs, prepared.structure)
    job = _job(prepared, batch, options, inlined, transformed)
    cluster = None if inlined else on_ray.asked_for(options.devices)
    if options.out is not None:
        _refuse_store(job, options, inlined)
        with options.watching():
            return _into_store(job, options, prepared.structure, cluster)
    with unheard() if inlined else options.watching():  # inside another map it is part of that one
        if cluster is not None:
            outputs = on_ray.run(job, options.chunk_size, cluster, options.budget)
        else:
            outputs = _locally(job, options, inlined)
    return pytree.tree_unflatten(outputs, prepared.structure)


def _locally(job: Job, options: Options, inlined: bool) -> list[torch.Tensor]:
    """Run on this machine: as one chunk what is small, planned what is not."""
    names = _names(job, options, inlined)
    size = None if inlined else options.chunk_size
    on = prepare.Devices(job, options.budget.on)
    uncut = size is None or size == "auto" or (isinstance(size, int) and size >= job.samples)
    plain = (
        uncut
        and len(names) == 1
        and options.memory_budget is None
        and not any(o.reduction for o in job.outputs)
    )
    if plain and names[0] == str(job.home) and (inlined or prepare.small(job)):
        return local.run_whole(job, on)
    cut = _split(job, on, names, options, inlined)
    refusal = cut.refusal()
    if refusal is not None:
        raise errors.OverBudget(f"{options.call}: {refusal}")
    return local.run(job, cut, on)


def _refuse_store(job: Job, options: Options, inlined: bool) -> None:
    """Refuse what cannot be written to a store, before anything is made."""
    call = options.call
    if inlined or job.transformed:
        raise errors.OptionError(
            f"{call}: out= and the call stands inside another map or transform, of which it is a "
            "part; leave out= away there"
        )
    if any(o.requires_grad for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and an output that requires grad: what is in a store has no history; "
            "call it under torch.no_grad(), or detach "
            "what the function returns"
        )
    if any(o.reduction is not None for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and reduce=: what is reduced fits in memory; leave out= away, or map "
            "twice"
        )
    if any(o.dim != 0 for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and out_dims={options.out_dims!r}: a store holds a row for each sample; "
            "leave out_dims at 0"
        )


def _into_store(
    job: Job, options: Options, structure: pytree.TreeSpec, cluster: on_ray.Ray | None
) -> Store:
    """Compute what the store lacks, unit by unit: here, or on the workers of a cluster."""
    sink, on = options.out, prepare.Devices(job, options.budget.on)
    assert sink is not None
    if cluster is not None:
        on_ray.refuse(job, options.chunk_size, None)
    workers = on_ray.worker_count(cluster, options.call) if cluster is not None else 0
    names = _names(job, options, False) if cluster is None else ()
    room = options.budget.on(torch.device("cpu")) if cluster is None else None
    if room is not None:  # half of it for the units in the making: one for each lane, and one more
        room //= 2 * (len(names) + 1)
    resumed = sink if options.resume else None
    unit = storing.unit_of(job, options.chunk_size, resumed, workers, room)
    job = on.job = dataclasses.replace(job, unit=unit)
    cut = _split(job, on, names, options, False) if cluster is None else None
    refusal = None if cut is None else cut.refusal()
    if refusal is not None:
        raise errors.OverBudget(f"{options.call}: {refusal}")
    columns = edges.output_names(structure)
    specs = tuple(
        [OutputSpec(name, o.shape, o.dtype) for name, o in zip(columns, job.outputs, strict=True)]
    )
    attributes = {"call": options.call, "torch": torch.__version__}
    header = Header(job.samples, unit, specs, storing.identity(job, unit), attributes)
    store = sink.create(header, resume=options.resume)
    if cut is not None:
        local.run(job, cut, on, store)
    elif cluster is not None:
        on_ray.run(job, options.chunk_size, cluster, options.budget, store)
    return store


def _job(
    prepared: Prepared, batch: Batch, options: Options, inlined: bool, transformed: bool
) -> Job:
    """The call as every executor takes it; refuses what no executor can do."""
    recording, call = prepared.recording, options.call
    program = recording.program
    inputs = batch.tensors()
    if (
        not recording.written_inputs
    ):  # the sample is resolved: what was recorded may view it as real numbers
        inputs = [t.resolve_conj().resolve_neg() for t in inputs]
    home = inputs[0].device
    writes_with_grad = bool(recording.written_inputs) and any(
        t.requires_grad for t in (*inputs, *recording.captured)
    )
    grad = torch.is_grad_enabled() and (any(program.output_flags) or writes_with_grad)
    layout = tuple([t.is_contiguous() for t in inputs])
    summed = () if options.reduce is None or grad or transformed else _summed(prepared, options)

    def lower(device_type: str) -> engine.Lowered:
        key = (device_type, grad, transformed, layout)
        found = prepared.lowerings.get(key)
        if found is None:
            how = LoweringOptions(
                device_type, options.randomness, options.strict, grad, transformed, call, summed
            )
            found = prepared.lowerings[key] = engine.lowered(
                program, how, layout, recording.sources
            )
        return found

    batched = lower(home.type).batched
    mapped = [v.mapped for v in batched.outputs]
    sums = [v.index in batched.summed for v in batched.outputs]
    if recording.random and (inlined or (transformed and _inside_functorch_vmap())):
        raise errors.RandomnessError(
            f"{call}: the function draws random numbers and the call stands inside another map, "
            "where each outer sample would "
            "need draws of its "
            "own; draw them outside (torch.randn for the whole batch) and pass them in as an "
            "argument"
        )
    known = (home, grad, batch.size)
    outputs = prepared.outputs.get(known)
    if outputs is None:
        outputs = prepared.outputs[known] = _outputs(
            prepared, mapped, sums, home, options, batch.size, grad
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
    seed = engine.draw_seed() if recording.random else 0
    return Job(
        recording,
        inputs,
        batch.size,
        home,
        outputs,
        lower,
        seed,
        grad,
        transformed,
        remat,
        call,
        columns=batch.columns,
    )


def _summed(prepared: Prepared, options: Options) -> tuple[bool, ...]:
    """Of which outputs only the sum over the samples is wanted.

    It can be computed without the terms.
    """
    program = prepared.recording.program
    tree = pytree.tree_unflatten([v.spec.ndim for v in program.outputs], prepared.structure)
    reduced = edges.spread_reductions(options.reduce, tree, options.call)
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
) -> tuple[Output, ...]:
    """What is to become of each output."""
    program, call = prepared.recording.program, options.call
    tree = pytree.tree_unflatten([v.spec.ndim for v in program.outputs], prepared.structure)
    reduced = edges.spread_reductions(options.reduce, tree, call)
    dims = edges.place_outputs(
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
            reduction = _batched(reduction, call)
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


def _batched(reduction: reductions.Reduction, call: str) -> reductions.Reduction:
    """A reduction whose `combine` takes many pairs at once."""
    if reduction.combine is None:
        return reduction
    pairs = vmap(reduction.combine, trace="once", chunk_size=None)

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


def _names(job: Job, options: Options, inlined: bool) -> tuple[str, ...]:
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
    return names


def _split(
    job: Job,
    on: prepare.Devices,
    names: tuple[str, ...],
    options: Options,
    inlined: bool,
    always: bool = False,
) -> Split:
    """Who is to compute how much, and how many samples at a time."""
    size = None if inlined else options.chunk_size
    if isinstance(size, Mapping):
        _check_devices_of(size, names, options.call)
    if size == "auto" and job.transformed:
        size = None  # what transforms from outside hold of a chunk is theirs: cutting saves nothing
    several = job.samples > 1 and size != 1
    forced = always or options.memory_budget is not None
    found = prepare.sites(job, on, names, options.budget.on, several, forced and not inlined)
    uniform = len(names) > 1 and any(o.reduction is not None for o in job.outputs)
    return split(
        job.samples, found, size, uniform, prepare.collected(job, names, options.budget.on)
    )


def _check_devices_of(chunk_size: Mapping[str, Any], names: tuple[str, ...], call: str) -> None:
    used = {*names, *[name.partition(":")[0] for name in names]}
    for device in chunk_size:
        if device not in used:
            raise errors.OptionError(
                f"{call}: chunk_size={dict(chunk_size)!r} names {device!r}, and the call computes "
                f"on {', '.join(dict.fromkeys(names))}; "
                "name one of these, or its kind"
            )


def _under_recording() -> bool:
    """Whether the call is made inside a function that is being recorded.

    Then it is inlined there, without a plan of its own.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(isinstance(m, Recorder) for m in dispatch_modes())


def _inside_functorch_vmap() -> bool:
    levels = functorch.get_interpreter_stack() or []
    return any(level.key() == functorch.TransformType.Vmap for level in levels)
