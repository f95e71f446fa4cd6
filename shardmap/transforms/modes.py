"""Derivatives of one sample's function in reverse and in forward mode, by plain autograd.

They support everything that autograd supports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from shardmap import errors
from shardmap._torch import pytree
from shardmap.trace.graphs import edge_of, edges_behind, leaf_of
from shardmap.transforms.base import Differentiated, Results


def refuse_inference_mode(call: str) -> None:
    """Refuse to differentiate in inference mode, where torch keeps no graph.

    Raises:
        TransformError: Inference mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise errors.TransformError(
            f"{call}: torch.inference_mode() keeps no graph to differentiate; use torch.no_grad() "
            "around the call"
        )


_SINGULAR = "LinalgDetBackward0"
"""The operator whose gradient autograd computes by another formula if the gradient is to be
differentiated: at a singular matrix the one is the adjugate, the other zero. The transforms of
`torch.func` always differentiate so. (`cumprod` and `silu` have two formulas of one value.)"""


class Graph:
    """One sample's function, run under autograd.

    Gradients flow on to captured tensors, and to the sample, as they do in the loop:
    if outer autograd is recording and any of them requires grad.

    Args:
        func: The function of one sample.
        by: The arguments that it is differentiated by.
        kwargs: Its keyword arguments.
        has_aux: True if it returns a pair of result and aux.
        call: The user's call, for errors.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        by: Differentiated,
        kwargs: dict[str, Any],
        has_aux: bool,
        call: str,
    ):
        refuse_inference_mode(call)
        outside = torch.is_grad_enabled()
        with torch.enable_grad():
            # One view each: the same tensor may be passed twice, and is then differentiated by
            # separately in each place.
            self.leaves = [
                t.view_as(t) if outside and t.requires_grad else leaf_like(t) for t in by.leaves
            ]
            self.results = Results(func(*by.with_leaves(self.leaves), **kwargs), has_aux, call)
        connected = any(t.requires_grad for t in by.leaves) or reaches_others(
            self.results.leaves, self.leaves
        )
        self.create_graph = outside and connected

    def pulled_back(
        self, outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The product of cotangents with the Jacobian for each differentiated tensor."""
        if self.create_graph or not differ_in_grad_mode(outputs):
            return pulled_back(outputs, self.leaves, cotangents, self.create_graph)
        return tuple([t.detach() for t in pulled_back(outputs, self.leaves, cotangents, True)])

    def cut(self, value: Any) -> Any:
        """A value of the forward pass without the graph that belongs to this transform only."""
        return value if self.create_graph else pytree.tree_map(lambda t: t.detach(), value)


def leaf_like(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf to differentiate by, of the memory of a tensor, and with its tangent."""
    # `detach` of a tensor that all samples share would leave out the tangent.
    leaf = tensor.detach() if tensor.requires_grad else tensor.view_as(tensor)
    return leaf.requires_grad_()


def pulled_back(
    outputs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    create_graph: bool,
) -> tuple[torch.Tensor, ...]:
    """Call `torch.autograd.grad` and keep the graph; unused leaves get zeros."""
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return tuple([torch.zeros_like(t) for t in leaves])
    outs, seeds = zip(*pairs, strict=True)
    options = {
        "retain_graph": True,
        "create_graph": create_graph,
        "allow_unused": True,
        "materialize_grads": True,
    }
    return torch.autograd.grad(outs, tuple(leaves), seeds, **options)


def differ_in_grad_mode(outputs: Sequence[torch.Tensor]) -> bool:
    """True if gradients of `outputs` may be other ones with `create_graph`."""
    behind = edges_behind(map(edge_of, outputs), set())
    return any(node.name() == _SINGULAR for node, _ in behind)


def reaches_others(outputs: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> bool:
    """True if gradients of `outputs` reach any tensor that requires grad other than `own`."""
    known = {id(t) for t in own}
    behind = edges_behind(map(edge_of, outputs), set())
    leaves = [leaf for node, _ in behind if (leaf := leaf_of(node)) is not None]
    return any(id(leaf) not in known for leaf in leaves)


def pushed_forward(
    func: Callable[[list[torch.Tensor]], tuple[list[torch.Tensor], Any]],
    primals: Sequence[torch.Tensor],
    tangents: Sequence[Any],
    nested: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """Compute the results of a function, their tangents, and aux.

    They are computed by dual tensors of plain autograd, so that `func` may call
    `torch.autograd.grad`. Where `func` takes forward derivatives itself, `torch.func.jvp` computes
    them: it has several levels, plain autograd one.

    Args:
        func: Takes the primals, returns a list of tensors and a pytree.
        primals: Tensors.
        tangents: One for each primal; None is zero.
        nested: True if `func` may take forward derivatives itself; not if it also goes backward
            by plain autograd, which sees through dual tensors, but not through the levels of
            `torch.func`.

    Raises:
        RuntimeError: `func` takes forward derivatives itself and may not.
    """
    try:
        with forward_ad.dual_level():
            duals = [
                p if t is None else forward_ad.make_dual(p, t)
                for p, t in zip(primals, tangents, strict=True)
            ]
            outs, aux = func(duals)
            pairs = [forward_ad.unpack_dual(t) for t in outs]
            values = [p.primal for p in pairs]
            products = [
                torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs
            ]
            return (
                values,
                products,
                pytree.tree_map(lambda t: forward_ad.unpack_dual(t).primal, aux),
            )
    except RuntimeError as error:
        if not nested or "ested forward mode AD" not in str(error):
            raise
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def of_moving(*parts: torch.Tensor) -> Any:
        inputs = list(primals)
        for i, part in zip(moving, parts, strict=True):
            inputs[i] = part
        outs, aux = func(inputs)
        return tuple(outs), aux

    found: Any = torch.func.jvp(
        of_moving,
        tuple(primals[i] for i in moving),
        tuple(tangents[i] for i in moving),
        has_aux=True,
    )
    return list(found[0]), list(found[1]), found[2]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for the log."""
    return str(error).partition("\n")[0]


def has_no_formula(error: BaseException) -> bool:
    """True if autograd's error says that an operator cannot be differentiated in this mode."""
    text = str(error)
    return isinstance(error, NotImplementedError | RuntimeError) and (
        "forward AD" in text
        or "forward mode AD" in text
        or "derivative for" in text
        or "jvp" in text
        or "is not differentiable" in text
    )
