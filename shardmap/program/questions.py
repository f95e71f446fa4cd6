"""Questions of a function about its sample: about values, and shapes that depend on values.

The answers of one sample are constants of its recording. Samples with the same answers are found
by computing, for all samples, the operands of the questions and the calls that lead
to them. Questions about what a shape depends on become questions about a count where that is
equivalent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._torch import OpOverload, aten
from shardmap.program.analysis import leading_to
from shardmap.program.ir import NO_GRAD, Equation, Program, Spec, Var
from shardmap.program.operators import CHECKS, SCALARS

_COUNTED = {
    aten.nonzero.default: 0,
    aten.masked_select.default: 1,
    aten.repeat_interleave.Tensor: 0,
}
"""Operators whose result's first size is a count over an argument, and which argument that is."""


def _bins(eq: Equation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The number of bins of each sample's `bincount`: `[samples, n] -> [samples]`."""
    least = eq.args[2] if len(eq.args) > 2 else dict(eq.kwargs).get("minlength", 0)
    return lambda x: (x.to(torch.int64).amax(1) + 1).clamp(min=least)


def begins(rows: torch.Tensor) -> torch.Tensor:
    """Mark the elements that differ from the one before them: `[samples, n] -> [samples, n]`."""
    changed = rows[:, 1:] != rows[:, :-1]
    return torch.nn.functional.pad(changed, (1, 0), value=True)


def _distinct(eq: Equation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The number of distinct elements of each sample: `[samples, ...] -> [samples]`."""
    return lambda x: begins(x.flatten(1).sort(1).values).sum(1)


def _changes(eq: Equation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The number of runs of equal elements of each sample: `[samples, ...] -> [samples]`."""
    return lambda x: begins(x.flatten(1)).sum(1)


def _along_a_dimension(eq: Equation) -> bool:
    """True if a recorded call compares parts of a tensor rather than its elements."""
    given = eq.args[3] if len(eq.args) > 3 else dict(eq.kwargs).get("dim")
    return eq.op is aten.unique_consecutive.default and given is not None


_COUNTS: dict[OpOverload, Callable[[Equation], Callable[[torch.Tensor], torch.Tensor]]] = {
    aten.bincount.default: _bins,
    aten._unique.default: _distinct,
    aten._unique2.default: _distinct,
    aten.unique_consecutive.default: _changes,
}
"""Operators whose result's first size is another function of their first argument's values."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question, and functions that read its answers from the outputs of a stage."""

    number: int
    """Index among the questions of the program."""
    answer: Hashable
    """The recorded sample's answer."""
    outputs: range
    """Positions of its operands among the outputs of the stage's program."""
    alike: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Compute from those outputs (`[samples, ...]` each) a truth value for each sample: whether it
    gives the recorded answer."""
    read: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, list[Hashable]]]
    """Compute from them the index of each sample's answer, and the list of distinct answers."""
    numbers: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
    """The answers themselves, one for each sample; None where the operator itself is asked."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Questions whose operands can be computed for all samples that answered those before alike."""

    program: Program
    questions: tuple[Question, ...]


def stages(program: Program, asked: Sequence[int], singly: bool = False) -> list[Stage]:
    """The programs that compute the operands of a program's questions.

    A result whose shape depends on values can be computed for samples of one shape only, and so a
    stage ends with each question about a shape.

    Args:
        program: What one sample does.
        asked: The equations that ask about values which differ by sample.
        singly: True if each question is a stage of its own: then nothing is computed for a sample
            that has already given another answer.
    """
    found: list[Stage] = []
    waiting: list[tuple[int, int]] = []
    for number, position in enumerate(asked):
        waiting.append((number, position))
        answer = program.equations[position].answer
        if singly or answer[0] == "shape" or number + 1 == len(asked):
            found.append(_stage(program, waiting, set(asked)))
            waiting = []
    return found


def answers(program: Program, asked: Sequence[int]) -> tuple[Hashable, ...]:
    """The recorded sample's answers, in order."""
    fresh = _Fresh(program)
    return tuple([_Asked(program.equations[at], fresh).answer for at in asked])


def _stage(program: Program, waiting: Sequence[tuple[int, int]], asked: set[int]) -> Stage:
    fresh = _Fresh(program)
    mine = {position: number for number, position in waiting}
    equations: list[Equation] = []
    outputs: list[Var] = []
    questions: list[Question] = []
    last = max(mine)
    for position, eq in enumerate(program.equations[: last + 1]):
        if position in mine:
            question = _Asked(eq, fresh)
            first = len(outputs)
            equations += question.equations
            outputs += question.outputs
            span = range(first, len(outputs))
            questions.append(
                Question(
                    mine[position], question.answer, span, question.alike, question.read,
                    question.numbers,
                )
            )  # fmt: skip
        if position < last and not (eq.answer is not None and eq.answer[0] == "value"):
            equations.append(eq)
    whole = program._replace(
        equations=tuple(equations), outputs=tuple(outputs), output_flags=(NO_GRAD,) * len(outputs)
    )
    return Stage(leading_to(whole), tuple(questions))


class _Fresh:
    """Makes variables that a program does not have yet."""

    def __init__(self, program: Program):
        known = [*program.inputs, *program.captured, *program.literals]
        for eq in program.equations:
            known += eq.results()
        self.index = max((v.index for v in known), default=0)
        self.group = max((v.group for v in known), default=0)

    def like(self, spec: Spec) -> Var:
        """A variable in memory of its own."""
        self.index += 1
        self.group += 1
        strides, step = [], 1
        for size in reversed(spec.shape):
            strides.append(step)
            step *= max(size, 1)
        own = Spec(spec.shape, tuple(reversed(strides)), spec.dtype, spec.device, 0)
        return Var(self.index, self.group, own)


class _Asked:
    """One question: the calls that compute its operands, and how its answers are read from them."""

    def __init__(self, eq: Equation, fresh: _Fresh):
        self.eq = eq
        self.fresh = fresh
        self.equations: list[Equation] = []
        self.outputs: list[Var] = []
        self.answer: Hashable
        self.numbers: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
        self.alike: Callable[[Sequence[torch.Tensor]], torch.Tensor]
        self.read: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, list[Hashable]]]
        if eq.answer[0] == "value":
            self._value(eq)
        else:
            self._shape(eq)

    def _call(self, op: OpOverload, args: tuple[Any, ...], spec: Spec) -> Var:
        out = self.fresh.like(spec)
        flags = tuple([NO_GRAD for a in args if type(a) is Var])
        self.equations.append(Equation(op, args, (), (out,), flags, False))
        return out

    def _value(self, eq: Equation) -> None:
        value = eq.answer[1]
        self.answer = key_of(value)
        if eq.op in SCALARS:
            operand = eq.args[0]
            self.outputs = [self._call(aten.clone.default, (operand,), operand.spec)]
            self._numbers(value, truth=eq.op is aten.is_nonzero.default)
        elif eq.op in CHECKS:
            failed = Spec((), (), torch.bool, eq.args[0].spec.device, 0)
            self.outputs = [self._call(aten.any.default, (eq.args[0],), failed)]
            self._numbers(value)
        elif eq.op is aten.equal.default and eq.args[0].spec.shape == eq.args[1].spec.shape:
            truth = Spec((), (), torch.bool, eq.args[0].spec.device, 0)
            specs = eq.args[0].spec._replace(dtype=torch.bool)
            unequal = self._call(aten.ne.Tensor, eq.args, specs)
            differ = self._call(aten.any.default, (unequal,), truth)
            self.outputs = [self._call(aten.logical_not.default, (differ,), truth)]
            self._numbers(value)
        else:
            self._one_by_one(eq, key_of)

    def _shape(self, eq: Equation) -> None:
        shapes = eq.answer[1]
        counted, place = None, 0
        if (
            eq.op in _COUNTS
            and eq.args[0].spec.ndim
            and 0 not in eq.args[0].spec.shape
            and not _along_a_dimension(eq)
        ):
            self.answer = key_of(shapes[0][0])
            self.outputs = [self._call(aten.clone.default, (eq.args[0],), eq.args[0].spec)]
            self._numbers(shapes[0][0], of=_COUNTS[eq.op](eq))
            return
        if eq.op is aten._ctc_loss.Tensor and 0 not in eq.args[3].spec.shape:
            lengths, longest = eq.args[3], shapes[1][2] // 2  # of a table of 2 * longest + 1
            self.answer = key_of(longest)
            self.outputs = [self._call(aten.clone.default, (lengths,), lengths.spec)]
            self._numbers(longest, of=lambda n: n.reshape(len(n), -1).amax(1))
            return
        if eq.op in _COUNTED:
            counted = eq.args[_COUNTED[eq.op]]
            if eq.op is aten.masked_select.default and eq.args[0].spec.shape != counted.spec.shape:
                self._broad_mask(eq, shapes[0][0])
                return
        elif eq.op is aten.index.Tensor:
            given = [(i, v) for i, v in enumerate(eq.args[1]) if v is not None]
            if len(given) == 1:
                place, counted = given[0]
        if counted is None:
            self.answer = shapes
            self._one_by_one(eq, _shapes_of)
            return
        self.answer = key_of(shapes[0][place])
        count = Spec((), (), torch.int64, counted.spec.device, 0)
        op = aten.count_nonzero.default
        if eq.op is aten.repeat_interleave.Tensor:
            op = aten.sum.default
        self.outputs = [self._call(op, (counted,), count)]
        self._numbers(shapes[0][place])

    def _numbers(
        self,
        value: Any,
        truth: bool = False,
        of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Read the answers from the one output itself, or (`truth`) yes where it is nonzero.

        `of` computes them from it.
        """

        def flat(found: Sequence[torch.Tensor]) -> torch.Tensor:
            given = found[0].detach()
            numbers = given.reshape(-1) if of is None else of(given)
            return numbers != 0 if truth else numbers

        def alike(found: Sequence[torch.Tensor]) -> torch.Tensor:
            numbers = flat(found)
            if value != value:
                return numbers != numbers
            same = numbers == value
            if value == 0 and numbers.is_floating_point():  # -0.0 is another answer than 0.0
                same &= numbers.signbit() == (math.copysign(1, value) < 0)
            return same

        def read(found: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[Hashable]]:
            numbers = flat(found)
            kinds, of_row = torch.unique(_told_apart(numbers), return_inverse=True)
            return of_row, [key_of(v) for v in kinds.view(numbers.dtype).tolist()]

        self.alike, self.read, self.numbers = alike, read, flat

    def _broad_mask(self, eq: Equation, selected: int) -> None:
        """Ask how many elements a mask selects from a tensor that it is broadcast with."""
        x, mask = eq.args[:2]
        whole = math.prod(torch.broadcast_shapes(x.spec.shape, mask.spec.shape))
        times = whole // max(math.prod(mask.spec.shape), 1)
        self.answer = key_of(selected)
        self.outputs = [self._call(aten.clone.default, (mask,), mask.spec)]

        def count(mask: torch.Tensor) -> torch.Tensor:
            marks = mask.flatten(1) if mask.dim() > 1 else mask.unsqueeze(1)
            return marks.count_nonzero(1) * times

        self._numbers(selected, of=count)

    def _operands(self, eq: Equation) -> list[Var]:
        return [self._call(aten.clone.default, (v,), v.spec) for v in eq.inputs()]

    def _one_by_one(self, eq: Equation, of: Callable[[Any], Hashable]) -> None:
        """Call the recorded operator itself for each sample."""
        self.outputs = self._operands(eq)

        def keys(found: Sequence[torch.Tensor]) -> list[Hashable]:
            return [of(_called(eq, row)) for row in zip(*found, strict=True)]

        def alike(found: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.tensor([key == self.answer for key in keys(found)])

        def read(found: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[Hashable]]:
            given = keys(found)
            kinds = list(dict.fromkeys(given))
            return torch.tensor([kinds.index(key) for key in given]), kinds

        self.alike, self.read = alike, read


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a floating-point number: the integers that hold its bits."""


def _told_apart(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of which equal ones are the same answer to python: -0.0 is not 0.0, NaN is NaN."""
    if not numbers.is_floating_point() or numbers.itemsize not in _BITS:
        return numbers
    return numbers.masked_fill(numbers.isnan(), math.nan).view(_BITS[numbers.itemsize])


def _called(eq: Equation, row: Sequence[torch.Tensor]) -> Any:
    tensors = iter(row)
    args = _filled(eq.args, tensors)
    return eq.op(*args, **dict(_filled(eq.kwargs, tensors)))


def _filled(values: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Arguments with tensors in the place of variables."""
    if type(values) is Var:
        return next(tensors)
    if type(values) in (tuple, list):
        return [_filled(v, tensors) for v in values]
    return values


def _shapes_of(found: Any) -> Hashable:
    tensors = found if isinstance(found, tuple | list) else (found,)
    return tuple([tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)])


def key_of(value: Any) -> Hashable:
    """An answer such that equal ones are the same to python: `1 == 1.0 == True`, and NaN is NaN."""
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else value.hex()
    if isinstance(value, complex):
        return "complex", key_of(value.real), key_of(value.imag)
    return type(value).__name__, value
