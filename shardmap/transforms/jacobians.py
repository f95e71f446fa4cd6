"""Jacobians and Hessians of a function of one sample, for each sample of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, Unpack

from shardmap import errors
from shardmap._torch import not_compiled
from shardmap.call.comparison import Comparison
from shardmap.call.options import MapOptions
from shardmap.call.planned import Plan
from shardmap.planning.device import Budget
from shardmap.planning.memory import parse_bytes
from shardmap.transforms import guess
from shardmap.transforms.base import (
    Differentiated,
    Transformed,
    check_argnums,
    check_function,
    in_forward_mode,
    name_of,
    refuse_nested_forward_mode,
    within_derivatives,
)
from shardmap.transforms.first_order import FirstOrder
from shardmap.transforms.second_order import SecondOrder
from shardmap.transforms.seeds import Seeding

logger = logging.getLogger("shardmap")

Argnums = int | tuple[int, ...]
T = TypeVar("T")


@not_compiled
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

    Reverse mode takes a backward pass for each element of the output.

    `jacrev(func)(x)` is `torch.stack([torch.func.jacrev(func)(row) for row in x])`. Good where
    outputs are fewer than inputs. `func` may use all that autograd can differentiate backward.
    If outer autograd is recording and tensors that `func` captures require grad, so do the
    Jacobians: call it under `torch.no_grad()` to have values only.

    Args:
        func: Takes one sample and returns tensors in any pytree; a function, or a plain
            `torch.nn.Module`.
        argnums: The number of the positional argument by which to differentiate, or a tuple of
            them; each a pytree of real floating-point tensors.
        has_aux: True if `func` returns a pair `(result, aux)`; aux is returned unchanged.
        in_dims: As for `shardmap.vmap`: None shares an argument among all samples.
        seed_chunk_size: Most elements of one sample's output that are differentiated at a time:
            "auto" plans it by memory and cache, None takes all.
        **options: As for `shardmap.vmap`. `chunk_size` counts samples; "auto" plans it with the
        rows
            that are taken of each sample at a time.

    Returns:
        A function of the batch, which returns the Jacobians `[N, *out, *in]`, in the structure of
        `func`'s results, and in that of the arguments within; with aux, a pair. Its `plan(*batch)`
        returns the `Plan` of the call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: `argnums` does not fit, or anything else than real floating-point tensors
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


@not_compiled
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

    Forward mode takes a tangent for each element of the input.

    `jacfwd(func)(x)` is `torch.stack([torch.func.jacfwd(func)(row) for row in x])`. Good where
    inputs are fewer than outputs, and for long computations: nothing is kept for a way back.
    Outer gradients flow as for `jacrev`.

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


@not_compiled
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
    and bytes of one row, times the rows, against those of one column, times the columns. The mode
    that was taken is logged (logger `shardmap`, level INFO) and is in the returned function's
    `method`. Where autograd has no formula for one of the modes, the other is taken.

    The Jacobian does not depend on the mode that was chosen: `jacobian(func)(x)` is
    `torch.stack([torch.func.jacrev(func)(row) for row in x])`, in the dtypes of the inputs. Forward
    mode is taken only on paths of `func` where it is known to give the same at all finite numbers:
    of smooth operators (`sqrt` is none), without `torch.no_grad()`, an `autograd.Function`, a hook
    or a question for `requires_grad`. `method="forward"` gives `jacfwd` for any function.

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


@not_compiled
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


class ModeChosen(errors.ShardmapError):
    """The cheaper mode for samples of a new signature has been found, and the call is made again.

    What is recorded until then holds the trials of both modes, unlike other samples' recordings.

    Args:
        call: The user's call.
        tensors: The samples' shapes and dtypes.
        mode: The mode.
    """

    def __init__(self, call: str, tensors: Hashable, mode: str):
        super().__init__(f"{call}: {mode} mode is taken for samples of {tensors}")
        self.tensors = tensors
        self.mode = mode


class Jacobians(Transformed):
    """The derivatives of a function at each sample of a batch: call it, or `plan` the call.

    `jacrev`, `jacfwd`, `jacobian` and `hessian` return it.

    Args:
        transform: The public name.
        func: The user's function.
        argnums: Numbers of the differentiated arguments.
        has_aux: True if `func` returns a pair of result and aux.
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
        steady: dict[Hashable, str] = {}  # by tensors, where other arguments never look the same

        def sample(*args: Any, **kwargs: Any) -> Any:
            by = Differentiated(args, argnums, call)
            if method in ("hessian", "forward"):
                refuse_nested_forward_mode(call)
            if method == "hessian":
                return SecondOrder(func, by, kwargs, has_aux, seeding, call).hessian()
            one = FirstOrder(func, by, kwargs, has_aux, seeding, call)
            taken = method
            if method == "auto":
                # Its values must not follow from the mode, which costs decide.
                # Torch does not nest forward mode.
                if in_forward_mode() or within_derivatives():
                    return one.reverse()
                key = guess.signature(args, kwargs)
                tensors = guess.tensors_of(key)
                if key not in chosen and tensors not in steady:
                    chosen[key] = one.cheaper()
                    raise ModeChosen(call, tensors, chosen[key])
                taken = chosen.get(key) or steady[tensors]
            if taken == "reverse":
                return one.reverse()
            return one.as_reverse() if method == "auto" else one.forward()

        sample.__name__ = f"{transform}({name_of(func)})"
        super().__init__(func, sample, in_dims, options)
        self._method = method
        self._chosen = chosen
        self._steady = steady
        self._seeding = seeding

    @property
    def method(self) -> str | None:
        """The mode that is taken: "reverse", "forward", or "hessian" for Hessians.

        With "auto" it is the mode for the latest shapes; None before the first call.
        """
        return (
            next(reversed(self._chosen.values()), None) if self._method == "auto" else self._method
        )

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results of the batch."""
        while True:
            try:
                return self._chosen_first(lambda: Transformed.__call__(self, *args, **kwargs))
            except errors.OverBudget:
                if not self._fewer():
                    raise

    @not_compiled
    def plan(self, *args: object, **kwargs: object) -> Plan:
        """Plan the call with this batch without running it, as `shardmap.plan` does.

        Args:
            *args: The batch.
            **kwargs: Its keyword arguments.

        Raises:
            OptionError: The transform writes to a store.
            ShardmapError: As for `shardmap.plan`.
        """
        while True:
            planned = self._chosen_first(lambda: Transformed.plan(self, *args, **kwargs))
            if planned.fits or not self._fewer():
                return planned

    @not_compiled
    def compare(
        self, *args: object, samples: int | Sequence[int] = 8, **kwargs: object
    ) -> Comparison:
        """Compare the transform of some samples with the plain loop, as `shardmap.compare` does.

        Args:
            *args: The batch.
            samples: Number of random samples to compare, or their numbers.
            **kwargs: Its keyword arguments.

        Raises:
            OptionError: The function draws random numbers, or there is nothing to compare.
            ShardmapError: As `shardmap.compare`.
        """
        return self._chosen_first(
            lambda: Transformed.compare(self, *args, samples=samples, **kwargs)
        )

    def _chosen_first(self, run: Callable[[], T]) -> T:
        """Call `run` until the modes of all its samples are chosen, and return its result.

        That ends: it is tried at most twice for samples of the same shapes and dtypes.
        """
        seen: set[Hashable] = set()
        while True:
            try:
                return run()
            except ModeChosen as found:
                if found.tensors in seen:
                    self._steady[found.tensors] = found.mode
                seen.add(found.tensors)

    def _fewer(self) -> bool:
        """Take fewer rows or columns at a time from now on; return False if impossible."""
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
