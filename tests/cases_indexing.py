"""Cases of indices and shapes that depend on values.

Importing this module adds them to `tests.cases`.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.cases import Kit, Run, case


def _indices(k: Kit) -> tuple[torch.Tensor, torch.Tensor]:
    return k.x(dtype=torch.int64), k.x(dtype=torch.int64)


@case()
def picked_by_a_label(k: Kit) -> Run:
    x, w = k.x(4, 4, grad=True), k.w(4, 3)
    i, j = _indices(k)

    def function(a: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> Any:
        return (
            a[i],
            a[i, j],
            a[..., j],
            a[None, i, 1:],
            a[j - 4],
            a[[0, 2], i],
            a[i].log_softmax(0)[j],
            w[i] * 2,
        )

    return lambda vmap: vmap(function)(x, i, j)


@case()
def written_at_a_label(k: Kit) -> Run:
    x, w = k.x(4, grad=True), k.w(4)
    i, j = _indices(k)

    def function(a: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(4, 4, dtype=a.dtype)
        out[i] = a
        out[i, j] += w[j]
        out[:, j] *= 2
        out[i - 4] += 1
        return out

    return lambda vmap: vmap(function)(x, i, j)


@case()
def a_copy_taken_at_a_label(k: Kit) -> Run:
    x = k.x(4, 4, grad=True)
    i, _ = _indices(k)

    def function(a: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        b = a.clone()
        row = b[i].clone()
        row += 1
        b[0] = 3
        return row + b

    return lambda vmap: vmap(function)(x, i)


@case()
def as_many_in_each_sample(k: Kit) -> Run:
    x = k.x(4, grad=True)
    return lambda vmap: vmap(
        lambda a: (
            a[a > a.median()] * 2,
            torch.masked_select(a, a <= a.median()),
            (a == a.max()).nonzero(),
        )
    )(x)


@case()
def selected_by_a_mask_that_all_share(k: Kit) -> Run:
    x, w = k.x(4, grad=True), k.w(4, grad=False)
    return lambda vmap: vmap(lambda a: (a[w > 0], torch.masked_select(a, w > 0) ** 2))(x)


@case(gradient=False)
def resized_within_its_memory(k: Kit) -> Run:
    x = k.x(2, 3)
    return lambda vmap: vmap(lambda a: (a * 2).resize_(3, 2).resize_(4) + 1)(x)
