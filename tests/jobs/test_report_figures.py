"""Tests of a report's figures of outputs.

Numbers agree with numpy, pixels show values, and rows are read within a bound.
"""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch

import shardmap
from shardmap.jobs.report import figures, samples
from shardmap.jobs.report.samples import Output, Sample
from shardmap.store.columns import TensorColumn
from tests import run_folders

GENERATOR = np.random.default_rng(5)
FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Different elements that every dtype can hold."""
    if dtype is torch.bool:
        return torch.from_numpy(GENERATOR.random(shape) < 0.3)
    if dtype.is_complex:
        return torch.from_numpy(
            GENERATOR.normal(size=shape) + 1j * GENERATOR.normal(size=shape)
        ).to(dtype)
    whole = torch.from_numpy(GENERATOR.integers(0, 97, shape))
    return (whole if dtype in INTEGERS else whole / 8 - 5).to(dtype)


def plain(t: torch.Tensor) -> np.ndarray:
    """The same numbers in double precision, by way of torch."""
    return t.to(torch.complex128).abs().numpy() if t.is_complex() else t.to(torch.float64).numpy()


def output(
    t: torch.Tensor, runs: int = 4, there: tuple[tuple[int, int], ...] | None = None
) -> Output:
    return Output("x", tuple(t.shape), t.dtype, TensorColumn(t, "x"), there or ((0, len(t)),), runs)


def pixels(picture: figures.Picture) -> np.ndarray:
    """[height, width, 4] as bytes, from the PNG in the page."""
    kind, data = picture.source.split(",")
    assert kind == "data:image/png;base64"
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
    assert image.shape[:2] == (picture.height, picture.width)
    return np.rint(image * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "dtype", [*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.complex128], ids=str
)
def test_statistics_are_those_of_numpy(dtype: torch.dtype) -> None:
    t = values(dtype, 13, 7)
    found, expected = figures.statistics(t), plain(t)
    assert (found.count, found.nan, found.infinite, found.finite) == (91, 0, 0, 91)
    got = [found.least, found.mean, found.largest, found.deviation]
    np.testing.assert_allclose(
        np.array(got, dtype=np.float64),
        [expected.min(), expected.mean(), expected.max(), expected.std()],
        rtol=1e-6,
    )
    if dtype in INTEGERS:
        assert isinstance(found.least, int)
        assert isinstance(found.largest, int)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
def test_nan_and_infinity_are_counted_and_left_out(dtype: torch.dtype) -> None:
    t = values(dtype, 11, 5)
    t[2, 1], t[7, 3], t[0, 0], t[10, 4] = math.nan, math.inf, -math.inf, math.nan
    expected = plain(t)
    finite = expected[np.isfinite(expected)]
    found = figures.statistics(t)
    assert (found.count, found.nan, found.infinite, found.finite) == (55, 2, 2, 51)
    assert (found.least, found.largest) == (
        pytest.approx(finite.min(), rel=1e-6),
        pytest.approx(finite.max(), rel=1e-6),
    )
    assert found.mean == pytest.approx(finite.mean(), rel=1e-6)
    drawn = figures.histogram(t, found)
    assert drawn is not None
    assert sum(drawn.counts) == 51


def test_integers_beyond_doubles_and_sums_beyond_range() -> None:
    largest = 2**63 - 1
    assert figures.statistics(torch.tensor([largest, largest - 2])).largest == largest
    far = torch.tensor([1e308, 1.5e308, -1e308], dtype=torch.float64)
    found = figures.statistics(torch.tensor([1.7e308, 1.7e308], dtype=torch.float64))
    assert (found.least, found.mean, found.deviation) == (1.7e308, None, None)
    drawn = figures.histogram(far, figures.statistics(far))
    assert drawn is not None
    assert (sum(drawn.counts), drawn.counts[0], drawn.counts[-1]) == (3, 1, 1)
    assert all(map(math.isfinite, drawn.edges))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_is_found_in_nothing(shape: tuple[int, ...]) -> None:
    t = torch.empty(shape)
    found = figures.statistics(t)
    assert (found.count, found.least, found.mean) == (0, None, None)
    assert figures.histogram(t, found) is None
    assert figures.heat_map(t) is None
    assert figures.curve(t) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_histograms_are_those_of_numpy(dtype: torch.dtype) -> None:
    t = (
        values(torch.complex128, 4001).to(dtype)
        if dtype.is_complex
        else torch.from_numpy(GENERATOR.normal(size=4001)).to(dtype)
    )
    drawn = figures.histogram(t, figures.statistics(t))
    assert drawn is not None
    counts, edges = np.histogram(plain(t), figures.BINS)
    np.testing.assert_allclose(drawn.edges, edges, rtol=1e-9, atol=1e-12)
    assert np.abs(np.array(drawn.counts) - counts).sum() <= 2, (
        "an element at an edge may fall to either side of it"
    )
    assert sum(drawn.counts) == 4001
    assert not drawn.logarithmic


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_few_integers_have_a_bar_each(dtype: torch.dtype) -> None:
    t = (
        values(torch.bool, 301)
        if dtype is torch.bool
        else torch.from_numpy(GENERATOR.integers(3, 9, 301)).to(dtype)
    )
    drawn = figures.histogram(t, figures.statistics(t))
    assert drawn is not None
    found, counts = np.unique(plain(t), return_counts=True)
    assert [drawn.ends[0] + i for i in range(len(drawn.counts))] == found.tolist()
    assert drawn.counts == counts.tolist()


def test_one_full_bar_does_not_hide_the_others() -> None:
    t = torch.cat([torch.zeros(1000), torch.linspace(-1, 1, 100)])
    drawn = figures.histogram(t, figures.statistics(t))
    assert drawn is not None
    assert drawn.logarithmic
    assert max(drawn.heights) == 1
    assert min(height for height in drawn.heights if height) > 0.1
    assert (
        figures.histogram(torch.full((5,), 3.0), figures.statistics(torch.full((5,), 3.0))) is None
    )


def test_a_heat_map_has_a_pixel_for_each_value() -> None:
    t = torch.from_numpy(GENERATOR.normal(size=(7, 2, 3)))
    t[3, 1, 2] = math.nan
    picture = figures.heat_map(t)
    assert picture is not None
    assert (picture.height, picture.width, picture.diverging, picture.not_finite) == (
        7,
        6,
        True,
        True,
    )
    image, matrix = pixels(picture), t.reshape(7, 6).numpy()
    assert tuple(image[3, 5, :3]) == figures.NOT_FINITE
    assert (np.all(image[..., :3] == figures.NOT_FINITE, axis=-1)).sum() == 1
    expected = matplotlib.colormaps["RdBu_r"](
        (matrix - picture.low) / (picture.high - picture.low), bytes=True
    )
    good = np.isfinite(matrix)
    assert np.array_equal(image[good], expected[good])
    assert picture.high == -picture.low == pytest.approx(np.nanmax(np.abs(matrix)))


def test_a_large_heat_map_has_means_for_pixels() -> None:
    lines, line = 2 * figures.HEAT_ROWS, 3 * figures.HEAT_COLUMNS
    blocks = GENERATOR.random((figures.HEAT_ROWS, figures.HEAT_COLUMNS)) + 1
    matrix = np.repeat(np.repeat(blocks, 2, axis=0), 3, axis=1)
    noise = np.tile(
        np.array([[0.25, 0.0, -0.25], [-0.25, 0.0, 0.25]]),
        (figures.HEAT_ROWS, figures.HEAT_COLUMNS),
    )  # no mean
    picture = figures.heat_map(torch.from_numpy(matrix + noise))
    assert picture is not None
    assert (lines, line) == matrix.shape
    assert (picture.low, picture.high) == (pytest.approx(blocks.min()), pytest.approx(blocks.max()))
    expected = matplotlib.colormaps["viridis"](
        (blocks - picture.low) / (picture.high - picture.low), bytes=True
    )
    assert np.abs(pixels(picture).astype(int) - expected).max() <= 3, (
        "means round otherwise than the values do"
    )


def test_a_sheet_shows_the_samples_it_names() -> None:
    rows = torch.from_numpy(GENERATOR.random((23, 3, 5, 4)))
    drawn = figures.sheet(Sample(rows, list(range(100, 123)), ""))
    assert drawn is not None
    assert (drawn.per_sample, drawn.of, drawn.columns, drawn.side) == (3, 3, 3, (5, 4))
    assert drawn.samples[0] == 100
    assert drawn.samples[-1] == 122
    image, picture = pixels(drawn.picture), drawn.picture
    for line, number in enumerate(drawn.samples):
        for column in range(3):
            part = image[line * 6 : line * 6 + 5, column * 5 : column * 5 + 4]
            wanted = (rows[number - 100, column].numpy() - picture.low) / (
                picture.high - picture.low
            )
            assert np.array_equal(part, matplotlib.colormaps["viridis"](wanted, bytes=True))
    assert (image[5, :, 3] == 0).all(), "the page is seen between the images"


@pytest.mark.parametrize("shape", [(), (7,), (3, 7), (7, 3), (300, 7), (7, 257)])
def test_other_shapes_are_no_images(shape: tuple[int, ...]) -> None:
    assert figures.sheet(Sample(torch.zeros(2, *shape), [0, 1], "")) is None


def test_a_curve_goes_through_the_values_and_stops_at_those_that_are_none() -> None:
    t = torch.from_numpy(GENERATOR.normal(size=11))
    t[4] = math.nan
    drawn = figures.curve(t.reshape(11, 1))
    assert drawn is not None
    assert drawn.marked == [4]
    assert [[point[1] for point in segment] for segment in drawn.segments] == [
        t[:4].tolist(),
        t[5:].tolist(),
    ]
    assert (drawn.height(drawn.least), drawn.height(drawn.largest)) == (97, 3)
    many = figures.curve(torch.arange(1009.0))
    assert many is not None
    assert many.points == figures.CURVE
    assert (many.segments[0][0][1], many.segments[0][-1][2]) == (0, 1008)


@pytest.mark.parametrize("rows", [1, 3, 97, 4099])
def test_rows_that_are_read_are_evenly_spaced(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "READ_BYTES", 50 * 5 * 4)
    t = torch.arange(rows * 5, dtype=torch.float32).reshape(rows, 5)
    found = samples.read(output(t))
    assert isinstance(found, Sample)
    assert torch.equal(found.rows, t[list(found.numbers)])
    assert found.numbers[0] == 0
    assert found.numbers[-1] == rows - 1
    assert len(found.numbers) == min(rows, 48)
    assert (found.said == "") == (rows <= 48)
    if rows > 48:
        assert found.said == f"looked at 48 of {rows:,} rows, 4 evenly spaced runs of 12"


def test_rows_that_are_not_written_are_not_read() -> None:
    t = torch.arange(21.0).reshape(21, 1)
    found = samples.read(output(t, there=((0, 4), (8, 12), (20, 21))))
    assert isinstance(found, Sample)
    assert list(found.numbers) == [0, 1, 2, 3, 8, 9, 10, 11, 20]
    assert torch.equal(found.rows, t[list(found.numbers)])
    assert found.said == "9 of 21 rows are written"


def test_a_row_beyond_the_bound_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "READ_BYTES", 1000)
    found = samples.read(output(torch.zeros(3, 251)))
    assert isinstance(found, samples.Unread)
    assert "One row has 1004 B, and no more than 1000 B" in found.reason


def test_memory_is_bounded_whatever_the_store_holds(tmp_path: Path) -> None:
    """The peak of a process that reports on 512 MiB grows by at most the bound and one unit."""
    rows, width = 8192, 16384
    ramp = torch.linspace(-1, 1, width)
    scale = torch.arange(rows, dtype=torch.float32)

    def times(s: torch.Tensor) -> torch.Tensor:
        return s * ramp

    store: Any = shardmap.vmap(
        times, out=shardmap.ZarrSink(tmp_path / "large.zarr"), chunk_size=256
    )(scale)
    assert store.header.samples * store.header.row_bytes == 512 << 20
    config = {**run_folders.CONFIG, "store": str(tmp_path / "large.zarr")}
    large = run_folders.make(tmp_path / "large", torch.sin, [scale[:3]], config=config)
    small = run_folders.make(tmp_path / "small", torch.sin, [scale[:3]])
    (large / "outputs.safetensors").unlink()
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom shardmap.jobs.report import page\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "page.write(Path(sys.argv[1]))\nbefore = "
        "peak()\npage.write(Path(sys.argv[2]))\nprint(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, small, large],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) << 10 < (256 << 20) + 256 * store.header.row_bytes
    text = (large / "report.html").read_text()
    assert "Looked at 256 of 8,192 rows, 16 evenly spaced runs of 16." in text
    assert "-8,191" in text or "-8191" in text, "the last row has been read"
