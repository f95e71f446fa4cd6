"""Writes: masked, indexed, scattered, in place, and into given tensors."""

from __future__ import annotations

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()

bias = weight(4, seed=4)


@case()
def masked_values(r):
    y = r.clone()
    y[y > 0] = y[y > 0].sin() * 3
    return y


@case()
def masked_in_place(r):
    y = r.clone()
    y[y > 0.5] *= 2
    return y


@case()
def masked_by_a_number(r):
    y = r * 1
    y[y < 0] = 0.1
    return y


@case(weights=[bias])
def masked_by_a_weight(r):
    y = r.clone()
    mask = r > 0
    y[mask] = bias[mask]
    return y


@case()
def an_argument_written_in_place(r):
    r.mul_(2)
    return r.sum()


@case()
def an_argument_written_on_one_way(r):
    if r[0] > 0:
        r += 1
    return r * r


@case()
def an_entry_at_its_argmax(r):
    y = r.clone()
    y[r.argmax()] = 0
    return y


@case()
def an_entry_at_a_python_number(r):
    y = r.clone()
    y[int(r.argmin())] += 2
    return y


@case()
def a_slice_written(r):
    y = torch.zeros(4)
    y[1:3] = r[:2]
    y[-1] = r.prod()
    return y


@case()
def scattered(r):
    return torch.zeros(4).scatter(0, r.argsort(), r)


@case()
def scatter_added(r):
    return torch.zeros(3).scatter_add(0, (r.abs()).long().clamp(max=2), r)


@case()
def scatter_reduced(r):
    index = (r > 0).long()
    return torch.zeros(2).scatter_reduce(0, index, r, "mean", include_self=False)


@case()
def index_added(r):
    return torch.ones(3).index_add(0, torch.tensor([0, 2, 2, 1]), r, alpha=2)


@case()
def index_put_accumulated(r):
    where = (r > 0).long()
    return torch.zeros(2).index_put((where,), r, accumulate=True)


@case()
def index_filled(r):
    return r.index_fill(0, r.argsort()[:1], 7.0)


@case()
def index_copied(r):
    return torch.zeros(4, 4).index_copy(0, torch.tensor([2]), r[None])


@case()
def mask_filled(r):
    return r.masked_fill(r < r.mean(), -1e4).softmax(0)


@case()
def mask_scattered(r):
    return torch.zeros(4).masked_scatter(r > 0, r.exp())


@case()
def a_chain_in_place(r):
    return (r * 1).add_(1).mul_(r).neg_().sin_()


@case(orders=0)
def out_given(r):
    y = torch.empty(4)
    torch.add(r, 1, out=y)
    torch.exp(y, out=y)
    return y


@case()
def a_view_written(r):
    y = r.clone()
    y.view(2, 2)[:, 0].mul_(3)
    return y


@case()
def a_diagonal_filled(r):
    m = torch.outer(r, r)
    m.diagonal().add_(r)
    m.fill_diagonal_(1.0)
    return m


@case()
def copied_and_swapped(r):
    y = r.clone()
    a = y[0].clone()
    y[0] = y[3]
    y[3].copy_(a * 2)
    return y


@case()
def filled_row_by_row(r):
    m = torch.empty(3, 4)
    for i in range(3):
        m[i] = r ** (i + 1)
    return m


@case()
def dynamic_programming(r):
    best = torch.zeros(5)
    for i in range(4):
        best[i + 1] = torch.maximum(best[i] + r[i], r[i])
    return best.clone()


@case()
def put_in_the_flat(r):
    return torch.zeros(2, 2).put(torch.tensor([3, 0]), r[:2])


@case()
def slice_scattered(r):
    return torch.slice_scatter(torch.zeros(6), r, start=1, end=5)


@case()
def select_and_diagonal_scattered(r):
    m = torch.zeros(4, 4).select_scatter(r, 0, 1)
    return m.diagonal_scatter(r.sin())


@case()
def renormalised_in_place(r):
    y = r.clone()
    y -= y.mean()
    y *= y.detach().norm()
    return y


@case()
def lerped_and_addcmuled(r):
    y = r.clone()
    y.lerp_(torch.ones(4), 0.3)
    y.addcmul_(r, r, value=0.5)
    y.addcdiv_(r, r.abs() + 1)
    return y


@case()
def new_and_set(r):
    y = r.new_zeros(4)
    y[::2] = r[1::2]
    return y


@case()
def triangle_from_a_vector(r):
    m = torch.zeros(3, 3)
    i, j = torch.tril_indices(2, 2)
    m[i, j] = r[:3]
    return m @ m.T


@case()
def a_running_cumulative(r):
    y = r.clone()
    return y.cumsum_(0).cumprod(0)


@case()
def sorted_then_written(r):
    y, order = r.sort()
    z = torch.empty_like(y)
    z[order] = y * torch.arange(4)
    return z
