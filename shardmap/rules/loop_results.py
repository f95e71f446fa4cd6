"""The results of a loop over samples: collected by tensor, compared with the recording, stacked."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import schema_of
from shardmap.program.ir import Equation, Spec, Var
from shardmap.program.schema import base_name

_dtype_of = operator.attrgetter("dtype")
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32)


@dataclass(frozen=True, slots=True)
class Results:
    """The tensors that a call returns for one sample, and their rows in the batch's results."""

    outs: tuple[Any, ...]
    single: bool
    """True if the operator returns one tensor, not a tuple or a list."""
    specs: tuple[Spec, ...]
    wanted: tuple[bool, ...]
    """For each recorded tensor, True if it is used."""
    name: str
    call: str
    """The user's call, for errors."""

    @staticmethod
    def of(eq: Equation, call: str) -> Results:
        """The results of a recorded call."""
        returns = schema_of(eq.op).returns
        single = [str(r.type) for r in returns] == ["Tensor"] and type(eq.outs[0]) is Var
        name = base_name(eq.op)
        specs = tuple([v.spec for v in eq.results()])
        return Results(eq.outs, single, specs, (True,) * len(specs), name, call)

    def only(self, wanted: Sequence[bool]) -> Results:
        """These results, of which only some are used."""
        return replace(self, wanted=tuple(wanted))

    @property
    def used(self) -> list[Spec]:
        """The recorded tensors that are used."""
        return [spec for spec, wanted in zip(self.specs, self.wanted, strict=True) if wanted]

    @property
    def quantised(self) -> bool:
        """True if there are integers with a grid, for which `torch.stack` alone makes memory."""
        return any(spec.dtype in _QUANTISED for spec in self.used)

    @property
    def sample_bytes(self) -> int:
        """Bytes of the results of one sample."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.used)

    def columns(self, rows: Sequence[Any]) -> list[Sequence[torch.Tensor]]:
        """For each recorded tensor that is used, that of each sample.

        Raises:
            VariesError: A sample has no tensor, or one of another dtype, where the recorded one
                had one.
        """
        found = [rows] if self.single else list(self._picked(self.outs, rows))
        pairs = zip(found, self.specs, self.wanted, strict=True)
        return [self._alike(column, spec) for column, spec, wanted in pairs if wanted]

    def _alike(self, column: Sequence[torch.Tensor], spec: Spec) -> Sequence[torch.Tensor]:
        """The column, if each sample has a tensor of the recorded dtype."""
        try:
            kinds = set(map(_dtype_of, column))
        except AttributeError:  # raised by None alone: a loop over them in python takes as long
            raise self._varies("the number", "a tensor", "none") from None
        for dtype in kinds - {spec.dtype}:
            raise self._varies("the dtype", str(spec.dtype), str(dtype))
        return column

    def _picked(self, outs: Sequence[Any], rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """The columns of `rows`, those of nested lists too; none for what was not returned."""
        if type(rows[0]) is not tuple:  # which are as long as the operator says
            for length in {len(row or ()) for row in rows} - {len(outs)}:
                raise self._varies("the length", str(len(outs)), str(length))
        for out, column in zip(outs, zip(*rows, strict=True), strict=True):
            if type(out) is tuple:
                yield from self._picked(out, column)
            elif out is not None:
                yield column

    def first(self, rows: Sequence[Any]) -> list[torch.Tensor]:
        """The recorded tensors of the first sample."""
        return [column[0] for column in self.columns(rows[:1])]

    def stacked(self, at: int, column: Sequence[torch.Tensor]) -> torch.Tensor:
        """The batch of one result.

        Raises:
            VariesError: A sample's has another shape than the recorded sample's.
        """
        self._check_first(at, column)
        try:
            return torch.stack(column)  # pyright: ignore[reportArgumentType]  a tuple will do
        except RuntimeError:
            self._check_shapes(at, column)
            if column[0].is_quantized:  # torch.stack takes those with one grid for all channels
                raise errors.VariesError(
                    f"{self.call}: {self.name} returns tensors quantised channel by channel, which "
                    "torch cannot stack; use torch.fake_quantize_per_channel_affine"
                ) from None
            raise

    def write(self, at: int, column: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
        """Write the samples' results into their rows."""
        self._check_first(at, column)
        try:
            torch.stack(column, out=rows)  # pyright: ignore[reportArgumentType]  a tuple will do
        except RuntimeError:
            self._check_shapes(at, column)
            raise

    def _check_first(self, at: int, column: Sequence[torch.Tensor]) -> None:
        """Refuse other shapes before memory of the recorded one is given to `torch.stack`.

        It would be resized. If the first of a block is right, another in it is an error of torch's.
        """
        if column[0].shape != self.used[at].shape:
            self._check_shapes(at, column)

    def _check_shapes(self, at: int, column: Sequence[torch.Tensor]) -> None:
        expected = tuple(self.used[at].shape)
        for t in column:
            if tuple(t.shape) != expected:
                raise self._varies("the shape", str(expected), str(tuple(t.shape)))

    def _varies(self, what: str, expected: str, found: str) -> errors.VariesError:
        return errors.VariesError(
            f"{self.call}: {what} of {self.name}'s result depends on values, and it is {expected} "
            f"for the first sample but {found} for another; use torch.where, masks, or operators "
            "whose results have one shape"
        )
