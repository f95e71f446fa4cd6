"""Resolve import paths, and check arguments against the signatures of their functions."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shardmap.errors import ConfigError
from shardmap.jobs import modules
from shardmap.jobs.config import reductions
from shardmap.jobs.config.schema import Call, RunConfig
from shardmap.jobs.config.words import convert, show, suggest

CALLS = ("data", "model", "function", "loss", "report")


@dataclass(frozen=True)
class BoundCall:
    """An imported function or class with its checked arguments."""

    function: Callable[..., Any]
    args: dict[str, Any]
    leading: int | None = None
    """The number of positional arguments that the run passes; None if the data decide."""

    @property
    def is_class(self) -> bool:
        """True if it is a class: it is constructed, and the instance is called."""
        return inspect.isclass(self.function)

    def __call__(self, *leading: Any) -> Any:
        """Call it with the run's arguments, then with those of the configuration."""
        return self.function(*leading, **self.args)


@dataclass(frozen=True)
class BoundRun:
    """A configuration whose import paths are resolved; `config` has every default filled in."""

    config: RunConfig
    data: BoundCall | None = None
    model: BoundCall | None = None
    function: BoundCall | None = None
    loss: BoundCall | None = None
    report: BoundCall | None = None
    reduce: Any = None
    """The reductions, in the form that `shardmap.vmap` takes."""
    allowed: tuple[str, ...] = field(default=())
    """Prefixes that import paths must have; empty if any path is allowed."""


def bind(config: RunConfig, allow: Sequence[str] = ()) -> BoundRun:
    """Import the functions of a configuration and check their arguments.

    Args:
        config: The result of `load`.
        allow: Import paths must be one of these or lie below one; those in the configuration's own
            folders must be in a folder that is given here. If empty, any path is allowed.

    Raises:
        ConfigError: An import path, or an argument of its function, is wrong.
    """
    named = {section: call for section in CALLS if (call := getattr(config, section)) is not None}
    folders = [Path(folder) for folder in config.python]
    for section, call in named.items():  # all of them before the first is imported
        _check_allowed(call.path, f"{section}.path", allow, folders)
    bound = {section: _bind_call(section, call, folders) for section, call in named.items()}
    _check_module(config, bound)
    full = {
        section: dataclasses.replace(call, init_args=_written(call, bound[section]))
        for section, call in named.items()
    }
    return BoundRun(
        dataclasses.replace(config, **full),
        **bound,
        reduce=reductions.build(config.reduce),
        allowed=tuple(allow),
    )


def import_object(path: str, key: str, folders: Sequence[Path] = ()) -> Any:
    """Import `package.module.name`.

    Args:
        path: The import path.
        key: The configuration's key that names it, for errors.
        folders: Folders that are searched for its module first (`RunConfig.python`).

    Raises:
        ConfigError: It cannot be imported; the message names the part that failed.
    """
    _check_path(path, key)
    module_path, _, name = path.rpartition(".")
    try:
        module = modules.import_module(module_path, folders)
    except ModuleNotFoundError as error:
        missing = error.name or module_path
        if module_path == missing or module_path.startswith(f"{missing}."):
            looked = "".join(f"{folder}, " for folder in folders)
            raise ConfigError(
                f"{key}: {path!r} cannot be imported, there is no module {missing} in {looked}"
                "the current directory, or among what is installed; check the spelling, or name "
                "its folder by --python FOLDER"
            ) from None
        raise ConfigError(
            f"{key}: {path!r} cannot be imported, {module_path} needs {missing}; install it"
        ) from None
    except Exception as error:
        summary = " ".join(str(error).split())
        raise ConfigError(
            f"{key}: {path!r} cannot be imported, {type(error).__name__}: {summary}; mend "
            f"{module_path}"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        names = [item for item in vars(module) if not item.startswith("_")]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {module_path}.{close[0]}?" if close else "check the spelling"
        raise ConfigError(
            f"{key}: {path!r} cannot be imported, {module_path} has no {name}; {hint}"
        ) from None


def _check_path(path: str, key: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        raise ConfigError(f"{key}: {path!r} is not an import path; write package.module.name")


def _check_allowed(path: str, key: str, allow: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse an import path that `--allow` does not admit.

    Only whole components count: `--allow my` does not admit `myself.load`. A module in one of the
    configuration's own folders is admitted by its folder, not by its name: the configuration that
    brings a `torch.py` is not admitted by `--allow torch`. In the current directory a name
    suffices.
    """
    _check_path(path, key)
    if not allow:
        return
    folder = modules.folder_of(path.partition(".")[0], folders)
    given = [Path(prefix).resolve() for prefix in allow if "/" in prefix or prefix in (".", "..")]
    if folder is not None and any(folder.is_relative_to(trusted) for trusted in given):
        return
    by_name = folder is None or folder == Path.cwd()
    if by_name and any(path == prefix or path.startswith(f"{prefix}.") for prefix in allow):
        return
    trusted = path.partition(".")[0] if by_name else folder
    raise ConfigError(
        f"{key}: {path!r} is not allowed, only what lies below {', '.join(allow)}; give --allow "
        f"{trusted} if you trust it"
    )


def _check_module(config: RunConfig, bound: dict[str, BoundCall]) -> None:
    """Refuse weights or a loss if neither `model` nor a class makes a module."""
    function = bound.get("function")
    if (
        function is None
        or "model" in bound
        or function.is_class
        or isinstance(function.function, nn.Module)
    ):
        return
    assert config.function is not None
    for key, given in (
        ("weights", config.weights),
        ("loss", None if config.loss is None else config.loss.path),
    ):
        if given is not None:
            raise ConfigError(
                f"{key}: {given!r} is for a module, and function: {config.function.path} is a "
                "function; name a class there, or give model"
            )


def _bind_call(section: str, call: Call, folders: Sequence[Path]) -> BoundCall:
    """Import `call.path` and check `call.init_args` against its signature."""
    function = import_object(call.path, f"{section}.path", folders)
    if not callable(function):
        raise ConfigError(
            f"{section}.path: {call.path!r} is a {type(function).__name__}, which cannot be "
            "called; name a function or class"
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (
        ValueError
    ):  # written in C without a signature, such as torch.neg: nothing to check against
        return BoundCall(function, dict(call.init_args), _leading(section, function, None, call))
    by_position = [
        item
        for item in parameters
        if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]
    variadic = any(item.kind is item.VAR_POSITIONAL for item in parameters)
    leading = _leading(section, function, parameters, call)
    if leading and len(by_position) < leading and not variadic:
        raise ConfigError(
            f"{section}.path: {call.path!r} takes no argument, and the run calls it with one; add "
            "a parameter"
        )
    accepted = [item for item in parameters if item.kind is item.KEYWORD_ONLY]
    if (
        leading is None
        # the data fill an unknown number of the first ones: none of them is required or
        # filled in
    ):
        optional = [
            item
            for item in by_position
            if item.kind is item.POSITIONAL_OR_KEYWORD and item.default is not item.empty
        ]
        accepted += [item for item in optional if item.name in call.init_args]
    else:
        accepted += [
            item for item in by_position[leading:] if item.kind is not item.POSITIONAL_ONLY
        ]
    anything = any(item.kind is item.VAR_KEYWORD for item in parameters)
    names = [item.name for item in accepted]
    for key, value in call.init_args.items():
        if key not in names and not anything:
            hint = suggest(str(key), names, f"{section}.init_args.")
            raise ConfigError(
                f"{section}.init_args.{key}: unknown argument of {call.path}, value {show(value)}; "
                f"{hint}"
            )
    for item in accepted:
        if item.default is item.empty and item.name not in call.init_args:
            raise ConfigError(
                f"{section}.init_args.{item.name}: missing; {call.path} needs a value for it"
            )
    hints = _hints(function) if call.init_args else {}
    args = {
        item.name: item.default
        for item in accepted
        if item.default is not item.empty and _is_plain(item.default)
    }
    for key, value in call.init_args.items():
        args[key] = (
            convert(key, hints[key], value, f"{section}.init_args.") if key in hints else value
        )
    return BoundCall(function, args, leading)


def _leading(
    section: str, function: Any, parameters: Sequence[inspect.Parameter] | None, call: Call
) -> int | None:
    """The number of positional arguments that the run passes; None if the data decide."""
    if section == "report":
        return 1
    if inspect.isclass(function) or section == "data":
        return 0
    if section == "model":  # a function of the dataset, or of its arguments only
        first = next(iter(parameters or ()), None)
        needs = first is not None and first.kind in (
            first.POSITIONAL_ONLY,
            first.POSITIONAL_OR_KEYWORD,
            first.VAR_POSITIONAL,
        )
        return int(
            needs
            and first is not None
            and first.default is first.empty
            and first.name not in call.init_args
        )
    return None


def _hints(function: Any) -> dict[str, Any]:
    """Types of parameters; those that cannot be resolved are not checked."""
    try:
        return typing.get_type_hints(
            function.__init__ if inspect.isclass(function) else function, include_extras=True
        )
    except (NameError, TypeError, AttributeError):
        return {}


def _is_plain(value: Any) -> bool:
    """True if YAML can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _written(call: Call, bound: BoundCall) -> dict[str, Any]:
    """The arguments with defaults filled in, as YAML data.

    If YAML cannot hold a converted value, the text that it was made from is used.
    """
    args = {
        key: value if _is_plain(value) else call.init_args[key] for key, value in bound.args.items()
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
