"""Refuse a chunk that is computed again after a tensor that it reads was written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from shardmap import errors
from shardmap._torch import version_of


def refusing_writes(call: str, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Make a function that refuses to go on once one of the tensors has been written in place.

    Args:
        call: The user's call, for errors.
        tensors: The captured tensors that a chunk reads.
    """
    kept = [(t, version_of(t)) for t in tensors if not t.is_inference()]

    def refuse() -> None:
        for tensor, version in kept:
            if version_of(tensor) != version:
                raise errors.CapturedWriteError(
                    f"{call}: remat=True computes chunks again in backward, and a captured tensor "
                    f"of shape {tuple(tensor.shape)} has been written in place since; take the "
                    "gradients before, or pass remat=False"
                )

    return refuse
