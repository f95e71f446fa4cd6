"""Memory as lines in the number of samples, and bytes as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmap.planning.memory import (
    GIB,
    KIB,
    MIB,
    Level,
    MemoryModel,
    envelope,
    format_bytes,
    parse_bytes,
)
from tests.planning.common import QUICK, counts, levels, models


@QUICK
@given(models, counts, st.integers(0, 10**6))
def test_the_largest_chunk_is_the_inverse_of_the_chunks_bytes(
    model: MemoryModel, limit: int, most: int
) -> None:
    """It fits, and one sample more does not."""
    largest = model.largest_chunk(limit, most)
    assert 0 <= largest <= most
    if largest:
        assert model.chunk_bytes(largest) <= limit
    if largest < most:
        assert model.chunk_bytes(largest + 1) > limit


@QUICK
@given(models, st.integers(0, 10**6), st.integers(0, 10**3))
def test_more_samples_need_no_less(model: MemoryModel, samples: int, more: int) -> None:
    assert model.chunk_bytes(samples) <= model.chunk_bytes(samples + more)
    needed = model.resident_bytes + model.chunk_bytes(samples)
    assert model.peak_bytes(samples) == needed + min(32 << 20, needed // 25)
    assert model.chunk_bytes(0) == 0


@QUICK
@given(st.lists(levels, max_size=8), st.integers(0, 10**6))
def test_an_envelope_is_as_high_as_all_levels(given: list[Level], samples: int) -> None:
    """At every number of samples, with no level in it that is nowhere the highest."""
    found = envelope(given)
    assert max(v.at(samples) for v in found) == max((v.at(samples) for v in given), default=0)
    assert set(found) <= set(given) or not given
    assert [v.sample_bytes for v in found] == sorted({v.sample_bytes for v in found}, reverse=True)
    assert [v.fixed_bytes for v in found] == sorted({v.fixed_bytes for v in found})


def test_levels_are_lines() -> None:
    assert Level(3, 5).at(7) == 38
    assert Level(1, 2) + Level(10, 20) == Level(11, 22)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * GIB), ("512 MB", 512 * 10**6), ("1048576", 1 << 20), ("1e3", 1000), (" 2.5 "
            "gib ", int(2.5 * GIB)), ("1TiB", 1 << 40),
        ("3kb", 3000), ("3 KiB", 3 * KIB), ("7b", 7), ("0.5MiB", MIB // 2), ("1.5TB", 15 * 10**11),
    ],
)  # fmt: skip
def test_bytes_are_read_from_text(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "6 parsecs",
        "-1",
        "-1GiB",
        "0",
        "inf",
        "nan",
        "1e400",
        "6GiB GiB",
        "six",
        "0x10",
        "0.5",
        "6 Gi B",
    ],
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    assert parse_bytes(text) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (int(9.1 * GIB), "9.1 GiB"),
        (5000 * GIB, "5000.0 GiB"),
    ],
)
def test_bytes_are_written_as_text(count: int, text: str) -> None:
    assert format_bytes(count) == text


@QUICK
@given(st.integers(1, 1 << 45))
def test_bytes_come_back_from_their_text(count: int) -> None:
    back = parse_bytes(format_bytes(count))
    assert back is not None
    assert abs(back - count) <= 0.051 * max(KIB, 1 << (count.bit_length() - 1) // 10 * 10)
