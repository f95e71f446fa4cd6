"""The Hessian of one sample, as blocks for each pair of inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.transforms.base import Results, within_derivatives
from shardmap.transforms.modes import (
    Graph,
    first_line,
    has_no_formula,
    leaf_like,
    pulled_back,
    pushed_forward,
)
from shardmap.transforms.one_sample import OneSample, Part, joined
from shardmap.transforms.seeds import UnitVectors

logger = logging.getLogger("shardmap")


class _Drawn(RuntimeError):
    """The function draws random numbers, and would be run more than once."""


class SecondOrder(OneSample):
    """The second derivatives of one sample, in the form that is recorded."""

    def hessian(self) -> Any:
        """The second derivatives, computed forward over reverse.

        That runs the function for each pair of an input and an output. If it draws, two backward
        passes are taken of one run instead, so that the draws are those of the function's map.
        """
        if within_derivatives():
            return self.within().hessian()
        graph = Graph(self.func, self.by, self.kwargs, False, self.call)
        try:
            blocks = self._all_blocks(graph, self._tangents_of_gradients(graph))
        except (NotImplementedError, RuntimeError) as error:
            drawn = isinstance(error, _Drawn)
            if not drawn and (isinstance(error, errors.ShardmapError) or not has_no_formula(error)):
                raise
            blocks = self._otherwise(graph, error)
        by_result = [self.by_argument([self.by_argument(row) for row in block]) for block in blocks]
        return pytree.tree_unflatten(by_result, graph.results.structure)

    def _otherwise(self, graph: Graph, error: Exception) -> list[list[list[torch.Tensor]]]:
        """The second derivatives where plain forward over reverse has failed.

        `torch.func.hessian` maps the backward pass, by which some operators without a forward
        formula are decomposed into others that have one: of ties it then makes its own choice.
        What `torch.func` does not support takes two backward passes.
        """
        if not isinstance(error, _Drawn):
            try:
                return self._all_blocks(graph, self._tangents_of_mapped_gradients(graph))
            except (NotImplementedError, RuntimeError) as other:
                # Torch words what it does not serve in many ways. The function has run before, so
                # an error of its own is raised by the backward passes as well.
                logger.info("%s: torch.func does not serve it: %s", self.call, first_line(other))
        logger.info(
            "%s: takes two backward passes, for in forward mode: %s", self.call, first_line(error)
        )
        return self._all_blocks(graph, self._gradients_of_gradients(graph), twice=True)

    def _all_blocks(
        self, graph: Graph, second: Callable[..., Part], twice: bool = False
    ) -> list[list[list[torch.Tensor]]]:
        return [self._blocks(y, k, second, twice) for k, y in enumerate(graph.results.leaves)]

    def _blocks(
        self, y: torch.Tensor, k: int, second: Callable[..., Part], twice: bool
    ) -> list[list[torch.Tensor]]:
        """Blocks `[*out, *in_i, *in_j]` of one output for each pair of inputs.

        Args:
            y: The output.
            k: The output's number.
            second: Takes k, the unit vector of the output, the number of an input and a unit vector
                of that; returns for each input the second derivatives along both.
            twice: True if that unit vector belongs to the first of the two derivatives, which is
                then the outer dimension.
        """
        count = len(self.by.leaves)
        found: list[list[Any]] = [[None] * count for _ in range(count)]
        for j, leaf in enumerate(self.by.leaves):
            if not y.numel() or not leaf.numel() or not y.requires_grad:
                for i, other in enumerate(self.by.leaves):
                    # Of the dtype of the gradient by the first of the two inputs.
                    found[i][j] = other.new_zeros((*y.shape, *other.shape, *leaf.shape))
                continue
            vectors = UnitVectors(
                lambda seed, j=j, leaf=leaf: self._all_rows(y, k, second, j, seed), leaf, self.call
            )
            if vectors.draws and not twice:
                raise _Drawn("each run would draw other random numbers")
            parts = vectors.run(self.seeding)
            for i, other in enumerate(self.by.leaves):
                pieces = [part[i] for part in parts]  # [vectors, rows, *in]
                if twice:
                    whole = joined([p.movedim(0, 1) for p in pieces], 1).reshape(
                        (*y.shape, *leaf.shape, *other.shape)
                    )
                    found[j][i] = whole
                else:
                    whole = joined([p.movedim(0, -1) for p in pieces], -1).reshape(
                        (*y.shape, *other.shape, *leaf.shape)
                    )
                    found[i][j] = whole
        return found

    def _all_rows(
        self, y: torch.Tensor, k: int, second: Callable[..., Part], j: int, seed: torch.Tensor
    ) -> Part:
        """The results of `second` for one unit vector of an input and all rows of the output.

        For each input: `[rows, *in]`.
        """
        if y.numel() == 1:
            return tuple([t.unsqueeze(0) for t in second(k, y.new_ones(y.shape), j, seed)])
        parts = UnitVectors(lambda row: second(k, row, j, seed), y, self.call).run(self.seeding)
        return tuple([joined([part[i] for part in parts], 0) for i in range(len(self.by.leaves))])

    def _tangents_of_gradients(self, graph: Graph) -> Callable[..., Part]:
        by, keep = self.by, graph.create_graph

        def second(k: int, row: torch.Tensor, j: int, seed: torch.Tensor) -> Part:
            def gradients(duals: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
                results = Results(
                    self.func(*by.with_leaves(duals), **self.kwargs), False, self.call
                )
                return list(pulled_back([results.leaves[k]], duals, [row], True)), ()

            with torch.enable_grad():
                primals = [
                    t.view_as(t) if keep and t.requires_grad else leaf_like(t) for t in by.leaves
                ]
                tangents = [seed if i == j else None for i in range(len(primals))]
                products = pushed_forward(gradients, primals, tangents, nested=False)[1]
            return tuple([t if keep else t.detach() for t in products])

        return second

    def _tangents_of_mapped_gradients(self, graph: Graph) -> Callable[..., Part]:
        by, keep = self.by, graph.create_graph

        def second(k: int, row: torch.Tensor, j: int, seed: torch.Tensor) -> Part:
            def output(*leaves: torch.Tensor) -> torch.Tensor:
                found = self.func(*by.with_leaves(list(leaves)), **self.kwargs)
                return Results(found, False, self.call).leaves[k]

            def gradients(leaf: torch.Tensor) -> Part:
                inputs = [leaf if i == j else t for i, t in enumerate(by.leaves)]
                back = torch.func.vjp(output, *inputs)[1]
                mapped = cast(Part, torch.func.vmap(back)(row.unsqueeze(0)))
                return tuple([t.squeeze(0) for t in mapped])

            products = torch.func.jvp(gradients, (by.leaves[j],), (seed,))[1]
            return tuple([t if keep else t.detach() for t in cast(Part, products)])

        return second

    def _gradients_of_gradients(self, graph: Graph) -> Callable[..., Part]:
        def second(k: int, row: torch.Tensor, j: int, seed: torch.Tensor) -> Part:
            with torch.enable_grad():
                gradients = pulled_back([graph.results.leaves[k]], graph.leaves, [row], True)
            return pulled_back([gradients[j]], graph.leaves, [seed], graph.create_graph)

        return second
