"""Figures of an output: statistics, a histogram, a heat map, a sheet of images, a curve.

They are data; the page draws them.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shardmap._extras import require
from shardmap.jobs.report.samples import Sample, blocks, real

BINS = 48
ONE_BIN = 0.4
"""Share of all elements from which heights are logarithmic: if one bin has more, the others would
be invisible beside it."""
HEAT_ROWS, HEAT_COLUMNS = 160, 320
"""Most pixels of a heat map."""
LEAST_SIDE, LARGEST_SIDE = 4, 256
"""Least and largest side, in pixels, of samples that are shown as images."""
CURVE = 240
"""Most points of a curve."""
NOT_FINITE = (245, 190, 0)
"""Colour of values that are not finite (red, green, blue); it is in neither colour scale."""


@dataclass(frozen=True)
class Statistics:
    """The least, mean and largest finite element, their deviation, and counts of the others."""

    count: int
    nan: int
    infinite: int
    least: float | int | None
    mean: float | None
    deviation: float | None
    largest: float | int | None

    @property
    def finite(self) -> int:
        """The number of finite elements."""
        return self.count - self.nan - self.infinite


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width."""

    counts: Sequence[int]
    edges: Sequence[float]
    logarithmic: bool
    """True if heights are logarithmic: one bin would hide the others."""
    single: bool = False
    """True if each bin is one integer, in the middle of its edges."""

    @property
    def ends(self) -> tuple[float, float]:
        """The labels under the first bin and the last."""
        off = 0.5 if self.single else 0.0
        return self.edges[0] + off, self.edges[-1] - off

    @property
    def heights(self) -> list[float]:
        """The height of each bar, 0 to 1."""
        most = max(self.counts)
        scale = math.log1p(most) if self.logarithmic else most
        return [(math.log1p(count) if self.logarithmic else count) / scale for count in self.counts]


@dataclass(frozen=True)
class Picture:
    """Pixels that each show one value or the mean of some."""

    source: str
    """A `data:` URI of a PNG."""
    width: int
    height: int
    low: float
    high: float
    """The value at the upper end of the colour scale."""
    diverging: bool
    """True if zero is in the middle of the scale."""
    not_finite: bool
    """True if pixels are in the colour for NaN and infinity."""
    beyond: bool
    """True if values lie outside the scale."""
    square: bool = False
    """True if it shows a square matrix."""


@dataclass(frozen=True)
class Sheet:
    """Images of some samples."""

    picture: Picture
    samples: Sequence[int]
    """The rows of the output that are shown."""
    per_sample: int
    """Number of images that are shown of each sample."""
    of: int
    """Number of images that each sample has."""
    columns: int
    side: tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """A value per row, or the range of the values that share a point."""

    points: int
    segments: Sequence[Sequence[tuple[float, float, float]]]
    """Positions from 0 to `points`, lowest and highest values there; in pieces, because at some
    positions no value is finite."""
    marked: Sequence[int]
    """Positions where a value is not finite."""
    least: float
    largest: float

    def height(self, value: float) -> float:
        """The height at which a value is drawn, from 97 at the bottom to 3 at the top."""
        scale = max(abs(self.least), abs(self.largest))
        return round(
            97
            - 94
            * (value / scale - self.least / scale)
            / (self.largest / scale - self.least / scale),
            2,
        )


def statistics(rows: Tensor) -> Statistics:
    """Compute statistics, in one pass for the mean and one for the deviation."""
    count = nan = infinite = 0
    total, least, largest = 0.0, math.inf, -math.inf
    whole = not (rows.is_floating_point() or rows.is_complex())
    for block in blocks(rows):
        count += block.size
        if not whole:
            nan, infinite = nan + int(np.isnan(block).sum()), infinite + int(np.isinf(block).sum())
            block = block[np.isfinite(block)]
        if block.size:
            with np.errstate(over="ignore"):  # an infinite sum is handled below
                total += float(block.sum(dtype=np.float64))
            low, high = block.min().item(), block.max().item()
            least, largest = min(least, low), max(largest, high)
    finite = count - nan - infinite
    if not finite:
        return Statistics(count, nan, infinite, None, None, None, None)
    mean = total / finite
    if not math.isfinite(mean):
        return Statistics(count, nan, infinite, least, None, None, largest)
    squares = 0.0
    with np.errstate(over="ignore"):
        for block in blocks(rows):
            off = (block if whole else block[np.isfinite(block)]).astype(np.float64) - mean
            squares += float(np.square(off).sum())
    deviation = math.sqrt(squares / finite)
    return Statistics(
        count, nan, infinite, least, mean, deviation if math.isfinite(deviation) else None, largest
    )


def histogram(rows: Tensor, found: Statistics) -> Histogram | None:
    """Count the finite elements in bins; a bin for each number if these are few integers.

    None if all are equal, or there are none.
    """
    low, high = found.least, found.largest
    if low is None or high is None or float(low) == float(high):
        return None
    whole = isinstance(low, int) and isinstance(high, int)
    single = whole and high - low < BINS
    bins = int(high - low) + 1 if single else BINS
    scale = max(
        abs(float(low)), abs(float(high))
    )  # the range of 1e308 and -1e308 overflows, that of 1 and -1 does not
    first, width = float(low) / scale, float(high) / scale - float(low) / scale
    counts = np.zeros(bins, dtype=np.int64)
    for block in blocks(rows):
        if single:
            index = (
                block.astype(np.int64) - int(low)
                if block.dtype != np.uint64
                else (block - np.uint64(low)).astype(np.int64)
            )
        else:
            finite = block if whole else block[np.isfinite(block)]
            part = (finite.astype(np.float64) / scale - first) / width
            index = np.minimum((part * bins).astype(np.int64), bins - 1)
        counts += np.bincount(index, minlength=bins)
    if single:
        edges = [float(low) - 0.5 + i for i in range(bins + 1)]
    else:
        edges = [scale * (first + width * i / bins) for i in range(bins + 1)]
    return Histogram(
        counts.tolist(), edges, not single and bool(counts.max() > ONE_BIN * counts.sum()), single
    )


def looks_like_images(shape: Sequence[int]) -> bool:
    """True if samples of this shape are worth drawing: `[..., H, W]`, both between 4 and 256."""
    return len(shape) >= 2 and all(LEAST_SIDE <= side <= LARGEST_SIDE for side in shape[-2:])


def sheet(sample: Sample) -> Sheet | None:
    """Images of a few samples: a row for each that has several, a grid otherwise.

    None if there are none.
    """
    shape = tuple(sample.rows.shape[1:])
    if not looks_like_images(shape) or not len(sample.rows) or not math.prod(shape):
        return None
    of, (height, width) = math.prod(shape[:-2]), shape[-2:]
    most = max(1, min(12, 1024 // width))
    per_sample = min(of, most)
    wanted = 6 if of > 1 else 3 * most
    chosen = (
        [round(i * (len(sample.rows) - 1) / max(1, wanted - 1)) for i in range(wanted)]
        if wanted < len(sample.rows)
        else None
    )
    chosen = chosen or list(range(len(sample.rows)))
    images = np.stack(
        [real(sample.rows[i].reshape(of, height, width)[:per_sample]) for i in chosen]
    ).astype(np.float64)
    images = images.reshape(-1, height, width)
    columns = per_sample if of > 1 else min(most, len(images))
    lines = -(-len(images) // columns)
    gap = 1 if max(height, width) < 32 else 3
    canvas = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    empty = np.ones(canvas.shape, dtype=bool)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
        empty[top : top + height, left : left + width] = False
    return Sheet(
        _picture(canvas, empty),
        [sample.numbers[i] for i in chosen],
        per_sample,
        of,
        columns,
        (height, width),
    )


def heat_map(rows: Tensor) -> Picture | None:
    """Rows as lines of pixels, each the mean of its neighbourhood if there are too many.

    None if the rows do not form a matrix.
    """
    lines, line = len(rows), math.prod(rows.shape[1:])
    if lines < 2 or line < 2:
        return None
    matrix = rows.reshape(lines, line)
    tops = [lines * i // min(lines, HEAT_ROWS) for i in range(min(lines, HEAT_ROWS))]
    lefts = np.array([line * i // min(line, HEAT_COLUMNS) for i in range(min(line, HEAT_COLUMNS))])
    widths = np.diff([*lefts, line])
    out = np.empty((len(tops), len(lefts)))
    for i, (top, bottom) in enumerate(zip(tops, [*tops[1:], lines], strict=True)):
        total = np.zeros(line)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity less infinity is drawn as NaN
            for number in range(top, bottom):
                total += real(matrix[number])
            out[i] = np.add.reduceat(total, lefts) / (widths * (bottom - top))
    return dataclasses.replace(_picture(out, None), square=lines == line)


def curve(rows: Tensor) -> Curve | None:
    """A curve with one value per row, in order.

    None if rows have several values, are fewer than three, none is finite, or all are equal.
    """
    if len(rows) < 3 or math.prod(rows.shape[1:]) != 1:
        return None
    values = real(rows.reshape(-1)).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() == finite.max():
        return None
    points = min(len(values), CURVE)
    starts = [len(values) * i // points for i in range(points + 1)]
    segments: list[list[tuple[float, float, float]]] = [[]]
    marked = []
    for place, (start, stop) in enumerate(itertools.pairwise(starts)):
        here = values[start:stop][np.isfinite(values[start:stop])]
        if here.size < stop - start:
            marked.append(place)
        if here.size:
            segments[-1].append((place + 0.5, here.min().item(), here.max().item()))
        elif segments[-1]:
            segments.append([])
    whole = [
        s if len(s) > 1 else [(s[0][0] - 0.5, *s[0][1:]), (s[0][0] + 0.5, *s[0][1:])]
        for s in segments
        if s
    ]  # a single point is drawn as a dash
    return Curve(points, whole, marked, finite.min().item(), finite.max().item())


def _picture(values: np.ndarray, empty: np.ndarray | None) -> Picture:
    """Draw values as coloured pixels; those that are `empty` are transparent."""
    colormaps = require("matplotlib", extra="run", purpose="to draw pictures").colormaps
    imsave = require("matplotlib.image", extra="run", purpose="to draw pictures").imsave
    finite = np.isfinite(values)
    seen = values[finite]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    diverging = low < 0 < high
    if diverging:
        largest, usual = max(-low, high), float(np.quantile(np.abs(seen), 0.99))
        end = (
            usual if 0 < 3 * usual < largest else largest
        )  # a few outliers would leave all others pale
        low, high = -end, end
    scale = max(abs(low), abs(high)) or 1.0
    width = high / scale - low / scale
    part = (
        np.clip((values / scale - low / scale) / width, 0, 1)
        if width
        else np.full(values.shape, 0.5)
    )
    colours = colormaps["RdBu_r" if diverging else "viridis"](
        np.where(finite, part, 0.0), bytes=True
    )
    colours[~finite, :3] = NOT_FINITE
    odd = ~finite if empty is None else ~finite & ~empty
    if empty is not None:
        colours[empty, 3] = 0
    data = io.BytesIO()
    imsave(data, colours, format="png")
    beyond = bool(seen.size and (seen.min() < low or seen.max() > high))
    return Picture(
        png(data.getvalue()),
        values.shape[1],
        values.shape[0],
        low,
        high,
        diverging,
        bool(odd.any()),
        beyond,
    )


def png(data: bytes) -> str:
    """Encode a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
