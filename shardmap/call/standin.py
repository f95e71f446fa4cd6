"""What stands in the place of a lowered program where one recording does not stand for all samples.

Executors take it for a lowering: they ask it for chunks and need nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.cache import Lowered, Notes
from shardmap.program.ir import Program
from shardmap.rules.lowering import V
from shardmap.rules.philox import SampleNumbers, Seeds

ITSELF = "the function itself"
"""The name under which the loop over the samples stands among the operators."""
_INPUTS = 6
"""The position of the samples among the arguments of `chunk`."""


class StandIn(ABC):
    """Has the functions of a replay (`shardmap.lower.codegen.Replay`)."""

    source: str
    """What runs, in words."""

    def described(self) -> str:
        """Which samples take which way, in words; empty where there is one way."""
        return ""

    def fixed(self, *_: object) -> tuple[()]:
        """Nothing is computed once for all chunks here."""
        return ()

    @abstractmethod
    def chunk(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one chunk, `[size, *shape]` each."""

    @abstractmethod
    def chunk_into(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """As `chunk`, written into memory that is there: one more argument, a list of slices."""

    def marked(self, slices: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        """`chunk`, or `chunk_into`, with one more argument that is told nothing.

        It is run to be watched, and once more for its results: the function may write to what it
        is given, so that it is given copies.
        """
        run = self.chunk_into if slices else self.chunk

        def watched(*arguments: Any) -> tuple[torch.Tensor, ...]:
            given = list(arguments[:-1])
            given[_INPUTS] = [t.clone() for t in given[_INPUTS]]
            return run(*given)

        return watched


def ways_of(low: Lowered) -> str:
    """Which samples of a call take which way, in words; empty where there is one way."""
    return low.replay.described() if isinstance(low.replay, StandIn) else ""


def lowering(
    program: Program,
    options: LoweringOptions,
    stand_in: StandIn,
    tiers: Mapping[str, str],
    sample_bytes: int,
    notes: Notes,
) -> Lowered:
    """A stand-in in the form in which executors take a lowering.

    Args:
        program: Describes the inputs and the outputs.
        options: What the map is lowered for.
        stand_in: What runs.
        tiers: What serves each operator, by name.
        sample_bytes: Bytes of all results of one sample, those on the way included.
        notes: What the planner learns.
    """
    count = len(program.inputs)
    inputs = [V(i, True, v.spec.shape, v.spec.dtype) for i, v in enumerate(program.inputs)]
    outputs = [
        V(count + i, True, v.spec.shape, v.spec.dtype) for i, v in enumerate(program.outputs)
    ]
    batched = BatchedProgram(
        fixed=(),
        chunk=(),
        inputs=tuple(inputs),
        captured=(),
        literals=(),
        outputs=tuple(outputs),
        tiers=dict(tiers),
        values=count + len(outputs),
        results={},
    )
    return Lowered(program, options, batched, stand_in, Fixes(), frozenset(), notes, sample_bytes)
