"""Run a recorded operator's kernel with the tensor keys that a dispatch mode switches off."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from shardmap._torch import (
    aten,
    dispatch_key,
    excluded_keys,
    force_keys,
    functorch,
    included_keys,
    is_zero_tensor,
)

LAZY_KEYS = (
    dispatch_key.ZeroTensor,
    dispatch_key.Conjugate,
    dispatch_key.Negative,
)
MAKES_LAZY = {
    id(op) for op in (aten._efficientzerotensor.default, aten._conj.default, aten._neg_view.default)
}
"""Addresses of the operators whose results are symbolic zeros, lazy conjugates or lazy negatives:
hashing an operator runs python code."""


def is_lazy(tensor: torch.Tensor) -> bool:
    """True if the memory of `tensor` does not hold its values.

    It is true of symbolic zeros of forward-mode AD (which have no memory), lazy conjugates and
    lazy negatives.
    """
    if functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return is_zero_tensor(tensor) or tensor.is_conj() or tensor.is_neg()


def lazy_tensors_resolved() -> contextlib.AbstractContextManager[Any]:
    """Let kernels see lazy tensors as they do outside a dispatch mode.

    Torch switches the keys that resolve lazy tensors off while a dispatch mode handles a call.
    An operator that these keys pass on unchanged, such as `mul.Scalar`, and whose kernel calls
    other operators then reads a symbolic zero's memory, which does not exist: a segmentation fault.
    A composite operator reads a conjugate as if it were none.
    """
    excluded = excluded_keys()
    for key in LAZY_KEYS:
        excluded = excluded.remove(key)
    included = included_keys()
    return force_keys(included, excluded)
