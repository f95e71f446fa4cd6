"""PyTorch's operator database against the loop.

No operator gets worse than the stored scoreboard, and none is wrong.
"""

from __future__ import annotations

import datetime
import zlib

import pytest

from tests import oracle, scoreboard, sweep

PARTS = 16
TODAY = datetime.datetime.now(datetime.UTC).timetuple().tm_yday % PARTS


def part(names: list[str], index: int) -> list[str]:
    """A fixed sixteenth of the operators, by their names."""
    return [name for name in names if zlib.crc32(name.encode()) % PARTS == index]


def assert_not_worse(names: list[str]) -> None:
    """Judges operators in worker processes and compares with the scoreboard."""
    board = scoreboard.load()
    found = [
        complaint
        for name, result in sweep.run(names, "shardmap", workers=1)
        for complaint in scoreboard.complaints(name, result, board)
    ]
    assert not found, "\n".join(found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("index", [pytest.param(TODAY, id=f"part_{TODAY}_of_{PARTS}")])
def test_part_of_the_day(index: int) -> None:
    """A sixteenth each day; the test's id says which."""
    assert_not_worse(part(list(sweep.operators()), index))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("index", range(PARTS))
def test_all(index: int) -> None:
    """Every operator."""
    assert_not_worse(part(list(sweep.operators()), index))


def test_scoreboard_holds_nothing_wrong() -> None:
    """Stored results of shardmap are right, served by the slow loop, or refused.

    And it covers the reference.
    """
    for name, entry in scoreboard.load()["operators"].items():
        for direction, stored in entry.items():
            assert stored.get("shardmap", "right") in scoreboard.RANKS, (name, direction, stored)


def test_samples_of_a_batch_differ() -> None:
    """A batch of equal rows would hide faults between rows."""
    known = sweep.operators()
    for name in ("add", "softmax", "linalg_cholesky", "nn_functional_conv2d", "gather"):
        for leaves, _, at in sweep.batches(known[name], sweep.PREFERRED[0]):
            floats = [
                leaves[i] for i in at if leaves[i].is_floating_point() and leaves[i][0].numel()
            ]
            assert all(
                not t[0].equal(t[1]) and not t[1].equal(t[2]) for t in floats if t.abs().sum() > 0
            )


def test_complaints_of_a_worse_result() -> None:
    """Wrong, crashed, worse than stored, and behind the reference are each said."""
    board = {
        "operators": {
            "add": {
                "forward": {
                    "shardmap": "right",
                    "shardmap_served": 5,
                    "torch": "right",
                    "torch_served": 5,
                }
            }
        }
    }
    fine = {"forward": "right", "forward_served": 5, "gradient": "uncounted", "gradient_served": 0}
    assert scoreboard.complaints("add", fine, board) == []
    assert scoreboard.complaints("add", fine | {"forward": "wrong"}, board)
    assert scoreboard.complaints("add", fine | {"forward": "crashed"}, board)
    assert scoreboard.complaints("add", fine | {"forward": "fallback"}, board)
    assert scoreboard.complaints("add", fine | {"forward_served": 4}, board)


def test_the_sweep_notices_a_wrong_map() -> None:
    """A subject that mixes rows is wrong on what has more than one distinct row."""

    def mixing(func, in_dims=0, out_dims=0, **options):
        return lambda *args: [
            leaf.roll(1, 0) for leaf in oracle.loop(func, in_dims, out_dims, **options)(*args)
        ]

    result = sweep.judge("add", sweep.operators()["add"], mixing)
    assert result["forward"] == "wrong"
    assert sweep.judge("add", sweep.operators()["add"], oracle.loop)["forward"] == "right"
