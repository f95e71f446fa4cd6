"""Products with Jacobians and Hessians, for each sample of a batch, without the matrices.

In `torch.func` and `torch.autograd.functional` these take the point and the vector in one call, or
in two. Here they are transforms, as everything else in this library: `vjp(func)` is a function of
the batch, whose last positional argument holds the vectors, one for each sample, or one for all
(`in_dims=(0, None)`). All return the pair of the function's value and the product, as
`torch.func.jvp` does, and `torch.autograd.functional`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Unpack

import torch

from shardmap import errors
from shardmap._torch import not_compiled, pytree
from shardmap.call.options import MapOptions
from shardmap.transforms.base import (
    Differentiated,
    Results,
    Transformed,
    check_argnums,
    check_function,
    name_of,
    within_derivatives,
)
from shardmap.transforms.modes import (
    Graph,
    first_line,
    has_no_formula,
    leaf_like,
    pulled_back,
    pushed_forward,
    refuse_inference_mode,
)
from shardmap.transforms.nested import Within

logger = logging.getLogger("shardmap")

Argnums = int | tuple[int, ...]


@not_compiled
def vjp(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    in_dims: Any = 0,
    **options: Unpack[MapOptions],
) -> Transformed:
    """The product of a cotangent with the Jacobian of `func`, at each sample of a batch.

    It takes one backward pass.

    For each row, `vjp(func)(x, cotangents)` equals `torch.func.vjp(func, row)` and its function of
    the cotangent. Outer gradients flow as for `shardmap.jacrev`.

    Args:
        func: Takes one sample and returns tensors in any pytree; a function, or a plain
            `torch.nn.Module`.
        argnums: The number of the positional argument by which to differentiate, or a tuple of
            them.
        has_aux: True if `func` returns a pair `(result, aux)`.
        in_dims: As for `shardmap.vmap`, of `func`'s arguments and of the cotangents behind them:
            None shares among all samples.
        **options: As for `shardmap.vmap`.

    Returns:
        A function of the batch: `func`'s arguments, and as the last one the cotangents, in the
        structure and shapes of `func`'s result. It returns `(result, product)`, the product in the
        structure and shapes of the arguments that are differentiated by; with aux, `(result,
        product, aux)`. Its `plan(*batch)` returns the `Plan` of the call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: `argnums` or the cotangents do not fit, or anything else than real
            floating-point tensors is differentiated.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> x, cotangents = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[1., 0.], [1., 1.]])
        >>> shardmap.vjp(lambda row: row**2)(x, cotangents)
        (tensor([[ 1.,  4.],
                [ 9., 16.]]), tensor([[2., 0.],
                [6., 8.]]))

    After `torch.func.vjp` and `torch.autograd.functional.vjp`; Griewank and Walther, Evaluating
    Derivatives, 2008, section 3.2.
    """
    call = _checked(func, "vjp", argnums, has_aux)

    def sample(*args: Any, **kwargs: Any) -> Any:
        inputs, vector = _with_vector(args, call, "cotangents")
        by = Differentiated(inputs, argnums, call)
        what = (f"{call}: the cotangents", "the function's result")
        if within_derivatives():
            value, product, aux = Within(func, by, kwargs, has_aux, call).product(
                lambda leaves, structure: _like(vector, leaves, structure, *what)
            )
            return (value, product, aux) if has_aux else (value, product)
        graph = Graph(func, by, kwargs, has_aux, call)
        results = graph.results
        cotangents = _like(vector, results.leaves, results.structure, *what)
        product = pytree.tree_unflatten(
            list(graph.pulled_back(results.leaves, cotangents)), by.structure
        )
        value = pytree.tree_unflatten(graph.cut(results.leaves), results.structure)
        return (value, product, graph.cut(results.aux)) if has_aux else (value, product)

    return _transformed(func, "vjp", sample, in_dims, options)


@not_compiled
def jvp(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    in_dims: Any = 0,
    **options: Unpack[MapOptions],
) -> Transformed:
    """The product of the Jacobian of `func` with a tangent, at each sample of a batch.

    It takes one pass in forward mode.

    For each row, `jvp(func)(x, tangents)` equals `torch.func.jvp(func, (row,), (tangent,))`.

    Args:
        func: As for `vjp`.
        argnums: As for `vjp`; the other arguments have no tangent.
        has_aux: As for `vjp`.
        in_dims: As for `shardmap.vmap`, of `func`'s arguments and of the tangents behind them: None
            shares among all samples.
        **options: As for `shardmap.vmap`.

    Returns:
        A function of the batch: `func`'s arguments, and as the last one the tangents, in the
        structure and shapes of the arguments that are differentiated by. It returns `(result,
        product)`, both in the structure of `func`'s result; with aux, `(result, product, aux)`. Its
        `plan(*batch)` returns the `Plan` of the call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: As for `vjp`.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> x, tangent = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([1., 0.])
        >>> shardmap.jvp(lambda row: row.prod(), in_dims=(0, None))(x, tangent)
        (tensor([ 2., 12.]), tensor([2., 4.]))

    After `torch.func.jvp`; Griewank and Walther, Evaluating Derivatives, 2008, section 3.1.
    """
    call = _checked(func, "jvp", argnums, has_aux)

    def sample(*args: Any, **kwargs: Any) -> Any:
        refuse_inference_mode(call)
        inputs, vector = _with_vector(args, call, "tangents")
        by = Differentiated(inputs, argnums, call)
        tangents = _like(
            vector, by.leaves, by.structure, f"{call}: the tangents", "what is differentiated by"
        )
        seen: list[Results] = []

        def function(leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
            seen.append(Results(func(*by.with_leaves(leaves), **kwargs), has_aux, call))
            return seen[-1].leaves, seen[-1].aux

        values, products, aux = pushed_forward(function, by.leaves, tangents)
        value, product = (pytree.tree_unflatten(t, seen[-1].structure) for t in (values, products))
        return (value, product, aux) if has_aux else (value, product)

    return _transformed(func, "jvp", sample, in_dims, options)


@not_compiled
def hvp(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    in_dims: Any = 0,
    **options: Unpack[MapOptions],
) -> Transformed:
    """The product of the Hessian of a scalar function with a vector, at each sample of a batch.

    It is the tangent of the gradient.

    For each row, `hvp(func)(x, vectors)` equals `torch.autograd.functional.hvp(func, row, vector)`.
    It is computed forward over reverse, so that it costs a few evaluations of `func`; where an
    operator has no forward formula, a second backward pass is taken instead, which is logged.

    Args:
        func: As for `vjp`, with a result of one element.
        argnums: As for `vjp`.
        in_dims: As for `shardmap.vmap`, of `func`'s arguments and of the vectors behind them: None
            shares among all samples.
        **options: As for `shardmap.vmap`.

    Returns:
        A function of the batch: `func`'s arguments, and as the last one the vectors, in the
        structure and shapes of the arguments that are differentiated by. It returns `(result,
        product)`, the product in that structure too. Its `plan(*batch)` returns the `Plan` of the
        call.

    Raises:
        OptionError: An option has a value that it cannot have.
        TransformError: As for `vjp`; or the result has more than one element.
        ShardmapError: As for `shardmap.vmap`.

    Example:
        >>> import torch, shardmap
        >>> x, vectors = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[1., 0.], [0., 1.]])
        >>> shardmap.hvp(lambda row: (row**3).sum())(x, vectors)
        (tensor([ 9., 91.]), tensor([[ 6.,  0.],
                [ 0., 24.]]))

    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994; signature
    after `torch.autograd.functional.hvp`.
    """
    call = _checked(func, "hvp", argnums, False)

    def sample(*args: Any, **kwargs: Any) -> Any:
        inputs, vector = _with_vector(args, call, "vectors")
        by = Differentiated(inputs, argnums, call)
        vectors = _like(
            vector, by.leaves, by.structure, f"{call}: the vectors", "what is differentiated by"
        )
        if within_derivatives():
            return Within(func, by, kwargs, False, call).second_product(
                vectors, lambda results: _one_scalar(results, call)
            )
        graph = Graph(func, by, kwargs, False, call)
        (value,) = _one_scalar(graph.results, call)
        try:
            products = _tangents_of_gradient(func, by, kwargs, graph.create_graph, vectors, call)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, errors.ShardmapError) or not has_no_formula(error):
                raise
            logger.info(
                "%s: takes two backward passes, for in forward mode: %s",
                call,
                first_line(error),
            )
            with torch.enable_grad():
                gradients = pulled_back([value], graph.leaves, [torch.ones_like(value)], True)
            products = graph.pulled_back(gradients, vectors)
        return (
            pytree.tree_unflatten(graph.cut([value]), graph.results.structure),
            pytree.tree_unflatten(list(products), by.structure),
        )

    return _transformed(func, "hvp", sample, in_dims, options)


def _tangents_of_gradient(
    func: Callable[..., Any],
    by: Differentiated,
    kwargs: dict[str, Any],
    create_graph: bool,
    vectors: list[torch.Tensor],
    call: str,
) -> tuple[torch.Tensor, ...]:
    """The product of the Hessian with a vector for each differentiated tensor."""

    def gradient(duals: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        (value,) = _one_scalar(Results(func(*by.with_leaves(duals), **kwargs), False, call), call)
        return list(pulled_back([value], duals, [torch.ones_like(value)], True)), ()

    with torch.enable_grad():
        primals = [
            t.view_as(t) if create_graph and t.requires_grad else leaf_like(t) for t in by.leaves
        ]
        products = pushed_forward(gradient, primals, vectors, nested=False)[1]
    return tuple([t if create_graph else t.detach() for t in products])


def _checked(func: Any, transform: str, argnums: Any, has_aux: Any) -> str:
    """Check the arguments of a transform, and return its call's name for errors."""
    check_function(func, transform)
    call = f"shardmap.{transform}({name_of(func)})"
    check_argnums(argnums, call)
    if not isinstance(has_aux, bool):
        raise errors.OptionError(
            f"{call}: has_aux={has_aux!r} is a {type(has_aux).__name__}; pass True or False"
        )
    return call


def _transformed(func: Any, transform: str, sample: Any, in_dims: Any, options: Any) -> Transformed:
    sample.__name__ = f"{transform}({name_of(func)})"
    return Transformed(func, sample, in_dims, options)


def _with_vector(args: tuple[Any, ...], call: str, what: str) -> tuple[tuple[Any, ...], Any]:
    """The function's arguments, and the vector behind them."""
    if len(args) < 2:
        raise errors.TransformError(
            f"{call}: was called with {len(args)} positional "
            f"argument{'s' if len(args) != 1 else ''}; pass the function's arguments, "
            f"and the {what} as the last one"
        )
    return args[:-1], args[-1]


def _one_scalar(results: Results, call: str) -> list[torch.Tensor]:
    shapes = [tuple(t.shape) for t in results.leaves]
    if len(shapes) != 1 or results.leaves[0].numel() != 1:
        raise errors.TransformError(
            f"{call}: the function's result has the shape{'s' if len(shapes) != 1 else ''} "
            f"{', '.join(map(str, shapes))}, and a Hessian's "
            "product is that of one number; return a scalar, or take shardmap.jvp of the gradient"
        )
    return results.leaves


def _like(
    vector: Any, leaves: list[torch.Tensor], structure: pytree.TreeSpec, what: str, model: str
) -> list[torch.Tensor]:
    """The vector's tensors, one for each of `leaves`, of its shape and dtype."""
    found, found_structure = pytree.tree_flatten(vector)
    if found_structure != structure:
        raise errors.TransformError(
            f"{what} have the structure {found_structure}, and {model} has {structure}; pass "
            "tensors in that structure"
        )
    for given, leaf in zip(found, leaves, strict=True):
        kind = (
            f"{given.dtype} {tuple(given.shape)}"
            if isinstance(given, torch.Tensor)
            else type(given).__name__
        )
        if kind != f"{leaf.dtype} {tuple(leaf.shape)}":
            raise errors.TransformError(
                f"{what} of one sample hold {kind} where {model} has {leaf.dtype} "
                f"{tuple(leaf.shape)}; pass tensors like those"
            )
    return found
