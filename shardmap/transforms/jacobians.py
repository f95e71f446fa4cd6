"""Jacobians and Hessians of a function of one sample, for each sample of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call.options import MapOptions
from shardmap.call.planned import Plan
from shardmap.planning.device import Budget
from shardmap.planning.memory import parse_bytes
from shardmap.transforms import guess
from shardmap.transforms.base import (
    Differentiated,
    Results,
    Transformed,
    check_argnums,
    check_function,
    name_of,
)
from shardmap.transforms.modes import (
    Graph,
    has_no_formula,
    pulled_back,
    pushed_forward,
    refuse_inference_mode,
)
from shardmap.transforms.seeds import Seeding, UnitVectors

logger = logging.getLogger("shardmap")

LEANING = 1.25
"""How much cheaper reverse mode must look: it also keeps, and reads again, what each operator of
the way there saved."""

Argnums = int | tuple[int, ...]
Part = tuple[torch.Tensor, ...]


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    in_dims: Any = 0,
    seed_chunk_size: int | str | None = "auto",
    **options: Unpack[MapOptions],
) -> Jacobians:
    """The Jacobian of `func` at each sample of a batch, in reverse mode.

    A backward pass for each element of the output.

    `jacrev(func)(x)` is `torch.stack([torch.func.jacrev(func)(row) for row in x])`. Good where
    outputs are fewer than inputs. `func` may use whatever autograd can differentiate backward.
    Where autograd records outside and what `func` captures requires grad, so do the Jacobians: call
    it under `torch.no_grad()` to have values only.

    Args:
        func: Takes one sample and returns tensors in any pytree; a function, or a plain
            `torch.nn.Module`.
        argnums: The number of the positional argument by which to differentiate, or a tuple of
            them; each a pytree of real floating-point tensors.
        has_aux: Whether `func` returns a pair `(result, aux)`, of which aux is returned as it is.
        in_dims: As for `shardmap.vmap`: None shares an argument among all samples.
        seed_chunk_size: Most elements of one sample's output that are differentiated at a time:
            "auto" plans it by memory and cache, None takes all.
        **options: As for `shardmap.vmap`. `chunk_size` counts samples; "auto" plans it with what is
            taken of each sample at a time.

    Returns:
        A function of the batch, which returns the Jacobians `[N, *out, *in]`, in the structure of
        `func`'s results, and in that of the arguments within; with aux, a pair. Its `plan(*batch)`
        returns the `Plan` of the call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: `argnums` does not fit, or something else than real floating-point tensors
            is differentiated.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> x = torch.tensor([[1., 2.], [3., 4.]])
        >>> shardmap.jacrev(lambda row: row**2)(x)
        tensor([[[2., 0.],
                 [0., 4.]],
        <BLANKLINE>
                [[6., 0.],
                 [0., 8.]]])

    After `torch.func.jacrev`: products of the unit vectors of the output with the Jacobian
    (Griewank and Walther, Evaluating Derivatives, 2008, chapter 3).
    """
    return Jacobians("jacrev", func, argnums, has_aux, "reverse", in_dims, seed_chunk_size, options)


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    in_dims: Any = 0,
    seed_chunk_size: int | str | None = "auto",
    **options: Unpack[MapOptions],
) -> Jacobians:
    """The Jacobian of `func` at each sample of a batch, in forward mode.

    A tangent for each element of the input.

    `jacfwd(func)(x)` is `torch.stack([torch.func.jacfwd(func)(row) for row in x])`. Good where
    inputs are fewer than outputs, and for long computations: nothing is kept for a way back.
    Gradients from outside flow as for `jacrev`.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        in_dims: As for `shardmap.vmap`.
        seed_chunk_size: Most elements of one sample's input by which to differentiate at a time:
            "auto" plans it by memory and cache, None takes all.
        **options: As for `shardmap.vmap`.

    Returns:
        As for `jacrev`.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: As for `jacrev`.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> x = torch.tensor([[1., 2.], [3., 4.]])
        >>> shardmap.jacfwd(lambda row: row.prod())(x)
        tensor([[2., 1.],
                [4., 3.]])

    After `torch.func.jacfwd`: products of the Jacobian with the unit vectors of the input (Griewank
    and Walther, 2008, chapter 3).
    """
    return Jacobians("jacfwd", func, argnums, has_aux, "forward", in_dims, seed_chunk_size, options)


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    method: str = "auto",
    in_dims: Any = 0,
    seed_chunk_size: int | str | None = "auto",
    **options: Unpack[MapOptions],
) -> Jacobians:
    """The Jacobian of `func` at each sample of a batch, in the mode that is cheaper.

    Both modes are recorded for the first sample of each new shape, and compared by the operations
    and bytes of one row, times the rows, against those of one column, times the columns. Which was
    taken is logged (logger `shardmap`, level INFO) and stands in the returned function's `method`.
    Where autograd has no formula for one of the modes, the other is taken.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        method: "auto", "reverse" (as `jacrev`) or "forward" (as `jacfwd`).
        in_dims: As for `shardmap.vmap`.
        seed_chunk_size: Most rows (in reverse) or columns (forward) of one sample's Jacobian at a
            time: "auto" plans it by memory and cache, None takes all.
        **options: As for `shardmap.vmap`.

    Returns:
        As for `jacrev`.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: As for `jacrev`.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> widening = torch.nn.Linear(2, 100).requires_grad_(False)
        >>> jacobians = shardmap.jacobian(widening)
        >>> jacobians(torch.randn(5, 2)).shape, jacobians.method
        (torch.Size([5, 100, 2]), 'forward')

    Which mode costs less by counting operations: Griewank and Walther, Evaluating Derivatives,
    2008, section 3.2.
    """
    if method not in ("auto", "reverse", "forward") or not isinstance(method, str):
        raise errors.OptionError(
            f"shardmap.jacobian({name_of(func)}): method={method!r}; choose 'auto', 'reverse' or "
            "'forward'"
        )
    return Jacobians("jacobian", func, argnums, has_aux, method, in_dims, seed_chunk_size, options)


def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    in_dims: Any = 0,
    seed_chunk_size: int | str | None = "auto",
    **options: Unpack[MapOptions],
) -> Jacobians:
    """The second derivatives of `func` at each sample of a batch.

    `hessian(func)(x)` is `torch.stack([torch.func.hessian(func)(row) for row in x])`: tangents of
    the gradient, forward over reverse. Where an operator has no forward formula, a second backward
    pass is taken instead, which is logged.

    Args:
        func: As for `jacrev`; a scalar result costs least.
        argnums: As for `jacrev`.
        in_dims: As for `shardmap.vmap`.
        seed_chunk_size: Most columns of one sample's Hessian at a time: "auto" plans it by memory
            and cache, None takes all.
        **options: As for `shardmap.vmap`.

    Returns:
        A function of the batch, which returns the Hessians `[N, *out, *in, *in]`, in the structures
        that `torch.func.hessian` gives: of `func`'s results, of the arguments within, and of the
        arguments within that. Its `plan(*batch)` returns the `Plan` of the call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: As for `jacrev`.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> shardmap.hessian(lambda row: row.prod())(torch.tensor([[1., 2., 3.], [4., 5., 6.]]))
        tensor([[[0., 3., 2.],
                 [3., 0., 1.],
                 [2., 1., 0.]],
        <BLANKLINE>
                [[0., 6., 5.],
                 [6., 0., 4.],
                 [5., 4., 0.]]])

    After `torch.func.hessian`; forward over reverse costs least: Griewank and Walther, 2008,
    section 3.3.
    """
    return Jacobians("hessian", func, argnums, False, "hessian", in_dims, seed_chunk_size, options)


class Jacobians(Transformed):
    """What `jacrev`, `jacfwd`, `jacobian` and `hessian` return.

    Call it with a batch, or `plan` the call.

    Args:
        transform: The public name.
        func: The user's function.
        argnums: By which arguments to differentiate.
        has_aux: Whether `func` returns a pair of result and aux.
        method: "reverse", "forward", "auto" or "hessian".
        in_dims: As for `shardmap.vmap`.
        seed_chunk_size: "auto", an int, or None.
        options: As for `shardmap.vmap`.
    """

    def __init__(
        self,
        transform: str,
        func: Any,
        argnums: Any,
        has_aux: Any,
        method: str,
        in_dims: Any,
        seed_chunk_size: Any,
        options: Mapping[str, Any],
    ):
        check_function(func, transform)
        call = f"shardmap.{transform}({name_of(func)})"
        check_argnums(argnums, call)
        if not isinstance(has_aux, bool):
            raise errors.OptionError(
                f"{call}: has_aux={has_aux!r} is a {type(has_aux).__name__}; pass True or False"
            )
        proper = (
            isinstance(seed_chunk_size, int)
            and not isinstance(seed_chunk_size, bool)
            and seed_chunk_size > 0
        )
        if not (
            proper
            or seed_chunk_size is None
            or (isinstance(seed_chunk_size, str) and seed_chunk_size == "auto")
        ):
            raise errors.OptionError(
                f"{call}: seed_chunk_size={seed_chunk_size!r}; pass a positive int, 'auto', or "
                "None for all rows or columns at once"
            )
        budget = options.get("memory_budget")
        allowed = Budget(
            parse_bytes(budget) if isinstance(budget, str) else budget,
            options.get("memory_fraction", 0.9),
        )
        seeding = Seeding(seed_chunk_size, allowed.on, call)
        chosen: dict[Any, str] = {}  # by signature, the last one last

        def sample(*args: Any, **kwargs: Any) -> Any:
            one = _Sample(func, Differentiated(args, argnums, call), kwargs, has_aux, seeding, call)
            if method == "hessian":
                return one.hessian()
            taken = method
            if method == "auto":
                key = guess.signature(args, kwargs)
                taken = chosen.get(key) or chosen.setdefault(key, one.cheaper())
            return one.reverse() if taken == "reverse" else one.forward()

        sample.__name__ = f"{transform}({name_of(func)})"
        super().__init__(func, sample, in_dims, options)
        self._method = method
        self._chosen = chosen
        self._seeding = seeding

    @property
    def method(self) -> str | None:
        """The mode that is taken: "reverse" or "forward", of Hessians "hessian".

        With "auto", for the shapes that came last.

        None before the first call.
        """
        return (
            next(reversed(self._chosen.values()), None) if self._method == "auto" else self._method
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results of the batch."""
        while True:
            try:
                return super().__call__(*args, **kwargs)
            except errors.OverBudget:
                if not self._fewer():
                    raise

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan the call with this batch without running it, as `shardmap.plan` does.

        Args:
            *args: The batch.
            **kwargs: Its keyword arguments.

        Raises:
            OptionError: The transform writes to a store.
            ShardmapError: As `shardmap.plan`.
        """
        while True:
            planned = super().plan(*args, **kwargs)
            if planned.fits or not self._fewer():
                return planned

    def _fewer(self) -> bool:
        """Take fewer rows or columns at a time from now on; says whether that can be."""
        seeding = self._seeding
        if seeding.asked != "auto" or seeding.largest <= 1:
            return False
        seeding.most, seeding.largest = max(1, seeding.largest // 4), 0
        logger.info(
            "%s: the plan does not fit, so that at most %d rows or columns are taken at a time",
            seeding.call,
            seeding.most,
        )
        return True


class _Sample:
    """The derivatives of one sample, as they are recorded."""

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

    # -- reverse
    # -------------------------------------------------------------------------------------------------------

    def reverse(self) -> Any:
        """The Jacobian, row by row."""
        graph = Graph(self.func, self.by, self.kwargs, self.has_aux, self.call)
        jacobians = [self._rows(graph, y) for y in graph.results.leaves]
        return self._with_aux(
            graph.results, [self._by_argument(j) for j in jacobians], graph.cut(graph.results.aux)
        )

    def _rows(self, graph: Graph, y: torch.Tensor) -> list[torch.Tensor]:
        """The Jacobians `[*out, *in]` of one output."""
        if not y.numel() or not y.requires_grad:
            return [y.new_zeros((*y.shape, *t.shape), dtype=t.dtype) for t in self.by.leaves]
        parts = self._reverse_vectors(graph, y).run(self.seeding)
        joined = [_joined([part[i] for part in parts], 0) for i in range(len(self.by.leaves))]
        return [
            j.reshape((*y.shape, *t.shape)) for j, t in zip(joined, self.by.leaves, strict=True)
        ]

    def _reverse_vectors(self, graph: Graph, y: torch.Tensor) -> UnitVectors:
        return UnitVectors(lambda seed: graph.pulled_back([y], [seed]), y, self.call)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self) -> Any:
        """The Jacobian, column by column."""
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
            parts = self._forward_vectors(i, seen).run(self.seeding)
            count = len(seen[-1].leaves)
            joined = [_joined([part[k].movedim(0, -1) for part in parts], -1) for k in range(count)]
            columns.append([j.reshape((*j.shape[:-1], *leaf.shape)) for j in joined])
            aux = [t[0] for t in parts[0][count:]]
        results = seen[-1]
        aux_structure = pytree.tree_flatten(results.aux)[1]
        by_result = [self._by_argument([c[k] for c in columns]) for k in range(len(results.leaves))]
        return self._with_aux(results, by_result, pytree.tree_unflatten(aux, aux_structure))

    def _forward_vectors(self, i: int, seen: list[Results]) -> UnitVectors:
        """The tangents of all outputs for unit vectors of one input, and aux.

        What the function returned goes to `seen`.
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

    # -- which of the two ----------------------------------------------------------------------------------------------

    def cheaper(self) -> str:
        """The mode that costs less by the recorded operations.

        The other one where that has no formula.
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
                "%s: takes %s mode: a sample's rows would cost about %.3g s in reverse mode, its columns about %.3g s in forward mode",
                self.call, taken, costs["reverse"], costs["forward"],
            )  # fmt: skip
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

    # -- second derivatives --------------------------------------------------------------------------------------------

    def hessian(self) -> Any:
        """Second derivatives: forward over reverse.

        Twice reverse where there is no forward formula.
        """
        graph = Graph(self.func, self.by, self.kwargs, False, self.call)
        try:
            blocks = [
                self._blocks(y, k, self._tangents_of_gradients(graph))
                for k, y in enumerate(graph.results.leaves)
            ]
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, errors.ShardmapError) or not has_no_formula(error):
                raise
            logger.info(
                "%s: takes two backward passes, for in forward mode: %s",
                self.call,
                str(error).partition("\n")[0],
            )
            blocks = [
                self._blocks(y, k, self._gradients_of_gradients(graph), twice=True)
                for k, y in enumerate(graph.results.leaves)
            ]
        by_result = [
            self._by_argument([self._by_argument(row) for row in block]) for block in blocks
        ]
        return pytree.tree_unflatten(by_result, graph.results.structure)

    def _blocks(
        self, y: torch.Tensor, k: int, second: Callable[..., Part], twice: bool = False
    ) -> list[list[torch.Tensor]]:
        """`[*out, *in_i, *in_j]` of one output for each pair of inputs.

        Args:
            y: The output.
            k: Its number.
            second: Takes k, the unit vector of the output, the number of an input and a unit vector
                of that; returns for each input the second derivatives along both.
            twice: Whether that unit vector belongs to the first of the two derivatives, which is
                then the outer dimension.
        """
        count = len(self.by.leaves)
        found: list[list[Any]] = [[None] * count for _ in range(count)]
        for j, leaf in enumerate(self.by.leaves):
            if not y.numel() or not leaf.numel() or not y.requires_grad:
                for i, other in enumerate(self.by.leaves):
                    found[i][j] = y.new_zeros((*y.shape, *other.shape, *leaf.shape))
                continue
            parts = UnitVectors(
                lambda seed, j=j, leaf=leaf: self._all_rows(y, k, second, j, seed), leaf, self.call
            ).run(self.seeding)
            for i, other in enumerate(self.by.leaves):
                pieces = [part[i] for part in parts]  # [vectors, rows, *in]
                if twice:
                    whole = _joined([p.movedim(0, 1) for p in pieces], 1).reshape(
                        (*y.shape, *leaf.shape, *other.shape)
                    )
                    found[j][i] = whole
                else:
                    whole = _joined([p.movedim(0, -1) for p in pieces], -1).reshape(
                        (*y.shape, *other.shape, *leaf.shape)
                    )
                    found[i][j] = whole
        return found

    def _all_rows(
        self, y: torch.Tensor, k: int, second: Callable[..., Part], j: int, seed: torch.Tensor
    ) -> Part:
        """For each input `[rows, *in]`.

        What `second` gives for one unit vector of an input and all of the output.
        """
        if y.numel() == 1:
            return tuple([t.unsqueeze(0) for t in second(k, y.new_ones(y.shape), j, seed)])
        parts = UnitVectors(lambda row: second(k, row, j, seed), y, self.call).run(self.seeding)
        return tuple([_joined([part[i] for part in parts], 0) for i in range(len(self.by.leaves))])

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
                    t.view_as(t) if keep and t.requires_grad else t.detach().requires_grad_()
                    for t in by.leaves
                ]
                tangents = [seed if i == j else None for i in range(len(primals))]
                products = pushed_forward(gradients, primals, tangents, nested=False)[1]
            return tuple([t if keep else t.detach() for t in products])

        return second

    def _gradients_of_gradients(self, graph: Graph) -> Callable[..., Part]:
        def second(k: int, row: torch.Tensor, j: int, seed: torch.Tensor) -> Part:
            with torch.enable_grad():
                gradients = pulled_back([graph.results.leaves[k]], graph.leaves, [row], True)
            return pulled_back([gradients[j]], graph.leaves, [seed], graph.create_graph)

        return second

    # -- structures ----------------------------------------------------------------------------------------------------

    def _by_argument(self, parts: list[Any]) -> Any:
        """What belongs to each input, in the structure of the arguments that are differentiated by."""
        return pytree.tree_unflatten(parts, self.by.structure)

    def _with_aux(self, results: Results, by_result: list[Any], aux: Any) -> Any:
        jacobian = pytree.tree_unflatten(by_result, results.structure)
        return (jacobian, aux) if self.has_aux else jacobian


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
