"""Draws of a function that is run itself, sample by sample: those that a replay would give it.

How a sample is served depends on the others and on earlier calls: by a path that many take, or by
the function itself. Its random numbers must not. So each operator that draws is served by its rule,
for a batch of one sample of this number, and counted as recorded calls that draw are.
"""

from __future__ import annotations

import collections
import contextlib
import math
import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import cast

import numpy as np
import torch
from torch.utils import checkpoint

from shardmap._torch import (
    OpOverload,
    TorchDispatchMode,
    generator_id,
    pytree,
    schema_of,
    without_dispatch,
    without_functions,
)
from shardmap.call import arguments as edges
from shardmap.lower import cache
from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.batcher import lower
from shardmap.program.operators import draws, op_info
from shardmap.rules import registry
from shardmap.rules.lowering import B, Call, Seed, V
from shardmap.rules.philox import Draw, SampleNumbers, Seeds, number_of
from shardmap.rules.random import SeededLoop, drawn
from shardmap.trace.given_generators import is_default
from shardmap.trace.record import record

_SEED_STEP = 0x9E3779B97F4A7C15
"""Constant that sets the seeds of neighbouring samples far apart."""


class Drawing:
    """Makes random draws depend only on the call's seeds and the sample's number.

    What draws without an operator of torch's (python's and numpy's generators, checkpoints) gets
    generators that are seeded by them; their states are restored on leaving this context.

    Args:
        seeds: The seeds of the call.
        generators: The user's generators, of which the seeds after the first are.
        randomness: As for `shardmap.vmap`.
        call: The user's call, for errors.
        begin: The code that calls the function.
        start: The numbers of the chunk's samples.
        size: How many there are.
    """

    def __init__(
        self,
        seeds: Seeds,
        generators: Sequence[torch.Generator],
        randomness: str,
        call: str,
        begin: CodeType,
        start: SampleNumbers,
        size: int,
    ):
        self.seeds = seeds
        self.randomness = randomness
        self.call = call
        self.begin = begin
        self.places = {generator_id(g): i + 1 for i, g in enumerate(generators)}
        self._generators = generators
        self._start = start
        self._size = size
        self._ahead: dict[Hashable, tuple[int, torch.Tensor]] = {}
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> Drawing:
        """Keep the states of the process's generators, and of the user's."""
        with without_dispatch(), without_functions():
            for generator in (torch.default_generator, *self._generators):
                self._kept.callback(generator.set_state, generator.get_state())
            if torch.cuda.is_initialized():
                self._kept.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        self._kept.callback(random.setstate, random.getstate())
        self._kept.callback(np.random.set_state, np.random.get_state())
        return self

    def __exit__(self, *error: object) -> None:
        """Restore them."""
        with without_dispatch(), without_functions():
            self._kept.close()

    def of(self, i: int) -> SampleDraws:
        """Seed all for the sample at a place; run the function in the context that is returned."""
        number = number_of(self._start, i)
        step = 0 if self.randomness == "same" else (number + 1) * _SEED_STEP
        seeds = [(seed + step) % (1 << 63) for seed in self.seeds if isinstance(seed, int)]
        own = seeds[0]
        # `torch.manual_seed` formats a traceback where CUDA has not been used yet.
        torch.default_generator.manual_seed(own)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(own)
        for generator, seed in zip(self._generators, seeds[1:], strict=True):
            generator.manual_seed(seed)
        random.seed(own)
        np.random.seed(own % (1 << 32))
        return SampleDraws(self, i, number, seeds)

    def row(self, i: int, place: int, function: Draw, number: int, *rest: object) -> torch.Tensor:
        """One sample's row of a draw, `[1, *shape]`; those of the next samples are made with it."""
        shape = tuple(cast(Sequence[int], rest[0]))
        key = function, place, number, shape, *rest[1:]
        first, rows = self._ahead.get(key, (0, None))
        if rows is None or not first <= i < first + len(rows):
            most = max(1, _AHEAD // max(1, math.prod(shape)))
            size = min(4 if rows is None else 2 * len(rows), self._size - i, most)
            start = self._start + i if isinstance(self._start, int) else self._start[i : i + size]
            seed = self.seeds[place]
            first, rows = self._ahead[key] = i, drawn(function, size, start, seed, number, *rest)
        return rows[i - first : i - first + 1].clone()  # a view would count the others' writes


_AHEAD = 2**16
"""Numbers that are drawn at a time."""


class SampleDraws(TorchDispatchMode):
    """Gives the random operators of one sample's run the numbers of that sample.

    Args:
        drawing: The draws of the chunk.
        place: The sample's place in the chunk.
        number: Its number.
        seeds: The seeds that generators have been given for it.
    """

    def __init__(self, drawing: Drawing, place: int, number: int, seeds: Sequence[int]):
        super().__init__()
        self._drawing = drawing
        self._at = place
        self._number = number
        self._seeds = seeds
        self._drawn = collections.Counter[int]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operator, and those that draw by their rules."""
        kwargs = kwargs or {}
        if func in _quiet or not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if not draws(func, args, kwargs):
            if not op_info(func).random:
                _quiet.add(func)
            return func(*args, **kwargs)
        values = (*args, *kwargs.values())
        given = next((v for v in values if isinstance(v, torch.Generator)), None)
        places = self._drawing.places
        place = 0 if given is None or is_default(given) else places.get(generator_id(given))
        # As the lowering counts: all draws together, and those of each of the user's generators.
        count = self._drawn[place or 0]
        self._drawn[0] += 1
        source = torch.default_generator if given is None else given
        if (
            place is None  # a generator that the function has made
            or source.initial_seed() != self._seeds[place]  # it has set a seed of its own
            or _is_computed_again(self._drawing.begin)
        ):
            return func(*args, **kwargs)
        if place:
            self._drawn[place] += 1
        made = _draw_of(func, args, kwargs, count, self._drawing.randomness, self._drawing.call)
        found = self._run(made, list(_tensors(values)), place, count)
        return _returned(func, args, kwargs, found)

    def _run(self, made: _Draw, tensors: Sequence[torch.Tensor], place: int, count: int) -> object:
        """Run a lowered call for this sample; tensors that it writes are written."""
        batched, seed = made.batched, self._drawing.seeds[place]
        rows = [t.unsqueeze(0) for t in tensors] or [_NOTHING]
        env = {v.index: t for v, t in zip(batched.inputs, rows, strict=True)}
        symbols = {"BatchSize": 1, "ChunkStart": self._number, "SampleDevice": rows[0].device}

        def value(arg: object) -> object:
            if isinstance(arg, V):
                return env[arg.index]
            if type(arg) is list or type(arg) is tuple:
                return [value(a) for a in arg]
            return seed if isinstance(arg, Seed) else symbols.get(type(arg).__name__, arg)

        for call in (*batched.fixed, *batched.chunk):
            args = list(map(value, call.args))
            if call.target is drawn:
                function, size, _, _, _, *rest = args
                if call.args[1] is B:
                    out = self._drawing.row(self._at, place, cast(Draw, function), count, *rest)
                else:  # one for all samples
                    out = drawn(cast(Draw, function), cast(int, size), 0, seed, count, *rest)
            else:
                out = call.target(*args, **{k: value(v) for k, v in call.kwargs})
            env.update(_named(call, out))
        outputs = [env[v.index][0] if v.mapped else env[v.index] for v in batched.outputs]
        return pytree.tree_unflatten(outputs, made.structure)


_NOTHING = torch.zeros(1)
"""The sample of a call without tensors."""


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, as pytrees order them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is list or type(value) is tuple:
            yield from _tensors(value)


def _is_computed_again(begin: CodeType) -> bool:
    """True inside of a checkpoint of the function's, which is run again by torch's generator."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not begin:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


_CHECKPOINT = checkpoint.__file__


def _returned(
    op: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], found: object
) -> object:
    """What the operator returns: an argument, if it writes to that."""
    if "out" in kwargs:
        return kwargs["out"]
    returns = schema_of(op).returns
    info = returns[0].alias_info if returns else None
    return args[0] if info is not None and info.is_write else found


@dataclass(frozen=True, slots=True)
class _Draw:
    """One call of an operator that draws, lowered for a batch."""

    batched: BatchedProgram
    structure: pytree.TreeSpec
    counted: bool
    """True if its draws follow from the number of earlier ones that it was lowered with."""


def _named(call: Call, out: object) -> Iterable[tuple[int, torch.Tensor]]:
    results = cast(Sequence[torch.Tensor], out if call.several else (out,))
    return [(i, t) for i, t in zip(call.outs, results, strict=False) if i is not None]


_quiet: set[object] = set()
"""Operators that never draw, as they are met."""
_drawn: dict[Hashable, _Draw] = {}
"""Calls that draw, lowered, by what they are called with."""
_MOST = 4096


def _draw_of(
    op: OpOverload,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    count: int,
    randomness: str,
    call: str,
) -> _Draw:
    """The lowered form of a call that draws, after `count` others."""
    form = op, _form(args), _form(tuple(kwargs.items())), randomness, registry.version()
    found = _drawn.get(form)
    if found is None:
        found = _kept(form, op, args, kwargs, 0, randomness, call)
    if not found.counted or not count:
        return found
    return _drawn.get((form, count)) or _kept(
        (form, count), op, args, kwargs, count, randomness, call
    )


def _form(value: object) -> Hashable:
    """What the lowered form of a call depends on, of an argument."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if type(value) is tuple or type(value) is list:
        return tuple(map(_form, value))
    return None if isinstance(value, torch.Generator) else (type(value), value)


def _kept(
    key: Hashable,
    op: OpOverload,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    count: int,
    randomness: str,
    call: str,
) -> _Draw:
    """Lower a call, and keep it under `key`."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    leaves = [None if isinstance(v, torch.Generator) else v for v in leaves]
    tensors = {i: v for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)}

    def of_tensors(*rows: torch.Tensor) -> object:
        given = list(leaves)
        for i, t in zip(tensors, rows, strict=False):
            given[i] = t
        args, kwargs = pytree.tree_unflatten(given, structure)
        return op(*args, **kwargs)

    samples = [t.detach().unsqueeze(0) for t in tensors.values()] or [_NOTHING]
    batch = edges.collect(tuple(samples), {}, 0, None, call)
    recording, results = record(of_tensors, batch, randomness, False, call)
    options = LoweringOptions(samples[0].device.type, randomness, False, False, False, call)
    batched = lower(
        recording.program, options, Fixes(), lambda number, eq: None, cache.lowered, count
    )
    loops = any(isinstance(c.target, SeededLoop) for c in (*batched.fixed, *batched.chunk))
    if len(_drawn) >= _MOST:
        _drawn.clear()
    made = _drawn[key] = _Draw(batched, results, loops)
    return made


def clear() -> None:
    """Forget the lowered calls."""
    _drawn.clear()
    _quiet.clear()
