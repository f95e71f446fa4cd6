"""Torch's settings for the precision of products in float32, read and set in another process.

Torch has two interfaces to them: `torch.set_float32_matmul_precision`, and `fp32_precision` of
`torch.backends` and its parts. Once the second was used, the first one's question raises a
RuntimeError where its three answers cannot tell what is set.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch

_SETTING = "fp32_precision"
"""The attribute that torch.backends and its parts have, which not all of them declare."""


def _places() -> dict[str, object]:
    """The objects with an `fp32_precision`; those that others inherit from come first."""
    backends = torch.backends
    found: dict[str, object] = {"all": backends, "cuda.matmul": backends.cuda.matmul}
    parts: dict[str, types.ModuleType] = {"cudnn": backends.cudnn, "mkldnn": backends.mkldnn}
    for name, part in parts.items():
        found[name] = part
        for operator in ("matmul", "conv", "rnn"):
            if hasattr(part, operator):
                found[f"{name}.{operator}"] = getattr(part, operator)
    return {name: place for name, place in found.items() if hasattr(place, _SETTING)}


class Float32Precision(NamedTuple):
    """The precision of products in float32, as one process has set it."""

    overall: str | None
    """The answer of `torch.get_float32_matmul_precision`, or None if that raises."""
    by_operator: tuple[tuple[str, str], ...]
    """For each backend and kind of operator: its name and its `fp32_precision`."""

    @staticmethod
    def current() -> Float32Precision:
        """The settings of this process."""
        try:
            overall = torch.get_float32_matmul_precision()
        except RuntimeError:  # both interfaces were used, and no answer of this one is right
            overall = None
        each = [(name, str(_precision(place))) for name, place in _places().items()]
        return Float32Precision(overall, tuple(each))

    def apply(self) -> None:
        """Set these settings in this process."""
        if self.overall is not None:
            torch.set_float32_matmul_precision(self.overall)
        places = _places()
        for name, precision in self.by_operator:
            place = places.get(name)  # None: another version of torch, which lacks it
            if place is not None and _precision(place) != precision:
                setattr(place, _SETTING, precision)


def _precision(place: object) -> object:
    return getattr(place, _SETTING, "none")
