"""Packed sequences, ctc_loss and single indices as users write them, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import shardmap
from tests import oracle

with torch.random.fork_rng():
    torch.manual_seed(2)
    GRU, LSTM = nn.GRU(3, 4, batch_first=True), nn.LSTM(3, 4)


def rows(*shape: int) -> Tensor:
    return torch.randn(7, *shape, generator=torch.Generator().manual_seed(len(shape)))


LENGTHS = torch.tensor([5, 3, 1, 4, 2, 5, 3])
MANY = torch.tensor([[5, 3, 2, 1], [1, 2, 3, 4], [4, 4, 1, 5], [2, 5, 3, 1]] + [[3, 1, 5, 2]] * 3)
SCORES, TARGETS = rows(6, 4), torch.arange(21).view(7, 3).square() % 3 + 1
TARGET_LENGTHS = torch.tensor([3, 2, 1, 3, 2, 3, 1])


def packed(r: Tensor) -> Any:
    out, last = GRU(pack_padded_sequence(r, [5, 3, 2, 1], batch_first=True))
    return pad_packed_sequence(out, batch_first=True)[0], last


def packed_by_its_lengths(r: Tensor, lengths: Tensor) -> Any:
    given = pack_padded_sequence(r, lengths, batch_first=True, enforce_sorted=False)
    out, last = GRU(given)
    return pad_packed_sequence(out, batch_first=True, total_length=5)[0], last


def packed_alone(r: Tensor, length: Tensor) -> Tensor:
    return GRU(pack_padded_sequence(r[None], length[None], batch_first=True))[1]


def packed_parts(r: Tensor) -> Tensor:
    return LSTM(pack_sequence([r, r[:3], r[:1]]))[1][0]


def _ctc(lengths: Any, targets: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda r, t: F.ctc_loss(r[:, None].log_softmax(-1), t[None], lengths, targets)


def ctc_by_its_length(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    scores = r[:, None].log_softmax(-1)
    return F.ctc_loss(scores, target[None], torch.tensor([6]), length[None])


def ctc_by_a_number(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    numbers: Any = [6], [int(length)]  # torch's annotation has tensors only
    return F.ctc_loss(r[:, None].log_softmax(-1), target[None], *numbers)


def ctc_unbatched(r: Tensor, target: Tensor) -> Tensor:
    return F.ctc_loss(r.log_softmax(-1), target, torch.tensor(6), torch.tensor(3))


def ctc_of_counted_labels(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    """As transformers has it: labels behind each other, and their number."""
    real = torch.arange(3)[None] < length
    scores = r[:, None].log_softmax(-1)
    return F.ctc_loss(scores, target[None].masked_select(real), torch.tensor([6]), real.sum(-1))


def ctc_of_two(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    """Two sequences in each sample, of lengths of their own, inputs too."""
    scores = torch.stack([r, r.flip(0)], 1).log_softmax(-1)
    lengths = torch.stack([length, 4 - length])
    return F.ctc_loss(scores, torch.stack([target, target]), 3 + lengths, lengths)


def ctc_by_the_inputs_length(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    scores = r[:, None].log_softmax(-1)
    return F.ctc_loss(scores, target[None], 3 + length[None], torch.tensor([2]))


def ctc_unbatched_by_its_length(r: Tensor, target: Tensor, length: Tensor) -> Tensor:
    labels = target.masked_select(torch.arange(3) < length)
    return F.ctc_loss(r.log_softmax(-1), labels, torch.tensor(6), length)


def indexed_under_no_grad(r: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        chosen = r[i, 1]
    return chosen * r[i]


def written_under_no_grad(r: Tensor, i: Tensor) -> Tensor:
    out = r.clone()
    with torch.no_grad():
        out[i] = 0
        out[i] += 1
    return out * 2


@torch.no_grad()
def indexed_in_a_function_without_grad(r: Tensor, i: Tensor) -> Any:
    return r[i].exp(), r[:, i % 3] * 1


PLACES = torch.tensor([0, 4, 2, 1, 3, 0, 2])
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "packed": (packed, (rows(4, 5, 3),)),
    "packed by its lengths": (packed_by_its_lengths, (rows(4, 5, 3), MANY)),
    "packed alone": (packed_alone, (rows(5, 3), LENGTHS)),
    "packed parts": (packed_parts, (rows(5, 3),)),
    "ctc, lists": (_ctc([6], [3]), (SCORES, TARGETS)),
    "ctc, tuples": (_ctc((6,), (3,)), (SCORES, TARGETS)),
    "ctc, tensors": (_ctc(torch.tensor([6]), torch.tensor([3])), (SCORES, TARGETS)),
    "ctc, unbatched": (ctc_unbatched, (SCORES, TARGETS)),
    "ctc by its length": (ctc_by_its_length, (SCORES, TARGETS, TARGET_LENGTHS)),
    "ctc of counted labels": (ctc_of_counted_labels, (SCORES, TARGETS, TARGET_LENGTHS)),
    "ctc of two": (ctc_of_two, (SCORES, TARGETS, TARGET_LENGTHS)),
    "ctc by the inputs' length": (ctc_by_the_inputs_length, (SCORES, TARGETS, TARGET_LENGTHS)),
    "ctc, unbatched, by its length": (
        ctc_unbatched_by_its_length,
        (SCORES, TARGETS, TARGET_LENGTHS),
    ),
    "ctc by a number": (ctc_by_a_number, (SCORES, TARGETS, TARGET_LENGTHS)),
    "indexed under no_grad": (indexed_under_no_grad, (rows(5, 3), PLACES)),
    "written under no_grad": (written_under_no_grad, (rows(5, 3), PLACES)),
    "indexed without grad": (indexed_in_a_function_without_grad, (rows(5, 3), PLACES)),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 1": {"chunk_size": 1},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
}


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name: str, way: str) -> None:
    function, columns = CASES[name]
    x = columns[0].clone().requires_grad_()
    found = [function(*row) for row in zip(x, *columns[1:], strict=True)]
    several = isinstance(found[0], tuple)
    want = [torch.stack(w) for w in zip(*found, strict=True)] if several else [torch.stack(found)]
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        out = mapped(x, *columns[1:])
        got = out if several else (out,)
        for mine, loops in zip(got, want, strict=True):
            assert mine.requires_grad == loops.requires_grad
            oracle.assert_same(mine.detach(), loops.detach(), name)
        if want[0].requires_grad:
            (mine,), (loops,) = [
                torch.autograd.grad([o.sin().sum() for o in outs], x, retain_graph=True)
                for outs in (got, want)
            ]
            torch.testing.assert_close(mine, loops, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "ctc" in name and "length" in name])
def test_lengths_that_differ_by_sample_need_no_loop(name: str) -> None:
    """Where the longest targets are as long in all samples; gradients inside too."""
    function, (x, targets, lengths) = CASES[name]
    lengths = torch.full_like(lengths, 2)

    def gradient(r: Tensor, *rest: Tensor) -> Tensor:
        r = r.clone().requires_grad_()
        return torch.autograd.grad(function(r, *rest), r)[0]

    for mapped in (function, gradient):
        want = torch.stack([mapped(*row) for row in zip(x, targets, lengths, strict=True)])
        for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}, {"trace": "once"}):
            call = shardmap.vmap(mapped, strict=True, **options)  # pyright: ignore
            for _ in range(4):
                oracle.assert_same(call(x, targets, lengths), want, name)


def test_groups_of_many_samples_are_batched() -> None:
    """Samples are grouped by their longest targets."""
    size = 400
    x, targets = torch.randn(size, 6, 5, dtype=torch.float64), torch.randint(1, 5, (size, 3))
    lengths = torch.arange(size) % 3 + 1
    for function in (ctc_by_its_length, ctc_of_counted_labels):
        want = torch.stack([function(*row) for row in zip(x, targets, lengths, strict=True)])
        mapped = shardmap.vmap(function, strict=True)
        for _ in range(4):
            oracle.assert_same(mapped(x, targets, lengths), want, function.__name__)
