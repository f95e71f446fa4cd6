"""The precision of products in float32: read and set, whichever interface of torch set it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import shardmap
from shardmap.run.messages import Settings
from shardmap.run.precision import Float32Precision
from tests.run.rows import assert_close, batch, loop

W = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each test leaves the settings as it found them."""
    # torch's own testing tools forbid plain settings for the rest of a process
    with torch.backends.__allow_nonbracketed_mutation():
        found = Float32Precision.current()
        yield
        found.apply()
        assert Float32Precision.current() == found


def everything() -> None:
    torch.backends.fp32_precision = "tf32"


def products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def one_after_the_other() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def older() -> None:
    torch.set_float32_matmul_precision("high")


def convolutions() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


WAYS = (everything, products, one_after_the_other, older, convolutions)


@pytest.mark.parametrize("way", WAYS)
def test_settings_travel_to_another_process(way) -> None:
    """A worker that takes over the settings answers as the driver does."""
    before = Float32Precision.current()
    way()
    settings, wanted = Settings.current(), Float32Precision.current()
    assert wanted != before
    before.apply()
    assert Float32Precision.current() == before
    settings.apply()
    assert Float32Precision.current() == wanted


@pytest.mark.parametrize("way", [everything, products])
def test_the_overall_question_has_no_answer(way) -> None:
    """Torch raises where both interfaces were used; nothing else is taken for that."""
    way()
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert Float32Precision.current().overall is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2, "devices": ["cpu", "cpu"]}])
def test_a_map_runs_with_each_setting(way, options) -> None:
    """The loop's values, first and later calls."""
    way()
    mapped = shardmap.vmap(lambda row: torch.tanh(row @ W), **options)
    for size in (7, 3, 1):
        expected = loop(lambda row: (torch.tanh(row @ W),), batch(size))
        assert_close([mapped(batch(size))], expected)


@pytest.mark.rotating  # the compilation takes ten seconds
def test_a_compiled_map_runs_with_both_interfaces_used(tmp_path, monkeypatch) -> None:
    """Compiled in another process, which takes over the settings."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SHARDMAP_CACHE", str(tmp_path))
    everything()
    mapped = shardmap.vmap(lambda row: torch.tanh(row @ W), compile=True, chunk_size=3)
    expected = loop(lambda row: (torch.tanh(row @ W),), batch(7))
    assert_close([mapped(batch(7))], expected)
