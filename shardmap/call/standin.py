"""Stand-ins for a lowered program where one recording does not serve all samples.

Executors treat a stand-in as a lowering: they only call it for chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.cache import Lowered, Notes
from shardmap.program.ir import Program
from shardmap.rules.lowering import V
from shardmap.rules.philox import SampleNumbers, Seeds

ITSELF = "the function itself"
"""Name of the loop over the samples among the operators."""
INPUTS = 6
"""The position of the samples among the arguments of `chunk`."""


class StandIn(ABC):
    """Base of stand-ins, with the functions of a replay (`shardmap.lower.codegen.Replay`)."""

    source: str
    """Description of the code that runs."""

    def described(self) -> str:
        """Text on which samples take which path; empty if there is one path."""
        return ""

    def fixed(self, device: torch.device, seed: Seeds, *_: object) -> tuple[()]:
        """The values that are computed once for all chunks: none that executors hold.

        What a stand-in's programs share must be ready before the first chunk: one that
        `remat=True` computes again must find what it found at first.
        """
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

    def chunk_into(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Compute one chunk as `chunk` does, with one more argument: the slices to write into."""
        *given, slices = arguments
        for t, where in zip(self.chunk(*given), slices, strict=True):
            where.copy_(t)
        return tuple(slices)

    def marked(self, slices: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        """`chunk`, or `chunk_into`, with one more argument, a mark that is never called.

        It is run to be measured, and once more for its results: the function may write to what it
        is given, so that it is given copies.
        """
        run = self.chunk_into if slices else self.chunk

        def watched(*arguments: Any) -> tuple[torch.Tensor, ...]:
            given = list(arguments[:-1])
            given[INPUTS] = [t.clone() for t in given[INPUTS]]
            return run(*given)

        return watched


def in_order(
    places: Sequence[torch.Tensor], parts: Sequence[Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Put the results of groups of samples back to the places of the samples in the chunk.

    Args:
        places: The places of each group's samples.
        parts: The outputs of each group.
    """
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    where = torch.cat(list(places))
    if torch.equal(where, torch.arange(len(where))):
        return tuple(columns)
    back = where.argsort()
    return tuple([column.index_select(0, back.to(column.device)) for column in columns])


def ways_of(low: Lowered) -> str:
    """Text on which samples of a call take which path; empty if there is one path."""
    return low.replay.described() if isinstance(low.replay, StandIn) else ""


def lowering(
    program: Program,
    options: LoweringOptions,
    stand_in: StandIn,
    tiers: Mapping[str, str],
    sample_bytes: int,
    notes: Notes,
) -> Lowered:
    """Wrap a stand-in as a lowering, which executors take.

    Args:
        program: Describes the inputs and the outputs.
        options: The options of the lowering.
        stand_in: The stand-in.
        tiers: The tier that serves each operator, by name.
        sample_bytes: Bytes of all results of one sample, intermediate ones included.
        notes: The planner's notes.
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
