"""Devices: the ones that a call names, the ones that exist, and the memory that they have left."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from shardmap.errors import DeviceError

Devices = str | torch.device | Sequence[str | torch.device]


def available() -> tuple[str, ...]:
    """The devices of this machine, by name."""
    names = ["cpu"]
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is not None:
        names += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return tuple(names)


def resolve(devices: Any, home: torch.device, call: str) -> tuple[str, ...]:
    """The devices that `devices` names, one entry per shard.

    Args:
        devices: "auto" (where the inputs are), "cpu", "cuda:*", "cuda:0,2", a `torch.device`, or a
            list of names (repeats allowed).
        home: Where the first mapped input lives.
        call: The user's call, for errors.

    Raises:
        DeviceError: A name is malformed or its device is absent; the message lists the existing
            ones.
    """
    if isinstance(devices, str | torch.device):
        names = _expand(str(devices), home, devices, call)
    elif isinstance(devices, list | tuple):
        names = [n for d in devices for n in _expand(_name(d, devices, call), home, devices, call)]
    else:
        raise DeviceError(
            f"{call}: devices={devices!r} is a {type(devices).__name__}; pass a name such as "
            "'cpu', or a list of names"
        )
    if not names:
        raise DeviceError(
            f"{call}: devices={devices!r} names no device; this machine has "
            f"{', '.join(available())}"
        )
    return tuple(names)


def one(device: Any, call: str) -> torch.device:
    """The device that `output_device` names.

    Raises:
        DeviceError: It is malformed, absent, or names several.
    """
    if not isinstance(device, str | torch.device):
        raise DeviceError(
            f"{call}: output_device={device!r} is a {type(device).__name__}; pass a name such as "
            "'cpu', or a torch.device"
        )
    names = _expand(str(device), torch.device("cpu"), device, call, "output_device")
    if len(names) != 1:
        raise DeviceError(
            f"{call}: output_device={device!r} names {len(names)} devices; results go to one"
        )
    return torch.device(names[0])


def _name(device: Any, devices: Any, call: str) -> str:
    if not isinstance(device, str | torch.device):
        raise DeviceError(
            f"{call}: devices={devices!r} holds a {type(device).__name__}; pass names such as "
            "'cuda:0', or torch.device objects"
        )
    return str(device)


def _expand(
    name: str, home: torch.device, devices: Any, call: str, argument: str = "devices"
) -> list[str]:
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
            f"{call}: {argument}={devices!r} names {(missing or [name])[0]}, which is not there; "
            f"this machine has {', '.join(there)}"
        )
    return found


def _current(kind: str) -> str:
    return (
        f"{kind}:{torch.accelerator.current_device_index()}"
        if torch.accelerator.is_available()
        else ""
    )


# -- memory


def accelerated(device: torch.device) -> bool:
    """True if `device` is an accelerator that is really there.

    Under fake tensors it may exist in name only.
    """
    return (
        device.type != "cpu"
        and torch.accelerator.is_available()
        and torch.accelerator.current_accelerator() == torch.device(device.type)
    )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on `device`; None if unknown."""
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, *_cgroup_rooms())
    if not accelerated(device):
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    return (
        free
        + torch.accelerator.memory_reserved(device)
        - torch.accelerator.memory_allocated(device)
    )


@functools.cache
def _cgroup_limits() -> tuple[tuple[int, Path], ...]:
    """The memory limits of this process's control groups, each with the file of its use."""
    root, found = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):  # a container sees its own group at the root
            try:
                text = (folder / limit).read_text().strip()
            except OSError:
                text = "max"
            if text.isdigit() and int(text) < 1 << 60:
                found.append((int(text), folder / usage))
            if folder == base:
                break
    return tuple(found)


def _cgroup_rooms() -> list[int]:
    rooms = []
    for limit, usage in _cgroup_limits():
        try:
            used = int(usage.read_text())
            stat = dict(
                line.split() for line in (usage.parent / "memory.stat").read_text().splitlines()
            )
            reclaimable = int(
                stat.get("inactive_file", stat.get("total_inactive_file", 0))
            )  # page cache is released when memory is needed
            rooms.append(max(0, limit - max(0, used - reclaimable)))
        except (OSError, ValueError):
            continue
    return rooms or [1 << 62]


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a map may add on each device to those already in use."""

    bytes: int | None
    """Bytes that the user gave; None to take a part of the free memory."""
    fraction: float
    """Part of the free memory, between 0 and 1."""

    def on(self, device: torch.device, peers: int = 1) -> int | None:
        """Bytes on `device`: those given, or an equal part of the free ones for each of `peers`.

        None if unknown.
        """
        return self.of(free_bytes(device) if self.bytes is None else None, peers)

    def of(self, free: int | None, peers: int) -> int | None:
        """The same, given the number of free bytes."""
        if self.bytes is not None:
            return self.bytes
        return None if free is None else int(free * self.fraction / peers)


class Meter:
    """Reads the bytes that this process has in use on a device, and the most it ever had.

    Nothing is reset, because other code may measure the process too, and so a chunk's peak
    is known only if it exceeds every one before.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> tuple[int, int] | None:
        """Bytes in use now, and at most so far; None if unknown."""
        if self.device.type == "cpu":
            return _resident()
        if not accelerated(self.device):
            return None
        return torch.accelerator.memory_allocated(
            self.device
        ), torch.accelerator.max_memory_allocated(self.device)


def _resident() -> tuple[int, int] | None:
    try:
        with open("/proc/self/status", "rb") as file:
            lines = dict(
                line.split(b":", 1) for line in file if line.startswith((b"VmHWM", b"VmRSS"))
            )
    except OSError:
        return None
    if len(lines) != 2:
        return None
    return int(lines[b"VmRSS"].split()[0]) * 1024, int(lines[b"VmHWM"].split()[0]) * 1024


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache of the CPU; 16 MiB if unknown."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue
    return max(sizes, default=16 << 20)
