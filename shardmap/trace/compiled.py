"""Compiled functions inside a recording: they run eagerly, so that each operator is seen.

`torch.compile` would compile the recorder with them, or skip them for good: facts learned about the
function while it is recorded decides whether it is compiled in later calls of the user's. Its
stance "force_eager" holds for the process, and other threads' compiled functions would be eager as
long as a recording runs. But a compiled function first checks if its thread is inside a kernel
of a fake tensor, and then calls the original function: so this thread pretends that it is.

TorchScript runs a function as it is written in its first calls and optimised later, with other
operators, and with a backward that shows none: its optimiser is off in this thread. What it has
optimised before stays so.
"""

from __future__ import annotations

import sys
from types import TracebackType

from shardmap._torch import (
    TracingContext,
    are_scripts_optimized,
    optimize_scripts,
    set_tracing_context,
    tracing_context,
)

_ASKS = "compile_wrapper"
"""Name of torch's function through which a compiled function is called."""


class _InsideKernel:
    in_kernel_invocation = True


_INSIDE_KERNEL = _InsideKernel()


class _Context:
    """The tracing context of this thread as a compiled function sees it.

    Other readers see the context that was there before, or one that counts as none.
    """

    def __init__(self, before: object):
        self._before = before
        self._counts = before is not None

    @property
    def fake_mode(self) -> object:
        if sys._getframe(1).f_code.co_name == _ASKS:
            return _INSIDE_KERNEL
        return getattr(self._before, "fake_mode", None)

    def __bool__(self) -> bool:
        return self._counts or sys._getframe(1).f_code.co_name == _ASKS

    def __getattr__(self, name: str) -> object:
        if self._before is None:
            self._before = TracingContext(None)
        return getattr(self._before, name)


class CompiledCodeRunsEagerly:
    """Context in which compiled functions of this thread run eagerly, and scripted ones plainly."""

    def __enter__(self) -> None:
        self._before, self._optimized = tracing_context(), are_scripts_optimized()
        set_tracing_context(_Context(self._before))
        optimize_scripts(False)

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        optimize_scripts(self._optimized)
        set_tracing_context(self._before)
