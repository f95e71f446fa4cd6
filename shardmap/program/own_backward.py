"""The operator that gives results a user-defined backward, and the program of that backward.

A `torch.autograd.Function` computes its forward in recorded calls like any others, under
`no_grad`. One more equation then tells that outer gradients reach its inputs by its own
backward: `own_backward(inputs, outputs, kept, numbers, text)` returns the outputs with that
history. The text is a `Backward`. A tensor hook is the same with one input that is the output.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import torch

from shardmap._torch import OpOverload
from shardmap.program.ir import Equation, Program, Var
from shardmap.program.operators import op_info
from shardmap.program.schema import short_name

_LIBRARY = torch.library.Library("shardmap", "DEF")
_LIBRARY.define(
    "own_backward(Tensor[] inputs, Tensor[] outputs, Tensor[] kept, Scalar[] numbers, "
    "str backward) -> Tensor[]"
)


def _values(
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    kept: list[torch.Tensor],
    numbers: list[float],
    backward: str,
) -> list[torch.Tensor]:
    """The outputs as they are: their history matters to autograd only."""
    return [t.detach() for t in outputs]


_LIBRARY.define("data(Tensor(a) tensor) -> Tensor(a)")
_LIBRARY.impl("data", torch.Tensor.detach, "CompositeExplicitAutograd")
DATA: OpOverload = torch.ops.shardmap.data.default
"""`tensor.data`: a write to it is hidden from autograd, which would else refuse to differentiate by
what it has saved of the memory."""

_LIBRARY.impl("own_backward", _values, "CompositeExplicitAutograd")
OWN_BACKWARD: OpOverload = torch.ops.shardmap.own_backward.default

_LIBRARY.define("no_tangents(Tensor[] tensors) -> ()")
_LIBRARY.impl("no_tangents", lambda tensors: None, "CompositeExplicitAutograd")
NO_TANGENTS: OpOverload = torch.ops.shardmap.no_tangents.default
"""The check that forward mode around the call does not differentiate by tensors: they are given to
a Function, say, which has a `jvp` of its own or none."""


NO_EFFECT = ""
"""The text where no gradient from outside arrives: the outputs are values."""

TOO_DEEP = "too deep"
"""The text where derivatives of so high an order have not been recorded."""


class Backward(NamedTuple):
    """The backward of a user-defined `autograd.Function` for one sample."""

    program: Program
    """Inputs: the cotangents; then the outputs listed in `saved`; then what the backward keeps, of
    which literals come last, as literals. Returns a gradient for each input."""
    cotangents: int
    """Number of cotangents that it takes, one for each output."""
    saved: tuple[int, ...]
    """Positions of the outputs that it reads."""
    once: str
    """Reason why it must not be differentiated itself; empty if it may be."""
    hook: bool
    """True if it is the backward of a tensor's hooks, which forward mode ignores. If it must not be
    differentiated, then not by what it keeps either, used or not."""
    materialised: bool
    """True if missing cotangents are passed as zeros; else the only cotangent is never missing."""
    function: str
    """Name of the Function, by which `python_state` finds what its backward reads."""
    changes: str = ""
    """What its own run changes, so that a second gradient would be another one; empty if nothing
    matters."""
    cast: str | None = None
    """The only `autocast_state` in which it computes this; None if it does in any."""
    plain: bool = False
    """True if it computes something else where its gradient is differentiated again."""
    asked: str = ""
    """The modes (autocast, detection of anomalies) that it was recorded in, if it asks for them and
    computes something else in others."""
    guard: str = ""
    """What in the function is computed again when a gradient is taken, if it leaves the gradient as
    it is and the state that is read there is compared; empty if it is a backward."""

    def dumps(self) -> str:
        """The text form that an equation carries."""
        return json.dumps([self.program.dumps(), *self[1:]])


@functools.lru_cache(256)
def backward_of(text: str) -> Backward:
    """The backward that `Backward.dumps` wrote; the same object for the same text."""
    program, count, saved, *rest = json.loads(text)
    return Backward(Program.loads(program), count, tuple(saved), *rest)


_OF_ONE = {
    "neg", "view", "reshape", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute",
    "expand", "squeeze", "unsqueeze", "sum", "mean", "clone", "alias", "detach", "_to_copy",
    "slice", "select", "narrow", "flip", "diagonal", "unfold", "contiguous", "real", "imag",
    "conj", "_conj",
}  # fmt: skip
_OF_EITHER = {"mul", "mm", "bmm", "dot", "mv", "convolution"}
_ZEROS = {"zeros_like", "new_zeros", "zeros"}


@functools.lru_cache(256)
def is_linear(text: str) -> bool:
    """True if the gradients are known to be linear in the cotangents.

    If the values that such a backward reads do not depend on the sample, it may run once on the sum
    of the samples' cotangents, as autograd does with any shared tensor.
    """
    if text == TOO_DEEP:
        return False
    backward = backward_of(text)
    program = backward.program
    follow = {v.index for v in program.inputs[: backward.cotangents]}
    zero: set[int] = set()
    for eq in program.equations:
        if not _stays_linear(eq, follow, zero):
            return False
    return all(v.index in follow or v.index in zero for v in program.outputs)


def _stays_linear(eq: Equation, follow: set[int], zero: set[int]) -> bool:
    """True if one call keeps what follows from the cotangents linear in them."""
    name = short_name(eq.op).partition(".")[0]
    results = [v.index for v in eq.results()]
    info = op_info(eq.op)
    if name in _ZEROS:
        zero.update(results)
        return True
    read = [v.index in follow for v in eq.inputs()]
    if info.shape_only or not any(read):
        return not (info.writes or info.writes_named)
    first = isinstance(eq.args[0], Var) and eq.args[0].index in follow
    good = (
        (name in _OF_ONE and first and sum(read) == 1)
        or (name in _OF_EITHER and sum(read) == 1)
        or (name == "div" and first and sum(read) == 1 and "rounding_mode" not in dict(eq.kwargs))
        or (name in ("add", "sub") and len(read) == 2 and all(read))
        or (name == "where" and _chooses(eq, follow, zero))
        or (name == "masked_fill" and first and sum(read) == 1 and eq.args[2] in (0, False))
    )
    follow.update(results)
    return good


def _chooses(eq: Equation, follow: set[int], zero: set[int]) -> bool:
    condition, *values = eq.args
    known = follow | zero
    return condition.index not in follow and all(
        isinstance(v, Var) and v.index in known for v in values
    )
