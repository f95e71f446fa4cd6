"""One call of a function that is differentiated, and helpers that all derivatives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardmap._torch import pytree
from shardmap.transforms.base import Differentiated
from shardmap.transforms.modes import refuse_inference_mode
from shardmap.transforms.nested import Within
from shardmap.transforms.seeds import Seeding

Part = tuple[torch.Tensor, ...]


class OneSample:
    """One sample's call of the user's function, with the arguments to differentiate by."""

    def __init__(
        self,
        func: Callable[..., Any],
        by: Differentiated,
        kwargs: dict[str, Any],
        has_aux: bool,
        seeding: Seeding,
        call: str,
    ):
        self.func = func
        self.by = by
        self.kwargs = kwargs
        self.has_aux = has_aux
        self.seeding = seeding
        self.call = call
        refuse_inference_mode(call)

    def within(self) -> Within:
        """The derivatives where transforms of `torch.func` are active."""
        return Within(self.func, self.by, self.kwargs, self.has_aux, self.call)

    def by_argument(self, parts: list[Any]) -> Any:
        """Arrange one part per input as the arguments that are differentiated by."""
        return pytree.tree_unflatten(parts, self.by.structure)


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate parts along a dimension; a single part is returned itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
