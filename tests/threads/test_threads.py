"""Maps from many threads, from handlers and callbacks, and after a fork: none hangs or is wrong."""

from __future__ import annotations

import pytest
import torch

import shardmap
from tests.threads import process

KINDS = ["plain", "reduce", "once", "store"]


@pytest.mark.parametrize("kind", KINDS)
def test_new_programs_in_eight_threads(kind: str) -> None:
    assert process.run("stress", kind, 8, 4, 1e-6, seconds=200) == "32 maps\n"


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("interval", [0.005, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_new_programs_in_eight_threads(kind: str, interval: float) -> None:
    assert process.run("stress", kind, 8, 200, interval, seconds=1800) == "1600 maps\n"


@pytest.mark.parametrize("who", ["signal", "finalizer", "weak reference", "hook", "operator"])
def test_a_map_during_a_map(who: str) -> None:
    assert "maps" in process.run("reentered", who, seconds=120)


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "loader"])
def test_children_of_a_process_that_has_mapped(how: str) -> None:
    assert process.run("forked", how, seconds=150).endswith("right\n")


@pytest.mark.parametrize("what", ["torch_stream", "same_numbers", "accused", "guilty"])
def test_random_numbers(what: str) -> None:
    assert process.run("drawing", what, seconds=150).endswith("right\n")


def test_modes_that_are_switched_off_around_a_map() -> None:
    """A signal handler may find modes off: the map still records what the function does."""
    x = torch.arange(12.0).view(3, 4)
    weight = torch.ones(4)

    def function(r: torch.Tensor) -> torch.Tensor:
        return (r * weight).sin() + r[0]

    want = torch.stack([function(r) for r in x])
    for off in (torch._C._DisableTorchDispatch, torch._C.DisableTorchFunction):
        with off():
            found = shardmap.vmap(function)(x)
        torch.testing.assert_close(found, want, msg=off.__name__)
