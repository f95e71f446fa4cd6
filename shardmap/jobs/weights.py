"""Load a module's parameters and buffers from a file.

No pickle is run: safetensors, or a state dict read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardmap._extras import require
from shardmap.errors import ConfigError

SHOWN = 4
"""Number of names that a message lists; the others are counted."""


def read(path: str) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        path: A `.safetensors` file, or a `.pt` or `.pth` file that `torch.save(module.state_dict(),
            path)` has written.

    Raises:
        ConfigError: It does not exist, cannot be read, or holds anything else than named tensors.
    """
    file = Path(path)
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise ConfigError(
            f"weights: {path!r} is of an unknown kind; give a .safetensors file, or a .pt or .pth "
            "file with a state dict"
        )
    if not file.is_file():
        there = "is a folder" if file.is_dir() else "is not there"
        raise ConfigError(
            f"weights: {path!r} {there}; give the path of a .safetensors, .pt or .pth file"
        )
    if file.suffix == ".safetensors":
        safetensors, module = (
            require("safetensors", extra="run", purpose="to read weights"),
            require("safetensors.torch", extra="run", purpose=""),
        )
        try:
            return module.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"weights: {path!r} is no safetensors file that can be read ({_line(error)}); save "
                "the module again"
            ) from error
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"weights: {path!r} holds something else than tensors, and a pickle can run code: "
            "nothing of it was loaded; "
            "save module.state_dict(), best with safetensors"
        ) from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:  # its bytes may be anything
        raise ConfigError(
            f"weights: {path!r} cannot be read ({_line(error)}); save module.state_dict() again"
        ) from error
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"weights: {path!r} holds a {type(values).__name__}, not names and tensors; save "
            "module.state_dict()"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"weights: {path!r} holds {name!r}, a {type(value).__name__}, where tensors are "
                "needed; save module.state_dict() alone"
            )
    return {str(name): value for name, value in values.items()}


def load(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Load weights into a module: every parameter and buffer, and no other.

    Args:
        module: The module.
        state: The state dict of `read`.
        path: The file's path, for errors.

    Raises:
        ConfigError: A name is missing or unknown, a shape is another, or a number would lose
            digits.
    """
    own = module.state_dict(keep_vars=True)
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, value in tensors.items():  # tied ones: the same memory under several names
        places.setdefault(
            (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,), []
        ).append(name)
    tied = {
        name: [other for other in names if other in state]
        for names in places.values()
        for name in names
    }
    _refuse(
        path,
        [name for name in tensors if not tied[name]],
        "lacks",
        "save the weights of this module, or name the one that they are of",
    )
    _refuse(
        path,
        [name for name in state if name not in own],
        "has",
        "which the module has not; name the module that they are of",
    )
    for name, value in state.items():
        wanted = tensors[name]
        if value.shape != wanted.shape:
            raise ConfigError(
                f"weights: {path!r} has {name!r} of shape {list(value.shape)}, the module "
                f"{list(wanted.shape)}; give the init_args with "
                "which the weights were made"
            )
        if (
            value.dtype != wanted.dtype
            and torch.promote_types(value.dtype, wanted.dtype) != wanted.dtype
        ):
            raise ConfigError(
                f"weights: {path!r} has {name!r} in {value.dtype}, the module in {wanted.dtype}, "
                "which would lose digits; make the module "
                f"in {value.dtype}, or convert the file"
            )
    for names in places.values():
        given = [name for name in names if name in state]
        for other in given[1:]:
            if not torch.equal(state[given[0]], state[other]):
                raise ConfigError(
                    f"weights: {path!r} has different values for {given[0]!r} and {other!r}, which "
                    "are one tensor in the module; untie them"
                )
    module.load_state_dict(
        {
            name: state[tied[name][0]] if name in tied else state[name]
            for name in own
            if name in tied or name in state
        }
    )


def _refuse(path: str, names: list[str], what: str, remedy: str) -> None:
    if names:
        told = ", ".join(map(repr, names[:SHOWN])) + (
            f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        )
        raise ConfigError(
            f"weights: {path!r} {what} {told}{',' if what == 'has' else ';'} {remedy}"
        )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
