"""Compare a replay with the recording operator by operator, from the recorded operands.

Rounding errors grow along a program, without bound in a chaotic one, so that different outputs do
not prove a wrong rule. Here every batched call gets the operands of the samples' own calls.
Then each result differs by the rounding of one operator only, and a larger difference is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._torch import has_internal_overlap, storage_id
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.closeness import OPERATOR_TOLERANCE, close, largest
from shardmap.lower.trial import Trial, arguments
from shardmap.program.analysis import random_call, written
from shardmap.program.ir import Equation, Packed, Param, Program, SampleDevice, Var, variables
from shardmap.program.operators import op_info
from shardmap.program.private_generators import PrivateGenerators
from shardmap.program.schema import short_name
from shardmap.rules.lowering import Call, V


@dataclass(frozen=True, slots=True)
class Apart:
    """Result of the comparison operator by operator."""

    wrong: dict[int, str]
    """For the number of a recorded call: a text on how its batched result differs."""
    outputs: list[torch.Tensor]
    """The outputs of the batched program, computed from the recorded operands."""
    samples: list[list[torch.Tensor]]
    """The outputs of each sample, computed by the recorded calls."""


def compare(program: Program, batched: BatchedProgram, trial: Trial) -> Apart:
    """Compare each batched call with the recorded one, both given the samples' own operands.

    Args:
        program: The program of one sample.
        batched: The same program for a batch, each sample's values kept (nothing summed or from
            factors).
        trial: The samples.
    """
    samples = [_Sample(program, trial, row) for row in range(trial.size)]
    env = trial.bound(batched)
    value = trial.values(env)
    given = {storage_id(t.untyped_storage()) for t in (*trial.inputs, *trial.captured)}
    calls = sorted(batched.comparable, key=lambda call: call.equation)
    last: dict[int, int] = {v.index: len(calls) for v in batched.outputs}
    for i, call in enumerate(calls):
        for v in arguments(call):
            last[v.index] = i
    wrong: dict[int, str] = {}
    reach = _reach(program, batched, calls)
    for call, furthest in zip(calls, itertools.accumulate(reach, max), strict=True):
        for index in call.outs:
            if index is not None and index in batched.results:
                for sample in samples:
                    sample.keep(batched.results[index][0], furthest)
    for i, call in enumerate(calls):
        for sample in samples:
            sample.advance(reach[i])
        out = call.target(*[value(a) for a in call.args], **{k: value(v) for k, v in call.kwargs})
        if call.equation < len(program.equations):
            _empty(program.equations[call.equation], out)
        if call.outs:
            for index, t in zip(call.outs, out if call.several else (out,), strict=True):
                if index is None:
                    continue
                env[index] = t
                if index in batched.results:
                    eq = program.equations[call.equation]
                    entered = max(
                        (
                            m
                            for sample in samples
                            for m in sample.entered[call.equation : reach[i] + 1]
                        ),
                        default=0.0,
                    )
                    difference = _settle(eq, *batched.results[index], t, samples, entered, given)
                    if difference is not None:
                        wrong.setdefault(call.equation, difference)
        if call.writes:
            _copy_written(batched, call.equation, env, samples)
        for v in arguments(call):
            if last[v.index] == i:
                env.pop(v.index, None)
    for sample in samples:
        sample.advance(len(program.equations) - 1)
    outputs = [env[v.index] for v in batched.outputs]
    return Apart(wrong, outputs, [sample.outputs() for sample in samples])


def by_recorded_calls(
    program: Program,
    trial: Trial,
    row: int,
    moved: Callable[[Equation, torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The outputs of one sample, computed by the recorded calls themselves.

    Args:
        program: The program of one sample.
        trial: The samples.
        row: The sample's place.
        moved: Takes the place of each result, if it is given.
    """
    sample = _Sample(program, trial, row, moved)
    sample.advance(len(program.equations) - 1)
    return sample.outputs()


def _reach(program: Program, batched: BatchedProgram, calls: list[Call]) -> list[int]:
    """For each batched call: the last recorded call whose result it computes.

    A product is computed in the shape of a view of it that was recorded next. As long as nothing is
    written in between, its values are those of the view. Were they not compared, the batch would
    keep the rounding errors of its own kernel, which a cast to a wider dtype shows as a fault.
    """
    made = {var.index: i for i, eq in enumerate(program.equations) for var in eq.results()}
    writes = [i for i, eq in enumerate(program.equations) if any(written(eq))]
    found = []
    for call in calls:
        last = call.equation
        for index in call.outs:
            if index is not None and index in batched.results:
                last = max(last, made.get(batched.results[index][0].index, 0))
        if any(call.equation < i <= last for i in writes):
            last = call.equation
        found.append(min(last, len(program.equations) - 1))
    return found


def _settle(
    eq: Equation,
    var: Var,
    v: V,
    t: torch.Tensor,
    samples: list[_Sample],
    entered: float,
    given: Collection[int],
) -> str | None:
    """Compare a batched result with the samples' own, then replace it by those.

    Args:
        eq: The recorded call.
        var: Its result.
        v: The batched result's value.
        t: The batched result.
        samples: The samples.
        entered: The largest magnitude of the operands.
        given: Memory that the caller has given: its views hold the samples' own numbers, and it is
            not to be written to, not even with them.
    """
    own = [sample.env.get(var.index) for sample in samples]
    if any(s is None for s in own):
        return None  # dead in the recording by now: made again where it is used
    found: str | None = None
    entered = max([entered, *[largest(s) for s in own if s is not None]])
    if not random_call(eq) and not op_info(eq.op).uninitialised:
        for row, s in enumerate(own):
            assert s is not None
            if not close(s, t[row].to(s.device), entered, OPERATOR_TOLERANCE):
                name = short_name(eq.op)
                found = f"{name}: sample {'first' if row == 0 else 'last'} of the trial differs"
                break
    ours = t.layout is not torch.strided or storage_id(t.untyped_storage()) not in given
    if ours and t.shape[0] and has_internal_overlap(t) != 1:
        with torch.no_grad():
            for row, s in enumerate(own):
                assert s is not None
                # A clone: both may be views of the trial's samples, by other strides where a
                # dimension has one entry, which torch takes for an overlap.
                t[row].copy_(s.clone())
    return found


def _empty(eq: Equation, out: object) -> None:
    """Fill uninitialised memory with one value everywhere, as a copy of it may be compared."""
    if not op_info(eq.op).uninitialised:
        return
    with torch.no_grad():
        for t in _tensors(out):
            if has_internal_overlap(t) != 1:
                t.zero_()


def _copy_written(
    batched: BatchedProgram, number: int, env: dict[int, Any], samples: list[_Sample]
) -> None:
    """Put the samples' own values into memory that a recorded call has written."""
    for var, v in batched.written.get(number, ()):
        t = env.get(v.index)
        own = [sample.env.get(var.index) for sample in samples]
        if t is None or not v.mapped or has_internal_overlap(t) == 1:
            continue
        if all(s is not None and s.shape == t.shape[1:] for s in own):
            with torch.no_grad():
                for row, s in enumerate(own):
                    t[row].copy_(s)


class _Sample:
    """One sample that is computed by the recorded calls themselves."""

    def __init__(
        self,
        program: Program,
        trial: Trial,
        row: int,
        moved: Callable[[Equation, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.moved = moved
        self.program = program
        self.trial = trial
        self.env: dict[int, Any] = {}
        self.entered: list[float] = []
        """For each recorded call that was run: the largest magnitude of its operands."""
        self.next = 0
        self.generators = PrivateGenerators()
        inputs = [t[row] for t in trial.own_inputs()]
        names = (*program.inputs, *program.captured, *program.literals)
        for var, t in zip(names, (*inputs, *trial.captured, *trial.own_literals()), strict=True):
            self.env[var.index] = t
        self.last: dict[int, int] = {}
        for i, eq in enumerate(program.equations):
            for var in eq.inputs():
                self.last[var.index] = i
            for var in eq.results():
                self.last.setdefault(var.index, i)
        for var in program.outputs:
            self.last[var.index] = len(program.equations)

    def keep(self, var: Var, number: int) -> None:
        """Keep a value until a call after call `number` is run."""
        self.last[var.index] = max(self.last.get(var.index, 0), number)

    def advance(self, number: int) -> None:
        """Run the recorded calls up to `number`, inclusive."""
        while self.next <= number:
            eq = self.program.equations[self.next]
            for var in self._ended(self.next - 1):
                self.env.pop(var, None)
            self.entered.append(0.0)
            self._run(eq)
            self.next += 1

    def _ended(self, number: int) -> Iterable[int]:
        if number < 0:
            return ()
        eq = self.program.equations[number]
        used = {var.index for var in (*eq.inputs(), *eq.results())}
        return [index for index in used if self.last[index] <= number]

    def _run(self, eq: Equation) -> None:
        if eq.answer is not None and eq.answer[0] == "value":
            return
        args = [self._value(a) for a in eq.args]
        kwargs = {k: self._value(a) for k, a in eq.kwargs}
        operands = [self.env[var.index] for var in eq.inputs()]
        self.entered[-1] = max(map(largest, operands), default=0.0)
        if random_call(eq):  # from a private generator: the process's own must not advance
            out = self.generators.run(eq.op, tuple(args), kwargs)
        else:
            out = eq.op(*args, **kwargs)
        _empty(eq, out)
        results = list(_tensors(out))
        if self.moved is not None:
            results = [self.moved(eq, t) for t in results]
        names = list(variables(eq.outs))
        if len(results) == len(names):
            for var, t in zip(names, results, strict=True):
                self.env[var.index] = t

    def _value(self, arg: Any) -> Any:
        kind = type(arg)
        if kind is Var:
            return self.env[arg.index]
        if kind is tuple or kind is list:
            return [self._value(a) for a in arg]
        if kind is Param:
            return self.trial.scalars[arg.scalar]
        if kind is Packed:
            return arg.value
        return self.trial.device if kind is SampleDevice else arg

    def outputs(self) -> list[torch.Tensor]:
        """The outputs of the program for this sample."""
        return [self.env[var.index] for var in self.program.outputs]


def _tensors(out: Any) -> Iterable[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for item in out:
            yield from _tensors(item)
