"""What the parts of a run hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from shardmap.errors import ConfigError
from shardmap.store import Store


@dataclass(frozen=True)
class Dataset:
    """Named columns, each a tensor with one row per sample.

    The run's `columns` say which of them the mapped function receives; the others are there for the report.
    """

    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Check that all columns have the same number of rows."""
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise ConfigError(f"data: the columns differ in their number of rows, {sizes}; give each one row per sample")

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Tensor:
        """One column."""
        return self.columns[name]


@dataclass(frozen=True)
class Outcome:
    """What a report is made from."""

    dataset: Dataset
    model: Any
    """What the configuration's `model` returned; None without one."""
    outputs: Any
    """The mapped function's outputs: its structure, each tensor with one row per sample, or reduced. The `Store`, if they went to one."""
    folder: Path
    """Where the report writes; it becomes the run folder when everything is written."""
    reduced: bool = False
    """Whether the outputs are combined over all samples."""

    def rows(self) -> list[Tensor]:
        """Each output with one row per sample, in memory: from a store all of it is read.

        Raises:
            ConfigError: There are no such rows: the run has reduced them.
        """
        if isinstance(self.outputs, Store):
            header = self.outputs.header
            return [self.outputs.read(index, 0, header.samples) for index in range(len(header.outputs))]
        leaves = pytree.tree_leaves(self.outputs)
        if self.reduced:
            raise ConfigError("reduce: the report needs the outputs of each sample, and they were reduced; leave reduce out, or the report")
        return leaves


@dataclass(frozen=True)
class Findings:
    """What a report found, for people and for machines."""

    headline: str
    """A sentence or a few, printed at the end of the run."""
    numbers: Mapping[str, float | int | str]
    """Written to `summary.json`."""
