"""The settings of torch that code may ask for, found by the names that it spells out."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from shardmap.program.autocast import asked_modes
from shardmap.program.backend_flags import Flag, backend_flags

VALUES = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format, np.generic, np.dtype,
)  # fmt: skip
"""Types whose objects never change, and whose text says all."""


@functools.lru_cache(4096)
def settings_asked(names: frozenset[str]) -> list[Flag]:
    """The settings of torch that code with some names may ask for."""
    found = [(f"torch.{name}()", _question(name)) for name in sorted(names)]
    flags = [
        flag for name in sorted(names & backend_flags().keys()) for flag in backend_flags()[name]
    ]
    return [(where, ask) for where, ask in found if ask is not None] + flags


def _question(name: str) -> Callable[[], object] | None:
    """Torch's function of this name, if it takes no argument and tells a setting."""
    asks = name.startswith(("is_", "are_", "get_")) or name == "initial_seed"
    ask = getattr(torch, name, None) if asks else None
    if not callable(ask) or name in _OF_THE_GRADIENT or asked_modes([name]):
        return None
    try:
        value = ask()
    except (TypeError, RuntimeError, AssertionError):
        return None  # it takes arguments, and answers about them
    return ask if isinstance(value, VALUES) else None


_OF_THE_GRADIENT = frozenset(("is_grad_enabled", "is_inference_mode_enabled"))
"""Questions about how the gradient is taken, and not about a state that stays, as `asked_modes`."""
