"""The result of a recording, and helpers that inspect tensors while recording."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from shardmap._torch import (
    force_keys,
    functorch,
    included_keys,
    key_set,
    run_backward,
    undefined_key,
)
from shardmap.program.ir import Program


@dataclass(frozen=True, slots=True)
class Recording:
    """A program and the tensors, numbers and facts that were recorded with it."""

    program: Program
    captured: tuple[torch.Tensor, ...]
    literals: tuple[torch.Tensor, ...]
    scalars: tuple[float, ...]
    written_inputs: frozenset[int]
    """Positions of mapped inputs that the function writes in place."""
    random: bool
    sources: dict[str, str]
    """The user's line for operators that have no rule of ours."""
    sample: tuple[torch.Tensor, ...]
    """The function's results for the sample; empty if the sample was made of zeros."""
    asked: tuple[int, ...] = ()
    """Numbers of the equations that ask about values which differ by sample: this sample's answers
    decided the path that was recorded."""
    caught: str = ""
    """Text of an operator's error that the function has caught: other samples may not raise it."""
    outside: str = ""
    """Text on a tensor that was computed from the sample where no recording sees it, or empty."""
    kept: tuple[str, ...] | None = ()
    """One text for each tensor that differs by sample and that python still holds though it is no
    output: the loop would keep another sample's, or all of them."""
    differentiated: tuple[int, ...] = ()
    """The captured tensors by which a gradient is taken inside; -1 for one that is used in no other
    way."""
    generators: tuple[torch.Generator, ...] = ()
    """The user's generators that the function draws from, by identity: their states are read at
    each call."""
    torchs_own: bool = False
    """True if the function draws from torch's own generator."""
    function: str = ""
    """Digest of the function by which a store knows it, where samples take several paths: which of
    them have been recorded differs from call to call; empty where the program says all."""
    asks_later: bool = False
    """True if a backward that gradients from outside reach asks for values."""


_names: dict[torch.device, str] = {}


def device_name(device: torch.device) -> str:
    """The name of a device, made once."""
    name = _names.get(device)
    if name is None:
        name = _names[device] = str(device)
    return name


_picked: ContextVar[Mapping[int, int]] = ContextVar("picked", default=types.MappingProxyType({}))


@contextlib.contextmanager
def picked_elements(by_level: Mapping[int, int]) -> Iterator[None]:
    """Let `element` take these samples of the vmaps around, by their levels, not the first."""
    token = _picked.set(by_level)
    try:
        yield
    finally:
        _picked.reset(token)


def element(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside functorch's wrappers: one element of each batch, else the first.

    That of an empty batch is zeros.
    """
    dims, picked = [], _picked.get()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            number = picked.get(functorch.maybe_get_level(tensor), 0)
            dims.append((functorch.maybe_get_bdim(tensor), number))
        tensor = functorch.get_unwrapped(tensor)
    for dim, number in reversed(dims):  # a wrapper inside another must not meet the transforms
        if tensor.shape[dim]:
            tensor = tensor.select(dim, number)
        else:
            tensor = tensor.new_zeros(tensor.shape[:dim] + tensor.shape[dim + 1 :])
    return tensor


def wrappers_of(tensor: torch.Tensor) -> tuple[tuple[int, int | None, bool, bool], ...]:
    """Functorch's wrappers around a plain tensor, the outermost first.

    Returns:
        Of each its level, the dimension that it maps, if it maps one, and whether it requires grad
        and is a leaf.
    """
    found = []
    while functorch.is_functorch_wrapped_tensor(tensor):
        dim = functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else None
        level = functorch.maybe_get_level(tensor)
        found.append((level, dim, tensor.requires_grad, tensor.is_leaf))
        tensor = functorch.get_unwrapped(tensor)
    if found:
        found.append((-1, None, tensor.requires_grad, tensor.is_leaf))
    return tuple(found)


def is_empty_outside(tensor: torch.Tensor) -> bool:
    """True if a `torch.func.vmap` around the call maps a tensor over no samples, at any level."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        inner = functorch.get_unwrapped(tensor)
        if functorch.is_batchedtensor(tensor) and not inner.shape[functorch.maybe_get_bdim(tensor)]:
            return True
        tensor = inner
    return False


def is_plain(tensor: torch.Tensor) -> bool:
    """True if a tensor is no wrapper of functorch's, also none that a transform has left behind."""
    return functorch.maybe_get_level(tensor) == -1


def is_mapped_outside(tensor: torch.Tensor) -> bool:
    """True if a `torch.func.vmap` around the call maps the values of a tensor, at any level."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def flat_tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in nested arguments."""
    flat = []
    for value in values:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        elif isinstance(value, tuple | list):
            flat += flat_tensors(value)
    return flat


def is_own_leaf(leaf: torch.Tensor) -> bool:
    """True if gradients of `leaf` end at itself.

    A leaf that autograd saved and unpacked again accumulates into the original.
    """
    try:
        if not leaf.is_leaf:
            return False
    except (
        RuntimeError
    ):  # a view made without grad whose base was written to with it: autograd forbids to ask
        return False
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return False  # integers into which a value with a gradient was written: none flows to them
    include = included_keys()
    exclude = key_set(undefined_key)
    with force_keys(include, exclude), torch.enable_grad():
        node = leaf.view_as(leaf).grad_fn
    if node is None:
        return False
    accumulate = node.next_functions[0][
        0
    ]  # None for a view made without grad of what requires it: gradients go nowhere from there
    return accumulate is None or getattr(accumulate, "variable", None) is leaf


_OWN_CODE = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


UNKNOWN = "an unknown line"
"""Text for a line of code that is in no file."""


def user_line() -> str:
    """The innermost line of the stack that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN_CODE) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return UNKNOWN


def looks_for_anomalies() -> bool:
    """True if autograd's engine itself, and not python, reads a value."""
    if not (torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()):
        return False
    caller = sys._getframe(4)  # above this, `_record`, `_dispatch` and `__torch_dispatch__`
    return caller.f_code is run_backward.__code__
