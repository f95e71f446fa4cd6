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
"""Part of all elements: where one bin has more, the others would not be seen beside it, and
heights go by the logarithm."""
HEAT_ROWS, HEAT_COLUMNS = 160, 320
"""Most pixels of a heat map."""
LEAST_SIDE, LARGEST_SIDE = 4, 256
"""Pixels of what is shown as an image."""
CURVE = 240
"""Most points of a curve."""
NOT_FINITE = (245, 190, 0)
"""Red, green, blue; in neither of the colour scales."""


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
    """True if heights are to go by the logarithm: one bin would hide the others."""
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
    """Pixels, each standing for one value or the mean of some."""

    source: str
    """A `data:` URI of a PNG."""
    width: int
    height: int
    low: float
    high: float
    """The values at the ends of the colour scale."""
    diverging: bool
    """True if zero is in the middle of the scale."""
    not_finite: bool
    """True if pixels are in the colour for NaN and infinity."""
    beyond: bool
    """True if values lie outside the scale."""
    square: bool = False
    """True if it is of a matrix with as many rows as columns."""


@dataclass(frozen=True)
class Sheet:
    """Images of some samples."""

    picture: Picture
    samples: Sequence[int]
    """The rows of the output that are shown."""
    per_sample: int
    """Images of each that are shown."""
    of: int
    """Images that each has."""
    columns: int
    side: tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """A value per row, or the range of those that share a point."""

    points: int
    segments: Sequence[Sequence[tuple[float, float, float]]]
    """Places from 0 to `points`, lowest and highest values there; in pieces, because at some
    places no value is finite."""
    marked: Sequence[int]
    """Places where a value is not finite."""
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
    """Count and measure, in one pass for the mean and one for the deviation."""
    count = nan = infinite = 0
    total, least, largest = 0.0, math.inf, -math.inf
    whole = not (rows.is_floating_point() or rows.is_complex())
    for block in blocks(rows):
        count += block.size
        if not whole:
            nan, infinite = nan + int(np.isnan(block).sum()), infinite + int(np.isinf(block).sum())
            block = block[np.isfinite(block)]
        if block.size:
            with np.errstate(over="ignore"):  # an infinite sum is answered below
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
    """Count the finite elements in bins; a bin for each number where these are few integers.

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
    )  # the range of 1e308 and -1e308 is no number, that of 1 and -1 is
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
    """Images of a few samples: a row for each where each has several, a grid otherwise.

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
    """Rows as lines of pixels, each the mean of its neighbourhood where there are more than fit.

    None if that is no matrix.
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
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # infinity less infinity is drawn as what it is
            for number in range(top, bottom):
                total += real(matrix[number])
            out[i] = np.add.reduceat(total, lefts) / (widths * (bottom - top))
    return dataclasses.replace(_picture(out, None), square=lines == line)


def curve(rows: Tensor) -> Curve | None:
    """One value per row, in order.

    None if rows are not that, or fewer than three, or none is finite, or all are equal.
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
    ]  # a point is a dash
    return Curve(points, whole, marked, finite.min().item(), finite.max().item())


def _picture(values: np.ndarray, empty: np.ndarray | None) -> Picture:
    """Values as coloured pixels; where `empty`, the page is seen."""
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
        )  # a few far values would leave all others pale
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
    """A PNG as something that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
