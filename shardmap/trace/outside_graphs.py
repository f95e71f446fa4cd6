"""Gradients inside a function by tensors from which mapped arguments have been computed.

A sample is recorded as a tensor without a history. In the loop it is a row of its argument, and
keeps the argument's: `torch.autograd.grad(loss, weight)` inside follows `features = encoder(x)`
that was computed outside, as far as `weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardmap import errors
from shardmap._torch import functorch
from shardmap.trace.graphs import edge_of, edges_behind, leaf_of
from shardmap.trace.recording import Recording, element, flat_tensors, is_plain

if TYPE_CHECKING:
    from shardmap.trace.refusals import Refusals


def given_inputs(func: object, args: Sequence[object], kwargs: dict[str, object]) -> list[Tensor]:
    """The tensors by which a call of `torch.autograd.grad` or `backward` differentiates."""
    place = {torch.autograd.grad: 1, torch.autograd.backward: 5, Tensor.backward: 4}[func]
    inputs = args[place] if len(args) > place else kwargs.get("inputs")
    return flat_tensors([inputs])


def histories_of(leaves: Iterable[object]) -> list[Tensor]:
    """The arguments that have a history, or begin one, at each level of `torch.func`."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    return [t for t in _at_each_level(tensors) if t.requires_grad]


def _at_each_level(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors, and what the wrappers among them that take gradients hold."""
    for tensor in tensors:
        while functorch.is_gradtrackingtensor(tensor):
            yield tensor
            tensor = functorch.get_unwrapped(tensor)
        if is_plain(tensor):
            yield tensor


def reached(arguments: Iterable[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
    """The first of some arguments that has been computed from one of some tensors, or is one."""
    leaves = {id(t) for t in tensors if t.is_leaf}
    results = {edge_of(t) for t in tensors if not t.is_leaf}
    for argument in arguments:
        behind = edges_behind([edge_of(argument)], set())
        if id(argument) in leaves or any(
            edge in results or id(leaf_of(edge[0])) in leaves for edge in behind
        ):
            return argument
    return None


def differentiate(
    recorder: Refusals, func: object, args: Sequence[object], kwargs: dict[str, object]
) -> None:
    """Note by which shared tensors a gradient is taken inside.

    Raises:
        HistoryError: In the loop it goes on through a mapped argument.
    """
    inputs = [t for t in given_inputs(func, args, kwargs) if is_plain(t)]
    shared = [t for t in inputs if recorder.is_shared(t)]
    if recorder.depth:
        shared += _of_outer_levels(recorder, args[:1] or kwargs.get("outputs"), shared)
    if not shared:
        return
    level: object = recorder
    while isinstance(level, type(recorder)):  # samples of maps around are parts of ours
        refuse_reached(level.call, level.histories, shared)
        level = level.outer
    recorder.differentiated += map(id, shared)
    place = 4 if func is torch.autograd.grad else 3
    if args[place] if len(args) > place else kwargs.get("create_graph"):
        known = set(map(id, shared))
        computed = [t for _, t in recorder.captured.values() if id(t) not in known]
        recorder.deep |= reached(histories_of(computed), shared) is not None


def _of_outer_levels(recorder: Refusals, outputs: object, shared: Sequence[Tensor]) -> list[Tensor]:
    """The wrappers of outer transforms for which plain tensors stand that a gradient is taken by.

    Raises:
        HistoryError: The gradient follows a graph of an outer transform. While the function is
            recorded its tensors stand without it.
    """
    wrappers = {id(plain): wrapper for wrapper, plain in recorder.wrappers.values()}
    followed = [wrappers[id(t)] for t in flat_tensors([outputs]) if id(t) in wrappers]
    ended = [t for t in flat_tensors([outputs]) if functorch.maybe_get_level(t) < -1]
    by = list(_at_each_level([wrappers[id(t)] for t in shared if id(t) in wrappers]))
    computed = [t for t in _at_each_level(wrappers.values()) if t.grad_fn is not None]
    if (
        any(t.grad_fn is not None for t in _at_each_level(followed))
        or any(recorder.is_outer(functorch.get_unwrapped(t)) for t in ended)
        or reached(computed, by) is not None
    ):
        raise errors.HistoryError(
            f"{recorder.call}: inside of a torch.func transform around the map, a gradient is "
            "taken inside the function of a tensor that was computed outside of it; compute that "
            "inside the function too (torch.func.jacrev, torch.func.vjp, or shardmap.jacrev), or "
            "map this function by torch.func.vmap"
        )
    return by


def refuse_deep(recorder: Refusals, outputs: Iterable[Tensor]) -> None:
    """Refuse gradients from outside through a gradient inside that went into an outside graph.

    What nodes of that graph have saved is captured as constants, which would miss a part.

    Raises:
        HistoryError: There are such gradients, and an output requires grad.
    """
    if recorder.deep and any(t.requires_grad for t in outputs):
        raise errors.HistoryError(
            f"{recorder.call}: a gradient with create_graph=True is taken inside by a tensor from "
            "which a captured tensor was computed outside, and gradients from outside would not "
            "see all of that graph; compute the captured tensor inside the function, or leave out "
            "create_graph=True if the result is not differentiated"
        )


def may_reach(recording: Recording, leaves: Iterable[object]) -> bool:
    """True if a replay might leave out a part of a gradient, for what these arguments come from."""
    arguments = histories_of(leaves) if recording.differentiated else []
    if not arguments:
        return False
    known = [recording.captured[place] for place in recording.differentiated if place >= 0]
    if len(known) < len(recording.differentiated):
        return True
    return reached(arguments, list(_at_each_level(known))) is not None


def refuse_reached(call: str, arguments: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Refuse a gradient that in the loop goes on through a mapped argument.

    Raises:
        HistoryError: One of the tensors is in the history of an argument.
    """
    found = reached(arguments, tensors)
    if found is not None:
        raise errors.HistoryError(
            f"{call}: a gradient is taken inside by a tensor from which a mapped argument of shape "
            f"{list(found.shape)} was computed outside, and the argument's samples are recorded "
            "without that history; compute the argument inside the function, detach it if the "
            "gradient is to stop there, or map over the samples' numbers: "
            "shardmap.vmap(lambda i: f(batch[i]))(torch.arange(len(batch)))"
        )


def refuse_tangent(recorder: Refusals, dual: Tensor) -> None:
    """Refuse that the function reads a tangent which its sample is recorded without.

    Raises:
        TransformError: Forward mode around the call gives the mapped arguments tangents.
    """
    if is_plain(dual) and recorder.tangents and recorder.belongs(element(dual)):
        raise errors.TransformError(
            f"{recorder.call}: the function reads the tangent of a dual number made around the "
            "call, and samples are recorded without tangents; unpack the map's result outside, or "
            "map over primals and tangents and use torch.func.jvp inside"
        )
