"""The public calls: check the arguments, then trace, batch, plan, run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardmap import edges, engine, errors
from shardmap.batch import LoweringOptions
from shardmap.internals import dispatch_modes, functorch
from shardmap.once import Memory, Prepared
from shardmap.planning import device as device_names
from shardmap.planning.split import split
from shardmap.record import record, refuse_shared_writes
from shardmap.run import local
from shardmap.run import ray as on_ray
from shardmap.trace import Recorder


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    kw_in_dims: Any = None,
    chunk_size: int | None = None,
    devices: Any = "auto",
    strict: bool = False,
    trace: str = "each",
) -> Callable[..., Any]:
    """Map `func`, a function of one sample, over a batch.

    `vmap(func)(*batch)` returns what the loop `torch.stack([func(*row) for row in rows])` returns: values, dtypes, structure
    and gradients. `func` runs once, on the first sample; what it does is recorded and replayed for the whole batch.

    Args:
        func: Takes one sample (tensors in any pytree, and other python values) and returns a pytree of tensors.
        in_dims: Which dimension of each positional argument holds the samples: an int for all, or a tuple of ints, Nones and
            pytrees of them; None shares an argument among all samples. Negative dimensions count from the end.
        out_dims: Where the dimension of samples goes in each output.
        randomness: "error" refuses random calls; "different" gives each sample draws of its own, which depend on torch's seed
            and the sample's index only; "same" gives all samples one draw.
        kw_in_dims: A dict of dims for keyword arguments, or an int for all; by default they are shared.
        chunk_size: Most samples computed at a time; None for all of a device's share.
        devices: "auto" (where the inputs are), "cpu", "cuda:*", "cuda:0,2", a list (a device named twice takes two shares), or "ray".
        strict: Refuse operators that only a loop over the batch can serve.
        trace: "each" records `func` at each call; "once" records once per signature of the arguments and replays that while
            the tensors and numbers that `func` reads are the same objects.

    Returns:
        A function of the batch; its results live where the first mapped input lives.

    Raises:
        OptionError: An option has a value that it cannot have.
        ShardmapError: Raised by the returned function for anything that cannot be followed: see `shardmap.errors`.

    Example:
        >>> import torch, shardmap
        >>> x, y = torch.arange(6.).view(3, 2), torch.ones(3, 2)
        >>> shardmap.vmap(torch.dot)(x, y)
        tensor([1., 5., 9.])
    """
    call = edges.call_name(func, in_dims)
    if not callable(func):
        raise errors.OptionError(f"shardmap.vmap: func={func!r} is a {type(func).__name__}, not a function; pass a function of one sample")
    _check_options(call, randomness, chunk_size, trace)

    options = _Options(in_dims, out_dims, randomness, kw_in_dims, chunk_size, devices, strict, call)
    memory = Memory(func, call) if trace == "once" else None

    @functools.wraps(func, updated=())
    def mapped(*args: Any, **kwargs: Any) -> Any:
        batch = edges.collect(args, kwargs, in_dims, kw_in_dims, call)
        return _run(func, batch, options, memory)

    return mapped


def _check_options(call: str, randomness: Any, chunk_size: Any, trace: Any) -> None:
    if randomness not in ("error", "same", "different"):
        raise errors.OptionError(f"{call}: randomness={randomness!r}; choose 'error', 'same' or 'different'")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
        raise errors.OptionError(
            f"{call}: chunk_size={chunk_size!r} is a {type(chunk_size).__name__}; pass a positive int, or None for no chunks"
        )
    if chunk_size is not None and chunk_size < 1:
        raise errors.OptionError(f"{call}: chunk_size={chunk_size} is not positive; pass a positive int, or None for no chunks")
    if trace not in ("each", "once"):
        raise errors.OptionError(f"{call}: trace={trace!r}; choose 'each' or 'once'")


@dataclass(frozen=True, slots=True)
class _Options:
    """The options of one `vmap`, checked."""

    in_dims: Any
    out_dims: Any
    randomness: str
    kw_in_dims: Any
    chunk_size: int | None
    devices: Any
    strict: bool
    call: str


def _run(func: Callable[..., Any], batch: edges.Batch, options: _Options, memory: Memory | None) -> Any:
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


def _execute(prepared: Prepared, batch: edges.Batch, options: _Options, inlined: bool, transformed: bool) -> Any:
    recording, call = prepared.recording, options.call
    program = recording.program
    inputs = batch.tensors()
    if not recording.written_inputs:  # the sample is resolved: what was recorded may view it as real numbers
        inputs = [t.resolve_conj().resolve_neg() for t in inputs]
    home = inputs[0].device
    writes_with_grad = bool(recording.written_inputs) and any(t.requires_grad for t in (*inputs, *recording.captured))
    grad = torch.is_grad_enabled() and (any(program.output_flags) or writes_with_grad)
    layout = tuple([t.is_contiguous() for t in inputs])

    def lower(device_type: str) -> engine.Lowered:
        key = (device_type, grad, transformed, layout)
        found = prepared.lowerings.get(key)
        if found is None:
            how = LoweringOptions(device_type, options.randomness, options.strict, grad, transformed, call)
            found = prepared.lowerings[key] = engine.lowered(program, how, layout, recording.sources)
        return found

    mapped = [v.mapped for v in lower(home.type).batched.outputs]
    ndims = [v.spec.ndim for v in program.outputs]
    placed = edges.place_outputs(ndims, mapped, prepared.structure, options.out_dims, call)
    if recording.random and (inlined or (transformed and _inside_functorch_vmap())):
        raise errors.RandomnessError(
            f"{call}: the function draws random numbers and the call stands inside another map, where each outer sample would "
            "need draws of its "
            "own; draw them outside (torch.randn for the whole batch) and pass them in as an argument"
        )
    seed = engine.draw_seed() if recording.random else 0
    job = local.Job(recording, inputs, home, lower, seed, grad)
    cluster = None if inlined else _cluster(options.devices)
    if cluster is not None:
        outputs = on_ray.run(job, batch.size, options.chunk_size, cluster, call)
    else:
        names = (str(home),) if inlined else device_names.resolve(options.devices, home, call)
        outputs = local.run(job, split(batch.size, names, None if inlined else options.chunk_size))
    results = [_place(t, v, d, batch.size) for t, v, d in zip(outputs, mapped, placed, strict=True)]
    return pytree.tree_unflatten(results, prepared.structure)


def _under_recording() -> bool:
    """Whether the call is made inside a function that is being recorded: then it is inlined there, without a plan of its own."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(isinstance(m, Recorder) for m in dispatch_modes())


def _inside_functorch_vmap() -> bool:
    levels = functorch.get_interpreter_stack() or []
    return any(level.key() == functorch.TransformType.Vmap for level in levels)


def _cluster(devices: Any) -> on_ray.Ray | None:
    if isinstance(devices, on_ray.Ray):
        return devices
    return on_ray.Ray() if isinstance(devices, str) and devices == "ray" else None


def _place(t: torch.Tensor, mapped: bool, d: int | None, size: int) -> torch.Tensor:
    if d is None:
        return t.clone()
    if not mapped:
        return t.unsqueeze(d).expand(*t.shape[:d], size, *t.shape[d:]).clone(memory_format=torch.contiguous_format)
    return t.movedim(0, d).contiguous() if d else t  # as torch.stack lays it out: what flatten() returns depends on that
