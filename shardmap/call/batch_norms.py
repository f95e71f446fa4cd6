"""The option `batch_norm=`: normalisation with running statistics in training mode.

In training mode `nn.BatchNorm1d`, its variants and `nn.InstanceNorm1d` with
`track_running_stats=True` normalise by the statistics of their input and update the running
statistics, which all samples
share: the loop updates them sample after sample, in order.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardmap._torch import NormBase

Function = Callable[..., Any]

_KERNEL = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in (
            *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum"),
            *("eps", "cudnn_enabled"),
        )
    ]
)
_NORMS: Mapping[object, tuple[inspect.Signature, str]] = {
    F.batch_norm: (inspect.signature(F.batch_norm), "training"),
    F.instance_norm: (inspect.signature(F.instance_norm), "use_input_stats"),
    torch.batch_norm: (_KERNEL, "training"),
    torch.instance_norm: (
        _KERNEL.replace(
            parameters=[
                p.replace(name="use_input_stats") if p.name == "training" else p
                for p in _KERNEL.parameters.values()
            ]
        ),
        "use_input_stats",
    ),
}
"""For each function: its signature, and the parameter for the input's own statistics."""


class _Served(TorchFunctionMode):
    """Mode that serves each normalisation in training mode by the option.

    Args:
        how: "frozen" normalises by the running statistics, "per_sample" by the input's own. Neither
            updates the running ones, nor counts the batches that a module has seen.
    """

    def __init__(self, how: str):
        super().__init__()
        self._how = how

    def __torch_function__(
        self,
        func: Callable[..., object],
        kinds: object,
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run one call of torch's python interface, or its replacement."""
        kwargs = kwargs or {}
        if func in _NORMS:
            signature, switch = _NORMS[func]
            return self._normalised(func, signature.bind(*args, **kwargs), switch)
        if func is Tensor.add_ and _is_count(args[0], sys._getframe(1)):
            return args[0]
        if func is Tensor.__float__ and _is_count(args[0], sys._getframe(1)):
            return 1.0  # the momentum of a mean over all batches; the statistics do not change
        return func(*args, **kwargs)

    def _normalised(
        self, func: Callable[..., object], bound: inspect.BoundArguments, switch: str
    ) -> object:
        bound.apply_defaults()
        given = bound.arguments
        if given[switch] and given["running_mean"] is not None:
            if self._how == "frozen":
                given[switch] = False
            else:
                given["running_mean"] = given["running_var"] = None
        return func(*bound.args, **bound.kwargs)


def _is_count(tensor: object, frame: FrameType | None) -> bool:
    """True if `tensor` counts the batches of the module whose method called torch.

    `frame` is the caller's, or that of another function mode which has passed the call on.
    """
    while frame is not None and isinstance(frame.f_locals.get("self"), TorchFunctionMode):
        frame = frame.f_back
    module = None if frame is None else frame.f_locals.get("self")
    return isinstance(module, NormBase) and tensor is getattr(module, "num_batches_tracked", None)


def served(func: Function, how: str) -> Function:
    """Wrap `func` so that its normalisations in training mode follow the option `how`."""
    if how == "error":
        return func

    @functools.wraps(func, updated=())
    def normalised(*args: object, **kwargs: object) -> object:
        with _Served(how):
            return func(*args, **kwargs)

    return normalised
