"""The reduce family against the loop.

Dimensions, keepdim, dtypes, samples without dimensions, empty lists of dimensions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.rules.against_loop import check, real

DIMS: dict[str, tuple[Any, ...]] = {
    "sum": (None, 0, -1, (0, 2), [], (1, -1)),
    "nansum": (None, 0, (0, 2)),
    "mean": (None, 0, -2, (0, 2), []),
    "amax": ((), 0, -1, (0, 2)),
    "amin": ((), 0, (1, 2)),
    "var": (None, 0, (0, 2)),
    "std": (None, -1, (0, 2)),
    "logsumexp": (0, -1, (0, 2)),
    "norm": (None, 0, (0, 2)),
    "prod": (0, -1),
    "argmax": (None, 0, -1),
    "argmin": (None, 1),
    "median": (0, -1),
    "nanmedian": (1,),
    "mode": (0, -1),
    "max": (0, -1),
    "min": (1,),
    "all": (None, 0, (0, 2), []),
    "any": (None, -1, (0, 2), []),
}


def _reduce(name: str, d: Any, keepdim: bool) -> Any:
    def func(x: torch.Tensor) -> Any:
        if name in ("all", "any"):
            x = x > 0
        if d is None and name in ("sum", "mean", "nansum"):
            return getattr(x, name)()
        out = getattr(x, name)(dim=d, keepdim=keepdim)
        return out if isinstance(out, torch.Tensor) else tuple(out)

    return func


@pytest.mark.parametrize("name", DIMS)
def test_dimensions(name: str) -> None:
    """Positive, negative, several and no dimensions, kept or not."""
    for d in DIMS[name]:
        for keepdim in (False, True):
            check(
                _reduce(name, d, keepdim),
                real(2, 3, 2),
                sizes=(2,),
                gradient=d != [] and name not in ("mode", "median", "nanmedian"),
            )


WITHOUT = (
    "sum mean prod max min median nanmedian nansum argmax argmin norm var_ logsumexp_ cumsum_ "
    "softmax_ sort_ cummax_ topk_ all any"
)


@pytest.mark.parametrize("name", WITHOUT.split())
def test_without_dimensions(name: str) -> None:
    """Samples without dimensions, and reductions of a whole sample."""
    special: dict[str, Any] = {
        "var_": lambda x: torch.var(x, correction=0),
        "logsumexp_": lambda x: torch.logsumexp(x, 0) if not x.ndim else torch.logsumexp(x, (0, 1)),
        "cumsum_": lambda x: torch.cumsum(x, -1),
        "softmax_": lambda x: torch.softmax(x, -1) + torch.log_softmax(x, 0),
        "sort_": lambda x: tuple(torch.sort(x, -1, descending=True)),
        "cummax_": lambda x: tuple(torch.cummax(x, -1)),
        "topk_": lambda x: tuple(torch.topk(x, 1, -1)),
    }
    func = special.get(name, lambda x: getattr(torch, name)(x))
    for shape in [(), (2, 3)]:
        check(func, real(*shape), sizes=(3, 1), gradient=name not in ("all", "any"))


def _written(x: torch.Tensor) -> torch.Tensor:
    out = x * 1
    out.cumsum_(-1)
    out[0].cumprod_(0)
    return out


CASES: dict[str, Any] = {
    "sum_dtype": (lambda x: x.sum(dtype=torch.float32), real(2, 3)),
    "sum_integers": (lambda x: (x > 0).sum(0), real(2, 3)),
    "mean_dtype": (
        lambda x: (x * 10).to(torch.int64).float().mean(1, dtype=torch.float64),
        real(2, 3),
    ),
    "prod_integers": (lambda x: (x > 0).prod(), real(2, 3)),
    "var_correction": (lambda x: torch.var(x, dim=1, correction=2), real(2, 4)),
    "var_mean": (lambda x: torch.var_mean(x, dim=(0, 1), correction=0, keepdim=True), real(2, 4)),
    "std_mean": (lambda x: torch.std_mean(x, dim=1), real(2, 4)),
    "norm_1": (lambda x: torch.linalg.vector_norm(x, 1, dim=(0, 1)), real(2, 3)),
    "norm_inf": (
        lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True),
        real(2, 3),
    ),
    "norm_dtype": (
        lambda x: torch.linalg.vector_norm(x.float(), 2, dtype=torch.float64),
        real(2, 3),
    ),
    "norm_p": (lambda x: torch.norm(x, 3), real(2, 3)),
    "cumsum": (lambda x: x.cumsum(0), real(2, 3)),
    "cumsum_dtype": (lambda x: (x > 0).cumsum(-1, dtype=torch.float64) * x, real(2, 3)),
    "cumprod": (lambda x: x.cumprod(-1), real(2, 3)),
    "cummax": (lambda x: tuple(x.cummax(0)), real(2, 3)),
    "cummin": (lambda x: tuple(x.cummin(1)), real(2, 3)),
    "logcumsumexp": (lambda x: x.logcumsumexp(0), real(2, 3)),
    "in_place": (_written, real(2, 3)),
    "softmax": (lambda x: x.softmax(0), real(2, 3)),
    "log_softmax": (lambda x: x.log_softmax(-1), real(2, 3)),
    "sort": (lambda x: tuple(x.sort(0)), real(4, 3)),
    "sort_stable": (
        lambda x: tuple(x.round().sort(dim=0, stable=True, descending=True)),
        real(6, 3),
    ),
    "argsort": (lambda x: x.argsort(dim=-1, stable=True), real(2, 3)),
    "topk": (lambda x: tuple(x.topk(2, 0, largest=False)), real(4, 3)),
    "kthvalue": (lambda x: tuple(x.kthvalue(2, 0, keepdim=True)), real(4, 3)),
    "count_nonzero": (lambda x: (x > 0).count_nonzero(), real(2, 3)),
    "count_nonzero_dim": (lambda x: (x > 0).count_nonzero(1), real(2, 3)),
    "count_nonzero_dims": (lambda x: (x > 0).count_nonzero((0, 1)), real(2, 3)),
    "aminmax": (lambda x: tuple(x.aminmax()), real(2, 3)),
    "aminmax_dim": (lambda x: tuple(x.aminmax(dim=1, keepdim=True)), real(2, 3)),
    "trace": (lambda x: x.trace(), real(2, 3)),
    "argmax_keepdim": (lambda x: x.argmax(keepdim=True), real(2, 3)),
    "empty_sum": (lambda x: x.sum(0), real(0, 3)),
    "empty_prod": (lambda x: x.prod(), real(0, 3)),
    "empty_mean": (lambda x: x.mean(), real(0, 3)),
    "empty_softmax": (lambda x: x.softmax(-1), real(2, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    """Single operators have special cases."""
    func, maker = CASES[name]
    check(func, maker, sizes=(3, 1), tolerance=1e-6 if name == "norm_dtype" else 1e-9)


@pytest.mark.parametrize("log", [False, True])
def test_softmax_backward(log: bool) -> None:
    """The recorded backward, with only the cotangent, only the input, or both mapped.

    Samples without dimensions too.
    """
    softmax = torch.log_softmax if log else torch.softmax

    def inner(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(softmax(x, 0), x, g)[0]

    check(inner, real(3, 2), real(3, 2), gradient=False)
    check(inner, real(), real(), gradient=False)


def test_no_dimension_of_all_and_any() -> None:
    """An empty list of dimensions: each operator means what it means for one sample."""
    for op in (
        torch.ops.aten.all.dims,
        torch.ops.aten.any.dims,
        torch.ops.aten.sum.dim_IntList,
        torch.ops.aten.amax.default,
    ):
        check(lambda x, op=op: op(x, []), real(2, 3), gradient=False)
        check(lambda x, op=op: op(x, [], True), real(2, 3), gradient=False)
