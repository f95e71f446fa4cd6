"""Refuse writes to a sample that other samples, or other tensors, would see."""

from __future__ import annotations

import torch

from shardmap import errors
from shardmap._torch import storage_id
from shardmap.program.schema import span
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording, element


def refuse_shared_writes(recording: Recording, batch: Batch, call: str) -> None:
    """Refuse writes to a row that other samples or another tensor would see."""
    if not recording.written_inputs:
        return
    tensors = [element(batch.leaves[i]) for i, _ in batch.mapped]
    for number in recording.written_inputs:
        if number in batch.copies:
            raise errors.CapturedWriteError(
                f"{call}: the function writes in place to mapped argument {number}, a lazy stack "
                "of tensordicts, of which it is given copies; clone the argument inside the "
                "function"
            )
        tensor = tensors[number]
        if tensor.is_conj() or tensor.is_neg():
            raise errors.CapturedWriteError(
                f"{call}: the function writes in place to mapped argument {number}, which is a "
                "lazy conjugate or negative of other memory; "
                "pass .resolve_conj() or .resolve_neg() of it"
            )
        if _may_overlap(tensor):
            raise errors.CapturedWriteError(
                f"{call}: the function writes in place to mapped argument {number}, whose samples "
                "overlap in memory (shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}): later samples would read what "
                "earlier ones wrote; pass a clone"
            )
        address = storage_id(tensor.untyped_storage())
        shared = any(
            storage_id(element(t).untyped_storage()) == address for t in recording.captured
        ) or any(
            storage_id(t.untyped_storage()) == address and not _apart(t, tensor)
            for k, t in enumerate(tensors)
            if k != number
        )
        if shared:
            raise errors.CapturedWriteError(
                f"{call}: the function writes in place to mapped argument {number}, whose memory "
                "another argument or a captured "
                "tensor shares: later "
                "samples would read what earlier ones wrote; pass clones"
            )


def _apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if one of two tensors of one storage ends before the other begins."""
    (first, end), (other_first, other_end) = (
        (start, start + span(t.shape, t.stride()) * t.element_size())
        for t in (a, b)
        for start in (t.storage_offset() * t.element_size(),)
    )
    return end <= other_first or other_end <= first


def _may_overlap(tensor: torch.Tensor) -> bool:
    """True if two elements may share memory.

    The steps of a tensor without overlap are each larger than all smaller ones reach.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
