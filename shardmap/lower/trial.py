"""Trials of a new lowering: the samples, and a run call by call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap import errors
from shardmap.lower.batched import BatchedProgram, Fixes
from shardmap.lower.closeness import has_values
from shardmap.lower.replayed import restride
from shardmap.program.ir import Packed, Program, Var
from shardmap.program.schema import span
from shardmap.rules.lowering import Call, Seed, V, values
from shardmap.rules.philox import Seeds


@dataclass(frozen=True, slots=True)
class Trial:
    """The first sample of a batch, and the last one if there are several.

    They are different samples: the last one shows a rule that mixes samples up, or a kernel that is
    wrong for all but the first.
    """

    device: torch.device
    seed: Seeds
    size: int
    """Number of samples, 1 or 2."""
    inputs: tuple[torch.Tensor, ...]
    """`[size, *shape]`, with the rows' strides."""
    captured: tuple[torch.Tensor, ...]
    literals: tuple[torch.Tensor, ...]
    scalars: tuple[float, ...]
    written_inputs: frozenset[int]
    """Positions of inputs that the program writes in place."""
    expected: tuple[tuple[torch.Tensor, ...], ...]
    """The function's own results: for the first sample, and for the last if it could be run on it.
    Empty if nothing is compared."""
    random: bool
    """True if the program draws random numbers: a replay draws others than the function."""

    @property
    def comparable(self) -> bool:
        """True if the function's results are numbers that a replay must reproduce."""
        return bool(self.expected) and all(has_values(t) for row in self.expected for t in row)

    def own_inputs(self) -> list[torch.Tensor]:
        """The inputs, with a copy of each that the program writes to."""
        return [private(t) if i in self.written_inputs else t for i, t in enumerate(self.inputs)]

    def own_literals(self) -> list[torch.Tensor]:
        """A copy of each literal, which the program may write to."""
        return [t.clone() for t in self.literals]

    def values(self, env: dict[int, Any]) -> Callable[[Any], Any]:
        """Function that gives the value of an argument of a batched call.

        Args:
            env: The tensors of the batched program's values, by index.
        """
        symbols = {
            "BatchSize": self.size,
            "ChunkStart": 0,
            "SampleDevice": self.device,
        }

        def value(arg: Any) -> Any:
            kind = type(arg)
            if kind is V:
                return env[arg.index]
            if kind is list or kind is tuple:
                return [value(a) for a in arg]
            if kind is Seed:
                return self.seed[arg.number]
            if kind.__name__ in symbols:
                return symbols[kind.__name__]
            if kind is Packed:
                return arg.value
            return self.scalars[arg.scalar] if kind.__name__ == "Param" else arg

        return value

    def bound(self, batched: BatchedProgram) -> dict[int, Any]:
        """The program's inputs, captured tensors and literals, by index of their values."""
        names = (*batched.inputs, *batched.captured, *batched.literals)
        tensors = (*self.own_inputs(), *self.captured, *self.own_literals())
        return {v.index: t for v, t in zip(names, tensors, strict=True)}


def private(rows: torch.Tensor) -> torch.Tensor:
    """A copy of `rows` with their strides, which the program may write to."""
    strides = rows.stride()
    if strides[0] == 0:  # one sample, repeated
        strides = span(rows.shape[1:], strides[1:]), *strides[1:]
    copy = torch.empty_strided(rows.shape, strides, dtype=rows.dtype, device=rows.device)
    return copy.copy_(rows)


@dataclass(frozen=True, slots=True)
class Fault:
    """Difference between a batched call and the recorded one."""

    restride: bool
    """True if only the strides differ: a copy corrects them."""
    text: str
    raised: bool = False
    """True if the call raised an error."""
    stale: bool = False
    """True if the shape depends on values, and may be another one since the recording."""


def arguments(call: Call) -> list[V]:
    """The values that a call reads."""
    return list(values((call.args, tuple([v for _, v in call.kwargs]))))


def run(
    program: Program, batched: BatchedProgram, fixes: Fixes, trial: Trial
) -> tuple[dict[int, Fault], list[torch.Tensor]]:
    """Run the batched calls one by one and compare shapes, dtypes and strides with the recording.

    Args:
        program: The program of one sample.
        batched: The same program for a batch.
        fixes: Fixes that are known to be needed.
        trial: The samples.

    Returns:
        The faults, by number of the recorded call, and the outputs; no outputs if a call failed.
    """
    env = trial.bound(batched)
    value = trial.values(env)
    calls = batched.comparable
    last: dict[int, int] = {v.index: len(calls) for v in batched.outputs}
    for i, call in enumerate(calls):
        for v in arguments(call):
            last[v.index] = max(i, last.get(v.index, 0))
    found: dict[int, Fault] = {}
    for i, call in enumerate(calls):
        number = call.equation
        try:
            out = call.target(
                *[value(a) for a in call.args], **{k: value(v) for k, v in call.kwargs}
            )
        except errors.ShardmapError:
            raise
        except Exception as error:
            if (
                fixes.tiers.get(number) == "loop"
                or number >= len(program.equations)
                or not call.mapped
            ):
                raise
            text = f"{program.equations[number]} raised {type(error).__name__}: {error}"
            return found | {number: Fault(False, text, True)}, []
        for index, t in zip(call.outs, _results(call, out), strict=True):
            if index is None:
                continue
            env[index] = t
            if index not in batched.results:
                continue
            var, v = batched.results[index]
            fault = compare(var, v, t, trial.size)
            if fault is not None:
                asked = program.equations[number].answer
                if asked is not None and asked[0] == "shape" and t.shape[v.mapped :] != v.shape:
                    fault = dataclasses.replace(fault, stale=True)
                found[number] = fault
                if not fault.restride:
                    return found, []
                env[index] = restride(t, var.spec.stride)
        for v in arguments(call):
            if last.get(v.index) == i:
                env.pop(v.index, None)
    return found, [env[v.index] for v in batched.outputs]


def _results(call: Call, out: Any) -> Iterable[Any]:
    if not call.outs:
        return ()
    return out if call.several else (out,)


def compare(var: Var, v: V, t: torch.Tensor, size: int) -> Fault | None:
    """Fault of the batch `t` of the recorded tensor `var` in shape, dtype or strides, or None."""
    text = (
        f"{var} should be {var.spec} for each of {size} samples, strides {var.spec.stride}; "
        f"got {tuple(t.shape)} {t.dtype} strides {t.stride()}"
    )
    shape = (size, *v.shape) if v.mapped else v.shape
    if tuple(t.shape) != tuple(shape) or t.dtype != var.spec.dtype:
        return Fault(False, text)
    if (
        v.mapped
        and t.numel()
        and not _same_strides(var.spec.shape, t.stride()[1:], var.spec.stride)
    ):
        return Fault(True, text)
    return None


def _same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    return all(n <= 1 or x == y for n, x, y in zip(shape, a, b, strict=True))
