"""Random operators that draw from generators of their own instead of torch's default ones.

A default generator belongs to the whole process. Saving its state, drawing and restoring it would
rewind what other threads drew meanwhile; and torch reads a state while it holds the generator's
mutex, so that a garbage collection at that moment can stop the process for good: its finalizers
hand the GIL to a thread that waits for the same mutex.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import OpOverload, aten, kernel_of, overload_name, schema_of
from shardmap.program.schema import base_name

_OVERLOADS = {
    "default": "generator",
    "low": "low_generator",
    "low_dtype": "low_generator_dtype",
    "Tensor": "Tensor_generator",
}
"""For each overload of a factory without a generator argument: the overload that has one."""


class PrivateGenerators:
    """One generator per device, all with the same seed, for one recording or one sample."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._made: dict[torch.device, torch.Generator] = {}

    def run(self, op: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a random operator.

        An operator that takes no generator (a fused attention kernel with dropout, a custom
        operator) draws from the default one, as it does in plain torch.
        """
        generator = self._on(_device_of(op, args, kwargs)) if takes_generator(op) else None
        if generator is None:
            return kernel_of(op)(*args, **kwargs)
        if op is aten.native_dropout.default:
            return _native_dropout(generator, *args, **kwargs)
        seeded = _with_generator(op)
        assert seeded is not None
        if seeded is op:
            position = [a.name for a in schema_of(op).arguments].index("generator")
            if position < len(args):  # given by position, as None
                args = (*args[:position], generator, *args[position + 1 :])
                return kernel_of(op)(*args, **kwargs)
            return kernel_of(op)(*args, **{**kwargs, "generator": generator})
        return kernel_of(seeded)(*args, generator=generator, **kwargs)

    def _on(self, device: torch.device) -> torch.Generator | None:
        """The generator of a device, or None where torch cannot make one."""
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
            return None  # a device in name only
        found = self._made.get(device)
        if found is None:
            found = self._made[device] = torch.Generator(device).manual_seed(self.seed)
        return found


def takes_generator(op: OpOverload) -> bool:
    """True if `PrivateGenerators` can serve a random operator."""
    return op is aten.native_dropout.default or _with_generator(op) is not None


def _with_generator(op: OpOverload) -> OpOverload | None:
    """The overload of `op` that takes a generator, or None if there is none."""
    if any(a.name == "generator" for a in schema_of(op).arguments):
        return op
    if op.namespace != "aten" or not base_name(op).startswith("rand"):
        return None
    name = _OVERLOADS.get(overload_name(op))
    return None if name is None else getattr(op.overloadpacket, name, None)


def _device_of(op: OpOverload, args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """The device on which `op` draws: its `device` argument, its first tensor's, or the CPU."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    for a, value in zip(schema_of(op).arguments, args, strict=False):
        if isinstance(value, torch.Tensor):
            return value.device
        if a.name == "device" and value is not None:
            return torch.device(value)
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def _native_dropout(
    generator: torch.Generator, x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout and its mask, as `aten.native_dropout` computes them in training."""
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p, generator=generator)
    return x.mul(mask).mul_(1.0 / (1.0 - p) if p < 1 else 0.0), mask
