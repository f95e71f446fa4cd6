"""Turn the calls of a recorded backward into a program of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardmap.program.analysis import is_effect, written
from shardmap.program.ir import GRAD, NO_GRAD, Equation, Param, Program, Var


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of a backward, taken out of a recording."""

    equations: list[Equation]
    cotangents: tuple[Var, ...]
    """The arguments of the backward."""
    outs: tuple[Var, ...]
    """The gradients that it returned."""
    out_flags: tuple[int, ...]
    """For each gradient: `NO_GRAD`, `GRAD` or `FRESH_LEAF`, as in `Equation.flags`."""

    def program(
        self, results: Sequence[Var], literals: set[int], anchors: Sequence[tuple[Var, int]]
    ) -> tuple[Program, tuple[int, ...], list[tuple[Var, int]], list[int]]:
        """Make the program, and list its uses of the recording that it was a part of.

        Args:
            results: The Function's results, to which the cotangents belong.
            literals: Indices of the recording's literals.
            anchors: Tensors that are kept whether they are used or not, each with its flag.

        Returns:
            The program; positions of the results that it reads; the other tensors that it
            reads, literals last, each with its flag as in `Equation.flags`; the numbers of the
            recording that it uses.
        """
        equations = self.leading()
        kept = self._read_from_outside(equations)
        for var, flag in anchors:
            kept[var.index] = var, flag
        saved = tuple([k for k, v in enumerate(results) if v.index in kept])
        for k in saved:
            del kept[results[k].index]
        plain = [pair for pair in kept.values() if pair[0].index not in literals]
        own = [pair for pair in kept.values() if pair[0].index in literals]
        numbers = _numbers(equations)
        places = {number: k for k, number in enumerate(numbers)}
        program = Program(
            inputs=(*self.cotangents, *[results[k] for k in saved], *[var for var, _ in plain]),
            captured=(),
            literals=tuple([var for var, _ in own]),
            scalars=len(numbers),
            equations=tuple([_renumbered(eq, places) for eq in equations]),
            outputs=self.outs,
            output_flags=self.out_flags,
            types=(),
        )
        return program, saved, plain + own, numbers

    def leading(self) -> list[Equation]:
        """The calls that lead to a result, write to memory or have an effect.

        The `detach` by which autograd unpacks a saved result is not among them.
        """
        used = {v.index for v in self.outs}
        kept = []
        for eq in reversed(self.equations):
            if is_effect(eq) or written(eq) or any(v.index in used for v in eq.results()):
                kept.append(eq)
                used.update(v.index for v in eq.inputs())
        return kept[::-1]

    def _read_from_outside(self, equations: list[Equation]) -> dict[int, tuple[Var, int]]:
        """Tensors made before the backward, each with `GRAD` if its history is used."""
        inside = {v.index for v in self.cotangents}
        found: dict[int, tuple[Var, int]] = {}

        def read(var: Var, flag: int) -> None:
            if var.index not in inside:
                before = found.get(var.index, (var, NO_GRAD))[1]
                found[var.index] = var, GRAD if GRAD in (flag, before) else before

        for eq in equations:
            for var, flag in zip(eq.inputs(), eq.flags, strict=True):
                read(var, flag)
            inside.update(v.index for v in eq.results() if v.index not in found)
        for var, flag in zip(self.outs, self.out_flags, strict=True):
            read(var, flag)
        return found


def _numbers(equations: list[Equation]) -> list[int]:
    """The indices of the recording's numbers that calls take, in order."""
    found: dict[int, None] = {}

    def look(value: object) -> None:
        if type(value) is Param:
            found[value.scalar] = None
        elif type(value) is tuple:
            for item in value:
                look(item)

    for eq in equations:
        look(eq.args)
        look(eq.kwargs)
    return list(found)


def _renumbered(eq: Equation, places: dict[int, int]) -> Equation:
    """A call with its numbers replaced by their positions in the program."""

    def new(value: object) -> object:
        if type(value) is Param:
            return Param(places[value.scalar])
        return each(value) if type(value) is tuple else value

    def each(values: tuple[object, ...]) -> tuple:
        return tuple(map(new, values))

    return eq._replace(args=each(eq.args), kwargs=each(eq.kwargs), source=None)
