"""The Jacobian of one sample, row by row or column by column."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.transforms import guess
from shardmap.transforms.asked import Asked
from shardmap.transforms.base import Results
from shardmap.transforms.modes import Graph, has_no_formula, pushed_forward
from shardmap.transforms.one_sample import OneSample, joined
from shardmap.transforms.seeds import UnitVectors

_ASKS = "the function asks whether its tensors require grad, or registers a hook"

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

    def forward_as_reverse(self) -> object:
        """The Jacobian that `reverse` computes, column by column where that is the same."""
        with self._watched() as asked:
            found = self.forward(as_reverse=True)
        if asked.history:  # by a path that other samples have not taken
            logger.info("%s: takes reverse mode, for %s", self.call, _ASKS)
            return self.reverse()
        return found

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Asked]:
        """Note what the function asks for while this context is entered."""
        func, asked = self.func, Asked()

        def watched(*args: object, **kwargs: object) -> object:
            with asked:  # inside of all modes that record
                return func(*args, **kwargs)

        self.func = watched
        try:
            yield asked
        finally:
            self.func = func

    def forward(self, as_reverse: bool = False) -> Any:
        """The Jacobian, computed column by column.

        The function is run for each input. If it draws, it is run once, and the Jacobian is
        computed row by row: all columns are to be of the same draws.

        Args:
            as_reverse: True for the dtypes of reverse mode, those of the inputs; forward mode has
                those of the outputs.
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
                if as_reverse:
                    columns[-1] = [c.to(leaf.dtype) for c in columns[-1]]
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
            if as_reverse:
                pieces = [p.to(leaf.dtype) for p in pieces]
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
        """The mode that costs less by the recorded operations, if both give the same.

        If autograd has no formula for one mode, it is the other.
        """
        costs: dict[str, float] = {}
        refused: dict[str, Exception] = {}
        asks = False
        for mode, cost in (("forward", self._forward_cost), ("reverse", self._reverse_cost)):
            try:
                with self._watched() as asked:
                    costs[mode] = cost()
                asks |= asked.history
            except (NotImplementedError, RuntimeError) as error:
                ours = isinstance(error, errors.ShardmapError)
                if mode == "forward":  # its results require no grad, which may be an error too
                    fatal = ours and not isinstance(error, errors.RandomnessError)
                else:
                    fatal = ours or not has_no_formula(error)
                if fatal:
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
            why = "" if taken == "reverse" else _ASKS if asks else self._difference()
            if why:
                logger.info("%s: takes reverse mode after all, for %s", self.call, why)
                return "reverse"
        return taken

    def _difference(self) -> str:
        """Text on the derivatives in the two modes, if they differ; empty if they do not.

        They differ where the function defines them itself (`autograd.Function`, hooks), or stops
        gradients in a way that does not stop tangents (`torch.no_grad`). One product with a vector
        on each side of the Jacobian is computed in both modes.
        """
        if not all(leaf.numel() for leaf in self.by.leaves):
            return ""
        vectors = self._forward_vectors(0, [])
        if vectors.draws:  # each run has draws of its own
            return ""
        graph = Graph(self.func, self.by, self.kwargs, self.has_aux, self.call)
        outputs = graph.results.leaves
        rows, columns = [_unlike(y) for y in outputs], [_unlike(t) for t in self.by.leaves]

        def function(leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], object]:
            results = Results(
                self.func(*self.by.with_leaves(leaves), **self.kwargs), self.has_aux, self.call
            )
            return results.leaves, results.aux

        tangents = pushed_forward(function, self.by.leaves, columns)[1]
        gradients = graph.pulled_back(outputs, rows)
        forward = [(a * b).double() for a, b in zip(rows, tangents, strict=True)]
        reverse = [(a * b).double() for a, b in zip(columns, gradients, strict=True)]
        apart = sum(t.sum() for t in forward) - sum(t.sum() for t in reverse)
        size = sum(t.abs().sum() for t in (*forward, *reverse))
        eps = max(torch.finfo(t.dtype).eps for t in (*outputs, *self.by.leaves))
        try:
            same = bool(abs(apart) <= math.sqrt(eps) * size)
        except (errors.ShardmapError, RuntimeError):  # traced: there are no values
            return "the modes cannot be compared here"
        return "" if same else "the derivatives in forward mode are other ones"

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


def _unlike(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a shape whose elements are all different, without a draw."""
    number = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return (1.5 + torch.cos(number * number + number)).to(tensor.dtype).reshape(tensor.shape)
