"""`unique` and its kin by groups of samples, packed sequences and small rules, against the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import shardmap
from tests.rules.against_loop import Make, below, check, real
from tests.rules.everywhere import everywhere


def all_below(high: int, extra: int) -> Make:
    """A maker of each number below `high`, some of them more than once, in any order."""

    def make(g: torch.Generator) -> torch.Tensor:
        more = torch.randint(0, high, (extra,), generator=g)
        return torch.cat([torch.arange(high), more])[torch.randperm(high + extra, generator=g)]

    return make


DISTINCT: dict[str, Callable[..., Any]] = {
    "values": lambda x: torch.unique(torch.cat([x, torch.arange(6)])),
    "all results": lambda x: torch.unique(
        torch.cat([x, torch.arange(6)]), return_inverse=True, return_counts=True
    ),
    "counts": lambda x: torch.unique(torch.cat([x, torch.arange(6)]), return_counts=True),
    "matrices": lambda x: torch.unique(
        torch.cat([x, torch.arange(6)]).view(3, -1).double(), return_inverse=True
    ),
    "neighbours": lambda x: torch.unique_consecutive(
        torch.cat([x, torch.arange(6)]).sort().values, return_inverse=True, return_counts=True
    ),
}


@pytest.mark.parametrize("name", DISTINCT)
def test_distinct_elements(name: str) -> None:
    everywhere(DISTINCT[name], below(6, 9), gradient=False)


def test_samples_with_other_numbers_of_distinct_elements() -> None:
    rows = torch.tensor([[0, 1, 2, 2], [0, 5, 5, 5], [2, 1, 0, 0], [5, 0, 0, 1], [3, 3, 3, 3]])
    for func in (
        lambda x: torch.unique(x, return_counts=True)[1].square().sum(),
        lambda x: torch.unique_consecutive(x).square().sum(),
    ):
        mine = shardmap.vmap(func, strict=True)(rows)
        assert torch.equal(mine, torch.stack([func(r) for r in rows]))


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}, {"chunk_size": 2}])
@pytest.mark.parametrize("name", ["unique", "unique_consecutive"])
def test_they_have_no_derivative(name: str, options: dict) -> None:
    """Torch has none, and says so where it is asked for."""

    def function(x: torch.Tensor) -> torch.Tensor:
        found = getattr(torch, name)(x, return_inverse=True)
        return found[0].sum() + found[1] * x.sin()

    mapped = shardmap.vmap(function, **options)
    for rows in (torch.arange(3.0).repeat(4, 1), torch.tensor([[0.0, 1, 1], [0, 1, 2]])) * 2:
        x = rows.clone().requires_grad_()
        for out in (mapped(x), torch.stack([function(row) for row in x])):
            with pytest.raises(NotImplementedError, match="derivative for '_?unique"):
                out.sum().backward()
        for take in (mapped, lambda b: torch.stack([function(row) for row in b])):
            with pytest.raises(NotImplementedError, match="forward AD with _?unique"):
                torch.func.jvp(take, (rows,), (rows,))
        with torch.no_grad():
            torch.testing.assert_close(mapped(x), torch.stack([function(row) for row in x]))


def test_missing_numbers_and_zeros_are_told_apart_as_in_the_loop() -> None:
    rows = torch.tensor([[math.nan, 1.0, math.nan, 0.0], [-0.0, math.nan, 0.0, math.nan]])
    rows = torch.cat([rows, torch.tensor([[math.nan, 2.0, 2.0, math.nan]])])

    def distinct(x: torch.Tensor) -> torch.Tensor:
        return torch.unique(x, return_counts=True)[1].square().sum()

    mine = shardmap.vmap(distinct, strict=True)(rows)
    assert torch.equal(mine, torch.stack([distinct(r) for r in rows]))


# -- packed sequences


@pytest.mark.parametrize("first", [True, False])
def test_packed_sequences(first: bool) -> None:
    torch.manual_seed(0)
    cell = torch.nn.GRU(3, 4, batch_first=first).double()
    lengths = [5, 3] if first else [4, 2, 2]

    def outputs(x: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=first)
        return pad_packed_sequence(cell(packed)[0], batch_first=first)[0]

    everywhere(outputs, real(2, 5, 3) if first else real(5, 3, 3))


def test_packed_sequences_in_any_order() -> None:
    def packed(x: torch.Tensor) -> torch.Tensor:
        return pack_padded_sequence(x, [3, 5, 1], enforce_sorted=False, batch_first=True).data

    everywhere(packed, real(3, 5, 2))


# -- small ones


def test_products_of_bytes() -> None:
    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x.to(torch.int8), y.to(torch.int8))

    everywhere(product, below(127, 17, 8, low=-128), below(127, 8, 16, low=-128), gradient=False)


def test_products_of_three() -> None:
    everywhere(F.bilinear, real(3, 4), real(3, 5), real(2, 4, 5), real(2))
    everywhere(lambda x, y, w: F.bilinear(x, y, w), real(4), real(5), real(2, 4, 5))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", [1, 2])
def test_margins_with_weights_of_each_sample(reduction: str, p: int) -> None:
    def loss(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.multi_margin_loss(x, t, p, 0.5, w.abs().detach(), reduction=reduction)

    everywhere(loss, real(4, 3), below(3, 4), real(3))


def test_leaky_units_in_evaluation() -> None:
    everywhere(lambda x: F.rrelu(x, 0.1, 0.4, training=False), real(4, 3))


def test_statistics_returned_by_batch_norm() -> None:
    def normalised(x: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch.ops.aten._native_batch_norm_legit_functional(
            x, None, None, m.detach(), v.detach().abs(), True, 0.1, 1e-5
        )
        return out[0], out[3], out[4]

    everywhere(normalised, real(4, 3, 5), real(3), real(3))


# -- draws


@pytest.mark.parametrize("training", [True])
def test_leaky_units_draw_a_slope_for_each_negative_number(training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 400, dtype=torch.float64)

    def slopes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = F.rrelu(x, 0.1, 0.3, training=training)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    out, gradient = shardmap.vmap(slopes, randomness="different", strict=True)(x)
    slope = out / x
    torch.testing.assert_close(slope, gradient)
    assert torch.equal(slope[x > 0], torch.ones_like(slope[x > 0]))
    drawn = slope[x <= 0]
    assert 0.1 <= drawn.min() < 0.11
    assert 0.29 < drawn.max() <= 0.3
    assert abs(float(drawn.mean()) - 0.2) < 0.01
    assert not torch.equal(slope[0][:20], slope[1][:20])


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_categories_are_drawn_by_their_probabilities(replacement: bool, mapped: bool) -> None:
    torch.manual_seed(0)
    p = torch.tensor([[0.1, 0.2, 0.0, 0.7], [3.0, 0.0, 1.0, 0.0]])
    many = p.repeat(3000, 1) if mapped else torch.zeros(6000)

    def drawn(row: torch.Tensor) -> torch.Tensor:
        weights = row if mapped else p[0]
        return torch.multinomial(weights, 2, replacement=replacement)

    got = shardmap.vmap(drawn, randomness="different", strict=True)(many)
    assert got.dtype == torch.int64
    assert got.shape == (6000, 2)
    for which in range(2) if mapped else [0]:
        own = got[which::2] if mapped else got
        shares = torch.bincount(own[:, 0], minlength=4) / len(own)
        torch.testing.assert_close(shares, p[which] / p[which].sum(), atol=0.03, rtol=0)
        if replacement:
            shares = torch.bincount(own[:, 1], minlength=4) / len(own)
            torch.testing.assert_close(shares, p[which] / p[which].sum(), atol=0.03, rtol=0)
        else:
            assert bool((own[:, 0] != own[:, 1]).all())


def test_draws_of_categories_do_not_depend_on_the_chunk() -> None:
    p = torch.rand(7, 3, 5)
    found = []
    for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
        torch.manual_seed(3)
        found.append(
            shardmap.vmap(
                lambda x: torch.multinomial(x, 4, True), randomness="different", **options
            )(p)
        )
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.manual_seed(3)
    same = shardmap.vmap(lambda x: torch.multinomial(p[0], 4, True), randomness="same")(p)
    assert torch.equal(same, same[:1].expand(same.shape))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_what_is_no_probability_is_refused(bad: float) -> None:
    p = torch.ones(3, 4)
    p[2, 1] = bad
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        shardmap.vmap(lambda x: torch.multinomial(x, 2), randomness="different")(p)


def test_operators_that_call_others() -> None:
    everywhere(lambda x, y: torch._chunk_cat([x, y], 0, 2), real(4, 3), real(4, 3), gradient=False)
    everywhere(lambda x, w, b: torch.conv_tbc(x, w, b, 1), real(5, 2, 3), real(2, 3, 4), real(4))
    check(lambda x: F.rrelu(x, training=False), real(3))
