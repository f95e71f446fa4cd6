"""Divide the calls of a chunk into graphs for a compiler, and calls that run beside them.

What the compiler cannot follow (draws,
questions about values, loops over samples) stays a call of its own beside the graphs, and so do
the last products of an output, which write into its slice of the result. Random draws therefore
are those of the eager program, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from shardmap._torch import (
    FakeTensorMode,
    OpOverload,
    aten,
    compiler,
    current_proxy_mode,
    schema_of,
    version_of,
)
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.codegen import _passed
from shardmap.program.ir import Packed, Param, SampleDevice
from shardmap.rules import huge_pages as pages
from shardmap.rules.lowering import BatchSize, Call, ChunkStart, Seed, V, values

logger = logging.getLogger("shardmap")

MOST_GRAPHS = 4
"""Most graphs of a program: with more, what is left between them is not worth compiling."""
MOST_NODES = 256
"""Most nodes of one call: a rule that works a few samples at a time unrolls its loop, which would
take minutes to compile and run no faster."""

OUTER = 4
"""Least size of an outer product's result over that of its larger factor."""

_PRODUCTS = {pages.bmm, pages.mul, aten.bmm.default, aten.mm.default, torch.matmul}
_VIEWS = {
    torch.Tensor.view,
    torch.Tensor.contiguous,
    torch.Tensor.flatten,
    torch.Tensor.reshape,
    torch.Tensor.transpose,
    torch.Tensor.permute,
    torch.Tensor.expand,
}
_DIVISIONS = {"div", "floor_divide", "remainder", "fmod", "__rshift__"}
"""Operators that stop the process where compiled code divides an integer by zero."""


class UncompilableError(Exception):
    """A program that is not compiled; the message says why."""


class Meta(NamedTuple):
    """The metadata of one tensor of a chunk."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str

    @classmethod
    def of(cls, t: torch.Tensor) -> Meta:
        """The metadata of `t`."""
        if t.layout is not torch.strided or t.is_conj() or t.is_neg():
            raise UncompilableError("it computes with tensors that are not plain and dense")
        return cls(tuple(t.shape), t.stride(), str(t.dtype), str(t.device))

    def empty(self) -> torch.Tensor:
        """A tensor with this metadata."""
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The arguments of one chunk, as `Replay.chunk` takes them."""

    size: int
    start: object
    device: torch.device
    seeds: Sequence[object]
    scalars: Sequence[float]
    fixed: Sequence[torch.Tensor]
    inputs: Sequence[torch.Tensor]

    @property
    def arguments(self) -> tuple[object, ...]:
        """The arguments of `Replay.chunk` before the inputs."""
        return self.size, self.start, self.device, self.seeds, self.scalars, self.fixed

    def value(self, env: dict[int, torch.Tensor], arg: object) -> object:
        """The value of an argument of a call."""
        kind = type(arg)
        if isinstance(arg, V):
            return env[arg.index]
        if isinstance(arg, Param):
            return self.scalars[arg.scalar]
        if isinstance(arg, Seed):
            return self.seeds[arg.number]
        if isinstance(arg, Packed):
            return arg.value
        if kind is list or kind is tuple:
            assert isinstance(arg, list | tuple)
            return [self.value(env, a) for a in arg]
        symbols = {BatchSize: self.size, ChunkStart: self.start, SampleDevice: self.device}
        return symbols[kind] if kind in symbols else arg

    def run(self, call: Call, env: dict[int, torch.Tensor]) -> None:
        """Run a call and put its results into `env`."""
        arguments = [self.value(env, a) for a in call.args]
        out = call.target(*arguments, **{k: self.value(env, a) for k, a in call.kwargs})
        for index, t in zip(call.outs, out if call.several else (out,), strict=bool(call.outs)):
            if index is not None:
                env[index] = t


def _reads(call: Call) -> list[V]:
    return list(values((call.args, tuple([a for _, a in call.kwargs]))))


def _makes(call: Call) -> list[int]:
    return [o for o in call.outs if o is not None]


def probe(program: BatchedProgram, chunk: Chunk) -> tuple[dict[int, Meta], list[torch.Tensor]]:
    """Run a chunk call by call: the metadata of all its values, and its outputs."""
    names = (*_passed(program), *program.inputs)
    env = {v.index: t for v, t in zip(names, (*chunk.fixed, *chunk.inputs), strict=True)}
    found = {index: Meta.of(t) for index, t in env.items()}
    last = {v.index: i for i, call in enumerate(program.chunk) for v in _reads(call)}
    kept = {v.index for v in program.outputs}
    for i, call in enumerate(program.chunk):
        chunk.run(call, env)
        found.update({o: Meta.of(env[o]) for o in _makes(call)})
        for index in {v.index for v in _reads(call)} | set(_makes(call)):
            if last.get(index, i) == i and index not in kept:
                env.pop(index, None)
    return found, [env[v.index] for v in program.outputs]


# -- which calls become graphs


@dataclass(frozen=True, slots=True)
class Part:
    """Calls that follow each other: one graph, or a call that runs as it is."""

    numbers: tuple[int, ...]
    graph: bool


def parts(program: BatchedProgram, eager: frozenset[int]) -> list[Part]:
    """Divide the calls of a chunk into graphs and calls that run as they are, in their order.

    Args:
        program: The batched program.
        eager: Numbers of calls that the compiler cannot follow.
    """
    calls = program.chunk
    last_write = max((i for i, call in enumerate(calls) if call.writes), default=-1)
    tail = _tail(program, last_write)
    made = {v.index for v in program.inputs} | {o for call in calls for o in _makes(call)}
    first: list[int] = []
    middle: list[int] = []
    effects: list[int] = []
    for i, call in enumerate(calls):
        if call.target is pages.give_back or i in tail:
            continue
        if i in eager and not call.writes and all(v.index not in made for v in _reads(call)):
            first.append(i)
            made -= set(_makes(call))
        elif i in eager and not call.outs and last_write < 0:
            effects.append(i)
        else:
            middle.append(i)
    found = [Part((i,), False) for i in first]
    run: list[int] = []
    for i in middle:
        if i not in eager:
            run.append(i)
            continue
        found += [Part(tuple(run), True)] if run else []
        found.append(Part((i,), False))
        run = []
    found += [Part(tuple(run), True)] if run else []
    return found + [Part((i,), False) for i in (*effects, *sorted(tail))]


def _tail(program: BatchedProgram, last_write: int) -> set[int]:
    """The last products of outputs, and what only views or copies them.

    They run as they are, into their slices of the result.
    """
    users: dict[int, set[int]] = {}
    for i, call in enumerate(program.chunk):
        for v in _reads(call):
            users.setdefault(v.index, set()).add(i)
    found: set[int] = set()
    for i in range(len(program.chunk) - 1, last_write, -1):
        call = program.chunk[i]
        wanted = call.op if call.op is not None else call.target
        views = call.target in _VIEWS or _is_view(call)
        if not (wanted in _PRODUCTS or views or _is_outer(program, call)):
            continue
        if call.mapped and all(users.get(o, set()) <= found for o in _makes(call)):
            found.add(i)
    made = {o: i for i, call in enumerate(program.chunk) for o in _makes(call)}

    def has_product(i: int) -> bool:
        call = program.chunk[i]
        if (call.op if call.op is not None else call.target) in _PRODUCTS:
            return True
        if _is_outer(program, call):
            return True
        sources = [made[v.index] for v in _reads(call) if v.index in made]
        return any(s in found and has_product(s) for s in sources)

    # What only copies the result of a graph is better made dense by the graph itself.
    return {i for i in found if has_product(i)}


def _is_outer(program: BatchedProgram, call: Call) -> bool:
    """True if a call multiplies two tensors to one that is much larger than both: an outer product.

    Computing it is writing it.
    """
    (out,) = call.outs if len(call.outs) == 1 else (None,)
    if call.op is not aten.mul.Tensor or out is None or out not in program.results:
        return False
    largest = max(v.numel for v in _reads(call))
    return program.results[out][1].numel >= OUTER * largest


def _is_view(call: Call) -> bool:
    if call.op is None or call.writes:
        return False
    returns = schema_of(call.op).returns
    return any(r.alias_info is not None for r in returns)


def given(program: BatchedProgram, numbers: Iterable[int]) -> tuple[list[V], list[int]]:
    """The values that a graph of these calls takes, and the indices of those that it returns."""
    inside = set(numbers)
    made: set[int] = set()
    taken: dict[int, V] = {}
    for i in sorted(inside):
        call = program.chunk[i]
        for v in _reads(call):
            if v.index not in made:
                taken.setdefault(v.index, v)
        made.update(_makes(call))
    wanted = {v.index for v in program.outputs}
    for i, call in enumerate(program.chunk):
        if i not in inside:
            wanted.update(v.index for v in _reads(call))
    return list(taken.values()), sorted(made & wanted)


# -- tracing


EXACT = {
    # halves are rounded where the operators round them, and x * 0 is NaN where x is
    "emulate_precision_casts": True,
    "joint_graph_constant_folding": False,
}
"""Options of Inductor under which values that the first comparison does not see stay the same."""


def _never_compiled(call: Call) -> bool:
    """True for draws, for questions about values, and for what has effects beside its results."""
    kinds = _kinds((call.args, tuple([a for _, a in call.kwargs])))
    return bool(kinds & {ChunkStart, Seed, Packed}) or (not call.outs and not call.writes)


def _kinds(arg: object) -> set[type]:
    if isinstance(arg, list | tuple) and type(arg) in (list, tuple):
        return {kind for a in arg for kind in _kinds(a)}
    return {type(arg)}


def reads_numbers(program: BatchedProgram) -> bool:
    """True if calls of a chunk read numbers that are bound at each call of the map."""
    return any(
        Param in _kinds((call.args, tuple([a for _, a in call.kwargs]))) for call in program.chunk
    )


@dataclass(frozen=True, slots=True)
class _Graph:
    module: torch.fx.GraphModule
    inputs: tuple[torch.Tensor, ...]


def _trace(
    program: BatchedProgram, numbers: Sequence[int], known: dict[int, Meta], chunk: Chunk
) -> tuple[_Graph, set[int]]:
    """The graph of these calls, and the numbers of those that cannot be part of one."""
    taken, returned = given(program, numbers)
    refused: set[int] = set()
    with FakeTensorMode() as mode:
        inputs = tuple([known[v.index].empty() for v in taken])

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        env = {v.index: t for v, t in zip(taken, tensors, strict=True)}
        nodes = current_proxy_mode().tracer.graph.nodes
        before = len(nodes)
        for i in numbers:
            call = program.chunk[i]
            try:
                chunk.run(call, env)
                fits = all(_same(env[o], known[o]) for o in _makes(call))
            except (RuntimeError, TypeError, ValueError) as error:
                # Torch's way to say that it cannot follow the call without values: it runs beside.
                logger.debug("%s stays outside of the compiled graph: %s", call.target, error)
                fits = False
            new = list(nodes)[before:] if len(nodes) > before else []
            before = len(nodes)
            if not fits or len(new) > MOST_NODES or not (refused or all(map(_is_pure, new))):
                refused.add(i)
                with mode:
                    env.update({o: known[o].empty() for o in _makes(call)})
                before = len(nodes)
        if any(version_of(t) for t in tensors):
            raise UncompilableError("it writes in place to values that live longer than a graph")
        return [env[o] for o in returned]

    module = compiler("trace")(run, tracing_mode="fake")(*inputs)
    return _Graph(module, inputs), refused


def _same(t: torch.Tensor, known: Meta) -> bool:
    return tuple(t.shape) == known.shape and str(t.dtype) == known.dtype


def _is_pure(node: torch.fx.Node) -> bool:
    """True if a node computes the same from the same tensors, whatever they hold."""
    if node.op == "get_attr":
        return False  # a tensor that the call made from python's numbers, or kept
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return True
    op = node.target
    if op.namespace not in ("aten", "prims") or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    made = node.meta.get("val")
    whole = isinstance(made, torch.Tensor) and not (made.is_floating_point() or made.is_complex())
    divides = op.overloadpacket.__name__.rstrip("_") in _DIVISIONS
    return not (whole and divides and len(node.all_input_nodes) > 1)


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of a program, ready to be compiled."""

    eager: frozenset[int]
    """Numbers of the calls that the compiler cannot follow."""
    graphs: tuple[_Graph, ...]
    known: dict[int, Meta]
    """Metadata of the values of a chunk, by index."""

    def compiled_into(self, folder: Path) -> float:
        """Compile each graph to a library in `folder`; returns the seconds that it took."""
        began = time.perf_counter()
        for number, graph in enumerate(self.graphs):
            path = str(folder / f"graph{number}.so")
            options = {"aot_inductor.output_path": path, **EXACT}
            compiler("compile")(graph.module, graph.inputs, options=options)
            for described in folder.glob("*.wrapper.json"):  # operators that torch itself runs
                described.rename(folder / f"graph{number}.json")
        return time.perf_counter() - began


def graphs(program: BatchedProgram, known: dict[int, Meta], chunk: Chunk) -> Graphs:
    """Trace the graphs of a program.

    Args:
        program: The batched program.
        known: Metadata of all values of a chunk.
        chunk: The chunk; only its size, device and numbers are read.

    Raises:
        UncompilableError: The program has no calls that are worth it, or too many between which it
            would have to be cut.
    """
    eager = frozenset(i for i, call in enumerate(program.chunk) if _never_compiled(call))
    while True:
        divided = [part for part in parts(program, eager) if part.graph]
        refuse(program, eager, len(divided))
        traced = [_trace(program, part.numbers, known, chunk) for part in divided]
        refused = frozenset(i for _, numbers in traced for i in numbers)
        if not refused:
            return Graphs(eager, tuple([graph for graph, _ in traced]), known)
        eager |= refused


def refuse(program: BatchedProgram, eager: frozenset[int], count: int) -> None:
    """Refuse a program that is not worth compiling, or that writes between its graphs."""
    names = ", ".join(dict.fromkeys(call_name(program.chunk[i]) for i in sorted(eager)))
    if not count:
        raise UncompilableError("nothing of it can be compiled" + (f" ({names})" if names else ""))
    if count > MOST_GRAPHS:
        raise UncompilableError(
            f"{names} cannot be compiled and cut it into {count} graphs, more than {MOST_GRAPHS}"
        )
    if count > 1 and any(call.writes for call in program.chunk):
        raise UncompilableError(
            f"it writes in place, and {names} cannot be compiled and cut it into {count} graphs"
        )


def call_name(call: Call) -> str:
    """The name of what a call calls."""
    if call.op is not None:
        return call.op.name()
    names = [call.target, *[a for a in call.args if callable(a) and not isinstance(a, type)]]
    return getattr(names[-1], "__name__", type(names[-1]).__name__)


def taken_by_graphs(program: BatchedProgram, eager: frozenset[int]) -> set[int]:
    """Indices of the values that the graphs of a program take."""
    divided = [part for part in parts(program, eager) if part.graph]
    return {v.index for part in divided for v in given(program, part.numbers)[0]}
