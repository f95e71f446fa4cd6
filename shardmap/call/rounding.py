"""Differences between a map's results and the function's own that rounding alone explains."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardmap.lower.closeness import close, largest
from shardmap.program.analysis import least_precise
from shardmap.program.ir import Program


@dataclass(frozen=True)
class Rounding:
    """The scale on which two results of one sample are compared.

    Attributes:
        program: The program that computes the results.
        inputs: The tensors that differ by sample.
        captured: The tensors that all samples share.
        results: The function's own results for the sample, all of them.
    """

    program: Program
    inputs: Sequence[torch.Tensor]
    captured: Sequence[torch.Tensor]
    results: Sequence[torch.Tensor]

    def explains(self, wanted: torch.Tensor, got: torch.Tensor) -> bool:
        """True if two results are equal up to rounding.

        Args:
            wanted: The function's own result.
            got: The map's, of the same shape.
        """
        if close(wanted, got, max(largest(wanted), self._entered)):
            return True
        if close(wanted, got, self._magnitude):
            return True
        roughest = least_precise(self.program)
        return roughest is not None and close(wanted, got, self._magnitude, precision=roughest)

    @functools.cached_property
    def _entered(self) -> float:
        return max([largest(t) for t in self.inputs], default=0.0)

    @functools.cached_property
    def _magnitude(self) -> float:
        """Scale of what cancels: all results, as in the trial of a lowering, or the weights.

        The gradient of an attention's key bias is 0 except for the rounding of products of weights
        and tokens. Integer tokens have no magnitude, and the weights enter by a tenth.
        """
        weights = max([largest(t) for t in self.captured], default=0.0) / 10
        return max([self._entered, weights, *[largest(t) for t in self.results]])
