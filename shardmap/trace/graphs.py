"""Autograd's graph, walked from results towards leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.autograd import graph

Edge = tuple[graph.Node, int]
"""A node, and which of its results is meant."""


def edge_of(tensor: torch.Tensor) -> tuple[graph.Node | None, int]:
    """The edge of which a tensor is the result; of a leaf there is no node."""
    return tensor.grad_fn, tensor.output_nr


def edges_behind(
    starts: Iterable[tuple[graph.Node | None, int]], seen: set[graph.Node]
) -> Iterator[Edge]:
    """Yield the edges of the graph from some on, these included, each once.

    Args:
        starts: Where to start.
        seen: The nodes that are not followed any more; those that are followed are added.
    """
    waiting, known = [*starts], set[Edge]()
    while waiting:
        node, number = waiting.pop()
        if node is None or (node, number) in known:
            continue
        known.add((node, number))
        yield node, number
        if node not in seen:
            seen.add(node)
            waiting += node.next_functions


def leaf_of(node: graph.Node) -> torch.Tensor | None:
    """The leaf into which a node accumulates gradients; None for other nodes."""
    return getattr(node, "variable", None)


def ends_of(samples: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves at which the gradients of samples end while they are recorded."""
    parts = [part for t in samples if t.grad_fn is not None for part in t.grad_fn.next_functions]
    found = [leaf_of(node) for node, _ in parts if node is not None]
    return [t for t in found if t is not None]
