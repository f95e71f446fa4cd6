"""The operator that stands for a Function whose forward leaves torch, and which maps itself.

A `torch.autograd.Function` may compute in numpy and define a `vmap` staticmethod. One application
is the call `own_function(tensors, text)`; the text names the Function and its other arguments.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch.autograd.function import Function

from shardmap import errors
from shardmap._threads import fork_safe_lock
from shardmap._torch import OpOverload, TorchDispatchMode, without_functions

_LIBRARY = torch.library.Library("shardmap", "FRAGMENT")
_LIBRARY.define("own_function(Tensor[] tensors, str text) -> Tensor[]")
OWN_FUNCTION: OpOverload = torch.ops.shardmap.own_function.default

_numbers: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
_functions: weakref.WeakValueDictionary[int, type] = weakref.WeakValueDictionary()
_lock = fork_safe_lock()
_PLAIN = (bool, int, float, str, type(None))


class Running(threading.local):
    """Notes of this thread on applications."""

    inside = False
    """True while one is computed."""
    single = False
    """True if the last one returned a tensor and no tuple."""


running = Running()


class MapInfo(NamedTuple):
    """Argument `info` of the `vmap` staticmethod."""

    batch_size: int
    randomness: str


class Application(NamedTuple):
    """One application of a Function, without its tensors."""

    function: type[Function]
    arguments: tuple[object, ...]
    """The arguments that are no tensors; None in the place of a tensor."""
    tensors: tuple[int, ...]
    """Positions of the tensors among the arguments."""

    def filled(self, tensors: Sequence[torch.Tensor]) -> list[object]:
        """The arguments of the forward."""
        arguments = list(self.arguments)
        for position, tensor in zip(self.tensors, tensors, strict=True):
            arguments[position] = tensor
        return arguments


def text_of(function: type[Function], arguments: Sequence[object]) -> str | None:
    """The text of an application, or None if an argument cannot be written in it."""
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    plain = [None if isinstance(a, torch.Tensor) else a for a in arguments]
    if not all(type(a) in _PLAIN for a in plain):
        return None
    with _lock:
        number = _numbers.setdefault(function, len(_numbers) + 1 + max(_functions, default=0))
        _functions[number] = function
    name = f"{function.__module__}.{function.__qualname__}"
    return json.dumps([number, name, plain, tensors])


def application(text: str) -> Application:
    """The application that a text stands for.

    Raises:
        AutogradFunctionError: The Function is not one of this process.
    """
    number, name, arguments, tensors = json.loads(text)
    function = _functions.get(number)
    if function is None or f"{function.__module__}.{function.__qualname__}" != name:
        raise errors.AutogradFunctionError(
            f"the autograd.Function {name} computes outside of torch, and its `vmap` is known only "
            "in the process that recorded it; make it an operator (torch.library.custom_op, "
            "register_vmap), which other processes can import"
        )
    return Application(function, tuple(arguments), tuple(tensors))


class _NoDraws(TorchDispatchMode):
    """Mode that refuses draws: they would be the same for all samples of a batch."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run one operator."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise errors.RandomnessError(
                f"the autograd.Function {self.name} computes outside of torch, and draws random "
                "numbers; draw them before, and pass them as an argument"
            )
        return func(*args, **(kwargs or {}))


def _forward(tensors: list[torch.Tensor], text: str) -> list[torch.Tensor]:
    """Compute one application; its results have memory of their own."""
    made = application(text)
    name = made.function.__qualname__
    given = [t.detach().clone() for t in tensors]
    before, running.inside = running.inside, True
    try:
        with without_functions(), torch.no_grad(), _NoDraws(name):
            returned = made.function.forward(*made.filled(given))
            changed = [not _same(a, b) for a, b in zip(given, tensors, strict=True)]
    finally:
        running.inside = before
    running.single = isinstance(returned, torch.Tensor)
    results = [returned] if isinstance(returned, torch.Tensor) else list(cast(tuple, returned))
    if not all(isinstance(t, torch.Tensor) for t in results):
        raise errors.AutogradFunctionError(
            f"the autograd.Function {name} computes outside of torch, and returns something that "
            "is no tensor; return tensors only"
        )
    if any(changed):
        raise errors.AutogradFunctionError(
            f"the autograd.Function {name} computes outside of torch, and writes to its argument "
            f"{made.tensors[changed.index(True)]}; clone it first"
        )
    return [t.detach().clone() for t in results]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


_LIBRARY.impl("own_function", _forward, "CompositeExplicitAutograd")


def mapped(
    text: str, mapped_tensors: tuple[bool, ...], randomness: str, size: int, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Compute an application for a batch by the Function's own `vmap`.

    Args:
        text: The application.
        mapped_tensors: For each tensor: True if it is a batch, with samples along dimension 0.
        randomness: As for `shardmap.vmap`.
        size: Number of samples.
        *tensors: The tensors.
    """
    made = application(text)
    arguments = made.filled(tensors)
    in_dims: list[int | None] = [None] * len(arguments)
    for position, is_mapped in zip(made.tensors, mapped_tensors, strict=True):
        in_dims[position] = 0 if is_mapped else None
    with torch.no_grad():
        info = MapInfo(size, randomness)
        returned, out_dims = made.function.vmap(info, tuple(in_dims), *arguments)
        results = (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)
        dims = (out_dims,) * len(results) if isinstance(out_dims, int | None) else tuple(out_dims)
        return tuple(
            [
                t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
                for t, d in zip(results, dims, strict=True)
            ]
        )
