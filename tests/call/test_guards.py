"""`trace="auto"` sees whatever changes a function between two calls, or records it each time."""

from __future__ import annotations

import pytest
import torch

import shardmap
from tests.call.changes import WAYS


def loop(f, rows):
    return torch.stack([f(r) for r in rows])


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("calls", [1, 2, 3, 6], ids="after{}".format)
def test_a_change_between_calls(name, calls):
    torch.manual_seed(0)
    way = WAYS[name]()
    batches = [torch.rand(3, 3) + 0.5 for _ in range(calls + 4)]
    try:
        f = next(way)
        mapped = shardmap.vmap(f, randomness="different")
        for rows in batches[:calls]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
        f = next(way)
        for rows in batches[calls:]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
            torch.testing.assert_close(
                shardmap.vmap(f, randomness="different")(rows), loop(f, rows)
            )
    finally:
        for _ in way:  # what was patched is put back
            pass


def test_there_are_enough_ways():
    assert len(WAYS) >= 80
