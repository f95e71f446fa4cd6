"""Packed sequences: torch's C++ code reads the number of rows of each step as numbers.

No operator shows that. So python asks for these numbers where C++ reads them, as for any value:
samples of other numbers take other paths, and a replay finds that shared ones have changed. The
lengths that `pad_packed_sequence` returns are written by C++ too; operators compute them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardmap._torch import pad_packed_sequence
from shardmap.trace import recurrent

PADS = pad_packed_sequence
"""The function behind `pad_packed_sequence`."""


def sizes_of(func: object, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The argument with the number of rows of each step; None if a call has none."""
    if func is PADS:
        return args[1] if len(args) > 1 else kwargs.get("batch_sizes")
    if func not in recurrent.CELLS or len(args) < 3 or not isinstance(args[1], torch.Tensor):
        return None
    return args[1] if func is torch.lstm or isinstance(args[2], torch.Tensor) else None


def ask(sizes: torch.Tensor, values: Sequence[int], is_mapped: bool) -> None:
    """Ask for the sizes that C++ is going to read.

    Args:
        sizes: The number of rows of each step, `[steps]`, which never grows.
        values: The same numbers, read without recording.
        is_mapped: True if they differ by sample.
    """
    if not is_mapped:
        torch.equal(sizes, torch.tensor(values, dtype=sizes.dtype, device=sizes.device))
        return
    rows = max(values, default=0)
    numbers = sizes if len(values) <= rows else torch.cat([sizes[:1], lengths_of(sizes, rows)])
    for number in numbers.unbind(0):
        number.item()


def lengths_of(sizes: torch.Tensor, rows: int) -> torch.Tensor:
    """The number of steps that each of the rows has: `[rows]`."""
    return (sizes > torch.arange(rows, device=sizes.device).unsqueeze(1)).sum(1)
