"""Follow what `TorchDispatchMode`s that a function enters change below autograd.

Such a mode stands between autograd and the recorder. The recorder sees what the mode calls;
autograd differentiates the call that the function made, whatever the mode returns. So a mode of
ours is put on top of them during each call of torch's python interface: it sees the function's own
calls, and compares them with those that arrive. Where a mode only counts or prints, nothing
differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from shardmap import errors
from shardmap._torch import OpOverload, TorchDispatchMode, aten
from shardmap.program.operators import op_info
from shardmap.trace.recording import flat_tensors


class ChecksTangents(Protocol):
    """Protocol of what knows of forward mode around the call."""

    def check_tangents(self, given: Sequence[object]) -> None:
        """Record that forward mode must not differentiate by arguments of a call."""
        ...


class Follows(Protocol):
    """Protocol of a recorder that modes of the function may stand above."""

    call: str
    above: Passed | None
    count: int
    paused: bool

    @property
    def lifted(self) -> ChecksTangents | None:
        """What knows of forward mode around the call."""
        ...

    def encode(self, value: object, flags: list[int], param: bool) -> object:
        """The variable of a tensor."""
        ...

    def change(self, tensor: torch.Tensor, count: int, returned: bool) -> None:
        """Note that a mode has changed the value of a tensor."""
        ...

    def cut_below(self, tensor: torch.Tensor, count: int) -> None:
        """Record that a tensor which was made below autograd has no history."""
        ...


class Passed:
    """One call that the function made, and the calls by which modes answered it."""

    def __init__(self, func: OpOverload, args: tuple, kwargs: dict[str, object]):
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.results: list[list[torch.Tensor]] = []
        """The results of each call that was the function's own, with the same arguments."""
        self.others: list[weakref.ref[torch.Tensor]] = []
        """The results of other calls."""
        self.written: list[torch.Tensor] = []
        """What other calls wrote to."""

    def arrived(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object], out: object
    ) -> None:
        """Note a call that has been answered below the modes."""
        found = flat_tensors((out,))
        if func is self.func and _same(args, self.args) and _same(kwargs, self.kwargs):
            self.results.append(found)
            return
        self.others += map(weakref.ref, found)
        info = op_info(func)
        if info.writes or info.writes_named or info.hidden_writes is not None:
            self.written += flat_tensors((*args, *kwargs.values()))

    def is_answered_by(self, out: object) -> bool:
        """True if the modes have returned what the function's own call did."""
        found = flat_tensors((out,))
        alike = any(
            len(found) == len(result) and all(a is b for a, b in zip(found, result, strict=True))
            for result in self.results
        )
        return alike and len(self.results) == 1 and not self.written


def _same(a: object, b: object) -> bool:
    """True if two arguments are the same tensors and equal values."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return bool(a == b)


class Above(TorchDispatchMode):
    """The mode above those that the function has entered."""

    def __init__(self, recorder: Follows):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run one call of the function's, and note where modes change its result."""
        recorder, kwargs = self.recorder, kwargs or {}
        if func is aten._make_dual.default and torch.is_inference_mode_enabled():
            raise errors.TransformError(
                f"{recorder.call}: the function traces forward mode (torch.func.linearize) under "
                "torch.inference_mode(), where torch's tangents are zeros; call the map under "
                "torch.no_grad()"
            )
        call = Passed(func, args, kwargs)
        around, recorder.above = recorder.above, call
        count = recorder.count
        try:
            out = func(*args, **kwargs)
        finally:
            recorder.above = around
        if around is not None:
            around.arrived(func, args, kwargs, out)
        if not recorder.paused:
            self._judge(call, out, count)
        return out

    def _judge(self, call: Passed, out: object, count: int) -> None:
        """Note what autograd will differentiate otherwise than the calls that were recorded.

        Args:
            call: The function's call.
            out: What the modes have returned.
            count: Number of variables before the call.
        """
        recorder = self.recorder
        given = flat_tensors((*call.args, *call.kwargs.values()))
        wanted = [t for t in given if t.requires_grad]
        history = torch.is_grad_enabled() and bool(wanted)
        returned = [] if call.is_answered_by(out) else flat_tensors((out,))
        changed = {id(t) for t in returned if history}
        for tensor in (*returned, *[ref() for ref in call.others]):
            if tensor is not None and id(tensor) not in changed:
                recorder.cut_below(tensor, count)
        for tensor in call.written:
            recorder.change(tensor, count, False)
        if (returned or call.written) and not history and recorder.lifted is not None:
            recorder.lifted.check_tangents(given)
        if not changed:
            return
        for tensor in wanted:  # by these the node of the call is known
            recorder.encode(tensor, [], False)
        for tensor in returned:
            recorder.change(tensor, count, True)
