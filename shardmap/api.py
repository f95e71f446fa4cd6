"""The public calls: check the arguments, then trace, batch, plan, run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import not_compiled
from shardmap.call import arguments as edges
from shardmap.call import outputs as out_edges
from shardmap.call import ragged as groups
from shardmap.call.automatic import Automatic
from shardmap.call.batch_norms import served
from shardmap.call.comparison import Comparison, compare_by_shape
from shardmap.call.comparison import compare as comparison
from shardmap.call.direct import NOT_DIRECT
from shardmap.call.execute import Call, run_map
from shardmap.call.first_use import FirstUse
from shardmap.call.gram_passes import compared
from shardmap.call.job import names_of, split_of
from shardmap.call.keepable import explained
from shardmap.call.memo import Prepared
from shardmap.call.once import Once
from shardmap.call.options import Options
from shardmap.call.planned import Plan
from shardmap.call.surroundings import surroundings
from shardmap.call.unequal import planned_by_shape, run_by_shape
from shardmap.reduce import per_sample as joint
from shardmap.run import prepare
from shardmap.run import ray as on_ray
from shardmap.store import Sink
from shardmap.trace.batch import Batch, unflatten_outputs
from shardmap.trace.record import record
from shardmap.trace.saved_hooks import are_saved_hooks_around, integers_kept
from shardmap.trace.thread_state import thread_state_kept
from shardmap.trace.watch import PythonWatch


@not_compiled
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
    trace: str = "auto",
    check: str = "first",
    strict: bool = False,
    max_paths: int = 64,
    ragged: str = "error",
    batch_norm: str = "error",
    compile: bool | str = False,
    cuda_graphs: bool = False,
    remat: bool = False,
    reduce: Any = None,
    out: Sink | None = None,
    resume: bool = False,
    progress: bool | str = False,
) -> Callable[..., Any]:
    """Map `func`, a function of one sample, over a batch.

    `vmap(func)(*batch)` returns what the loop `torch.stack([func(*row) for row in rows])` returns:
    values, dtypes, structure and gradients. `func` runs on the first sample; its calls of torch
    are recorded and replayed for the whole batch, and for later batches.

    Args:
        func: Takes one sample (tensors in any pytree, and other python values) and returns a pytree
            of tensors.
        in_dims: The mapped dimension of each positional argument: an int for all, or a tuple of
            ints, Nones and pytrees of them; None shares an argument among all samples.
            Negative dimensions count from the end.
        out_dims: The position of the mapped dimension in each output.
        randomness: "error" refuses random calls; "different" gives each sample draws of its own,
            which depend on torch's seed and the sample's index only; "same" gives all samples one
            draw.
        kw_in_dims: A dict of dims for keyword arguments, or an int for all; by default they are
            shared.
        devices: "auto" (where the inputs are), "cpu", "cuda:*", "cuda:0,2", a list (a device named
            twice takes two shares), or a Ray cluster: "ray" or `shardmap.Ray(...)`.
        chunk_size: Most samples computed at a time. "auto" plans a size that fits in memory and
            stays in the CPU's cache, or saturates the GPU. An int; None for all of a device's
            share; or a mapping from devices ("cuda:0", "cuda") to any of these.
        output_device: Device of the results; by default that of the first mapped input.
        memory_budget: Bytes that the map may add on each device to those in use, or text such as
            "6GiB". By default the free memory.
        memory_fraction: Part of the free memory that may be used if no budget is given, above 0
            and at most 1.
        trace: "auto" replays a recording while all that `func` was seen to read is unchanged
            (globals, closures, attributes, modules, hooks, settings), and records `func` at each
            call if it reads what cannot be compared (a file, a clock): `plan.explain()` says which.
            "each" always records; "once" records once per signature of the arguments and replays
            that while everything that `func` can reach by name is the same.
        check: "first" runs `func` on the batch's last sample as well when it is mapped for the
            first time, and compares both samples' results with the map's; "always" does so at each
            call; "off" never. The check finds values that differ by sample without an operator
            of torch's.
        strict: Refuse operators that only a loop over the batch can serve.
        max_paths: Most different paths that samples may take when `func` reads their values
            (`if x > 0`, `.item()`, a loop until converged). Each path is recorded on one of its
            samples; the samples of further paths are run one by one, with a warning.
        ragged: Treatment of results whose shapes differ by sample: "error" refuses them, "list"
            returns a list of tensors in their place, "nested" a jagged nested tensor.
        batch_norm: Treatment of normalisation with running statistics in training mode, which would
            update values that all samples share: "error" refuses it, "per_sample" uses each
            sample's own statistics, as the loop does, and does not change the running ones,
            "frozen" uses the running ones, as in evaluation.
        compile: True compiles the program of a chunk by Inductor for the planned chunk size, once;
            smaller chunks, gradients from outside and what the compiler refuses run as they are,
            the last two with a warning. "auto" compiles in the background of runs that are
            expected to take twenty times the compilation, and switches when it is ready.
        cuda_graphs: Capture the program of a chunk as a CUDA graph for the planned chunk size, on
            CUDA devices alone; smaller chunks run as they are, and so does, with a warning, what a
            graph cannot hold: gradients from outside, draws, questions about values.
        remat: Under outer autograd, compute each chunk again in backward, so that memory stays that
            of one chunk. Costs one more forward pass.
        reduce: Instead of stacking: "sum", "mean", "max", "min", a pair `(combine, finish)`, or one
            of `shardmap.reduce`; for each output, as a pytree prefix, None to stack. Memory does
            not grow with the batch.
        out: Write the results to a store as they are computed, instead of keeping them:
            `shardmap.ZarrSink(path)`, `SafetensorsSink(folder)` or `MemmapSink(folder)`. The call
            then returns the `Store`. Results may be larger than memory.
        resume: Continue the same call after it was killed, from the units in the store: the
            function, the tensors that it captures, the samples and the seed must be the same.
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
        in_dims, out_dims, randomness, kw_in_dims, devices, chunk_size, output_device,
        memory_budget, memory_fraction, trace, strict, remat,
        joint.plain(reduce), out, resume, progress, call, check, max_paths,
        ragged, batch_norm, compile, cuda_graphs,
    )  # fmt: skip
    options.refuse_wrong(func)
    func = served(func, batch_norm)
    of_sample = joint.composed(func, reduce, call) if joined else func
    once = Once(of_sample, options) if trace == "once" else None
    kept = once or (Automatic(of_sample, options) if trace == "auto" else None)

    @not_compiled
    @functools.wraps(func, updated=())
    def mapped(*args: object, **kwargs: object) -> Any:
        hooks = are_saved_hooks_around()
        if kept is not None and not joined and not hooks:
            result = kept.directly(args, kwargs)
            if result is not NOT_DIRECT:
                return result
        with thread_state_kept() as restored, restored.twice:
            with integers_kept() if hooks else contextlib.nullcontext():
                return call_mapped(args, kwargs)

    def call_mapped(args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        args, kwargs, is_ragged = groups.given(args, kwargs, options)
        if is_ragged:
            result = run_by_shape(of_sample, args, kwargs, options, once and once.memory)
        else:
            batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
            recordings = kept and kept.of_call(args, kwargs)
            result = run_map(of_sample, batch, options, recordings)
        return joint.finished(reduce, result, call) if joined and out is None else result

    return mapped


@not_compiled
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
    trace: str = "auto",
    check: str = "first",
    strict: bool = False,
    max_paths: int = 64,
    ragged: str = "error",
    batch_norm: str = "error",
    compile: bool | str = False,
    cuda_graphs: bool = False,
    remat: bool = False,
    reduce: Any = None,
    progress: bool | str = False,
) -> Callable[..., Plan]:
    """Plan a map without running it.

    `plan(func, ...)(*batch)` takes what `vmap` takes and returns the `Plan`.

    The function is recorded, lowered and tried on at most three samples, from which the plan's
    numbers follow. A plan that does not fit is returned too, but marked, and refuses to run.

    Args:
        func: As for `vmap`, like every other argument.
        in_dims: As for `vmap`.
        out_dims: As for `vmap`.
        randomness: As for `vmap`.
        kw_in_dims: As for `vmap`.
        devices: As for `vmap`; a cluster is joined, and its workers report their memory.
        chunk_size: As for `vmap`.
        output_device: As for `vmap`.
        memory_budget: As for `vmap`.
        memory_fraction: As for `vmap`.
        trace: As for `vmap`.
        check: As for `vmap`.
        strict: As for `vmap`.
        max_paths: As for `vmap`.
        ragged: As for `vmap`.
        batch_norm: As for `vmap`.
        compile: As for `vmap`.
        cuda_graphs: As for `vmap`.
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
        in_dims, out_dims, randomness, kw_in_dims, devices, chunk_size, output_device,
        memory_budget, memory_fraction, trace, strict, remat,
        joint.plain(reduce), None, False, progress, call, check,
        max_paths, ragged, batch_norm, compile, cuda_graphs,
    )  # fmt: skip
    options.refuse_wrong(func)
    func = served(func, batch_norm)
    of_sample = joint.composed(func, reduce, call) if joined else func
    cluster = on_ray.asked_for(devices)

    @not_compiled
    @functools.wraps(func, updated=())
    def planned(*args: object, **kwargs: object) -> Plan:
        with thread_state_kept() as kept, kept.twice:
            return call_planned(args, kwargs)

    def call_planned(args: tuple[object, ...], kwargs: dict[str, object]) -> Plan:
        if not surroundings().plain:
            raise errors.OptionError(
                f"{call}: inside another map or transform there is nothing to plan; plan the "
                "outermost call"
            )
        args, kwargs, is_ragged = groups.given(args, kwargs, options)
        if is_ragged:
            return planned_by_shape(
                of_sample, args, kwargs, options,
                lambda result: joint.finished(reduce, result, call) if joined else result,
            )  # fmt: skip
        batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
        watch = PythonWatch() if trace == "auto" else None
        pair = record(of_sample, batch, randomness, False, call, watch=watch)
        recorded = "" if watch is None else explained(of_sample, batch, watch, pair[0])
        use = FirstUse(of_sample, batch, pair, options, False)
        verdict = use.verdict()
        call_of = Call(Prepared(*use.first()), batch, options, surroundings(), use)
        call_of, instead = call_of.settled()
        if cluster is not None and instead is not None:
            raise errors.OptionError(
                f"{call}: devices={devices!r} and samples that go different ways by what python "
                "asks about their values, which a cluster computes way by way; call the mapped "
                "function itself, or plan for devices='auto'"
            )
        prepared, structure = call_of.prepared, call_of.prepared.structure
        grad = torch.is_grad_enabled() and any(prepared.recording.program.output_flags)
        plain = grad or instead is not None
        passes = compared(prepared, options, batch.size, plain, several=False)
        notes = [] if passes is None else passes.notes
        direct = None if plain else compared(prepared, options, batch.size, grad, several=True)
        if direct is not None and len(direct.passes) > 1:
            notes.append(
                "gram: this plan keeps all of it at once; a call of the mapped function takes "
                f"{len(direct.passes)} passes instead"
            )
        if passes is not None:
            what = passes.passes[0][1:] if instead is None else (prepared, passes.stacked)
            call_of = Call(what[0], batch, what[1], surroundings(), None)
        job = call_of.job(instead)
        on = prepare.Devices(job, options.budget.on)
        if cluster is not None:
            cut = on_ray.planned(job, chunk_size, cluster, options.budget)
        else:
            cut = split_of(job, on, names_of(job, options, False), options, False, always=True)

        def finish(outputs: list[torch.Tensor]) -> object:
            found: Sequence[object] = outputs
            if passes is not None and instead is not None:
                found = passes.whole(outputs, batch)
            elif passes is not None:

                def run(prepared: Prepared, how: Options, of: Batch) -> Sequence[torch.Tensor]:
                    return outputs if of is batch else call_of.map_of(prepared, how, of)

                found = passes.outputs(run, batch)
            placed = [o.dim for o in job.outputs] if passes is None else passes.dims
            dims = out_edges.result_dims(structure, out_dims, placed, call)
            result = unflatten_outputs(found, structure, dims, batch.size)
            return joint.finished(reduce, result, call) if joined else result

        return Plan(job, cut, on, options, finish, notes, verdict.alone, recorded=recorded)

    return planned


@not_compiled
def compare(
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
    trace: str = "auto",
    check: str = "first",
    strict: bool = False,
    max_paths: int = 64,
    ragged: str = "error",
    batch_norm: str = "error",
    compile: bool | str = False,
    cuda_graphs: bool = False,
    remat: bool = False,
    reduce: Any = None,
) -> Callable[..., Comparison]:
    """Compare a map with the plain loop on some samples.

    `compare(func, ...)(*batch, samples=8)` takes what `vmap` takes, computes the whole batch by the
    map, some random samples by calling `func` itself, and returns a `Comparison` of the two: the
    largest difference of each output, the operator where they differ first, the tier that serves
    each operator, and the share of the parameters that `func` reads which has a gradient.

    Args:
        func: As for `vmap`, like every other argument.
        in_dims: As for `vmap`.
        out_dims: As for `vmap`.
        randomness: As for `vmap`; a function that draws cannot be compared.
        kw_in_dims: As for `vmap`.
        devices: As for `vmap`.
        chunk_size: As for `vmap`.
        output_device: As for `vmap`.
        memory_budget: As for `vmap`.
        memory_fraction: As for `vmap`.
        trace: As for `vmap`.
        check: As for `vmap`.
        strict: As for `vmap`.
        max_paths: As for `vmap`.
        ragged: As for `vmap`.
        batch_norm: As for `vmap`.
        compile: As for `vmap`.
        cuda_graphs: As for `vmap`.
        remat: As for `vmap`.
        reduce: As for `vmap`; the results that are reduced are compared before.

    Returns:
        A function of the batch and of `samples`: how many random samples to compare (8), or their
        numbers. It returns a `Comparison`: print it, or look at `agrees`.

    Raises:
        OptionError: An option has a value that it cannot have, or there is nothing to compare.
        ShardmapError: As for `vmap`.

    Example:
        >>> import torch, shardmap
        >>> found = shardmap.compare(torch.dot)(torch.rand(100, 3), torch.rand(100, 3), samples=5)
        >>> found.agrees, len(found.samples), found.outputs[0].name
        (True, 5, 'result')
    """
    call = edges.call_name(func, in_dims, maker="compare")
    options = Options(
        in_dims, out_dims, randomness, kw_in_dims, devices, chunk_size, output_device,
        memory_budget, memory_fraction, trace, strict, remat, None, None, False, False, call, check,
        max_paths, ragged, batch_norm, compile, cuda_graphs,
    )  # fmt: skip
    options.refuse_wrong(func)
    func = served(func, batch_norm)
    of_sample = joint.composed(func, reduce, call) if joint.contains(reduce) else func

    @not_compiled
    @functools.wraps(func, updated=())
    def compared_with(
        *args: object, samples: int | Sequence[int] = 8, **kwargs: object
    ) -> Comparison:
        if not surroundings().plain:
            raise errors.OptionError(
                f"{call}: inside another map or transform there is nothing to compare; compare the "
                "outermost call"
            )
        args, kwargs, is_ragged = groups.given(args, kwargs, options)
        with thread_state_kept() as kept, kept.twice:
            if is_ragged:
                return compare_by_shape(of_sample, args, kwargs, options, samples)
            batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
            return comparison(of_sample, batch, options, samples)

    return compared_with
