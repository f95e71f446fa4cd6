"""Find in-place `torch.autograd.Function`s whose result is a view, or has views.

A Function that has written to its argument (`ctx.mark_dirty`) becomes a part of the history of the
memory: autograd derives the histories of the other views from it. Of an argument that is itself a
view, even the Function's node is hidden in one of torch's (`CopySlices`), which in-place operators
on views make as well. Those are recorded, so what no recorded write explains is a Function's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction

from shardmap import errors
from shardmap._torch import base_of, sequence_number
from shardmap.program.ir import Var
from shardmap.program.operators import OpInfo
from shardmap.trace.equations import Equations
from shardmap.trace.recording import flat_tensors
from shardmap.trace.tensor_table import Variables


def _is_hiding(node: graph.Node) -> bool:
    """True for the node of a tensor that was written to by way of a view."""
    return node.name().endswith("CopySlices")


class ViewWrites(Equations):
    """The recorded calls, and the writes to views among them that autograd has seen."""

    def __init__(self, call: str, outer: Variables | None, once: bool):
        super().__init__(call, outer, once)
        self.below = False
        """True inside an operator that is recorded as the calls of its decomposition."""
        self._being_written: list[torch.Tensor] = []
        """Views that the last operator that writes has written to, where autograd sees it."""
        self._explained: set[int] = set()
        """The numbers of the nodes that autograd has made for such writes."""
        self.older_views: dict[int, graph.Node] = {}
        """By variable: views of a tensor that a Function has written to after they were made."""
        self.behind_views: dict[int, graph.Node] = {}
        """By address: the nodes of Functions with such views that are used afterwards, and of those
        that have written to a sample."""

    def note_writes(self, info: OpInfo, args: tuple, kwargs: dict[str, object]) -> None:
        """Note what an operator, which is about to run, writes to."""
        self._explain()
        if not (info.writes or info.writes_named) or not torch.is_grad_enabled():
            return
        if any(t.requires_grad for t in flat_tensors((*args, *kwargs.values()))):
            written = [args[i] for i in info.writes if i < len(args)]
            written += [kwargs[name] for name in info.writes_named if name in kwargs]
            self._being_written = [t for t in flat_tensors(written) if base_of(t) is not None]

    def _explain(self) -> None:
        """Note the nodes that autograd has made for the last write."""
        bases = [base_of(tensor) for tensor in self._being_written]
        for base in bases:
            node = base.grad_fn
            for _ in range(sum(other is base for other in bases)):  # `_foreach_` writes to several
                if node is not None and _is_hiding(node):
                    self._explained.add(sequence_number(node)())
                    node = node.next_functions[0][0]
        self._being_written = []

    def note_older_views(self, result: torch.Tensor, node: graph.Node, value: Var) -> None:
        """Note the views of a Function's result that were made before it was the result.

        Args:
            result: The result.
            node: The Function's node.
            value: The variable of the result before.
        """
        if any(var.index == value.index for var in self.inputs):  # its batch is what it is part of
            self.behind_views[id(node)] = node
        for ref, var in self.entries.values():
            if var.group == value.group:
                tensor = ref()
                if tensor is not None and base_of(tensor) is result:
                    self.older_views[var.index] = node

    def refuse_functions_behind_views(
        self, nodes: Iterable[graph.Node], samples: Iterable[torch.Tensor] = ()
    ) -> None:
        """Refuse in-place Functions of which the recorded calls show no history.

        Args:
            nodes: The nodes that outer gradients reach.
            samples: The samples, which are rows of batches.

        Raises:
            AutogradFunctionError: There is such a Function.
        """
        self._explain()
        written = {id(t.grad_fn) for t in samples if isinstance(t.grad_fn, BackwardCFunction)}
        for node in nodes:
            hidden = _is_hiding(node) and sequence_number(node)() not in self._explained
            if hidden or id(node) in written or id(node) in self.behind_views:
                raise errors.AutogradFunctionError(
                    f"{self.call}: a custom autograd.Function writes in place (ctx.mark_dirty) to "
                    "a view, to a mapped argument, or to a tensor of which an older view is used "
                    "afterwards, and gradients from outside would not pass through its backward; "
                    "give it a copy and use its result (F.apply(x.clone()); what nn.Linear returns "
                    "for a single sample is a view), or take the gradient inside the mapped "
                    "function (torch.autograd.grad)"
                )
