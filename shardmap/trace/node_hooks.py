"""Refuse what outer gradients would miss: hooks on nodes of the graph, backwards that are hidden.

Nodes do not list their hooks. But handles are numbered throughout the process, so that a recording
that only made handles of tensors is known to have none; otherwise each node gets a
hook for a moment, and the others are found beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import graph
from torch.utils.hooks import RemovableHandle

from shardmap import errors
from shardmap.trace.graphs import edge_of, edges_behind
from shardmap.trace.histories import Histories, Hook
from shardmap.trace.recomputed import Recomputed

_HIDDEN = {"DifferentiableGraphBackward": "torch.jit.script", "CppNode": "C++"}
"""Parts of the names of nodes whose backward recorded operators do not show, and their makers."""


def nodes_before(tensors: Iterable[torch.Tensor], recorder: Histories) -> list[graph.Node]:
    """The nodes of autograd's graph before `tensors`, as far as the function made them."""
    stop = {t.grad_fn for _, t in recorder.captured.values() if t.grad_fn is not None}
    behind = edges_behind([edge_of(t) for t in tensors if t.requires_grad], set(stop))
    return list(dict.fromkeys([node for node, _ in behind if node not in stop]))


def refuse_hidden_backwards(recorder: Histories, nodes: Iterable[graph.Node]) -> None:
    """Refuse backwards that are written in C++, or made by TorchScript.

    Their forward runs operators on tensors without a history, which is what is recorded.

    Args:
        recorder: The recorder, once the function has returned.
        nodes: The nodes that outer gradients reach.

    Raises:
        AutogradFunctionError: There is such a backward.
    """
    for node in nodes:
        name = node.name()
        maker = next((maker for part, maker in _HIDDEN.items() if part in name), None)
        if maker is not None:
            raise errors.AutogradFunctionError(
                f"{recorder.call}: a backward of {maker} ({name.rpartition('::')[2]}) lies between "
                "the inputs and an output that requires grad, and gradients from outside would not "
                f"pass through it; use {_ALTERNATIVES[maker]}, take the gradient inside the mapped "
                "function (torch.autograd.grad), or call the map under torch.no_grad()"
            )


_ALTERNATIVES = {
    "torch.jit.script": "the function as it was before it was scripted",
    "C++": "torch operators, or torch.library.custom_op with register_autograd",
}


def refuse_changes_by_modes(recorder: Histories, nodes: Iterable[graph.Node]) -> None:
    """Refuse what a dispatch mode inside the function writes below autograd, or takes from outside.

    Args:
        recorder: The recorder, once the function has returned.
        nodes: The nodes that outer gradients reach.

    Raises:
        AutogradFunctionError: A gradient would pass through such a tensor.
    """
    for node in nodes:
        if id(node) in recorder.missed:
            raise errors.AutogradFunctionError(
                f"{recorder.call}: a TorchDispatchMode inside the function writes in place to a "
                f"tensor that requires grad, or returns another that was there before "
                f"({node.name()}), before an output that requires grad: autograd does not see it, "
                "and gradients from outside would; let the mode return a new tensor, use a "
                "TorchFunctionMode, or take the gradient inside the mapped function "
                "(torch.autograd.grad)"
            )


def refuse_node_hooks(recorder: Histories, nodes: Iterable[graph.Node]) -> None:
    """Refuse hooks that the recorded function has registered on `nodes`, or on shared ones.

    Args:
        recorder: The recorder, once the function has returned.
        nodes: The nodes that outer gradients reach.

    Raises:
        AutogradFunctionError: There are such hooks; they are removed.
    """
    first = recorder.first_handle
    if RemovableHandle.next_id - first <= len(recorder.hooks):
        return
    outside = [t.grad_fn for _, t in recorder.captured.values()]
    for node in (*nodes, *[n for n in outside if n is not None]):
        if _removed(node, first):
            module = type(node).__name__ == "BackwardHookFunctionBackward"
            raise errors.AutogradFunctionError(
                f"{recorder.call}: "
                + (
                    "a module with a full backward hook lies between the inputs and an output that "
                    "requires grad, and outer gradients would not call the hook; take the gradient "
                    "inside the mapped function (torch.autograd.grad), or remove the hook"
                    if module
                    else f"a hook on a node of autograd's graph ({node.name()}: grad_fn."
                    "register_hook, register_prehook), which gradients from outside would not "
                    "call; register it on a tensor (Tensor.register_hook), or take the gradient "
                    "inside the mapped function (torch.autograd.grad)"
                )
            )


def _removed(node: graph.Node, first: int) -> bool:
    """Remove a node's hooks whose handles are numbered from `first` on; True if there were any."""
    found = False
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref()
        assert hooks is not None
        handle.remove()
        for number in [n for n in hooks if n >= first]:
            del hooks[number]
            found = True
    return found


def _nothing(*_: tuple[torch.Tensor, ...]) -> None:
    """A hook that changes no gradient."""


def hooks_before(recorder: Histories, reached: set[int]) -> list[list[Hook]]:
    """The hooks that outer gradients must call, grouped by tensor."""
    found: dict[tuple[int, int, int], list[Hook]] = {}
    for hook in recorder.hooks:
        if not hook.is_active:
            continue
        if hook.var.index in recorder.captured:
            raise errors.AutogradFunctionError(
                f"{recorder.call}: register_hook on a tensor of shape {hook.var.spec.shape} that "
                "all samples share, which the loop would give a hook for each sample; register "
                "it once, outside of the mapped function"
            )
        if id(hook.node) in reached:
            if getattr(hook.function, "__globals__", None) is vars(graph):
                raise errors.AutogradFunctionError(
                    f"{recorder.call}: register_multi_grad_hook before an output that requires "
                    "grad, which gradients from outside would not call; take the gradients inside "
                    "the mapped function (torch.autograd.grad) and hand them on, or change each "
                    "one with Tensor.register_hook"
                )
            guard = id(hook.function) if isinstance(hook.function, Recomputed) else 0
            found.setdefault((id(hook.node), hook.number, guard), []).append(hook)
    return list(found.values())
