"""Make the cotangents with which a backward is run and recorded, and find its arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch.autograd import graph

from shardmap import errors
from shardmap._torch import sequence_number, without_functions
from shardmap.program.ir import Var
from shardmap.trace.histories import Applied, HookNode, described, is_torchs
from shardmap.trace.recorder import Recorder

REMEDY = (
    "take the gradient inside the mapped function (torch.autograd.grad), call it under "
    "torch.no_grad(), .detach() what it takes if no gradient is to pass, or write it with torch "
    "operators"
)
"""What to do about a backward that cannot be recorded."""


def missing(recorder: Recorder, applied: Applied) -> tuple[list[torch.Tensor | None], bool]:
    """A value for each missing cotangent, and True if missing ones are zeros.

    Autograd's engine tells which: it computes a gradient with the Function's own
    backward replaced.
    """
    node = applied.node
    count = len(node._input_metadata)
    pairs = applied.pairs
    if count == 1 or is_torchs(node):
        return [None] * count, True
    seen: list[tuple[torch.Tensor | None, ...]] = []

    def spy(*grads: torch.Tensor | None) -> tuple[None, ...]:
        seen.append(grads)
        return (None,) * len(node.needs_input_grad)

    first = min(pairs)
    edges = [graph.GradientEdge(n, i) for n, i in node.next_functions if n]
    start = graph.GradientEdge(cast(graph.Node, node), first)
    vars(node)["apply"] = spy
    paused, recorder.paused = recorder.paused, True
    try:
        value = _sample(pairs[first][0])
        torch.autograd.grad((start,), edges, (value,), retain_graph=True, allow_unused=True)
    finally:
        recorder.paused = paused
        del vars(node)["apply"]
    (grads,) = seen
    absent = [k for k in range(count) if k != first and grads[k] is None]
    if absent and len(pairs) > 1:
        raise errors.AutogradFunctionError(
            f"{recorder.call}: {described(node)} has several "
            "results and ctx.set_materialize_grads(False), so that its backward depends on "
            f"which of them are used outside; leave missing gradients zeros, or {REMEDY}"
        )
    return list(grads), not absent


def _sample(var: Var) -> torch.Tensor:
    """Ones with the metadata of a result."""
    spec = var.spec
    device = torch.device(spec.device)
    if 0 in spec.stride:
        return torch.ones(spec.shape, dtype=spec.dtype, device=device)
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device).fill_(1)


def cotangents(
    recorder: Recorder, applied: Applied, given: list[torch.Tensor | None]
) -> tuple[Var, ...]:
    """Replace each used result's cotangent by a sample's, and return their variables."""
    names = []
    recorder.paused, paused = True, recorder.paused
    for number, (value, _) in sorted(applied.pairs.items()):
        sample = _sample(value)
        with torch.enable_grad():  # no leaf: an argument of a backward may be written to
            leaf = torch.ones(
                sample.shape, dtype=sample.dtype, device=sample.device, requires_grad=True
            )
            cotangent = torch.empty_strided(
                sample.shape, sample.stride(), dtype=sample.dtype, device=sample.device
            ).copy_(leaf)
        given[number] = cotangent
        with without_functions():  # our own look at its memory is no door
            names.append(recorder.add_cotangent(cotangent))
    recorder.paused = paused
    return tuple(names)


def argument_vars(recorder: Recorder, applied: Applied) -> list[Var | None]:
    """The variables of a Function's tensor arguments; None for those that do not require grad."""
    if isinstance(applied.node, HookNode):
        return [applied.pairs[0][0]]
    found: list[Var | None] = []
    for node, number in applied.node.next_functions:
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            var = recorder.known(leaf) or recorder.captured_var(leaf)
            found.append(var if var.index in recorder.captured else None)
            continue
        var = recorder.edges.get((type(node), sequence_number(node)(), number))
        if var is None:
            raise errors.AutogradFunctionError(
                f"{recorder.call}: {described(applied.node)} lies between "
                "the inputs and an output that requires grad, and one of its arguments takes part "
                f"in no operator of its forward, so that it cannot be followed; {REMEDY}"
            )
        found.append(var)
    return found
