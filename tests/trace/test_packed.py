"""Packed sequences whose lengths are read, differ by sample, or change between calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

import shardmap
from shardmap._torch import pytree
from tests.trace.ways import WAYS

with torch.random.fork_rng():
    torch.manual_seed(2)
    GRU, LSTM = nn.GRU(3, 2, batch_first=True), nn.LSTM(3, 2, batch_first=True)
LENGTHS = torch.tensor([5, 3, 2, 1])
ALIKE_IN_SHAPE = torch.tensor([[5, 3, 2, 1], [5, 4, 1, 1], [5, 2, 2, 2], [1, 2, 3, 5]])
"""Each packs to 11 rows and 5 steps: only the sizes of the steps differ."""


def packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def padded(x: Tensor, lengths: Tensor) -> Any:
    return pad_packed_sequence(packed(x, lengths), batch_first=True, total_length=6)


def averaged(x: Tensor, lengths: Tensor) -> Tensor:
    found, counts = padded(x, lengths)
    return found.sum((1, 2)) / counts


def last_rows(x: Tensor, lengths: Tensor) -> Tensor:
    found, counts = padded(x, lengths)
    return found.gather(1, (counts - 1)[:, None, None].expand(-1, 1, 3)).squeeze(1)


def recurrent(x: Tensor, lengths: Tensor) -> Any:
    found, state = GRU(packed(x, lengths))
    return pad_packed_sequence(found, total_length=7), state


def long_memory(x: Tensor, lengths: Tensor) -> Any:
    found, state = LSTM(packed(x, lengths))
    return pad_packed_sequence(found, batch_first=True, total_length=5), state


def parts(x: Tensor, lengths: Tensor) -> Any:
    given = pack_sequence([x[0], x[1, :3], x[2, :2]], enforce_sorted=False)
    return unpack_sequence(given), pad_packed_sequence(given), lengths.sum()


FUNCTIONS: list[Callable[[Tensor, Tensor], Any]] = [
    padded,
    averaged,
    last_rows,
    recurrent,
    long_memory,
    parts,
]


def same_as_the_loop(mapped: Any, loop: Any, x: Tensor, *others: Tensor) -> None:
    """Values, dtypes and gradients of one call."""
    rows = [pytree.tree_leaves(loop(*row)) for row in zip(x, *others, strict=True)]
    wanted = [torch.stack(column) for column in zip(*rows, strict=True)]
    found = pytree.tree_leaves(mapped(x, *others))
    torch.testing.assert_close(found, wanted)
    of = [[t.square().sum() for t in outs if t.requires_grad] for outs in (found, wanted)]
    got, expected = (torch.autograd.grad(sum(losses), x)[0] for losses in of)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lengths_of_each_sample(function: Any, way: dict[str, Any]) -> None:
    """In each order: what the first and the last sample have in common says nothing of others."""
    mapped = shardmap.vmap(function, **way)
    for order in ([0, 0, 0], [0, 1, 2, 3], [0, 1, 0], [0, 1, 3], [2, 0, 1, 3, 2]):
        x = torch.randn(len(order), 4, 5, 3, requires_grad=True)
        same_as_the_loop(mapped, function, x, ALIKE_IN_SHAPE[order])


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lengths_that_all_share_and_that_change_between_calls(
    function: Any, way: dict[str, Any]
) -> None:
    """Their memory is written, so that python holds the same tensor."""
    lengths = LENGTHS.clone()

    def shared(x: Tensor) -> Any:
        return function(x, lengths)

    mapped = shardmap.vmap(shared, **way)
    for k in (0, 0, 0, 0, 1, 1, 0, 2, 2, 1):
        lengths.copy_(ALIKE_IN_SHAPE[k])
        same_as_the_loop(mapped, shared, torch.randn(5, 4, 5, 3, requires_grad=True))


def test_samples_of_the_same_lengths_are_batched_together() -> None:
    """The function itself is not run for each sample, but for each set of lengths."""
    lengths = ALIKE_IN_SHAPE[torch.arange(300) % 3]
    x = torch.randn(300, 4, 5, 3, requires_grad=True)
    shardmap.clear_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            same_as_the_loop(shardmap.vmap(last_rows), last_rows, x, lengths)
    assert not [str(w.message) for w in caught if "the function itself" in str(w.message)]


def test_many_steps_of_few_sequences_and_few_of_many() -> None:
    """Whichever are fewer are asked for: the lengths, or the sizes of the steps."""
    few = torch.tensor([[90, 3], [88, 5], [90, 3]])
    many = torch.tensor([[2] * 3 + [1] * 70, [2] * 3 + [1] * 70, [2, 1, 2] + [1] * 69 + [2]])
    for x, lengths in ((torch.randn(3, 2, 90, 3), few), (torch.randn(3, 73, 2, 3), many)):
        x.requires_grad_()
        for _ in range(3):
            same_as_the_loop(shardmap.vmap(summed), summed, x, lengths)


def summed(x: Tensor, lengths: Tensor) -> Any:
    found, counts = pad_packed_sequence(packed(x, lengths), batch_first=True, total_length=90)
    return found.cumsum(1), counts
