"""A run's configuration: typed, merged from defaults, a YAML file and the command line, and checked before anything runs.

A configuration names functions by import path, and importing is running code: treat a configuration as you treat a script.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from shardmap.errors import ConfigError
from shardmap.extras import require


@dataclass(frozen=True)
class Bounds:
    """The range of a number, written beside its type: `Annotated[int, Bounds(least=1)]`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    """Like `least`, but not allowed itself."""

    def admits(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        parts = ((" of at least ", self.least), (" above ", self.above), (" of at most ", self.most))
        return " and".join(f"{words}{bound}" for words, bound in parts if bound is not None)


@dataclass(frozen=True)
class Call:
    """A function named by its import path, and the named arguments that the run gives it."""

    path: str
    """`package.module.name`; packages in the current directory count."""
    args: dict[str, Any] = field(default_factory=dict)
    """Named arguments, checked against the function's signature."""


@dataclass(frozen=True)
class RunConfig:
    """One run: data, the function to map over it, where and in which chunks, and what to make of the outputs."""

    data: Call
    """Called first; returns a `shardmap.jobs.Dataset`."""
    function: Call
    """The function to map: called with the model, if there is one, then one sample's value of each column."""
    model: Call | None = None
    """Called with the dataset; what it returns is the mapped function's first argument, the same for all samples."""
    report: Call | None = None
    """Called with a `shardmap.jobs.Outcome`; writes tables and pictures into the run folder."""
    columns: list[str] | None = None
    """The dataset's columns that are mapped, in the order of the function's parameters; null for all of them."""
    devices: list[str] | str = "auto"
    """`auto`, `cpu`, `cuda:*`, `ray`, or a list of devices."""
    workers: Annotated[int, Bounds(least=1)] | None = None
    """With `devices: ray`: how many worker processes; null for one per GPU, or per core where the cluster has no GPU."""
    chunk_size: Annotated[int, Bounds(least=1)] | Literal["auto"] | None = "auto"
    """Most samples computed at once on a device; `auto` plans it by memory and cache, null takes all that fall to the device."""
    memory_budget: str | None = None
    """What the map may add on each device to what is in use there, such as `6GiB`; null for nine tenths of what is free."""
    randomness: Literal["error", "same", "different"] = "error"
    """What random calls inside the function do, as in `torch.func.vmap`."""
    reduce: Literal["sum", "mean", "max", "min"] | None = None
    """Combines each output over all samples instead of keeping a row for each; memory does not grow with their number."""
    seed: int = 0
    """Seeds torch before the model is made."""
    store: str | None = None
    """A path or URL: outputs are written there as they are computed, instead of kept in memory."""
    store_kind: Literal["zarr", "safetensors", "memmap"] = "zarr"
    """How the store writes them; only `zarr` takes URLs."""
    resume: bool = False
    """Whether to go on with what the store holds of this run; only what is missing is computed."""
    output: str = "runs/run"
    """The run folder. A folder that exists is left alone: the run goes to `NAME-2`, `NAME-3`, and so on."""
    save_outputs: bool | None = None
    """Whether the mapped outputs themselves are saved, as `outputs.safetensors`; null for yes, unless they are in a store."""

    def __post_init__(self) -> None:
        if self.save_outputs is None:
            object.__setattr__(self, "save_outputs", self.store is None)
        if not self.output.strip():
            raise ConfigError("output: '' is empty; give the path of the run folder")
        if self.devices == []:
            raise ConfigError("devices: [] is empty; give auto, or at least one device")
        if self.workers is not None and self.devices != "ray":
            raise ConfigError(
                f"workers: {self.workers}, and devices: {self.devices}; workers are Ray's: give devices: ray, or leave them out"
            )
        if self.store is None:
            for key, value in (("resume", self.resume), ("store_kind", self.store_kind != "zarr")):
                if value:
                    told = str(getattr(self, key)).lower()
                    raise ConfigError(f"{key}: {told}, and there is no store; give store: PATH, or leave {key} out")
            return
        if not self.store.strip():
            raise ConfigError("store: '' is empty; give a path or URL, or null")
        if self.reduce is not None:
            raise ConfigError(f"reduce: {self.reduce}, and store: {self.store}; what is reduced fits in memory: leave one of them out")
        if self.save_outputs:
            raise ConfigError(f"save_outputs: true, and store: {self.store}; the outputs are in the store: leave save_outputs out")
        if self.store_kind != "zarr" and "://" in self.store and not self.store.startswith(("file://", "local://")):
            raise ConfigError(
                f"store_kind: {self.store_kind}, and store: {self.store}; only zarr takes URLs: give store_kind: zarr, or a folder"
            )

    def identity(self) -> dict[str, Any]:
        """The keys that say what is computed of what; the others say where, how, and what becomes of it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key in IDENTITY_KEYS}

    def digest(self) -> str:
        """Hash of `identity`: equal for two runs that are to give the same outputs."""
        return hashlib.blake2b(json.dumps(self.identity(), sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


IDENTITY_KEYS = ("data", "model", "function", "columns", "randomness", "seed")


@dataclass(frozen=True)
class BoundCall:
    """An imported function with its checked arguments."""

    function: Callable[..., Any]
    args: dict[str, Any]

    def __call__(self, *leading: Any) -> Any:
        """Call the function with what the run provides, then the arguments from the configuration."""
        return self.function(*leading, **self.args)


@dataclass(frozen=True)
class BoundRun:
    """A configuration whose import paths are resolved; `config` has every default filled in."""

    config: RunConfig
    data: BoundCall
    function: BoundCall
    model: BoundCall | None
    report: BoundCall | None


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration: defaults, then the YAML file, then the overrides.

    Args:
        path: The YAML file.
        overrides: Command line words, `--key value` or `--key=value`; dots reach inside: `--model.args.epochs 3`.

    Returns:
        The configuration; its import paths are not resolved yet (see `bind`).

    Raises:
        ConfigError: The file or a key is wrong; the message is one line.
    """
    return _from_values(_read_yaml(Path(path)), overrides, str(path))


def from_mapping(values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration from keys and values, checked as one from a file is.

    Args:
        values: As in the YAML file.
        origin: Where they are from, for errors.
        overrides: As for `load`.

    Raises:
        ConfigError: A key is wrong.
    """
    return _from_values(copy.deepcopy(dict(values)), overrides, origin)


def _from_values(values: dict[str, Any], overrides: Sequence[str], origin: str) -> RunConfig:
    for section in ("data", "function", "model", "report"):
        if isinstance(values.get(section), str):  # the short form: `function: package.module.name`
            values[section] = {"path": values[section]}
    _check_keys(values, RunConfig, "")
    for key, text in _parse_overrides(overrides):
        _override(values, key, text)
    for key in ("data", "function"):
        if key not in values:
            raise ConfigError(f"{key}: missing in {origin}; every run names one, for example {key}: {{path: package.module.name}}")
    for section in ("data", "function", "model", "report"):
        value = values.get(section)
        if isinstance(value, dict) and "path" not in value:
            raise ConfigError(f"{section}.path: missing; give the import path of a function, package.module.name")
    return _build(values)


def bind(config: RunConfig) -> BoundRun:
    """Import the functions that a configuration names and check the arguments it gives them.

    Raises:
        ConfigError: An import path, or an argument for the function behind it, is wrong.
    """
    data = _bind_call("data", config.data, leading=0)
    model = None if config.model is None else _bind_call("model", config.model, leading=1)
    function = _bind_call("function", config.function, leading=None)
    report = None if config.report is None else _bind_call("report", config.report, leading=1)
    full = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, args=data.args),
        model=None if config.model is None or model is None else dataclasses.replace(config.model, args=model.args),
        function=dataclasses.replace(config.function, args=function.args),
        report=None if config.report is None or report is None else dataclasses.replace(config.report, args=report.args),
    )
    return BoundRun(full, data, function, model, report)


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML that `load` reads back."""
    yaml = require("yaml", extra="run", purpose="to write configurations")
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="run", purpose="to read configurations")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration, such as configs/digits_gradients.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a YAML configuration") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{where}: not YAML ({problem}); mend the syntax there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {_show(values)}, not keys and values; start from configs/digits_gradients.yaml")
    return values


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split command line words into (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word}: not an override; write --key value, for example --chunk_size 128")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key}: has no value; write --{key} VALUE")
            text = rest.pop(0)
        pairs.append((key.replace("-", "_"), text))
    return pairs


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key; the text is converted later, by the type that the key wants."""
    parts = key.split(".")
    if parts[0] in ("data", "function", "model", "report") and len(parts) == 1:
        values[key] = None if text in ("null", "none", "None") else {"path": text}
        return
    nested: Any = text
    for part in reversed(parts):
        nested = {part: nested}
    _check_keys(nested, RunConfig, "")
    target = values
    for part in parts[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[parts[-1]] = text


def _check_keys(values: Any, spec: Any, prefix: str) -> None:
    """Refuse keys that a dataclass does not have, at every depth."""
    names = [item.name for item in dataclasses.fields(spec)]
    hints = typing.get_type_hints(spec)
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"{prefix}{key}: unknown key, value {_show(value)}; {_suggest(str(key), names, prefix)}")
        inner = next((kind for kind in _members(hints[key]) if dataclasses.is_dataclass(kind)), None)
        if inner is not None and value is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key}: {_show(value)} is not a section; give path: package.module.name, and args")
            _check_keys(value, inner, f"{prefix}{key}.")


def _build(values: dict[str, Any]) -> RunConfig:
    """Convert and check every value by its declared type."""
    jsonargparse = require("jsonargparse", extra="run", purpose="to read configurations")
    checked: dict[str, Any] = {}
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    for key, value in values.items():
        inner = next((kind for kind in _members(hints[key]) if dataclasses.is_dataclass(kind)), None)
        if value is None and type(None) in _members(hints[key]):
            checked[key] = None
        elif inner is not None and isinstance(value, dict):
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(inner, as_group=False)
            call = _parse(parser, value, f"{key}.", typing.get_type_hints(inner))
            # the arguments as they were given: only the function's signature says what they are
            checked[key] = Call(call.path, dict(value.get("args") or {}))
        else:
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_argument(f"--{key}", type=hints[key])
            checked[key] = getattr(_parse(parser, {key: value}, "", hints), key)
    return RunConfig(**checked)


def _bind_call(section: str, call: Call, leading: int | None) -> BoundCall:
    """Import `call.path` and check `call.args` against its signature.

    `leading` is how many positional arguments the run provides; None if that depends on the data (the mapped function).
    """
    function = import_object(call.path, f"{section}.path")
    if not callable(function):
        raise ConfigError(f"{section}.path: {call.path!r} is a {type(function).__name__}, which cannot be called; name a function")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C without a signature, such as torch.neg: nothing to check against
        return BoundCall(function, dict(call.args))
    by_position = [item for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    variadic = any(item.kind is item.VAR_POSITIONAL for item in parameters)
    if leading is not None and len(by_position) < leading and not variadic:
        provided = {1: "one positional argument"}.get(leading, f"{leading} positional arguments")
        raise ConfigError(f"{section}.path: {call.path!r} takes no argument, but the run calls it with {provided}; add a parameter")
    if leading is None:
        accepted = [item for item in parameters if item.kind is item.KEYWORD_ONLY]
    else:
        accepted = [item for item in by_position[leading:] if item.kind is not item.POSITIONAL_ONLY]
        accepted += [item for item in parameters if item.kind is item.KEYWORD_ONLY]
    names = [item.name for item in accepted]
    for key, value in call.args.items():
        if key not in names:
            hint = _suggest(str(key), names, f"{section}.args.")
            raise ConfigError(f"{section}.args.{key}: unknown argument of {call.path}, value {_show(value)}; {hint}")
    for item in accepted:
        if item.default is item.empty and item.name not in call.args:
            raise ConfigError(f"{section}.args.{item.name}: missing; {call.path} needs a value for it")
    jsonargparse = require("jsonargparse", extra="run", purpose="to read configurations")
    hints = typing.get_type_hints(function, include_extras=True) if names else {}
    args: dict[str, Any] = {}
    for item in accepted:
        if item.name not in call.args:
            args[item.name] = item.default
        elif item.name not in hints:
            args[item.name] = call.args[item.name]
        else:
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_argument(f"--{item.name}", type=hints[item.name])
            parsed = _parse(parser, {item.name: call.args[item.name]}, f"{section}.args.", hints)
            args[item.name] = getattr(parsed, item.name)
    return BoundCall(function, args)


def import_object(path: str, key: str) -> Any:
    """Import `package.module.name`.

    Raises:
        ConfigError: It cannot be imported; the message says at which part.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        raise ConfigError(f"{key}: {path!r} is not an import path; write package.module.name")
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        missing = error.name or module_path
        if module_path == missing or module_path.startswith(f"{missing}."):
            raise ConfigError(f"{key}: {path!r} cannot be imported, there is no module {missing}; check the spelling") from None
        raise ConfigError(f"{key}: {path!r} cannot be imported, {module_path} needs {missing}; install it") from None
    except Exception as error:
        summary = " ".join(str(error).split())
        raise ConfigError(f"{key}: {path!r} cannot be imported, {type(error).__name__}: {summary}; mend {module_path}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        names = [item for item in vars(module) if not item.startswith("_")]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {module_path}.{close[0]}?" if close else "check the spelling"
        raise ConfigError(f"{key}: {path!r} cannot be imported, {module_path} has no {name}; {hint}") from None


def _parse(parser: Any, values: dict[str, Any], prefix: str, hints: dict[str, Any]) -> Any:
    """Let jsonargparse convert and check values; its multi-line errors become one line in plain words."""
    try:
        parsed = parser.parse_object(copy.deepcopy(values))  # it converts what it is given in place
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        key = next((name for name in values if f'"{name}' in str(error)), next(iter(values)))
        raise ConfigError(f"{prefix}{key}: {_show(values[key])} does not fit; give {_plain(hints[key])}") from error
    for key, value in vars(parsed).items():
        for member in _members(hints[key]):
            for bounds in getattr(member, "__metadata__", ()):
                if isinstance(bounds, Bounds) and isinstance(value, int | float) and not bounds.admits(value):
                    raise ConfigError(f"{prefix}{key}: {value} is out of range; give {_plain(hints[key])}")
    return parsed


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the type itself otherwise."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


def _plain(hint: Any) -> str:
    """Describe a type in plain words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    members = _members(hint)
    if len(members) > 1:
        return " or ".join(_plain(member) for member in members)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _plain(arguments[0]) + "".join(str(item) for item in arguments[1:] if isinstance(item, Bounds))
    if origin is Literal:
        names = [str(argument) for argument in arguments]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if origin in (list, tuple, Sequence):
        return f"a list (each {_plain(arguments[0])})" if arguments else "a list"
    if origin in (dict, Mapping):
        return "names and values"
    return getattr(hint, "__name__", str(hint))


def _suggest(key: str, names: Sequence[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known: {', '.join(names)}" if names else "it takes none"


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
