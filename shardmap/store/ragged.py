"""Samples of unequal shapes: sentences, graphs, point clouds."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shardmap.errors import OptionError, SourceError
from shardmap.store.columns import Column
from shardmap.store.sources import source


class Ragged:
    """A batch whose samples have shapes of their own.

    Pass it to a mapped function as any batch, with in_dim 0: samples of one shape are computed
    together, so that no padding takes part. The function is recorded once for each shape, which
    takes milliseconds, and is remembered: of a thousand shapes, pad some to a common one. Sums and
    means of half precision are rounded once for each shape, too.

    A plain list of tensors of unequal lengths is taken for one, and so is a jagged nested tensor.

    Args:
        samples: One tensor per sample, all of one dtype and on one device.

    Raises:
        OptionError: The samples are no such list.

    Example:
        >>> import torch, shardmap
        >>> words = shardmap.Ragged([torch.tensor(w) for w in ([3., 4.], [1., 2., 2.], [0., 1.])])
        >>> shardmap.vmap(torch.linalg.vector_norm)(words)
        tensor([5., 3., 1.])
        >>> shardmap.vmap(torch.cumsum, in_dims=(0, None))(words, 0)
        Ragged(3 samples of torch.float32: 2 x [2], 1 x [3])
    """

    def __init__(self, samples: Sequence[Tensor]):
        if isinstance(samples, Tensor) or not isinstance(samples, Sequence):
            raise OptionError(
                f"shardmap.Ragged: samples is a {type(samples).__name__}; pass a list with a "
                "tensor for each sample, or a tensor as it is"
            )
        for number, sample in enumerate(samples):
            if (
                not isinstance(sample, Tensor)
                or sample.layout is not torch.strided
                or sample.is_nested
            ):
                found = (
                    f"a tensor of layout {sample.layout}"
                    if isinstance(sample, Tensor)
                    else f"a {type(sample).__name__}"
                )
                raise OptionError(
                    f"shardmap.Ragged: sample {number} is {found}; pass a dense tensor for each "
                    "sample"
                )
            if (sample.dtype, sample.device) != (samples[0].dtype, samples[0].device):
                raise OptionError(
                    f"shardmap.Ragged: sample {number} is of {sample.dtype} on {sample.device}, "
                    f"sample 0 of {samples[0].dtype} on "
                    f"{samples[0].device}; bring all to one dtype and one device"
                )
        self._samples: tuple[Tensor, ...] = tuple(samples)
        self._values: Column | None = None
        self._ends: list[int] = []

    @classmethod
    def cut(cls, values: object, lengths: Sequence[int] | Tensor | np.ndarray) -> Ragged:
        """Samples that lie one behind the other in one column.

        Of a column of a source, or a path, each sample is read when it is computed, by the workers
        of a cluster themselves.

        Args:
            values: All samples together, `[sum(lengths), *shape]`: a tensor, an array, a column of
                a `shardmap.source`, or what that makes a source of one column of.
            lengths: How many rows of it each sample has.

        Raises:
            OptionError: The lengths are no numbers of rows, or are not all of them.
            SourceError: The values cannot be read.

        Example:
            >>> import torch, shardmap
            >>> shardmap.Ragged.cut(torch.arange(5.), [2, 0, 3])
            Ragged(3 samples of torch.float32: 1 x [0], 1 x [2], 1 x [3])
        """
        counts = [int(n) for n in lengths]
        wrong = [n for n, count in zip(lengths, counts, strict=True) if n != count or count < 0]
        if wrong:
            raise OptionError(
                f"shardmap.Ragged.cut: lengths has {wrong[0]}; give the number of rows of each "
                "sample"
            )
        if not isinstance(values, Tensor | Column):
            columns = source(os.fspath(values) if isinstance(values, os.PathLike) else values)
            if len(columns.columns) != 1:
                raise SourceError(
                    f"shardmap.Ragged.cut: values is {columns!r}; give one of its columns"
                )
            (values,) = columns.columns
        rows = values.shape[0] if isinstance(values, Tensor) and values.ndim else 0
        rows = len(values) if isinstance(values, Column) else rows
        if sum(counts) != rows:
            raise OptionError(
                f"shardmap.Ragged.cut: lengths add up to {sum(counts)}, and values has {rows} "
                "rows; each row belongs to one sample"
            )
        if isinstance(values, Tensor):
            return cls(values.split(counts) if counts else ())
        found = cls(())
        found._values = values
        found._ends = list(itertools.accumulate(counts))
        return found

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """All samples, in memory."""
        return self._samples if self._values is None else tuple(self)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each sample."""
        if self._values is None:
            return [tuple(sample.shape) for sample in self._samples]
        starts = [0, *self._ends[:-1]]
        inner = self._values.shape
        return [(end - start, *inner) for start, end in zip(starts, self._ends, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the samples; torch's default if there are none."""
        if self._values is not None:
            return self._values.dtype
        return self._samples[0].dtype if self._samples else torch.get_default_dtype()

    def rows(self, numbers: Sequence[int]) -> Tensor | SampleColumn:
        """Samples of one shape: stacked, or a column that reads them as they are needed.

        Args:
            numbers: Which.
        """
        if self._values is None:
            return torch.stack([self._samples[number] for number in numbers])
        return SampleColumn(self, numbers)

    def between(self, start: int, stop: int) -> Ragged:
        """The samples from `start` up to `stop`, in memory."""
        return Ragged([self[number] for number in range(start, min(stop, len(self)))])

    @property
    def travels(self) -> bool:
        """True if other processes can read the samples by themselves."""
        return self._values is not None and self._values.travels

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._samples) if self._values is None else len(self._ends)

    def __getitem__(self, index: int) -> Tensor:
        """One sample."""
        if self._values is None:
            return self._samples[index]
        number = range(len(self._ends))[index]
        start = self._ends[number - 1] if number else 0
        return self._values.rows_between(start, self._ends[number])

    def __iter__(self) -> Iterator[Tensor]:
        """The samples in order."""
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        if not len(self):
            return "Ragged(no samples)"
        counts = collections.Counter(self.shapes)
        shapes = [f"{count} x {list(shape)}" for shape, count in sorted(counts.items())]
        shown = shapes if len(shapes) <= 4 else [*shapes[:2], "...", shapes[-1]]
        return f"Ragged({len(self)} samples of {self.dtype}: {', '.join(shown)})"


class SampleColumn(Column):
    """Samples of one shape among those of a `Ragged`, read as they are needed."""

    def __init__(self, ragged: Ragged, numbers: Sequence[int]):
        self.ragged, self.numbers = ragged, list(numbers)
        self.rows, self.dtype = len(self.numbers), ragged.dtype
        self.shape = ragged.shapes[self.numbers[0]]
        self.travels = ragged.travels

    def read(self, start: int, stop: int) -> Tensor:
        """Rows, stacked."""
        return torch.stack([self.ragged[number] for number in self.numbers[start:stop]])


class PickedColumn(Column):
    """Some rows of a column, in any order, read as they are needed."""

    def __init__(self, column: Column, numbers: Sequence[int]):
        self.column, self.numbers = column, list(numbers)
        self.rows, self.shape, self.dtype = len(self.numbers), column.shape, column.dtype

    @property
    def travels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  as the column's
        """True if other processes can read the rows by themselves."""
        return self.column.travels

    def read(self, start: int, stop: int) -> Tensor:
        """Rows, put together."""
        wanted = self.numbers[start:stop]
        return torch.cat([self.column.rows_between(row, row + 1) for row in wanted])
