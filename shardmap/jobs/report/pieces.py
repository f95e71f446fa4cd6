"""Building blocks of reports: tables as text and CSV, and pictures of many small images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shardmap._extras import require
from shardmap.run.colours import FAINT, INK, WRONG


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet with its caption."""

    image: Tensor
    """Pixels `[height, width]`, 0 (paper) to 1 (ink)."""
    lines: Sequence[str]
    """Lines of text below the image."""
    marked: bool = False
    """True to draw a frame and the last line in the marking colour."""


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as CSV, with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def format_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Lay out columns of equal length as text, right-aligned under their names."""
    cells = [
        [name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in column)]
        for name, column in columns.items()
    ]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*cells, strict=True)
    )


def contact_sheet(
    path: Path, tiles: Sequence[Tile], *, title: str, subtitle: str, columns: int = 5
) -> None:
    """Draw images in a grid, each with its lines of text.

    Args:
        path: The PNG to write.
        tiles: The images, drawn row by row.
        title: Large text above the grid.
        subtitle: Small text under the title.
        columns: Number of images per row.
    """
    figure_module = require("matplotlib.figure", extra="run", purpose="to draw pictures")
    rows = -(-len(tiles) // columns)
    height = 1.62 * rows + 0.95  # inches
    figure = figure_module.Figure(figsize=(1.5 * columns + 0.4, height), facecolor="white")
    figure.text(0.035, 1 - 0.2 / height, title, fontsize=14, weight="bold", color=INK, va="top")
    figure.text(0.035, 1 - 0.52 / height, subtitle, fontsize=9, color=FAINT, va="top")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.03, right=0.97, top=1 - 0.92 / height, bottom=0.5 / height, hspace=0.5, wspace=0.12
    )
    for axes in grid.flat[len(tiles) :]:
        axes.set_axis_off()
    for axes, tile in zip(grid.flat, tiles, strict=False):
        axes.imshow(tile.image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(
                color=WRONG if tile.marked else "#d5d8df", linewidth=2.2 if tile.marked else 0.8
            )
        for number, line in enumerate(tile.lines):
            last = number == len(tile.lines) - 1
            axes.text(
                0.5,
                -0.06 - 0.15 * number,
                line,
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=8.5,
                color=(WRONG if tile.marked else FAINT) if last else INK,
                weight="bold" if last and tile.marked else "normal",
            )
    figure.savefig(path, dpi=150)
