"""The private parts of torch that more than one file needs, in one place: they move between versions."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

functorch: Any = torch._C._functorch  # type: ignore[reportAttributeAccessIssue] - a C extension without stubs

has_internal_overlap: Any = torch._debug_has_internal_overlap  # type: ignore[reportPrivateImportUsage] - 1: two elements share memory

__all__ = ["dispatch_modes", "functorch", "has_internal_overlap"]
