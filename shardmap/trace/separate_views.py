"""Split a tensor into views that autograd treats one by one.

Autograd forbids in-place writes to the views that `split` or `unbind` returns, and to their base,
as soon as gradients are recorded. Under an outer `torch.func.jvp` the loop records none, but a
recording does: its samples require grad. There each view is made by a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor

_DIM_AT: dict[object, int] = {
    torch.unbind: 1, Tensor.unbind: 1, Tensor.__iter__: 1,
    torch.split: 2, Tensor.split: 2,
    torch.split_with_sizes: 2, Tensor.split_with_sizes: 2,
    torch.chunk: 2, Tensor.chunk: 2,
    torch.tensor_split: 2, Tensor.tensor_split: 2,
    torch.hsplit: 2, Tensor.hsplit: 2,
    torch.vsplit: 2, Tensor.vsplit: 2,
    torch.dsplit: 2, Tensor.dsplit: 2,
}  # fmt: skip
"""Functions that return several views of their first argument, and the position of `dim`."""
_FIXED_DIM = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


def returns_several_views(func: object) -> bool:
    """True if a function of torch's interface returns several views of one tensor."""
    return func in _DIM_AT


def separated(
    func: Callable[..., object], views: Sequence[torch.Tensor], args: tuple, kwargs: dict
) -> list[torch.Tensor]:
    """The views that a call has returned, each made again by `select` or `narrow`.

    Args:
        func: The called function, which returns several views.
        views: The views that it returned.
        args: Its arguments.
        kwargs: Its named arguments.
    """
    base: torch.Tensor = args[0] if args else kwargs["self" if "self" in kwargs else "input"]
    at = _DIM_AT[func]
    dim = args[at] if len(args) > at else kwargs.get("dim", _FIXED_DIM.get(func.__name__, 0))
    dim = min(dim, base.ndim - 1) % base.ndim  # hsplit of one dimension splits that
    if at == 1:
        return [base.select(dim, i) for i in range(len(views))]
    step = base.stride(dim)
    made = []
    for view in views:
        offset = view.storage_offset() - base.storage_offset()
        made.append(base.narrow(dim, offset // step if view.numel() else 0, view.shape[dim]))
    return made
