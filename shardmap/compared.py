"""`reduce=shardmap.reduce.gram()`: the map returns factors, and the matrices are made of what it returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from shardmap import edges, errors
from shardmap.ghost import gram
from shardmap.once import Prepared
from shardmap.options import Options
from shardmap.reduction import Reduction


@dataclass(frozen=True, slots=True)
class Compared:
    """A map whose outputs stand for others."""

    prepared: Prepared
    options: Options
    factors: gram.AsFactors
    original: Prepared

    def outputs(self, found: Sequence[Tensor], samples: int) -> list[Any]:
        """What the function's outputs become: the matrix in the place of the first output that it compares, None in that of the others.

        Raises:
            MismatchError: The factors do not give what the function returned for the first sample.
        """
        out: list[Any] = [None if at < 0 else found[at] for at in self.factors.kept]
        for positions, parts in self.factors.groups:
            out[positions[0]] = gram.matrix(parts, found, samples)
            if not gram.check(parts, positions, self.original.recording.sample, out[positions[0]]):
                raise errors.MismatchError(
                    f"{self.options.call}: the inner products from factors are not those of what the function returned for the first "
                    "sample; stack the results (reduce=None) and multiply them, and report the function"
                )
        return out


def compared(prepared: Prepared, options: Options, plain: bool) -> Compared | None:
    """The map that returns factors instead; None where nothing is compared.

    Args:
        prepared: The recording.
        options: The call's.
        plain: Whether the outputs are compared as they are: inside transforms and other maps, and where gradients are recorded.

    Raises:
        OptionError: An option that the outputs of such a map cannot have.
    """
    if options.reduce is None:
        return None
    program = prepared.recording.program
    tree = pytree.tree_unflatten([v.spec.ndim for v in program.outputs], prepared.structure)
    reduced = edges.spread_reductions(options.reduce, tree, options.call)
    marks = {id(r): r for r in reduced if r is not None and r.name == "gram"}
    if not marks:
        return None
    if options.out is not None:
        raise errors.OptionError(f"{options.call}: out= and reduce='gram': the matrix is returned; leave out= away, and save it yourself")
    if options.out_dims != 0:
        raise errors.OptionError(f"{options.call}: out_dims={options.out_dims!r} and reduce='gram'; leave out_dims at 0")
    found = prepared.derived.get("gram")
    if found is None:
        groups = [[k for k, r in enumerate(reduced) if r is mark] for mark in marks.values()]
        factors = gram.as_factors(prepared.recording, groups, options.randomness, not plain)
        structure = pytree.tree_structure(list(factors.recording.program.outputs), is_leaf=lambda v: not isinstance(v, list))
        found = prepared.derived["gram"] = factors, Prepared(factors.recording, structure)
    factors, derived = found
    recording = dataclasses.replace(prepared.recording, program=factors.recording.program, sample=())
    reductions: list[Reduction | None] = [None] * len(recording.program.outputs)
    for k, at in enumerate(factors.kept):
        if at >= 0:
            reductions[at] = reduced[k]
    return Compared(dataclasses.replace(derived, recording=recording), dataclasses.replace(options, reduce=reductions), factors, prepared)
