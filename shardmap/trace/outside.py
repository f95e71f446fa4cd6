"""Find tensors that the function computed from its sample where no recording sees it.

Another thread's calls are not recorded, so that what it returns looks like a tensor from outside.
Its history in autograd's graph tells: it leads back to the sample, whose gradient would miss it.
Values that differ by sample are found by comparing samples; of one sample, or of samples that are
all alike, only the history shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd import graph

from shardmap._torch import functorch
from shardmap.trace.graphs import edges_behind


def origins(samples: Sequence[torch.Tensor]) -> list[graph.Node | None]:
    """For each recorded sample: the node of autograd's graph in which its history ends."""
    return [sample.grad_fn for sample in samples]


def computed_outside(nodes: Iterable[graph.Node | None], captured: Iterable[torch.Tensor]) -> str:
    """Text on the first captured tensor that depends on the sample; empty if none does."""
    origins = {node for node in nodes if node is not None}
    if not origins:
        return ""
    seen: set[graph.Node] = set()
    for tensor in captured:
        behind = edges_behind([(_history(tensor), 0)], seen)
        if any(node in origins for node, _ in behind):
            return (
                f"a tensor of shape {tuple(tensor.shape)} is computed from the sample where no "
                "operator call is seen, such as in another thread"
            )
    return ""


def _history(tensor: torch.Tensor) -> graph.Node | None:
    if functorch.is_functorch_wrapped_tensor(tensor) or not tensor.requires_grad:
        return None
    try:
        return tensor.grad_fn
    except RuntimeError:  # autograd forbids to read it of some views
        return None
