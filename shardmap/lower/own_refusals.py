"""Refuse a gradient whose backward was recorded in another state than it is taken in."""

from __future__ import annotations

from typing import NoReturn

import torch

from shardmap import errors
from shardmap.program.autocast import Modes, autocast_state
from shardmap.program.own_backward import Backward
from shardmap.program.python_state import REMOVED, State


def refuse_changes(call: str, backward: Backward, state: State | None) -> None:
    """Refuse a gradient in another state than that which its backward has read.

    Raises:
        AutogradFunctionError: Python state has changed since the map ran.
    """
    other = state.changed() if state is not None else ""
    if not other:
        return
    hook = backward.hook
    if backward.guard:
        refuse_recomputation(call, backward, other)
    if other is REMOVED:
        raise errors.AutogradFunctionError(
            f"{call}: a hook (register_hook) was removed between the map and its "
            "gradient, and the map has recorded it; remove it after the gradient, or inside the "
            "mapped function, or register it on the map's result"
        )
    who = "a hook" if hook else "the backward of a custom autograd.Function"
    remedy = (
        "close over the value instead of what holds it"
        if hook
        else "pass it to apply and keep it on ctx"
    )
    raise errors.AutogradFunctionError(
        f"{call}: {who} reads {other}, which has changed between the map and its "
        f"gradient, and the map has read it when it ran; {remedy}, or take the gradient before"
    )


def refuse_recomputation(call: str, backward: Backward, what: str) -> NoReturn:
    """Refuse a gradient that would compute a part of the function again, from another state.

    Args:
        call: The user's call.
        backward: The backward, which guards such a part.
        what: What has changed.

    Raises:
        AutogradFunctionError: Always.
    """
    again, remedy = (
        ("unpack what was saved", "put them around the call of the map")
        if backward.guard.startswith("saved")
        else ("computes again", "call the function without a checkpoint")
    )
    raise errors.AutogradFunctionError(
        f"{call}: {backward.guard} inside the function {again} when the gradient is taken, and "
        f"what is read there has changed since the map ran ({what}); take the gradient before the "
        f"change, or {remedy}"
    )


def refuse_a_second(call: str, backward: Backward, taken: bool) -> None:
    """Refuse a second gradient if the first one's backward has changed what it reads.

    Raises:
        AutogradFunctionError: It is the second one.
    """
    changes, hook = backward.changes, backward.hook
    if changes and taken:
        who = "a hook (register_hook)" if hook else "the backward of a custom autograd.Function"
        raise errors.AutogradFunctionError(
            f"{call}: {who} changes what it reads ({changes}), so that a second "
            "gradient of the same results is another one, and the map has recorded the first; call "
            "the map again for each gradient, or take both inside the mapped function "
            "(torch.autograd.grad)"
        )


def refuse_modes(call: str, backward: Backward, kinds: list[str]) -> None:
    """Refuse a gradient that is taken in another mode than its backward was recorded in.

    Args:
        call: The user's call.
        backward: The backward.
        kinds: The kinds of device of the cotangents.

    Raises:
        AutogradFunctionError: The loop's backward would compute something else.
    """
    if not kinds:
        return
    who = "a hook" if backward.hook else "the backward of a custom autograd.Function"
    if backward.plain and torch.is_grad_enabled():
        raise errors.AutogradFunctionError(
            f"{call}: {who} asks torch.is_grad_enabled(), and computes something else "
            "where its gradient is differentiated again (create_graph=True); let it compute the "
            "same, or take the gradients inside the mapped function (torch.autograd.grad)"
        )
    if backward.asked and backward.asked != str(Modes.now()):
        raise errors.AutogradFunctionError(
            f"{call}: {who} asks for autocast or the detection of anomalies, and the gradient is "
            f"taken under {Modes.now()}, where it computes something else than under "
            f"{backward.asked}, as the map has recorded it; take the gradient under that, or ask "
            "in the forward and keep the answer on ctx"
        )
    state = autocast_state(kinds[0])
    if backward.cast is not None and backward.cast != state:
        inside = f"under torch.autocast({kinds[0]!r}, dtype={state})"
        remedy = (
            "take it outside of torch.autocast, as torch asks to, or decorate the backward with "
            "torch.amp.custom_bwd"
            if not backward.cast
            else f"take it under the map's autocast ({backward.cast}), or let the backward cast "
            "what it computes with to one dtype"
        )
        raise errors.AutogradFunctionError(
            f"{call}: the gradient is taken {inside if state else 'without autocast'}, "
            f"where {who} computes in another precision than the map has recorded; {remedy}"
        )
