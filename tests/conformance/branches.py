"""Branches on a sample's values."""

from __future__ import annotations

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()

scale = weight(4, seed=1)


@case()
def sign_of_a_sum(r):
    if r.sum() > 0:
        return r.sin()
    return r.cos() * 2


@case(weights=[scale])
def a_weight_on_one_way_only(r):
    return r * scale if r[0] > r[1] else r.exp()


@case()
def three_ways(r):
    if r[0] > 0.5:
        return r.tanh()
    elif r[1] > 0:
        return r.square()
    else:
        return r - r.mean()


@case()
def both_halves_of_and(r):
    if r[0] > 0 and r[1] > 0:
        return r * 3
    return r / 2


@case()
def either_of_or(r):
    return r.sigmoid() if r[0] > 1 or r.min() < -1 else r.relu()


@case()
def not_a_truth(r):
    if not (r > 0).any():
        return torch.zeros_like(r)
    return r.abs().sqrt()


@case()
def all_in_bounds(r):
    if torch.all(r.abs() < 1.5):
        return r
    return r.clamp(-1.5, 1.5)


@case()
def an_assert(r):
    assert torch.isfinite(r).all(), "not finite"
    return r.softmax(-1)


@case()
def a_check_for_nan(r):
    y = r.log()
    if torch.isnan(y).any():
        return r.square().log1p()
    return y


@case()
def clipped_by_its_norm(r):
    norm = r.norm()
    if norm > 1.5:
        r = r * (1.5 / norm)
    return r


@case()
def compared_with_max(r):
    largest = max(r[0], r[1])
    return r * largest


@case()
def a_chained_comparison(r):
    return r * 2 if -0.5 < r[0] < 0.5 else r.flip(0)


@case()
def huber_by_hand(r):
    e = r.abs().sum()
    if e < 2:
        return 0.5 * e**2
    return 2 * (e - 1)


@case()
def early_return_in_a_loop(r):
    for i in range(4):
        if r[i] > 0.7:
            return r * r[i]
    return -r


@case(weights=[scale])
def a_counter_of_python(r):
    n = 0
    for v in r:
        if v > 0:
            n += 1
    return r * scale + n


@case()
def a_list_that_grows(r):
    parts = []
    for v in r:
        if v > 0:
            parts.append(v.sin())
    if not parts:
        return r.sum()
    return torch.stack(parts).prod()


@case()
def equal_to_its_flip(r):
    a = r.round()
    return r + 1 if torch.equal(a[:2].sign(), a[2:].sign()) else r - 1


@case()
def close_to_zero(r):
    if torch.allclose(r[0], torch.zeros(()), atol=0.5):
        return r.sin()
    return r / r[0]


@case()
def a_dictionary_of_functions(r):
    table = {0: torch.sin, 1: torch.cos, 2: torch.tanh, 3: torch.exp}
    return table[int(r.argmax())](r)


@case()
def match_on_a_number(r):
    match int((r > 0).sum()):
        case many if many > 2:
            return r * 2
        case 0:
            return r
        case _:
            return r.cumsum(0)


@case()
def a_try_around_a_check(r):
    try:
        if r.sum() < 0:
            raise ValueError("negative")
        return r.sum().sqrt() * r
    except ValueError:
        return r * 0.1


@case(orders=0)
def a_bool_as_a_result(r):
    return torch.tensor(bool(r[0] > 0))


@case(3, dtype=torch.int64, orders=0)
def parity(r):
    if r.sum() % 2 == 0:
        return r // 2
    return 3 * r + 1


@case(5, dtype=torch.bool, orders=0)
def a_majority(r):
    return r.logical_not() if r.sum() > 2 else r
