"""Give results of forward mode the histories that symbolic zeros hide.

The tangent of `x * 2` is `tangent * 2 + x * 0`, where torch's zero is symbolic: the result is
computed without `x`, and yet requires grad in the loop, with a gradient of zeros. No recorded call
shows that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd import graph

from shardmap.program.analysis import written
from shardmap.program.ir import GRAD, Equation
from shardmap.trace.graphs import edge_of, edges_behind, leaf_of
from shardmap.trace.histories import CUTS
from shardmap.trace.recorder import Recorder
from shardmap.trace.recording import is_plain

Tensor = torch.Tensor


def with_hidden_histories(
    recorder: Recorder,
    samples: Sequence[Tensor],
    begins: Sequence[graph.Node | None],
    outputs: list[Tensor],
) -> list[Tensor]:
    """The outputs, each with a history that leads to all tensors that autograd's graph leads to.

    Args:
        recorder: The recorder, once the function has returned.
        samples: The recorded samples.
        begins: The node of each in autograd's graph, before the function ran.
        outputs: The function's results.
    """
    if not recorder.groups_of_zeros:
        return outputs
    shared = [t for _, t in recorder.captured.values() if is_plain(t) and t.requires_grad]
    return [
        _joined(recorder, output, _reached(output, samples, begins, shared))
        if is_plain(output) and output.requires_grad and output.layout is torch.strided
        else output
        for output in outputs
    ]


def _reached(
    output: Tensor,
    samples: Sequence[Tensor],
    begins: Sequence[graph.Node | None],
    shared: Sequence[Tensor],
) -> list[Tensor]:
    """The samples and captured tensors to which autograd's graph leads from an output."""
    edges = set(edges_behind([edge_of(output)], set()))
    nodes = {node for node, _ in edges}
    leaves = {id(leaf_of(node)) for node in nodes}
    found = [t for t, begin in zip(samples, begins, strict=True) if begin in nodes]
    return found + [t for t in shared if edge_of(t) in edges or (t.is_leaf and id(t) in leaves)]


def _joined(recorder: Recorder, output: Tensor, reached: Iterable[Tensor]) -> Tensor:
    """An output, joined with no element of each tensor to which no recorded call leads."""
    of = recorder.known(output)
    if of is None:
        return output
    known = _leading_to(recorder.equations, of.group)
    hidden = [
        t
        for t in reached
        if t.requires_grad
        and t.numel()
        and (var := recorder.known(t)) is not None
        and var.group not in known
    ]
    if not hidden:
        return output
    with recorder, torch.enable_grad():
        nothing = [_real(t, output).reshape(-1)[:0].to(output.dtype) for t in hidden]
        return torch.cat([output.reshape(-1), *nothing]).view(output.shape)


def _real(tensor: Tensor, output: Tensor) -> Tensor:
    complex_only = tensor.is_complex() and not output.is_complex()
    return torch.view_as_real(tensor) if complex_only else tensor


def _leading_to(equations: Sequence[Equation], group: int) -> set[int]:
    """The memory that a history leads to, by the recorded calls."""
    found = {group}
    for eq in reversed(equations):
        if eq.op in CUTS or found.isdisjoint(v.group for v in (*eq.results(), *written(eq))):
            continue
        found |= {v.group for v, flag in zip(eq.inputs(), eq.flags, strict=True) if flag == GRAD}
    return found
