"""Find out if a function asks for what differs between reverse and forward mode.

In reverse mode the tensors that a function computes require grad, in forward mode they do not: a
branch on that, or a hook that is registered behind it, gives another derivative in each mode.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import torch
from torch.overrides import TorchFunctionMode

from shardmap.trace.lifted import QUESTIONS
from shardmap.trace.watch import is_own

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_HOOKS = {
    _TORCH + os.path.join(*path)
    for path in (("nn", "modules", "module.py"), ("utils", "hooks.py"), ("autograd", "graph.py"))
}
"""Torch's files that ask on behalf of a user's hook; its others choose a kernel by the answer."""


class Asked(TorchFunctionMode):
    """Notes whether a function asks its tensors for their history, or registers a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.history = False
        """True if the function has asked."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Note one call of torch's python interface, and make it."""
        if func in QUESTIONS or func is torch.Tensor.register_hook:
            file = sys._getframe(1).f_code.co_filename
            self.history |= file in _HOOKS or not (file.startswith(_TORCH) or is_own(file))
        return func(*args, **(kwargs or {}))
