"""Parts that all transforms share: the call that they return, and the arguments they read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from shardmap import api, errors
from shardmap._torch import dispatch_modes, forward_level, functorch, not_compiled, pytree
from shardmap.call.comparison import Comparison
from shardmap.call.planned import Plan
from shardmap.trace.recorder import Recorder

_OF_RUNS = ("out", "resume")
"""Options of `shardmap.vmap` that `shardmap.plan` does not take: a plan runs into memory."""


_DERIVATIVES = (functorch.TransformType.Grad, functorch.TransformType.Jvp)


def within_derivatives() -> bool:
    """True if derivatives of `torch.func`, or forward mode, are active where the function is run.

    While a function is recorded, the transforms around it are set aside.
    """
    if functorch.peek_interpreter_stack() is not None:
        levels = functorch.get_interpreter_stack() or []
        if any(level.key() in _DERIVATIVES for level in levels):
            return True
    return in_forward_mode() and not any(isinstance(m, Recorder) for m in dispatch_modes())


def in_forward_mode() -> bool:
    """True inside of `torch.autograd.forward_ad.dual_level`, of which torch has one."""
    return forward_level(forward_ad) >= 0


def refuse_nested_forward_mode(call: str) -> None:
    """Refuse forward mode within `torch.autograd.forward_ad.dual_level()`.

    Raises:
        TransformError: The call is made there.
    """
    if in_forward_mode():
        raise errors.TransformError(
            f"{call}: the call takes tangents inside torch.autograd.forward_ad, of which torch has "
            "one level only; use reverse mode (shardmap.jacrev(func), for second derivatives "
            "shardmap.jacrev(torch.func.jacrev(func)))"
        )


class Transformed:
    """A transformed function of the batch: call it, `plan` the call, or `compare` it with the loop.

    Args:
        func: The user's function, for its name and docstring.
        sample: The mapped function: the transform of one sample.
        in_dims: As for `shardmap.vmap`.
        options: As for `shardmap.vmap`.
        within: The function to map inside of derivatives of `torch.func`, and in forward mode, if
            it is another.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        sample: Callable[..., Any],
        in_dims: Any,
        options: Mapping[str, Any],
        within: Callable[..., object] | None = None,
    ):
        self._sample = sample
        self._in_dims = in_dims
        self._options = dict(options)
        self._mapped = api.vmap(sample, in_dims, **self._options)
        self._within = within and api.vmap(within, in_dims, **self._options)
        functools.update_wrapper(self, func, updated=())

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results of the batch."""
        if self._within is not None and (in_forward_mode() or within_derivatives()):
            return self._within(*args, **kwargs)
        return self._mapped(*args, **kwargs)

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
        if self._options.get("out") is not None:
            raise errors.OptionError(
                f"{self!r}.plan: out={self._options['out']!r}: a plan runs into memory; leave out= "
                "away"
            )
        return api.plan(self._sample, self._in_dims, **self._without_runs())(*args, **kwargs)

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
        options = {k: v for k, v in self._without_runs().items() if k != "progress"}
        compared = api.compare(self._sample, self._in_dims, **options)
        return compared(*args, samples=samples, **kwargs)

    def _without_runs(self) -> dict[str, Any]:
        return {name: value for name, value in self._options.items() if name not in _OF_RUNS}

    def __repr__(self) -> str:
        return f"shardmap.{name_of(self._sample)}"


def name_of(func: Any) -> str:
    """The name of a function in error messages."""
    return getattr(func, "__name__", None) or type(func).__name__


def check_function(func: Any, transform: str) -> None:
    """Refuse a `func` that is no function.

    Raises:
        OptionError: `func` cannot be called.
    """
    if not callable(func):
        raise errors.OptionError(
            f"shardmap.{transform}: func={func!r} is a {type(func).__name__}, not a function; pass "
            "a function of one sample"
        )


def check_argnums(argnums: Any, call: str) -> None:
    """Refuse an `argnums` that is no argument number, before there are arguments.

    Raises:
        TransformError: `argnums` is neither an int nor a tuple of different ints.
    """
    numbers = argnums if isinstance(argnums, tuple) and argnums else (argnums,)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise errors.TransformError(
            f"{call}: argnums={argnums!r}; pass the number of a positional argument, or a tuple of "
            "such numbers"
        )


class Differentiated:
    """The arguments of one sample by which a function is differentiated.

    Args:
        args: The sample's positional arguments.
        argnums: The numbers of the differentiated ones.
        call: The user's call, for errors.

    Raises:
        TransformError: `argnums` is out of range or names an argument twice, or an argument holds
            anything else than real floating-point tensors.
    """

    def __init__(self, args: tuple[Any, ...], argnums: int | tuple[int, ...], call: str):
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        for n in numbers:
            if not -len(args) <= n < len(args):
                raise errors.TransformError(
                    f"{call}: argnums={argnums!r} is out of range: the function was called with "
                    f"{len(args)} positional "
                    f"argument{'s' if len(args) != 1 else ''}, so that {-len(args)} to "
                    f"{len(args) - 1} can be named"
                )
        self.numbers = [n % len(args) for n in numbers]
        if len(set(self.numbers)) < len(self.numbers):
            raise errors.TransformError(
                f"{call}: argnums={argnums!r} names an argument twice; name each once"
            )
        self._args = args
        chosen = tuple([args[n] for n in self.numbers])
        self.chosen = chosen
        self.in_tuple = isinstance(argnums, tuple)
        self.leaves, self._structure = pytree.tree_flatten(chosen)
        self.structure = self._structure if self.in_tuple else pytree.tree_flatten(chosen[0])[1]
        """The structure of derivatives by argument: a tuple only if `argnums` is one."""
        for n, value in zip(self.numbers, chosen, strict=True):
            for leaf in pytree.tree_leaves(value):
                _check_real(leaf, f"{call}: argument {n}", f"leave argument {n} out of argnums")

    def with_leaves(self, leaves: list[torch.Tensor]) -> list[Any]:
        """The sample's arguments, with `leaves` in place of the differentiated tensors."""
        args = list(self._args)
        for n, value in zip(
            self.numbers, pytree.tree_unflatten(leaves, self._structure), strict=True
        ):
            args[n] = value
        return args


def _check_real(leaf: Any, what: str, otherwise: str) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise errors.TransformError(
            f"{what} holds {leaf!r}, a {type(leaf).__name__}, and derivatives are taken by "
            f"tensors; pass torch.tensor(...), or {otherwise}"
        )
    if leaf.is_complex():
        raise errors.TransformError(
            f"{what} is of dtype {leaf.dtype}, and derivatives are those of real numbers; write "
            "the function of torch.view_as_real(z)"
        )
    if not leaf.is_floating_point():
        raise errors.TransformError(
            f"{what} is of dtype {leaf.dtype}, and derivatives need floating-point tensors; pass "
            f".float() of it, or {otherwise}"
        )


class Results:
    """The values that the function returned for one sample.

    Args:
        out: The function's result, or the pair of result and aux.
        has_aux: True if it is that pair.
        call: The user's call, for errors.

    Raises:
        TransformError: It is no pair although `has_aux` is true, or the result holds anything else
            than real floating-point tensors.
    """

    def __init__(self, out: Any, has_aux: bool, call: str):
        self.aux: Any = ()
        if has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise errors.TransformError(
                    f"{call}: has_aux=True and the function returned a {type(out).__name__}; "
                    "return a pair of the result and the aux, or "
                    "pass has_aux=False"
                )
            out, self.aux = out
        self.leaves, self.structure = pytree.tree_flatten(out)
        for leaf in self.leaves:
            _check_real(
                leaf, f"{call}: the function's result", "return it as aux, with has_aux=True"
            )
        for leaf in pytree.tree_leaves(self.aux):
            if not isinstance(leaf, torch.Tensor):
                raise errors.TransformError(
                    f"{call}: the aux holds {leaf!r}, a {type(leaf).__name__}; return tensors, or "
                    "leave it away"
                )
