"""Selections: masks, indices and positions that a sample decides."""

from __future__ import annotations

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()

table = weight(7, 3, seed=3)


@case()
def sum_of_the_positive(r):
    return r[r > 0].sum()


@case()
def mean_of_the_masked(r):
    return r * r.masked_select(r.abs() > 0.3).square().sum()


@case()
def positions_of_the_positive(r):
    where = torch.nonzero(r > 0)
    return r * where.sum()


@case()
def positions_as_a_tuple(r):
    (where,) = torch.where(r > 0)
    return r[where].sum() + r


@case(5, dtype=torch.int64, orders=0)
def unique_values(r):
    return r.unique().sum()


@case(5, dtype=torch.int64, orders=0)
def counts_of_unique_values(r):
    values, counts = r.unique(return_counts=True)
    return values[counts.argmax()]


@case(5, dtype=torch.int64, orders=0)
def runs_of_equal_values(r):
    values, inverse = torch.unique_consecutive(r, return_inverse=True)
    return values.numel() * torch.ones_like(inverse) + inverse


@case()
def repeated_entries(r):
    return torch.repeat_interleave(r, (r.abs()).long()).sum() * r


@case(5, dtype=torch.int64, positive=True, orders=0)
def one_hot_with_classes(r):
    return torch.nn.functional.one_hot(r, 4)


@case(5, dtype=torch.int64, positive=True, orders=0)
def one_hot_by_its_largest(r):
    return torch.nn.functional.one_hot(r).sum()


@case()
def a_slice_by_its_start(r):
    k = int(r.argmax())
    return r[k:].sum() + r


@case()
def a_slice_by_two_ends(r):
    a, b = sorted((int(r.argmax()), int(r.argmin())))
    return r[a : b + 1].prod() * r


@case()
def one_entry_by_its_argmax(r):
    return r[r.argmax()] * r


@case()
def narrowed_by_a_value(r):
    return r.narrow(0, int(r.argmin()) // 2, 2).sin()


@case()
def split_where_it_is_largest(r):
    left, right = torch.tensor_split(r, [int(r.argmax())])
    return left.sum() * right.sum()


@case()
def topk_of_three(r):
    values, indices = r.topk(2)
    return values * indices


@case()
def sorted_by_another(r):
    return r[(r * r).argsort()]


@case(6)
def the_kth_value_and_median(r):
    return r.kthvalue(2).values + r.median() + r.quantile(0.3)


@case()
def searched(r):
    edges = torch.tensor([-1.0, 0.0, 1.0])
    return r * torch.searchsorted(edges, r)


@case()
def bucketized(r):
    return torch.bucketize(r, torch.tensor([-0.5, 0.5]), right=True) + r


@case()
def searched_in_its_own(r):
    return torch.searchsorted(r.detach().sort().values, r.detach().flip(0)) * r


@case(weights=[table])
def rows_of_a_table(r):
    return table[(r.abs() * 2).long().clamp(max=6)] * r[:, None]


@case(weights=[table])
def gathered_columns(r):
    return table.gather(1, (r > 0).long()[:, None]).squeeze(1) * r


@case(weights=[table])
def index_select_by_rank(r):
    return table.index_select(0, r.argsort()).sum(0) + r[:3]


@case()
def take_along(r):
    return torch.take_along_dim(torch.outer(r, r), r.argsort()[None], 1)


@case()
def take_from_the_flat(r):
    return torch.outer(r, r.cos()).take(torch.tensor([0, 5, 10]))


@case()
def where_of_three(r):
    return torch.where(r > 0, r.sqrt(), torch.zeros(())).nan_to_num()


@case(3, 3)
def a_mask_over_rows(r):
    return r[r.sum(1) > 0].sum(0)


@case(3, 3)
def upper_triangle_entries(r):
    i, j = torch.triu_indices(3, 3, 1)
    return r[i, j]


@case(6)
def the_last_unpadded(r):
    length = (r > 0).sum()
    return r[length - 1] * r


@case()
def cumulative_extremes(r):
    return r.cummax(0).values - r.cummin(0).values + r.logcumsumexp(0)


@case(5, dtype=torch.int64, positive=True, orders=0)
def a_histogram(r):
    return torch.bincount(r, minlength=4)


@case()
def masked_entries_as_weights(r):
    kept = r[r.abs() > 0.2]
    return (kept.softmax(0) * kept).sum()


@case(orders=0)
def membership(r):
    return torch.isin(r.round(), torch.tensor([0.0, 1.0]))
