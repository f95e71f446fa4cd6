"""Memory that python code can write to without an operator: by numpy, DLPack, a storage.

Of what differs by sample such access is refused. Of what all samples share the value may be read:
it is the same for all. But the code that has it can write there too, which no recording shows. So
the bytes are kept, and compared whenever a recorded call reads that memory, and at the end.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from shardmap import errors
from shardmap.trace.recording import user_line

_CAPTURED_BYTES = 1 << 24
"""Largest memory from outside of the function whose bytes are kept.

To copy 16 MiB takes 1.4 ms, and each comparison 11 ms, at each recorded call that reads them; of
64 MiB, which fit no cache, 48 and 72 ms, more than recording a large model takes."""


@dataclass(frozen=True, slots=True)
class _Known:
    bytes: torch.Tensor
    shape: tuple[int, ...]
    door: str
    captured: weakref.ref[torch.Tensor] | None
    """The tensor, if it is from outside of the function."""


class Exposed:
    """The memories of a recording that python code can reach, by group.

    Args:
        call: The user's call, for errors.
    """

    def __init__(self, call: str):
        self._call = call
        self._of: dict[int, _Known] = {}

    def __contains__(self, group: int) -> bool:
        return group in self._of

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, group: int, tensor: torch.Tensor, door: str, captured: bool) -> None:
        """Keep the bytes of a tensor's memory, before python code reaches it by `door`."""
        large = captured and tensor.untyped_storage().nbytes() > _CAPTURED_BYTES
        if group not in self._of and not large:
            kept = _bytes_of(tensor).clone()
            shape = tuple(tensor.shape)
            self._of[group] = _Known(kept, shape, door, weakref.ref(tensor) if captured else None)

    def renew(self, group: int, tensor: torch.Tensor) -> None:
        """Keep the bytes anew, after a recorded write."""
        known = self._of[group]
        self._of[group] = _Known(_bytes_of(tensor).clone(), known.shape, known.door, known.captured)

    def check(self, group: int, tensor: torch.Tensor) -> None:
        """Refuse a tensor whose memory was written without an operator."""
        known = self._of[group]
        if torch.equal(_bytes_of(tensor), known.bytes):
            return
        text = (
            f"{self._call}: the memory of a tensor of shape {known.shape}, which the function "
            f"reached by {known.door}, was written to without an operator, seen at {user_line()}"
        )
        if known.captured is not None:
            raise errors.CapturedWriteError(
                f"{text}; all samples share that tensor, and the loop would write to it once per "
                "sample: return the value instead, or clone the tensor inside the function"
            )
        raise errors.EscapeError(
            f"{text}; write to it by torch's operators (`t[i] = v`, `masked_fill_`), or make it "
            "outside of the function"
        )

    def finish(self) -> None:
        """Refuse writes to tensors from outside of the function."""
        for group, known in self._of.items():
            tensor = None if known.captured is None else known.captured()
            if tensor is not None:
                self.check(group, tensor)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
