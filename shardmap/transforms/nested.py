"""Derivatives by `torch.func` itself, where its transforms are active while the function is run.

A recording sets the transforms around it aside. Where the map runs the function itself, sample by
sample, tensors belong to their levels: plain autograd, which the other modules use, does not see
beyond the level that it is called in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import pytree
from shardmap.transforms.base import Differentiated, Results


class Within:
    """The derivatives of one sample's function, as nested transforms.

    No dimension is mapped in them (`chunk_size=1`): whatever the loop runs is served.

    Args:
        func: The function of one sample.
        by: The arguments that it is differentiated by.
        kwargs: Its keyword arguments.
        has_aux: True if it returns a pair of result and aux.
        call: The user's call, for errors.
    """

    def __init__(
        self,
        func: Callable[..., object],
        by: Differentiated,
        kwargs: dict[str, object],
        has_aux: bool,
        call: str,
    ):
        self._by = by
        self._has_aux = has_aux
        self._call = call

        def of_inputs(*inputs: object) -> object:
            out = func(*by.with_leaves(pytree.tree_leaves(inputs)), **kwargs)
            Results(out, has_aux, call)  # refuses what has no derivative
            return out

        self._function = of_inputs
        self._inputs: tuple[object, ...] = tuple(by.chosen)
        self._numbers: int | tuple[int, ...] = tuple(range(len(self._inputs))) if by.in_tuple else 0

    def jacobian(self) -> object:
        """The Jacobian, and aux."""
        return self._rows(self._function)(*self._inputs)

    def hessian(self) -> object:
        """The second derivatives."""
        return self._rows(self._rows(self._function))(*self._inputs)

    def product(
        self, cotangents: Callable[[list[torch.Tensor], pytree.TreeSpec], list[torch.Tensor]]
    ) -> tuple[object, object, object]:
        """The result, the product of cotangents with the Jacobian, and aux.

        Args:
            cotangents: Takes the result's tensors and structure, returns the cotangent of each.
        """
        value, pull, *aux = _pulled(self._function, self._inputs, self._has_aux)
        leaves, structure = pytree.tree_flatten(value)
        products = pull(pytree.tree_unflatten(cotangents(leaves, structure), structure))
        return value, products if self._by.in_tuple else products[0], aux[0] if aux else ()

    def second_product(
        self, vectors: Sequence[torch.Tensor], check: Callable[[Results], object]
    ) -> tuple[object, object]:
        """The one number that the function returns, and its Hessian's product with vectors."""

        def gradient(*inputs: Any) -> tuple[object, object]:
            value, pull = _pulled(self._function, inputs, False)
            check(Results(value, False, self._call))
            return pull(pytree.tree_map(torch.ones_like, value)), value

        _, pull, value = _pulled(gradient, self._inputs, True)
        structure = pytree.tree_flatten(self._inputs)[1]
        products = pull(pytree.tree_unflatten(list(vectors), structure))
        return value, products if self._by.in_tuple else products[0]

    def _rows(self, function: Callable[..., object]) -> Callable[..., object]:
        return torch.func.jacrev(
            function, argnums=self._numbers, has_aux=self._has_aux, chunk_size=1
        )


def _pulled(
    function: Callable[..., object], inputs: tuple[object, ...], has_aux: bool
) -> Sequence[Any]:
    return torch.func.vjp(function, *inputs, has_aux=has_aux)
