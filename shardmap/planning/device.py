"""Which devices a call means, and which of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap.errors import DeviceError

Devices = str | torch.device | Sequence[str | torch.device]


def available() -> tuple[str, ...]:
    """The devices of this machine, by name."""
    names = ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        names += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return tuple(names)


def resolve(devices: Any, home: torch.device, call: str) -> tuple[str, ...]:
    """The devices that `devices` names, one entry per shard.

    Args:
        devices: "auto" (where the inputs are), "cpu", "cuda:*", "cuda:0,2", a `torch.device`, or a list of names (repeats allowed).
        home: Where the first mapped input lives.
        call: The user's call, for errors.

    Raises:
        DeviceError: A name is malformed or its device is absent; the message lists what is there.
    """
    if isinstance(devices, str | torch.device):
        names = _expand(str(devices), home, devices, call)
    elif isinstance(devices, list | tuple):
        names = [n for d in devices for n in _expand(_name(d, devices, call), home, devices, call)]
    else:
        raise DeviceError(f"{call}: devices={devices!r} is a {type(devices).__name__}; pass a name such as 'cpu', or a list of names")
    if not names:
        raise DeviceError(f"{call}: devices={devices!r} names no device; this machine has {', '.join(available())}")
    return tuple(names)


def _name(device: Any, devices: Any, call: str) -> str:
    if not isinstance(device, str | torch.device):
        raise DeviceError(
            f"{call}: devices={devices!r} holds a {type(device).__name__}; pass names such as 'cuda:0', or torch.device objects"
        )
    return str(device)


def _expand(name: str, home: torch.device, devices: Any, call: str) -> list[str]:
    if name == "auto":
        return [str(home)]
    there = available()
    kind, _, which = name.partition(":")
    of_kind = [d for d in there if d.partition(":")[0] == kind]
    if which == "*":
        found = of_kind
    elif which:
        found = [f"{kind}:{i.strip()}" for i in which.split(",")]
        if kind == "cpu" and found == ["cpu:0"]:
            found = ["cpu"]
    else:
        found = of_kind[:1] if kind == "cpu" else [d for d in of_kind if d == _current(kind)]
    missing = [d for d in found if d not in there]
    if missing or not found:
        raise DeviceError(
            f"{call}: devices={devices!r} names {(missing or [name])[0]}, which is not there; this machine has {', '.join(there)}"
        )
    return found


def _current(kind: str) -> str:
    return f"{kind}:{torch.accelerator.current_device_index()}" if torch.accelerator.is_available() else ""
