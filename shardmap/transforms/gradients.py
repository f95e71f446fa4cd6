"""Per-sample gradients of a module's parameters, or of a function's first argument."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from shardmap._torch import not_compiled, pytree
from shardmap.call.comparison import Comparison
from shardmap.call.options import MapOptions
from shardmap.call.planned import Plan
from shardmap.errors import TransformError
from shardmap.transforms.base import Transformed
from shardmap.transforms.modes import differ_in_grad_mode

T = TypeVar("T")


@not_compiled
def per_sample_grad(
    model_or_fn: nn.Module | Callable[..., Any],
    loss: Callable[..., Tensor] | None = None,
    *,
    params: str | Sequence[str] | None = None,
    flat: bool = False,
    batch_of_one: bool = False,
    has_aux: bool = False,
    in_dims: Any = 0,
    **options: Unpack[MapOptions],
) -> Callable[..., Any]:
    """The gradient of each sample's loss with respect to the parameters.

    With a module, `per_sample_grad(model, loss)(x, y)` differentiates `loss(model(x[i]), y[i])` for
    each `i`: the first argument goes to the model (a tuple as its arguments, a dict as its named
    ones), the others to the loss. Without a loss the module returns it itself. Parameters that are
    frozen (`requires_grad=False`) and buffers are constants; a parameter that several layers share
    has one gradient, under its first name.

    With a function of parameters, `per_sample_grad(fn)(params, x, y)` differentiates `fn(params,
    x[i], y[i])`, as `torch.func.vmap(torch.func.grad(fn), in_dims=(None, 0, 0))`; with a loss,
    `loss(fn(params, x[i]), y[i])`.

    The gradients have no history of their own, whatever requires grad: to differentiate them again,
    map `torch.func.grad` of the function with `shardmap.vmap`, or take `shardmap.jacrev`. Inside of
    derivatives of `torch.func` they have one.

    With `reduce=` the gradients are not stacked but summed, clipped, compared or projected as they
    are computed, if possible without computing them themselves: see `shardmap.reduce`.

    Args:
        model_or_fn: A module, written for one sample unless `batch_of_one`, or a function of
            parameters (a pytree of tensors) and of one sample.
        loss: Takes the output for one sample and its other arguments; returns one number.
        params: The parameters of a module: a name, a pattern such as "*.weight" or "encoder.*",
            or several; by default all that require grad.
        flat: Return all gradients of a sample as one row, in the order of the parameters.
        batch_of_one: Pass the model its sample as a batch of one, `x[i][None]`, and take its only
            result: for models that expect batches.
        has_aux: `loss` (or the function) returns `(loss, aux)`, and the call returns `(gradients,
            aux)`, with `aux` stacked.
        in_dims: The mapped dimension of each argument, as for `shardmap.vmap`; without a
            function's parameters, which all samples share.
        **options: Options of `shardmap.vmap`.

    Returns:
        A function of the batch, with a method `plan` that takes the same batch and returns the
        `Plan`. It returns a dict of gradients by parameter name, `[N, *shape]` each (for a function
        the structure of its parameters), or `[N, P]` if `flat`.

    Raises:
        TransformError: There is nothing to differentiate, or a name fits no parameter; at the call,
            the loss is not one floating-point number.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> model, loss = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(5, 3), torch.randn(5, 1)
        >>> gradients = shardmap.per_sample_grad(model, loss)(x, y)
        >>> {name: tuple(g.shape) for name, g in gradients.items()}
        {'weight': (5, 1, 3), 'bias': (5, 1)}
        >>> norms = shardmap.per_sample_grad(model, loss, reduce="norm")(x, y)  # [5]
        >>> squares = sum(g[0].square().sum() for g in gradients.values())
        >>> torch.allclose(norms[0] ** 2, squares)
        True
    """
    given = [model_or_fn] if loss is None else [model_or_fn, loss]
    call = f"shardmap.per_sample_grad({', '.join(map(_name, given))})"
    if not callable(model_or_fn):
        raise TransformError(
            f"{call}: {model_or_fn!r} is a {type(model_or_fn).__name__}; pass a module or a "
            "function of parameters"
        )
    if loss is not None and not callable(loss):
        raise TransformError(
            f"{call}: loss={loss!r} is a {type(loss).__name__}; pass a function of the output and "
            "the targets"
        )
    if isinstance(model_or_fn, nn.Module):
        select(model_or_fn, params, call)  # refused here, where it is asked for
        both = _module_gradient(model_or_fn, loss, params, flat, batch_of_one, has_aux, call)
        return Transformed(model_or_fn.forward, both[0], in_dims, options, both[1])
    if params is not None:
        raise TransformError(
            f"{call}: params={params!r} selects a module's parameters by name; a function is "
            "differentiated by all that it gets, so pass it the chosen ones only"
        )
    both = _function_gradient(model_or_fn, loss, flat, batch_of_one, has_aux, call)
    return OfParameters(model_or_fn, both, in_dims, options)


class OfParameters:
    """Gradients with respect to a first argument that all samples share."""

    def __init__(
        self,
        fn: Callable[..., Any],
        both: _Both,
        in_dims: Any,
        options: MapOptions,
    ):
        self._fn = fn
        self._both = both
        self._in_dims = in_dims
        self._options = options
        self._by_arguments: dict[Any, Transformed] = {}
        """The mapped functions, which hold the recordings of `trace="once"`, by form of the
        arguments."""
        functools.update_wrapper(self, fn, updated=())

    @not_compiled
    def __call__(self, parameters: Any, *batch: Any, **kwargs: Any) -> Any:
        """The gradients of the batch."""
        return self._over(len(batch))(parameters, *batch, **kwargs)

    @not_compiled
    def plan(self, parameters: Any, *batch: Any, **kwargs: Any) -> Plan:
        """Plan the call without running it, as `shardmap.plan` does."""
        return self._over(len(batch)).plan(parameters, *batch, **kwargs)

    @not_compiled
    def compare(
        self,
        parameters: object,
        *batch: object,
        samples: int | Sequence[int] = 8,
        **kwargs: object,
    ) -> Comparison:
        """Compare some samples' gradients with the plain loop's, as `shardmap.compare` does."""
        over = self._over(len(batch))
        return over.compare(parameters, *batch, samples=samples, **kwargs)

    def _over(self, arguments: int) -> Transformed:
        made = self._by_arguments.get(arguments)
        if made is None:
            dims = (
                tuple(self._in_dims)
                if isinstance(self._in_dims, tuple | list)
                else (self._in_dims,) * arguments
            )
            made = self._by_arguments[arguments] = Transformed(
                self._fn, self._both[0], (None, *dims), self._options, self._both[1]
            )
        return made


def select(
    model: nn.Module, params: str | Sequence[str] | None, call: str
) -> dict[str, nn.Parameter]:
    """A module's parameters by name: those that require grad, or those that `params` names.

    Raises:
        TransformError: There are none, a pattern fits none, or names one that is frozen.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            why = (
                "all its parameters are frozen; call requires_grad_() on the ones to differentiate"
                if named
                else "it has no parameters"
            )
            raise TransformError(
                f"{call}: {type(model).__name__} has nothing to differentiate: {why}"
            )
        return chosen
    patterns = [params] if isinstance(params, str) else list(params)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise TransformError(
            f"{call}: params={params!r}; pass a name, a pattern such as '*.weight', or a list of "
            "them"
        )
    wanted: set[str] = set()
    aliases = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    first = {id(p): name for name, p in reversed(list(named.items()))}
    for pattern in patterns:
        found = [name for name in aliases if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, aliases, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"it has {', '.join(list(named)[:8])}{', ...' if len(named) > 8 else ''}"
            )
            raise TransformError(
                f"{call}: params={pattern!r} fits no parameter of {type(model).__name__}; {hint}"
            )
        if pattern in aliases and not aliases[pattern].requires_grad:
            raise TransformError(
                f"{call}: params={pattern!r} is frozen (requires_grad is False); unfreeze it, or "
                "leave it out"
            )
        wanted.update(first[id(aliases[name])] for name in found if aliases[name].requires_grad)
    if not wanted:
        raise TransformError(
            f"{call}: params={params!r} fits frozen parameters only; unfreeze the ones you need"
        )
    return {name: p for name, p in named.items() if name in wanted}


def _module_gradient(
    model: nn.Module,
    loss: Callable[..., object] | None,
    params: str | Sequence[str] | None,
    flat: bool,
    batch_of_one: bool,
    has_aux: bool,
    call: str,
) -> _Both:
    """Functions of one sample: the gradients of the parameters that the model has when it runs."""

    def value_of(
        run: Callable[..., object], x: object, rest: tuple[object, ...]
    ) -> tuple[Tensor, object]:
        output = _applied(run, x, batch_of_one)
        return _value(output if loss is None else loss(output, *rest), has_aux, call)

    def arranged(found: Mapping[str, Tensor], aux: object) -> object:
        gradients = _row(list(found.values())) if flat else dict(found)
        return (gradients, aux) if has_aux else gradients

    @functools.wraps(model.forward, assigned=())
    def gradient(x: object, *rest: object) -> object:
        chosen = select(model, params, call)
        with torch.enable_grad():
            value, aux = value_of(model, x, rest)
            found = _gradients(value, list(chosen.values()))
        return arranged(dict(zip(chosen, found, strict=True)), _detached(aux))

    @functools.wraps(model.forward, assigned=())
    def within(x: object, *rest: object) -> object:
        def of_tensors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, object]:
            return value_of(functools.partial(_with_parameters, model, tensors), x, rest)

        return arranged(*_traced_gradients(of_tensors, {**select(model, params, call)}))

    gradient.__name__ = gradient.__qualname__ = f"gradient of {type(model).__name__}"
    within.__name__ = within.__qualname__ = gradient.__name__
    return gradient, within


def _function_gradient(
    fn: Callable[..., object],
    loss: Callable[..., object] | None,
    flat: bool,
    batch_of_one: bool,
    has_aux: bool,
    call: str,
) -> _Both:
    """Functions of the parameters and one sample that return the parameters' gradients."""

    def value_of(
        handed: object, sample: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Tensor, object]:
        if loss is None:
            output = (
                fn(handed, *(_one(s) for s in sample), **kwargs)
                if batch_of_one
                else fn(handed, *sample, **kwargs)
            )
        else:
            output = fn(handed, _one(sample[0])) if batch_of_one else fn(handed, sample[0])
            output = loss(_only(output) if batch_of_one else output, *sample[1:], **kwargs)
        return _value(output, has_aux, call)

    def flattened(parameters: object) -> tuple[list[Tensor], pytree.TreeSpec]:
        leaves, structure = pytree.tree_flatten(parameters)
        if not leaves or not all(
            isinstance(p, Tensor) and (p.is_floating_point() or p.is_complex()) for p in leaves
        ):
            raise TransformError(
                f"{call}: its first argument, the parameters, is to be a pytree of floating-point "
                "tensors"
            )
        return leaves, structure

    def arranged(found: Sequence[Tensor], structure: pytree.TreeSpec, aux: object) -> object:
        gradients = _row(found) if flat else pytree.tree_unflatten(list(found), structure)
        return (gradients, aux) if has_aux else gradients

    @functools.wraps(fn, updated=())
    def gradient(parameters: object, *sample: object, **kwargs: object) -> object:
        leaves, structure = flattened(parameters)
        with torch.enable_grad():
            tensors = [p.detach().requires_grad_() for p in leaves]
            handed = pytree.tree_unflatten(tensors, structure)
            value, aux = value_of(handed, sample, kwargs)
            found = _gradients(value, tensors, differ_in_grad_mode([value]))
        return arranged(found, structure, _detached(aux))

    @functools.wraps(fn, updated=())
    def within(parameters: object, *sample: object, **kwargs: object) -> object:
        leaves, structure = flattened(parameters)

        def of_leaves(tensors: list[Tensor]) -> tuple[Tensor, object]:
            return value_of(pytree.tree_unflatten(tensors, structure), sample, kwargs)

        found, aux = _traced_gradients(of_leaves, leaves)
        return arranged(found, structure, aux)

    return gradient, within


_Both = tuple[Callable[..., object], Callable[..., object]]
"""The gradient of one sample, and the same with a history, for derivatives of `torch.func` around:
in them a gradient without one would have a derivative of zero, and no error."""


def _traced_gradients(
    value_of: Callable[[T], tuple[Tensor, object]], tensors: T
) -> tuple[T, object]:
    """The gradients of a loss, which may be differentiated again, and its aux."""
    seen: list[tuple[list[object], pytree.TreeSpec]] = []

    def value(tensors: T) -> tuple[Tensor, list[Tensor]]:
        found, aux = value_of(tensors)
        seen.append(pytree.tree_flatten(aux))
        return found, [leaf for leaf in seen[-1][0] if isinstance(leaf, Tensor)]

    found, unwrapped = torch.func.grad(value, has_aux=True)(tensors)
    leaves, structure = seen[-1]
    rest = iter(unwrapped)
    aux = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return found, pytree.tree_unflatten(aux, structure)


def _detached(aux: object) -> object:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, aux)


def _with_parameters(
    model: nn.Module, tensors: Mapping[str, Tensor], *args: object, **kwargs: object
) -> object:
    return torch.func.functional_call(model, dict(tensors), args, kwargs)


def _applied(model: Callable[..., object], x: object, batch_of_one: bool) -> object:
    """Run the model on one sample: a tuple holds its arguments, a dict its named ones."""
    x = pytree.tree_map(_one, x) if batch_of_one else x
    if isinstance(x, dict):
        output = model(**x)
    else:
        output = model(*x) if isinstance(x, tuple) else model(x)
    return pytree.tree_map(_only, output) if batch_of_one else output


def _one(value: object) -> object:
    return value.unsqueeze(0) if isinstance(value, Tensor) else value


def _only(value: object) -> object:
    return value.squeeze(0) if isinstance(value, Tensor) else value


def _value(returned: object, has_aux: bool, call: str) -> tuple[Tensor, object]:
    """The loss of one sample, and its aux."""
    aux: object = ()
    if has_aux:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TransformError(
                f"{call}: has_aux=True, and the loss returned a {type(returned).__name__}; return "
                "(loss, aux)"
            )
        returned, aux = returned
    if (
        not isinstance(returned, Tensor)
        or returned.numel() != 1
        or not returned.is_floating_point()
    ):
        found = (
            f"{returned.dtype} {tuple(returned.shape)}"
            if isinstance(returned, Tensor)
            else f"a {type(returned).__name__}"
        )
        raise TransformError(
            f"{call}: the loss of one sample is {found}; return one floating-point number, such as "
            "the sum or mean of it"
        )
    return returned.reshape(()), aux


def _gradients(
    value: Tensor, tensors: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of a loss; a loss that is a constant has zeros, as under `torch.func.grad`.

    Args:
        value: The loss.
        tensors: The tensors to differentiate by.
        create_graph: True to compute them as if they were differentiated again.
    """
    if not value.requires_grad:
        return tuple([torch.zeros_like(t) for t in tensors])
    found = torch.autograd.grad(
        value,
        tuple(tensors),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return tuple([t.detach() for t in found]) if create_graph else found


def _row(gradients: Sequence[Tensor]) -> Tensor:
    """All gradients of a sample, concatenated: `[P]`."""
    return torch.cat([g.reshape(-1) for g in gradients])


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
