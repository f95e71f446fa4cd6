"""Follow values that depend on memory which `torch.empty` made and no recorded call wrote.

Such memory may have been written by unrecorded code. It may also hold no values: autograd
passes empty tensors where only a shape is needed, a map makes batches of empty memory before it
is filled. So values that depend on it are followed, and only an output, an answer to python or an
effect that depends on them is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from shardmap._torch import aten
from shardmap.program.ir import Var, variables
from shardmap.program.operators import OpInfo
from shardmap.program.schema import base_name

_OVERWRITTEN: dict[str, int] = {
    "bernoulli": 0, "normal_functional": 0, "uniform": 0, "exponential": 0, "log_normal": 0,
    "cauchy": 0, "geometric": 0, "random": 0, "fill": 0, "zero": 0, "copy": 0,
    "rrelu_with_noise_functional": 1,
}  # fmt: skip
"""Functional forms of operators that overwrite a tensor: the position of that tensor, which only
gives the shape."""

_DRAWN_BY_VALUE = {aten.bernoulli.default, aten.bernoulli.out}
"""Overloads of the above that read the tensor: its values are the probabilities."""

_CONVOLUTIONS = {"convolution_backward", "convolution_backward_overrideable"}


class Unwritten:
    """The memory groups whose values depend on memory that no recorded call has written."""

    def __init__(self) -> None:
        self.groups: dict[int, str] = {}
        """The group, and the operator that first read it (empty if it was not read)."""
        self.made: dict[int, tuple[int, int, int]] = {}
        """The place in python where the memory was made: while python stays there, only torch's own
        C++ code can have written to it."""

    def make(self, results: Iterable[Var], place: tuple[int, int, int]) -> None:
        """Add memory that has just been made."""
        for var in results:
            if 0 not in var.spec.shape:
                self.groups[var.group] = ""
                self.made[var.group] = place

    def constants(self, read: Iterable[Var], place: tuple[int, int, int]) -> list[Var]:
        """The variables of `read` whose memory torch's C++ code filled with constants.

        `at::tensor({1, 2})` does so, in the same call that reads it: no python ran in between.
        """
        return [v for v in read if v.group in self.groups and self.made.get(v.group) == place]

    def written(self, groups: Iterable[int]) -> None:
        """Remove memory whose values depend on recorded calls from now on."""
        for group in groups:
            self.groups.pop(group, None)
            self.made.pop(group, None)

    def read(self, info: OpInfo, args: tuple[Any, ...], named: Any, written: set[int]) -> list[Var]:
        """The variables of such memory whose values a call reads.

        Tensors that it writes count as overwritten.
        """
        return [
            var
            for var in valued(info, args, named)
            if var.group in self.groups and var.group not in written
        ]

    def follow(
        self, info: OpInfo, args: tuple[Any, ...], outs: Any, read: list[Var], written: set[int]
    ) -> None:
        """Add the results of a call that reads such memory.

        Args:
            info: The operator.
            args: Its arguments, encoded.
            outs: Its results.
            read: The variables of such memory that it reads, from `read`.
            written: The groups that it writes.
        """
        if not read:
            self.written(written)
            return
        name = base_name(info.op)
        groups = {v.group for v in read}
        results: Iterator[Var] = variables(outs)
        if name in _CONVOLUTIONS:
            results = variables(_convolution_results(args, outs, groups))
        for group in (*[v.group for v in results], *written):
            self.groups.setdefault(group, name)


def valued(info: OpInfo, args: tuple[Any, ...], named: Any) -> Iterator[Var]:
    """The tensor arguments whose values a result depends on."""
    name = base_name(info.op)
    if info.shape_only or name.endswith("_like") or name.startswith("new_"):
        return
    if name in _CONVOLUTIONS:
        gradient, inputs, weight, *_, mask = args
        used = ((gradient, any(mask)), (inputs, mask[1]), (weight, mask[0]))
        yield from variables([value for value, matters in used if matters])
        return
    unread = _OVERWRITTEN.get(name) if info.op not in _DRAWN_BY_VALUE else None
    yield from variables([value for i, value in enumerate(args) if i != unread])
    yield from variables([value for _, value in named])


def _convolution_results(args: tuple[Any, ...], outs: Any, groups: set[int]) -> list[Any]:
    """The gradients of a convolution that depend on memory of `groups`."""
    gradient, inputs, weight = ({v.group for v in variables(args[i : i + 1])} for i in range(3))
    needs = (gradient | weight, gradient | inputs, gradient)
    return [out for out, of in zip(outs, needs, strict=True) if of & groups]


def python_place(serial: int, depth: int) -> tuple[int, int, int]:
    """The current place in python: the call of torch's interface, the frame, the instruction."""
    frame = sys._getframe(depth)
    return serial, id(frame), frame.f_lasti
