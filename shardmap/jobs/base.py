"""Values that the parts of a run pass to each other: dataset, outcome, findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shardmap._torch import pytree
from shardmap.errors import ConfigError
from shardmap.store import Source, Store
from shardmap.store.columns import Column
from shardmap.store.ragged import Ragged


@dataclass(frozen=True)
class Dataset:
    """Named columns, each with one row per sample.

    A column is a tensor, one of a `shardmap.Source`, whose rows are read as they are needed, or a
    `shardmap.Ragged`, whose samples have different shapes.

    The run's `columns` say which of them the mapped function receives; the others are for the
    report.
    """

    columns: Mapping[str, Tensor | Column | Ragged]

    def __post_init__(self) -> None:
        """Check that all columns have the same number of rows."""
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise ConfigError(
                f"data: the columns differ in their number of rows, {sizes}; give each one row per "
                "sample"
            )

    @staticmethod
    def of(source: Source) -> Dataset:
        """The columns of a source, under its names."""
        return Dataset(
            {spec.name: column for spec, column in zip(source.specs, source.columns, strict=True)}
        )

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Any:
        """One column in memory: a tensor, or a `shardmap.Ragged`.

        All rows of a source's column are read.
        """
        column = self.columns[name]
        return column.rows_between(0, len(column)) if isinstance(column, Column) else column


@dataclass(frozen=True)
class Outcome:
    """The results of a run, from which a report is made."""

    dataset: Dataset
    model: Any
    """The object that the configuration's `model` made, its weights loaded; None without one."""
    outputs: Any
    """The outputs: the open `Store`, if they went to one; otherwise their structure, each tensor
    with one row per sample, or reduced."""
    folder: Path
    """The run folder, where the report writes."""
    reduced: bool = False
    """True if the outputs are combined over all samples."""

    def tensors(self) -> dict[str, Tensor]:
        """The outputs by name, in memory, whether they are kept or reduced.

        All of a store is read. A single output is called `result`, others by their place: `0`,
        `loss.1`, `mean.conv.weight`.
        """
        if isinstance(self.outputs, Store):
            header = self.outputs.header
            return {
                spec.name: self.outputs.read(index, 0, header.samples)
                for index, spec in enumerate(header.outputs)
            }
        return named(self.outputs)

    def rows(self) -> list[Tensor]:
        """Each output with one row per sample, in memory; a store is read entirely.

        Raises:
            ConfigError: There are no such rows: the run has reduced them.
        """
        if self.reduced:
            raise ConfigError(
                "reduce: the report needs the outputs of each sample, and they were reduced; leave "
                "reduce out, or the report"
            )
        return list(self.tensors().values())


@dataclass(frozen=True)
class Findings:
    """The findings of a report, for people and for machines."""

    headline: str
    """One or a few sentences, printed at the end of the run."""
    numbers: Mapping[str, float | int | str]
    """Numbers and texts that are written to `summary.json`."""


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree, each named by its place in the tree.

    A single tensor is called `result`, others `0` or `loss.1`; each sample of a `Ragged` has a
    name of its own.
    """
    tensors = {}
    for place, leaf in pytree.tree_flatten_with_path(tree)[0]:
        # a key of a dict, an index of a sequence, or a field: whichever this step of the place is
        steps = [
            next(str(getattr(key, kind)) for kind in ("key", "idx", "name") if hasattr(key, kind))
            for key in place
        ]
        name = ".".join(steps) or "result"
        if isinstance(leaf, Tensor):
            tensors[name] = leaf
        elif isinstance(leaf, Ragged):
            tensors |= {f"{name}.{number}": sample for number, sample in enumerate(leaf)}
    return tensors
