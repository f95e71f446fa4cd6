"""Find the outputs that autograd may save for a backward: the caller may write to what it gets.

The loop stacks what its samples return, into memory that no backward reads. An output of one chunk
is the chunk's own result: `map(x).mul_(2)` would write to what `exp` has saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardmap.program.analysis import IDENTITIES
from shardmap.program.ir import Equation, Program
from shardmap.program.operators import op_info
from shardmap.program.schema import short_name

_FREE = set(
    "add sub rsub neg sum mean view _unsafe_view reshape _reshape_alias t transpose permute expand "
    "squeeze unsqueeze select slice narrow diagonal unfold unbind split split_with_sizes "
    "as_strided flip roll cat stack clone _to_copy copy_ add_ sub_ neg_ zero_ fill_ "
    "index_select gather select_backward slice_backward alias real imag view_as_real "
    "view_as_complex constant_pad_nd zeros_like ones_like empty_like new_zeros new_empty "
    "full_like".split()
)
"""Operators of which autograd saves neither arguments nor results."""

_OF_ARGUMENTS = _FREE | set(
    "mul div mm bmm addmm baddbmm addmv addbmm mv dot addcmul addcdiv convolution where sin cos "
    "log log1p log2 abs square index masked_fill lerp gelu silu softplus leaky_relu clamp "
    "native_layer_norm native_group_norm native_batch_norm embedding nll_loss_forward mse_loss "
    "smooth_l1_loss huber_loss zeros ones full arange rand randn scatter scatter_add index_add "
    "index_put index_put_ mul_ div_ addmm_ cumsum tril triu".split()
)
"""Operators of which autograd saves arguments at most."""


def saved_results(program: Program) -> tuple[bool, ...]:
    """For each output: whether autograd may save it, or other tensors of its memory."""
    wanted = {v.group for v in program.outputs}
    saved: set[int] = set()
    for eq in program.equations:
        read = {v.group for v in eq.inputs()}
        results = {v.group for v in eq.results()}
        if not wanted.isdisjoint(read | results):
            name = _name(eq)
            if name not in _FREE:
                saved |= read
            if name not in _OF_ARGUMENTS:
                saved |= results
    return tuple([v.group in saved for v in program.outputs])


def _name(eq: Equation) -> str:
    if eq.op in IDENTITIES or op_info(eq.op).shape_only:
        return "view"
    return short_name(eq.op).partition(".")[0]


def unsaved(outs: Sequence[torch.Tensor], saved: Sequence[bool]) -> list[torch.Tensor]:
    """A chunk's outputs, in memory of their own where autograd may have saved them.

    Args:
        outs: The outputs.
        saved: What `saved_results` says; nothing is saved where autograd records nothing.
    """
    if not any(saved):
        return list(outs)
    return [t.clone() if s else t for t, s in zip(outs, saved, strict=True)]
