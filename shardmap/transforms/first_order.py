"""The Jacobian of one sample, row by row or column by column."""

from __future__ import annotations

import logging
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.transforms import guess
from shardmap.transforms.base import Results
from shardmap.transforms.modes import Graph, has_no_formula, pushed_forward
from shardmap.transforms.one_sample import OneSample, joined
from shardmap.transforms.seeds import UnitVectors

logger = logging.getLogger("shardmap")

LEANING = 1.25
"""Factor by which reverse mode must look cheaper: it also keeps and reads again the values that
each forward operator saved."""


class FirstOrder(OneSample):
    """The first derivatives of one sample, in the form that is recorded."""

    def reverse(self) -> Any:
        """The Jacobian, computed row by row."""
        graph = Graph(self.func, self.by, self.kwargs, self.has_aux, self.call)
        jacobians = [self._rows(graph, y) for y in graph.results.leaves]
        return self._with_aux(
            graph.results, [self.by_argument(j) for j in jacobians], graph.cut(graph.results.aux)
        )

    def _rows(self, graph: Graph, y: torch.Tensor) -> list[torch.Tensor]:
        """The Jacobians `[*out, *in]` of one output."""
        if not y.numel() or not y.requires_grad:
            return [y.new_zeros((*y.shape, *t.shape), dtype=t.dtype) for t in self.by.leaves]
        parts = self._reverse_vectors(graph, y).run(self.seeding)
        pieces = [joined([part[i] for part in parts], 0) for i in range(len(self.by.leaves))]
        return [
            j.reshape((*y.shape, *t.shape)) for j, t in zip(pieces, self.by.leaves, strict=True)
        ]

    def _reverse_vectors(self, graph: Graph, y: torch.Tensor) -> UnitVectors:
        return UnitVectors(lambda seed: graph.pulled_back([y], [seed]), y, self.call)

    def forward(self) -> Any:
        """The Jacobian, computed column by column.

        The function is run for each input. If it draws, it is run once, and the Jacobian is
        computed row by row: all columns are to be of the same draws.
        """
        seen: list[Results] = []
        columns: list[list[torch.Tensor]] = []
        aux: list[torch.Tensor] = []
        for i, leaf in enumerate(self.by.leaves):
            if not leaf.numel():
                results = Results(
                    self.func(*self.by.with_leaves(self.by.leaves), **self.kwargs),
                    self.has_aux,
                    self.call,
                )
                columns.append([y.new_zeros((*y.shape, *leaf.shape)) for y in results.leaves])
                seen.append(results)
                aux = pytree.tree_leaves(results.aux)
                continue
            vectors = self._forward_vectors(i, seen)
            if vectors.draws and len(self.by.leaves) > 1:
                logger.info("%s: takes reverse mode, for it draws random numbers", self.call)
                return self.reverse()
            parts = vectors.run(self.seeding)
            count = len(seen[-1].leaves)
            pieces = [joined([part[k].movedim(0, -1) for part in parts], -1) for k in range(count)]
            columns.append([j.reshape((*j.shape[:-1], *leaf.shape)) for j in pieces])
            aux = [t[0] for t in parts[0][count:]]
        results = seen[-1]
        aux_structure = pytree.tree_flatten(results.aux)[1]
        by_result = [self.by_argument([c[k] for c in columns]) for k in range(len(results.leaves))]
        return self._with_aux(results, by_result, pytree.tree_unflatten(aux, aux_structure))

    def _forward_vectors(self, i: int, seen: list[Results]) -> UnitVectors:
        """The tangents of all outputs for unit vectors of one input, and aux.

        The function's results are appended to `seen`.
        """
        leaf = self.by.leaves[i]

        def function(leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
            results = Results(
                self.func(*self.by.with_leaves(leaves), **self.kwargs), self.has_aux, self.call
            )
            seen.append(results)
            return results.leaves, results.aux

        def core(seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tangents = [seed if k == i else None for k in range(len(self.by.leaves))]
            _, products, aux = pushed_forward(function, self.by.leaves, tangents)
            return (*products, *pytree.tree_leaves(aux))

        return UnitVectors(core, leaf, self.call)

    def cheaper(self) -> str:
        """The mode that costs less by the recorded operations.

        If autograd has no formula for one mode, it is the other.
        """
        costs: dict[str, float] = {}
        refused: dict[str, Exception] = {}
        for mode, cost in (("forward", self._forward_cost), ("reverse", self._reverse_cost)):
            try:
                costs[mode] = cost()
            except (NotImplementedError, RuntimeError) as error:
                random = mode == "forward" and isinstance(error, errors.RandomnessError)
                if not random and (
                    isinstance(error, errors.ShardmapError) or not has_no_formula(error)
                ):
                    raise
                refused[mode] = error
        if not costs:
            raise refused["reverse"]
        taken = min(costs, key=lambda mode: costs[mode] * (LEANING if mode == "reverse" else 1))
        for mode, error in refused.items():
            logger.info(
                "%s: takes %s mode, for in %s mode: %s",
                self.call,
                taken,
                mode,
                str(error).partition("\n")[0],
            )
        if not refused:
            logger.info(
                "%s: takes %s mode: a sample's rows would cost about %.3g s in reverse mode, "
                "its columns about %.3g s in forward mode",
                self.call,
                taken,
                costs["reverse"],
                costs["forward"],
            )
        return taken

    def _forward_cost(self) -> float:
        vectors = [
            self._forward_vectors(i, []) for i, leaf in enumerate(self.by.leaves) if leaf.numel()
        ]
        return sum(guess.seconds(v.program, v.count, v.like.device.type) for v in vectors)

    def _reverse_cost(self) -> float:
        graph = Graph(self.func, self.by, self.kwargs, self.has_aux, self.call)
        vectors = [
            self._reverse_vectors(graph, y)
            for y in graph.results.leaves
            if y.numel() and y.requires_grad
        ]
        return sum(guess.seconds(v.program, v.count, v.like.device.type) for v in vectors)

    def _with_aux(self, results: Results, by_result: list[Any], aux: Any) -> Any:
        jacobian = pytree.tree_unflatten(by_result, results.structure)
        return (jacobian, aux) if self.has_aux else jacobian
