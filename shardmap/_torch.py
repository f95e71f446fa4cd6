"""The private parts of torch that more than one file needs, in one place.

They move between versions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

functorch: Any = torch._C._functorch  # type: ignore[reportAttributeAccessIssue] - a C extension without stubs

has_internal_overlap: Any = torch._debug_has_internal_overlap  # type: ignore[reportPrivateImportUsage] - 1: two elements share memory


class Switch:
    """A switch of torch that is the same for all threads.

    Off while any of them needs it off, then as it was before.
    """

    def __init__(self, get: Callable[[], bool], put: Callable[[bool], Any]):
        self.get = get
        self.put = put
        self.lock = threading.Lock()
        self.users = 0
        self.before = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Off inside this context."""
        with self.lock:
            if self.users == 0:
                self.before = self.get()
                self.put(False)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.put(self.before)


transformer_fast_paths = Switch(
    torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled
)
cudnn = Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled)
mkldnn = Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)

__all__ = [
    "Switch",
    "cudnn",
    "dispatch_modes",
    "functorch",
    "has_internal_overlap",
    "mkldnn",
    "transformer_fast_paths",
]
