"""Maps for `reduce=shardmap.reduce.gram()`.

They return factors of the outputs, from which the matrices are computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import outputs as out_edges
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.routes import taken
from shardmap.factors import gram
from shardmap.planning.memory import format_bytes
from shardmap.program.ir import Program
from shardmap.reduce.reduction import Reduction
from shardmap.trace.batch import Batch

PASS_BYTES = 4 << 20
"""Bytes of one map's results below which they are not split over two maps."""
PASSES = 6
"""Most maps, unless one output of one sample is larger than a sixth of all."""

CACHED_BYTES = 16 << 20
"""Bytes above which automatic chunks are the smaller ones."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Maps that return factors in place of the function's outputs."""

    passes: tuple[tuple[gram.Pass, Prepared, Options], ...]
    groups: tuple[tuple[int, ...], ...]
    """For each matrix: positions of the outputs that it compares."""
    original: Prepared
    options: Options
    """The call's."""
    call: str
    dims: tuple[int | None, ...]
    """For each of the function's outputs: position of the mapped dimension, or None if it has
    none."""
    plain: bool
    """True if no factors are used: inside transforms and other maps, whose draws are not repeated,
    and where gradients are recorded."""

    @property
    def notes(self) -> list[str]:
        """Sentences about the outputs that are compared by factors."""
        return gram.described([one for one, _, _ in self.passes])

    @property
    def stacked(self) -> Options:
        """The options under which the function's own outputs are stacked where they are compared.

        So they are where no single program gives factors of them: `whole` takes the results.
        """
        structure, options = self.original.structure, self.options
        how = out_edges.spread_reductions(options.reduce, structure, self.call)
        others = [None if r is not None and r.name == "gram" else r for r in how]
        return dataclasses.replace(options, reduce=pytree.tree_unflatten(others, structure))

    def whole(self, found: Sequence[Tensor], batch: Batch) -> list[Any]:
        """Compute what `outputs` does from the function's own outputs, stacked."""
        one, own = self.passes[0][0], self.original.recording.program.outputs
        place = {at: k for k, at in enumerate(one.kept) if at >= 0}
        for at, var in enumerate(one.program.outputs):
            if at not in place:
                place[at] = next(k for group in self.groups for k in group if own[k] == var)
        ordered = [found[place[at]] for at in range(len(one.program.outputs))]

        def run(prepared: Prepared, _: Options, __: Batch) -> Sequence[Tensor]:
            return [t[:1] for t in found] if prepared is self.original else ordered

        return self.outputs(run, batch)

    def outputs(
        self,
        run: Callable[[Prepared, Options, Batch], Sequence[Tensor]],
        batch: Batch,
    ) -> list[Any]:
        """Run the maps and return the function's outputs.

        A matrix replaces the first of the outputs that it compares, None the others.

        Args:
            run: Function that runs a map, always with the same draws.
            batch: The call's arguments.

        Raises:
            MismatchError: The factors do not give the function's own result for the first sample.
        """
        out: list[Any] = [None] * len(self.passes[0][0].kept)
        matrices: list[Tensor | None] = [None] * len(self.groups)
        for one, prepared, options in self.passes:
            found = run(prepared, options, batch)
            for k, at in enumerate(one.kept):
                if at >= 0:
                    out[k] = found[at]
            matrices = [
                gram.add_to(m, parts, found, batch.size)
                for m, parts in zip(matrices, one.parts, strict=True)
            ]
            del found  # before the next map makes its own
        sample, recording = self.original.recording.sample, self.original.recording
        if sample and recording.random:  # the maps have drawn something else than the recording
            first = taken(batch, torch.tensor([0]))
            alone = [] if self.plain else run(self.original, self.options.alone(), first)
            sample = [t[0] for t in alone]
        for positions, matrix in zip(self.groups, matrices, strict=True):
            assert matrix is not None, "each matrix is of outputs"
            if not gram.check(positions, sample, matrix):
                raise errors.MismatchError(
                    f"{self.call}: the inner products from factors are not those of what the "
                    "function returned for the first sample; stack "
                    "the results (reduce=None) and multiply them, and report the function"
                )
            out[positions[0]] = matrix
        return out


def compared(
    prepared: Prepared, options: Options, samples: int, plain: bool, several: bool
) -> Compared | None:
    """The maps that return factors; None if no output is compared.

    Args:
        prepared: The recording.
        options: The call's options.
        samples: N.
        plain: True to compare the outputs themselves: inside transforms and other maps, and
            where gradients are recorded.
        several: True if there may be more than one map.

    Raises:
        OptionError: An option cannot be combined with such a map.
    """
    if options.reduce is None:
        return None
    program = prepared.recording.program
    reduced = out_edges.spread_reductions(options.reduce, prepared.structure, options.call)
    marks = {id(r): r for r in reduced if r is not None and r.name == "gram"}
    if not marks:
        return None
    if options.out is not None:
        raise errors.OptionError(
            f"{options.call}: out= and reduce='gram': the matrix is returned; leave out= away, and "
            "save it yourself"
        )
    if options.out_dims != 0:
        raise errors.OptionError(
            f"{options.call}: out_dims={options.out_dims!r} and reduce='gram'; leave out_dims at 0"
        )
    _refuse_size(program, len(marks), samples, options)
    found = prepared.derived.get(("gram", samples, several))
    if found is None:
        groups = [tuple(k for k, r in enumerate(reduced) if r is mark) for mark in marks.values()]
        limit = _limit(program, groups, samples, options) if several else None
        made = gram.passes(
            prepared.recording, groups, options.randomness, not plain, samples, limit
        )
        maps = [(one, Prepared(prepared.recording, _listed(one))) for one in made]
        found = prepared.derived["gram", samples, several] = (
            groups,
            maps,
            _chunk(program, options, limit),
        )
    groups, made, chunk = found
    whole = options
    options = dataclasses.replace(options, chunk_size=chunk)
    maps = []
    for one, derived in made:
        recording = dataclasses.replace(prepared.recording, program=one.program, sample=())
        reductions: list[Reduction | None] = [None] * len(one.program.outputs)
        for k, at in enumerate(one.kept):
            if at >= 0:
                reductions[at] = reduced[k]
        maps.append(
            (
                one,
                dataclasses.replace(derived, recording=recording),
                dataclasses.replace(options, reduce=reductions),
            )
        )
    dims = tuple([0 if r is None else None for r in reduced])
    return Compared(tuple(maps), tuple(groups), prepared, whole, options.call, dims, plain)


def _refuse_size(program: Program, matrices: int, samples: int, options: Options) -> None:
    """Refuse matrices that do not fit, before anything is computed.

    Raises:
        OverBudget: They need more memory than the budget.
    """
    spec = program.outputs[0].spec
    needed = matrices * samples**2 * spec.dtype.itemsize
    budget = options.budget.on(torch.device(options.output_device or spec.device))
    if budget is not None and needed > budget:
        raise errors.OverBudget(
            f"{options.call}: reduce='gram' of {samples} samples is {matrices} x [{samples}, "
            f"{samples}], {format_bytes(needed)}, and the "
            f"budget is {format_bytes(budget)}; compare fewer samples, or project the gradients "
            "(shardmap.reduce.project) first"
        )


def _chunk(program: Program, options: Options, limit: int | None) -> Any:
    """The chunk size.

    On a CPU, a chunk that is planned takes no more than the results of all samples.

    Measured for a small CNN on 500 digits, against chunks sized for the cache: a third of the
    memory, and half the time.
    """
    on_cpu = program.inputs[0].spec.device == "cpu" and options.devices in ("auto", "cpu")
    if options.chunk_size != "auto" or limit is None or limit > CACHED_BYTES or not on_cpu:
        return options.chunk_size
    results = [v.spec for eq in program.equations for v in eq.results()]
    return max(
        1, limit // max(1, sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in results))
    )


def _listed(one: gram.Pass) -> pytree.TreeSpec:
    """The structure of a map's outputs: a list."""
    return pytree.tree_structure([0] * len(one.program.outputs))


def _limit(
    program: Program, groups: Sequence[Sequence[int]], samples: int, options: Options
) -> int:
    """Most bytes of the outputs of one map."""
    specs = [program.outputs[k].spec for group in groups for k in group]
    total = samples * sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    limit = max(PASS_BYTES, total // PASSES)
    budget = options.budget.bytes
    return limit if budget is None else max(1, min(limit, budget // 4))
