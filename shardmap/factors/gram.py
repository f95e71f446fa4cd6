"""Inner products of the outputs of all pairs of samples, from factors if those are smaller.

The map returns the factors of the function's outputs (`passes`); the matrix is computed from
them in blocks (`add_to`). For linear layers `<A_i B_i, A_j B_j> = <A_i^T A_j, B_i B_j^T>`; over one
position the product of two Gram matrices, of cotangents and activations.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.factors.find import Factored, Factors, Patches, Rows, Term, sizes
from shardmap.factors.norms import channels, patches
from shardmap.program.analysis import mapped_groups, written
from shardmap.program.ir import NO_GRAD, Equation, Param, Program, Var
from shardmap.trace.recording import Recording

BLOCK_BYTES = 32 << 20
"""Bytes of one of a block's temporaries; there are about four of that size."""


@dataclass(frozen=True, slots=True)
class Part:
    """One output of the function: a sum of terms, or itself.

    The numbers are positions among the outputs of the map.
    """

    terms: tuple[tuple[Term, int, int], ...] = ()
    """Each term, with the positions of its factors."""
    scales: tuple[tuple[tuple[str, float | int, bool], ...], ...] = ()
    """For each term its scales: "mul" or "div", then a number or a position, then True if it is a
    position."""
    dense: int = -1


@dataclass(frozen=True, slots=True)
class Pass:
    """One map of the samples, and the use of its outputs."""

    program: Program
    kept: tuple[int, ...]
    """For each of the function's outputs that is not compared: its position among the map's; -1 for
    the others, and in all passes but the first."""
    parts: tuple[tuple[Part, ...], ...]
    """For each matrix, the parts that this pass adds to it."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part before it has positions: its output, and its bytes per sample."""

    group: int
    output: int
    factored: Factored | None
    rows: tuple[int, int] | None
    """The rows of an output that is cut into pieces; None for all."""
    sample_bytes: int


def passes(
    recording: Recording,
    groups: Sequence[Sequence[int]],
    randomness: str,
    enabled: bool,
    samples: int,
    limit_bytes: int | None,
) -> tuple[Pass, ...]:
    """Maps of the same function that return factors of the compared outputs.

    If all factors would be large, each map returns some of them, so that only those are in memory
    at a time.

    Args:
        recording: The recording of the function.
        groups: For each matrix, the positions of the outputs that it compares.
        randomness: The map's option.
        enabled: True to use factors: not under transforms and outer autograd.
        samples: N.
        limit_bytes: Most bytes of the outputs of one map; None for one map, whatever they take.
    """
    program = recording.program
    writes = {v.group for eq in program.equations for v in written(eq)}
    factors = Factors(program, writes, mapped_groups(program, randomness, False))
    pieces = [
        piece
        for number, group in enumerate(groups)
        for k in group
        for piece in _pieces(program, factors, number, k, enabled)
    ]
    if limit_bytes is not None and not (recording.random or recording.written_inputs):
        pieces = [
            part
            for piece in pieces
            for part in _cut(program, piece, max(1, limit_bytes // max(1, samples)))
        ]
        bins = _binned(pieces, max(1, limit_bytes // max(1, samples)))
    else:
        bins = [pieces]
    compared = {k for group in groups for k in group}
    return tuple(
        [
            _pass(recording, taken, len(groups), compared, number == 0)
            for number, taken in enumerate(bins)
        ]
    )


def described(made: Sequence[Pass]) -> list[str]:
    """Sentences about the products that are compared by factors."""
    products = [
        [term for term, _, _ in part.terms]
        for one in made
        for parts in one.parts
        for part in parts
        if part.terms
    ]
    return [f"gram: inner products from factors {sizes(terms)}" for terms in products]


def _pieces(program: Program, factors: Factors, number: int, k: int, enabled: bool) -> list[_Piece]:
    var = program.outputs[k]
    found = factors.of(var) if enabled else None
    if found is not None and _smaller(found.terms):
        held = [v for t in found.terms for v in (t.left, t.right)]
        return [_Piece(number, k, found, None, sum(_bytes(v) for v in held))]
    return [_Piece(number, k, None, None, _bytes(var))]


def _bytes(var: Var) -> int:
    return math.prod(var.spec.shape) * var.spec.dtype.itemsize


def _cut(program: Program, piece: _Piece, most_bytes: int) -> list[_Piece]:
    """Cut a piece into rows of its output if it is larger than a map may return for a sample."""
    shape = program.outputs[piece.output].spec.shape
    if piece.factored is not None or piece.sample_bytes <= most_bytes or not shape or shape[0] < 2:
        return [piece]
    each = piece.sample_bytes // shape[0]
    step = max(1, most_bytes // max(1, each))
    starts = range(0, shape[0], step)
    return [
        dataclasses.replace(
            piece,
            rows=(i, min(i + step, shape[0])),
            sample_bytes=each * (min(i + step, shape[0]) - i),
        )
        for i in starts
    ]


def _binned(pieces: Sequence[_Piece], most_bytes: int) -> list[list[_Piece]]:
    """Distribute the pieces over maps: the largest first, each into the first with room."""
    bins: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda p: -p.sample_bytes):
        for taken in bins:
            if sum(p.sample_bytes for p in taken) + piece.sample_bytes <= most_bytes:
                taken.append(piece)
                break
        else:
            bins.append([piece])
    return bins


def _pass(
    recording: Recording, pieces: Sequence[_Piece], groups: int, compared: set[int], first: bool
) -> Pass:
    program = recording.program
    outputs: list[Var] = []
    flags: list[int] = []
    equations = list(program.equations)
    index = itertools.count(1 + max(v.index for v in _variables(program)))

    def add(var: Var, flag: int = NO_GRAD) -> int:
        outputs.append(var)
        flags.append(flag)
        return len(outputs) - 1

    kept = tuple(
        [
            -1 if k in compared or not first else add(v, program.output_flags[k])
            for k, v in enumerate(program.outputs)
        ]
    )
    parts: list[list[Part]] = [[] for _ in range(groups)]
    for piece in pieces:
        var, flag = program.outputs[piece.output], program.output_flags[piece.output]
        if piece.factored is not None:
            part = _factored(recording, piece.factored, add)
        elif piece.rows is not None:
            cut = _rows(var, piece.rows, next(index))
            equations.append(
                Equation(aten.slice.Tensor, (var, 0, *piece.rows), (), (cut,), (flag,), False)
            )
            part = Part(dense=add(cut, flag))
        else:
            part = Part(dense=add(var, flag))
        parts[piece.group].append(part)
    changed = program._replace(
        outputs=tuple(outputs), output_flags=tuple(flags), equations=tuple(equations)
    )
    return Pass(changed, kept, tuple(map(tuple, parts)))


def _variables(program: Program) -> list[Var]:
    made = [v for eq in program.equations for v in eq.results()]
    return [*program.inputs, *program.captured, *program.literals, *made]


def _rows(var: Var, rows: tuple[int, int], index: int) -> Var:
    """A view of some rows of a recorded tensor."""
    start, stop = rows
    spec = var.spec
    return Var(
        index,
        var.group,
        spec._replace(
            shape=(stop - start, *spec.shape[1:]), offset=spec.offset + start * spec.stride[0]
        ),
    )


def _factored(recording: Recording, found: Factored, add: Callable[..., int]) -> Part:
    terms, scales = [], []
    for term in found.terms:
        terms.append((term, add(term.left), add(term.right)))
        scaled: list[tuple[str, float | int, bool]] = []
        for how, by in term.scales:
            if type(by) is Var:
                scaled.append((how, add(by), True))
            else:
                scaled.append(
                    (how, recording.scalars[by.scalar] if type(by) is Param else by, False)
                )
        scales.append(tuple(scaled))
    return Part(tuple(terms), tuple(scales))


def _smaller(terms: Sequence[Term]) -> bool:
    """True if factors take less memory than the product and no more operations to compare."""
    n, m = terms[0].n, terms[0].m
    positions = sum(t.positions for t in terms)
    if any(type(t) is Patches and not t.plain for t in terms):
        return False
    held = sum(math.prod(t.left.spec.shape) + math.prod(t.right.spec.shape) for t in terms)
    return 2 * held <= n * m and positions**2 * (n + m) <= 2 * n * m


def add_to(
    out: Tensor | None, parts: Sequence[Part], outs: Sequence[Tensor], samples: int
) -> Tensor | None:
    """Add one map's part to the matrix `[N, N]`, block by block.

    Only blocks on and above the diagonal are computed.

    Args:
        out: The matrix so far.
        parts: The parts that are added.
        outs: The outputs of the map, `[N, ...]` each.
        samples: N.
    """
    if not parts:
        return out
    like = outs[_places(parts[0])[0]]
    out = like.new_zeros((samples, samples)) if out is None else out
    widest = max([max(t.positions for t, _, _ in p.terms) for p in parts if p.terms], default=1)
    block = max(1, int(math.sqrt(BLOCK_BYTES / like.element_size())) // widest)
    for a in range(0, samples or 1, block):  # that of no samples has a history too
        rows = slice(a, min(a + block, samples))
        for b in range(a, samples or 1, block):
            columns = slice(b, min(b + block, samples))
            target = out[rows, columns]
            for part in parts:
                target += _block(part, outs, rows, columns)
            if b > a:
                out[columns, rows] = target.mH
            else:  # products are symmetric up to rounding only
                target.copy_(target.triu() + target.triu(1).mH)
    return out


def _places(part: Part) -> tuple[int, ...]:
    return (part.dense,) if not part.terms else tuple(right for _, _, right in part.terms)


def _block(part: Part, outs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
    if not part.terms:
        flat = outs[part.dense].flatten(1)
        return flat[rows] @ flat[columns].mH
    total: Tensor | None = None
    for x, x_scales in zip(part.terms, part.scales, strict=True):
        for y, y_scales in zip(part.terms, part.scales, strict=True):
            found = _inner(x, y, outs, rows, columns)
            found = _scaled(found, x_scales, outs, rows, 0)
            found = _scaled(found, y_scales, outs, columns, 1)
            total = found if total is None else total + found
    assert total is not None
    return total


def _scaled(
    t: Tensor,
    scales: Sequence[tuple[str, float | int, bool]],
    outs: Sequence[Tensor],
    rows: slice,
    d: int,
) -> Tensor:
    for how, by, place in scales:
        number = outs[int(by)][rows].reshape((1, -1) if d else (-1, 1)) if place else by
        t = t * number if how == "mul" else t / number
    return t


def _inner(
    x: tuple[Term, int, int],
    y: tuple[Term, int, int],
    outs: Sequence[Tensor],
    rows: slice,
    columns: slice,
) -> Tensor:
    """Inner products `[I, J]` of one term of some samples and one term of others."""
    (a, *_), (b, *_) = x, y
    if type(a) is Rows and type(b) is not Rows:
        return _rows_with_product(x, y, outs, rows, columns)
    if type(b) is Rows and type(a) is not Rows:
        return _rows_with_product(y, x, outs, columns, rows).t()
    left, right = _factors(x, outs, rows)
    other_left, other_right = _factors(y, outs, columns)
    if type(a) is Rows and type(b) is Rows:
        lefts = (
            (left.unsqueeze(1) == other_left.unsqueeze(0))
            & (left != a.padding).unsqueeze(1)
            & (other_left != b.padding).unsqueeze(0)
        )
        products = (right @ other_right.t()).masked_fill_(~lefts, 0)
    else:
        products = (left @ other_left.t()).mul_(right @ other_right.t())
    return _over_positions(products, a.positions, b.positions)


def _over_positions(products: Tensor, mine: int, others: int) -> Tensor:
    """Sum over positions: `[I*T, J*S] -> [I, J]`."""
    if mine == others == 1:
        return products
    return products.unflatten(1, (-1, others)).unflatten(0, (-1, mine)).sum((1, 3))


def _factors(
    x: tuple[Term, int, int], outs: Sequence[Tensor], rows: slice
) -> tuple[Tensor, Tensor]:
    """A term's factors of some samples: `[I*T, n]` (indices `[I*T]` of rows) and `[I*T, m]`."""
    term, left_at, right_at = x
    left, right = outs[left_at][rows], outs[right_at][rows]
    if type(term) is Rows:
        return left.reshape(-1), right.reshape(-1, term.m)
    if type(term) is Patches:
        left, right = channels(left), patches(right, term.weight[2:], *term.numbers[:3])
    return left.transpose(1, 2).reshape(-1, term.n), right.reshape(-1, term.m)


def _rows_with_product(
    x: tuple[Term, int, int],
    y: tuple[Term, int, int],
    outs: Sequence[Tensor],
    rows: slice,
    columns: slice,
) -> Tensor:
    term = x[0]
    assert type(term) is Rows
    index, grad = _factors(x, outs, rows)
    left, right = _factors(y, outs, columns)
    if y[0].flipped:
        left, right = right, left
    met = left[:, index].t().masked_fill((index == term.padding).unsqueeze(1), 0)  # [I*T, J*S]
    return _over_positions(met.mul_(grad @ right.t()), term.positions, y[0].positions)


def check(groups: Sequence[int], sample: Sequence[Tensor], found: Tensor) -> bool:
    """True if the first entry is the squared norm of the first sample's own output.

    Args:
        groups: The outputs that the matrix compares.
        sample: The function's own result.
        found: The matrix.
    """
    if not sample or not len(found):
        return True
    expected = torch.stack([sample[k].detach().abs().square().sum().double() for k in groups]).sum()
    first = found[0, 0].abs().double().cpu()
    return not torch.isfinite(expected) or bool(
        (first - expected.cpu()).abs() <= 1e-2 * expected.cpu()
    )
