"""The Jacobian of one sample, row by row or column by column."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.transforms import agreement, guess
from shardmap.transforms.asked import Asked
from shardmap.transforms.base import Results, within_derivatives
from shardmap.transforms.modes import Graph, first_line, has_no_formula, pushed_forward
from shardmap.transforms.one_sample import OneSample, joined
from shardmap.transforms.seeds import UnitVectors

_ASKS = "the function asks whether its tensors require grad, or registers a hook"
_DRAWS = "it draws random numbers"

logger = logging.getLogger("shardmap")

LEANING = 1.25
"""Factor by which reverse mode must look cheaper: it also keeps and reads again the values that
each forward operator saved."""


class FirstOrder(OneSample):
    """The first derivatives of one sample, in the form that is recorded."""

    def reverse(self) -> object:
        """The Jacobian, computed row by row."""
        if within_derivatives():
            return self.within().jacobian()
        return self._all_rows(self._graph())

    def _graph(self) -> Graph:
        return Graph(self.func, self.by, self.kwargs, self.has_aux, self.call)

    def _all_rows(self, graph: Graph) -> object:
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

    def as_reverse(self) -> object:
        """The Jacobian of `reverse`, column by column where that is known to be the same.

        It is known by the path that this sample takes, whichever path others have taken. In both
        modes the function runs first as in reverse mode, which costs nothing where nothing uses
        it, so that recordings part where the function does: at a question about values.
        """
        if within_derivatives():
            return self.within().jacobian()
        graph = self._graph()
        try:
            tangents, why = self._tangents_as_reverse()
        except (NotImplementedError, RuntimeError) as error:
            if not _refuses_forward(error):
                raise
            logger.info(
                "%s: takes reverse mode, for in forward mode: %s", self.call, first_line(error)
            )
            return self._all_rows(graph)
        if not why:
            return self._columns(tangents, as_reverse=True)
        logger.info("%s: takes reverse mode, for %s", self.call, why)
        try:
            return self._all_rows(graph)
        except (NotImplementedError, RuntimeError) as error:
            if why in (_ASKS, _DRAWS) or not _refuses_reverse(error):
                raise
            logger.info(
                "%s: takes forward mode, for in reverse mode: %s", self.call, first_line(error)
            )
            return self._columns(tangents, as_reverse=True)

    def _tangents_as_reverse(self) -> tuple[_Tangents, str]:
        """Record the tangents, and tell why they might not be those of reverse mode; or ""."""
        with self._watched() as asked:
            tangents = self._tangents(as_reverse=True)
        if asked.history:  # by a path that other samples have not taken
            return tangents, _ASKS
        if tangents.draws:  # each run has draws of its own
            return tangents, _DRAWS
        arguments = pytree.tree_leaves((self.by.with_leaves(self.by.leaves), self.kwargs))
        given = [t for t in arguments if isinstance(t, torch.Tensor)]
        for vectors, leaf in zip(tangents.vectors, self.by.leaves, strict=True):
            if vectors is not None:
                program = vectors.program
                held = vectors.holding([leaf]) or program.captured
                moving = (*program.inputs, *held)
                why = agreement.disagreement(program, moving, vectors.holding(given))
                if why:
                    return tangents, why
        return tangents, ""

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

    def forward(self) -> object:
        """The Jacobian, computed column by column.

        The function is run for each input. If it draws, it is run once, and the Jacobian is
        computed row by row: all columns are to be of the same draws.
        """
        tangents = self._tangents(as_reverse=False)
        if tangents.draws and len(self.by.leaves) > 1:
            logger.info("%s: takes reverse mode, for %s", self.call, _DRAWS)
            return self.reverse()
        return self._columns(tangents, as_reverse=False)

    def _tangents(self, as_reverse: bool) -> _Tangents:
        """Record the tangents for unit vectors of each input.

        Args:
            as_reverse: True to run the function in grad mode, as in reverse mode, so that the
                recordings show what it computes without.
        """
        seen: list[Results] = []
        vectors = [
            self._forward_vectors(i, seen, as_reverse) if leaf.numel() else None
            for i, leaf in enumerate(self.by.leaves)
        ]
        return _Tangents(vectors, seen)

    def _columns(self, tangents: _Tangents, as_reverse: bool) -> object:
        """Compute the Jacobian from recorded tangents.

        Args:
            tangents: The tangents for each input.
            as_reverse: True for the dtypes of reverse mode, those of the inputs; forward mode has
                those of the outputs.
        """
        seen = tangents.seen
        columns: list[list[torch.Tensor]] = []
        aux: list[torch.Tensor] = []
        for leaf, vectors in zip(self.by.leaves, tangents.vectors, strict=True):
            if vectors is None:
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

    def _forward_vectors(self, i: int, seen: list[Results], as_reverse: bool) -> UnitVectors:
        """The tangents of all outputs for unit vectors of one input, and aux.

        The function's results are appended to `seen`.
        """
        leaf = self.by.leaves[i]
        outside = torch.is_grad_enabled()

        def function(leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
            results = Results(
                self.func(*self.by.with_leaves(leaves), **self.kwargs), self.has_aux, self.call
            )
            seen.append(results)
            return results.leaves, results.aux

        def core(seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tangents = [seed if k == i else None for k in range(len(self.by.leaves))]
            with torch.set_grad_enabled(outside or as_reverse):
                _, products, aux = pushed_forward(function, self.by.leaves, tangents)
                found = (*products, *pytree.tree_leaves(aux))
                return found if outside else tuple([t.detach() for t in found])

        return UnitVectors(core, leaf, self.call)

    def cheaper(self) -> str:
        """The mode that costs less by the recorded operations, if both are known to give the same.

        If autograd has no formula for one mode, it is the other.
        """
        costs: dict[str, float] = {}
        refused: dict[str, Exception] = {}
        why = ""
        try:
            tangents, why = self._tangents_as_reverse()
            costs["forward"] = tangents.cost()
        except (NotImplementedError, RuntimeError) as error:
            if not _refuses_forward(error):
                raise
            refused["forward"] = error
        try:
            costs["reverse"] = self._reverse_cost()
        except (NotImplementedError, RuntimeError) as error:
            if not _refuses_reverse(error):
                raise
            refused["reverse"] = error
        if not costs:
            raise refused["reverse"]
        taken = min(costs, key=lambda mode: costs[mode] * (LEANING if mode == "reverse" else 1))
        for mode, error in refused.items():
            logger.info(
                "%s: takes %s mode, for in %s mode: %s", self.call, taken, mode, first_line(error)
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
            if why and taken == "forward":
                logger.info("%s: takes reverse mode after all, for %s", self.call, why)
                return "reverse"
        return taken

    def _reverse_cost(self) -> float:
        graph = self._graph()
        vectors = [
            self._reverse_vectors(graph, y)
            for y in graph.results.leaves
            if y.numel() and y.requires_grad
        ]
        return sum(map(_cost, vectors))

    def _with_aux(self, results: Results, by_result: list[Any], aux: Any) -> Any:
        jacobian = pytree.tree_unflatten(by_result, results.structure)
        return (jacobian, aux) if self.has_aux else jacobian


@dataclass(slots=True)
class _Tangents:
    """The recorded tangents of a function, for unit vectors of each input."""

    vectors: list[UnitVectors | None]
    """For each input; None if it has no elements."""
    seen: list[Results]
    """The function's results, the latest last."""

    @property
    def draws(self) -> bool:
        """True if the function draws random numbers."""
        return any(v is not None and v.draws for v in self.vectors)

    def cost(self) -> float:
        """Guess the seconds of all columns."""
        return sum(_cost(v) for v in self.vectors if v is not None)


def _cost(vectors: UnitVectors) -> float:
    return guess.seconds(vectors.program, vectors.count, vectors.like.device.type)


def _refuses_forward(error: Exception) -> bool:
    """True if a function may fail so in forward mode alone.

    Its results require no grad there, which may be an error too.
    """
    return not isinstance(error, errors.ShardmapError) or isinstance(error, errors.RandomnessError)


def _refuses_reverse(error: Exception) -> bool:
    return not isinstance(error, errors.ShardmapError) and has_no_formula(error)
