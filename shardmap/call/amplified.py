"""Tell a chaotic function's rounding from a fault, by what rounding of its operands does.

The kernels of a batch round otherwise than those of one sample. A chaotic function carries that on
without bound, so no tolerance fits. But then the smallest changes of its operands and of the
numbers on the way move the function's own result as far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardmap._torch import schema_of
from shardmap.lower.apart import by_recorded_calls
from shardmap.lower.trial import Trial
from shardmap.program.ir import Equation
from shardmap.program.schema import short_name
from shardmap.run import prepare
from shardmap.run.base import Job

_TRIES = 4
"""Number of roundings that are tried."""
_FACTOR = 10.0
"""How much farther than by these tries rounding may move a result."""
_LEAST = 1e-3
"""What share of its difference each number must be moved by at least."""


class Amplified:
    """The results of the samples at a batch's ends, with all numbers rounded otherwise.

    Args:
        job: The call.
    """

    def __init__(self, job: Job):
        self._job = job
        self._found: list[list[list[torch.Tensor]]] | None = None

    def results(self) -> list[list[list[torch.Tensor]]]:
        """For each try, and each of the samples at the ends, the recorded results."""
        if self._found is None:
            with torch.no_grad():
                self._found = [self._rounded(i) for i in range(_TRIES)]
        return self._found

    def _rounded(self, seed: int) -> list[list[torch.Tensor]]:
        job = self._job
        recording = job.recording
        generator = torch.Generator().manual_seed(seed)
        size = min(job.samples, 2)
        trial = Trial(
            job.home,
            job.seed,
            size,
            tuple([_moved(t, generator) for t in prepare.samples_at_the_ends(job, size)]),
            tuple([_moved(t, generator) for t in recording.captured]),
            recording.literals,
            recording.scalars,
            recording.written_inputs,
            (),
            recording.random,
        )

        def moved(eq: Equation, t: torch.Tensor) -> torch.Tensor:
            return _moved(t, generator) if _rounds(eq) else t

        return [by_recorded_calls(recording.program, trial, row, moved) for row in range(size)]


_EXACT = frozenset(
    """abs amax amin argmax argmin cat ceil clamp clamp_max clamp_min clone copy cummax cummin
    embedding expand fill flip floor fmax fmin frac full_like gather index index_select masked_fill
    max maximum min minimum nan_to_num neg ones_like relu repeat roll round scatter sgn sign sort
    stack topk trunc unfold_copy where zeros_like _to_copy""".split()
)
"""Operators that round nothing."""


def _rounds(eq: Equation) -> bool:
    """True if a call's results are new numbers that its kernel has rounded."""
    schema = schema_of(eq.op)
    aliases = any(returned.alias_info is not None for returned in schema.returns)
    exact = short_name(eq.op).partition(".")[0] in _EXACT
    return not (aliases or schema.is_mutable or exact) and any(True for _ in eq.inputs())


def explains(moved: Sequence[torch.Tensor], wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """True if rounding moves a result about as far as the map's is from the function's own.

    Args:
        moved: The result from operands that are rounded otherwise, several times.
        wanted: The function's own.
        got: The map's.
    """
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return any(not torch.equal(t, wanted) for t in moved)
    difference = _distance(got, wanted)
    if not difference.numel():
        return True
    farthest = torch.stack([_distance(t, wanted) for t in moved]).amax(0)
    # A step moves by its height where an operand lies on it, and nowhere else.
    apart = difference > _LEAST * difference.max()
    moved_too = (farthest >= _LEAST * difference)[apart].double().mean()
    return bool(moved_too >= 0.5) and bool(difference.max() <= _FACTOR * farthest.max())


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The distance of each number, infinite where only one is finite."""
    same = (a == b) | (a.isnan() & b.isnan())
    return (
        (a.detach() - b.detach()).cpu().abs().double().nan_to_num(torch.inf).where(~same.cpu(), 0)
    )


def _moved(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor with each number moved by its last place, up or down."""
    plain = t.detach()
    if not (plain.is_floating_point() or plain.is_complex()) or plain.layout is not torch.strided:
        return plain
    signs = torch.randint(0, 2, plain.shape, generator=generator) * 2 - 1
    step = torch.finfo(plain.dtype).eps * signs.to(plain.device, plain.real.dtype)
    moved = torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device=plain.device)
    return moved.copy_(plain * (1 + step))
