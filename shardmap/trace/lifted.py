"""Answer `requires_grad` as the loop's tensors do where samples require grad only to be recorded.

Under transforms and under forward mode around a map, every floating-point sample requires grad
while it is recorded (`record.rows_of`). The rows of the loop do not all do so: under
`torch.func.jvp` none does, under `torch.func.grad` those that it differentiates. Which tensors
require grad in the loop follows from autograd's graph of the recording, whose leaves are known.
"""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from shardmap import errors
from shardmap._torch import forward_level, functorch, is_forward_on, without_functions
from shardmap.program.ir import Equation
from shardmap.program.own_backward import NO_TANGENTS
from shardmap.trace.graphs import Edge, edge_of, edges_behind, ends_of, leaf_of
from shardmap.trace.histories import Histories
from shardmap.trace.recording import is_plain
from shardmap.trace.watch import is_own

Tensor = torch.Tensor

QUESTIONS: dict[object, object] = {
    getattr(Tensor, name).__get__: answer
    for name, answer in {"requires_grad": False, "is_leaf": True, "grad_fn": None}.items()
}
"""What reads the attributes of a tensor that follow from its history, each with the answer of a
tensor without one."""

_NUMBER = re.compile(r"must be \w+, not Tensor").search


class _Levels(NamedTuple):
    """The transforms around a call."""

    differentiating: int
    """Level of the innermost one that takes derivatives; 0 if there is none."""
    mapping: frozenset[int]
    """Levels of the vmaps further in: a tensor that they map says that it requires no grad."""
    forward: bool
    """True if forward mode is around."""


def levels_around() -> _Levels:
    """The transforms around a call, before they are set aside."""
    levels = functorch.get_interpreter_stack() or []
    maps = functorch.TransformType.Vmap
    forward = any(i.key() == functorch.TransformType.Jvp for i in levels)
    last = max([i.level() for i in levels if i.key() != maps], default=0)
    mapping = frozenset([i.level() for i in levels if i.level() > last])
    return _Levels(last, mapping, forward or forward_level(forward_ad) >= 0)


class Lifted:
    """The tensors of a recording that require grad, told from those that do so in the loop.

    Args:
        recorder: The recorder.
        around: That of the recording around this one, if there is one.
        levels: The transforms around the call.
        samples: The samples, before the function has written to any.
        arguments: The mapped argument of which each is a sample.
    """

    def __init__(
        self,
        recorder: Histories,
        around: Lifted | None,
        levels: _Levels,
        samples: Sequence[Tensor],
        arguments: Sequence[Tensor],
    ):
        self.recorder = recorder
        self.around = around
        self.levels = levels
        self._arguments: dict[int, tuple[Tensor, Tensor]] = {}
        """By the address of the leaf that a sample is made of: it, and the argument."""
        self._on = is_forward_on()
        self._checked: tuple[int, tuple] | None = None
        """The last call whose arguments forward mode must not differentiate by, while it runs."""
        self._given = list(arguments)
        self._set: set[Edge] = set()
        """Tensors of which the function has set `requires_grad`."""
        for sample, argument in zip(samples, arguments, strict=True):
            for leaf in ends_of([sample]) or [sample]:
                self._arguments[id(leaf)] = leaf, argument

    def follow_forward_mode(self) -> None:
        """Follow where forward mode is off: in Functions, and where the function switches it off.

        Raises:
            TransformError: It has switched forward mode off, which would stop tangents from
                outside that replays would let pass.
        """
        if is_forward_on() is self._on or not self.levels.forward:
            self._checked = None
            return
        frame = _application()
        if frame is not None:
            self.check_tangents(frame.f_locals["args"], id(frame))
            return
        raise errors.TransformError(
            f"{self.recorder.call}: the function switches forward mode off or on "
            "(forward_ad._set_fwd_grad_enabled), or applies an autograd.Function that does, while "
            "forward mode is around the call, and recorded calls do not show it; use "
            "tensor.detach() where tangents are to stop, or switch it around the call of the map"
        )

    def check_tangents(self, given: Sequence[object], call: int = 0) -> None:
        """Record that forward mode must not differentiate by arguments of a call.

        Under `torch.no_grad()` too: it stops no tangents.

        Args:
            given: The arguments.
            call: A number that tells this call from others that are running.
        """
        if not self.levels.forward:
            return
        recorder, flags = self.recorder, []
        with without_functions():
            tensors = [_plain(recorder, t) for t in given if isinstance(t, Tensor)]
            read = [t for t in tensors if t.is_floating_point() or t.is_complex()]
            names = tuple([recorder.encode(t, flags, False) for t in read])
        if names and self._checked != (call, names):
            self._checked = call, names
            mode = torch.is_grad_enabled()
            recorder._append(Equation(NO_TANGENTS, (names,), (), (), tuple(flags), mode))

    def refuse_number(self, error: Exception) -> None:
        """Refuse a tensor for a number, which torch takes of the loop's tensors.

        Raises:
            TransformError: Torch has refused one, perhaps only since samples require grad while
                they are recorded.
        """
        if not (self.levels.forward and isinstance(error, TypeError) and _NUMBER(str(error))):
            return
        raise errors.TransformError(
            f"{self.recorder.call}: a tensor is passed for a number ({error}), and under forward "
            "mode around the map torch takes none whose tangent the map would have to follow; pass "
            "tensor.detach(), which is what torch reads there: a number without a tangent"
        ) from error

    def note_set(self, tensor: Tensor) -> None:
        """Note that the function lets a tensor require grad."""
        node, number = edge_of(tensor)
        if node is not None:
            self._set.add((node, number))

    def answer(self, question: Callable[[Tensor], object], tensor: Tensor) -> object:
        """The loop's answer to a question of `QUESTIONS` about a tensor."""
        if not self._is_asked_by_others(tensor) or self.in_loop(tensor):
            return question(tensor)
        return QUESTIONS[question]

    def _is_asked_by_others(self, tensor: Tensor) -> bool:
        """True if code that is not ours asks for a result of the function's, or for a sample."""
        if not is_plain(tensor) or not tensor.requires_grad:
            return False
        var = self.recorder.known(tensor)
        if var is None or var.index in self.recorder.captured:
            return False
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename in _HANDING_ON:
            frame = frame.f_back
        return frame is None or not is_own(frame.f_code.co_filename)

    def in_loop(self, tensor: Tensor) -> bool:
        """True if a tensor of the recording that requires grad does so in the loop."""
        if self.levels.mapping and self._is_mapped(tensor):
            return False
        behind = list(edges_behind([edge_of(tensor)], set()))
        if not self._set.isdisjoint(behind):
            return True
        leaves = [tensor] if not behind else [leaf_of(node) for node, _ in behind]
        wrappers = {id(plain): outer for outer, plain in self.recorder.wrappers.values()}
        for leaf in leaves:
            if leaf is None:
                continue
            known = self._arguments.get(id(leaf))
            outer = wrappers.get(id(leaf), leaf) if known is None else known[1]
            if self._is_made_inside(leaf) or self._outside_requires(outer):
                return True
        return False

    def _is_mapped(self, tensor: Tensor) -> bool:
        """True if a tensor was computed from one that the innermost vmaps around map."""
        recorder, mapping = self.recorder, self.levels.mapping
        pairs = list(zip(recorder.inputs, self._given, strict=True))
        for outer, plain in recorder.wrappers.values():
            var = recorder.known(plain)
            if var is not None:
                pairs.append((var, outer))
        mapped = {v.group for v, outer in pairs if functorch.maybe_get_level(outer) in mapping}
        for eq in recorder.equations:
            if any(v.group in mapped for v in eq.inputs()):
                mapped |= {v.group for v in eq.results()}
        var = recorder.known(tensor)
        return var is not None and var.group in mapped

    def _is_made_inside(self, leaf: Tensor) -> bool:
        var = self.recorder.known(leaf)
        return (
            var is not None
            and var.index not in self.recorder.captured
            and id(leaf) not in self._arguments
        )

    def _outside_requires(self, outer: Tensor) -> bool:
        """True if results of a tensor from outside require grad in the loop."""
        if not outer.requires_grad:
            return False
        if self.levels.differentiating:
            return functorch.maybe_get_level(outer) == self.levels.differentiating
        if self.around is None:
            return True
        var = self.around.recorder.known(outer)
        if var is None or var.index in self.around.recorder.captured:
            return self.around._outside_requires(outer)
        return self.around.in_loop(outer)


def _application() -> types.FrameType | None:
    """The outermost running application of an `autograd.Function`.

    Torch switches forward mode off in its forward.
    """
    frame, found = sys._getframe(2), None
    while frame is not None:
        if frame.f_code is _APPLY:
            found = frame
        frame = frame.f_back
    return found


def _plain(recorder: Histories, tensor: Tensor) -> Tensor:
    """The recorded tensor that a wrapper of a transform, around the call or inside, stands for."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if recorder.is_outer(tensor):
            return recorder.peeled(tensor)
        tensor = functorch.get_unwrapped(tensor)
    return tensor


_APPLY: types.CodeType | None = getattr(
    getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None
)
"""The code that applies a Function. From torch 2.14 on that is C, which no frame shows: Functions
under forward mode are refused there as what switches it off is."""
_OWN = os.path.dirname(os.path.dirname(__file__))
_HANDING_ON = {
    os.path.join(_OWN, "trace", "escapes.py"),
    os.path.join(_OWN, "transforms", "asked.py"),
}
"""The files of the modes that hand questions on."""
