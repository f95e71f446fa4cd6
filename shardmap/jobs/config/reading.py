"""Merge defaults, a YAML file and the command line, and check them key by key."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardmap._extras import require
from shardmap.errors import ConfigError
from shardmap.jobs.config import reductions
from shardmap.jobs.config.schema import SECTIONS, RunConfig
from shardmap.jobs.config.words import convert, members, show, suggest


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration: defaults, then the YAML file, then the overrides.

    Args:
        path: The YAML file, or a folder with a `run.yaml` in it.
        overrides: Command line words, `--key value` or `--key=value`; dots reach inside:
            `--model.init_args.epochs 3`.

    Returns:
        The configuration; its import paths are not resolved yet (see `bind`).

    Raises:
        ConfigError: The file or a key is wrong; the message is one line.
    """
    file = Path(path)
    if file.is_dir():
        file = _in_folder(file)
    return _from_values(_read_yaml(file), overrides, file.parent)


def from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Make a configuration from keys and values, with the checks of one from a file.

    Args:
        values: As in the YAML file; folders of `python` are relative to the current directory.
        overrides: As for `load`.

    Raises:
        ConfigError: A key is wrong.
    """
    return _from_values(copy.deepcopy(dict(values)), overrides, Path())


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML that `load` reads back."""
    yaml = require("yaml", extra="run", purpose="to write configurations")
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _from_values(values: dict[str, Any], overrides: Sequence[str], folder: Path) -> RunConfig:
    for section in SECTIONS:
        if isinstance(values.get(section), str):  # the short form: `function: package.module.name`
            values[section] = {"path": values[section]}
    _check_keys(values, RunConfig, "")
    for key, text in _parse_overrides(overrides):
        _override(values, key, text)
        if key == "python":
            folder = Path()  # a word of the command line is relative to the current directory
    for section in SECTIONS:
        value = values.get(section)
        if isinstance(value, dict) and "path" not in value:
            needed = (
                "a file, a folder or a URL"
                if section == "source"
                else "the import path of a function, package.module.name"
            )
            raise ConfigError(f"{section}.path: missing; give {needed}")
    config = _build(values)
    named = [config.python] if isinstance(config.python, str) else config.python
    return dataclasses.replace(config, python=[str((folder / each).resolve()) for each in named])


def _in_folder(folder: Path) -> Path:
    """The configuration in a folder."""
    file = folder / "run.yaml"
    if file.is_file():
        return file
    if (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder}: is a run folder; go on with it by `shardmap resume {folder}`, or start the "
            f"run anew by `shardmap run {folder / 'config.yaml'}`"
        )
    raise ConfigError(f"{folder}: holds no run.yaml; give the path of a YAML configuration")


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="run", purpose="to read configurations")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the path of a YAML configuration, such as "
            "configs/digits_gradients/run.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{path}: cannot be read ({reason}); give the path of a YAML configuration"
        ) from None
    try:
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), "", path)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{where}: not YAML ({problem}); mend the syntax there") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds {show(values)}, not keys and values; start from "
            "configs/digits_gradients/run.yaml"
        )
    return values


def _refuse_twice(node: Any, prefix: str, path: Path) -> None:
    """Refuse a key that is given twice; YAML's reader would silently use the last one."""
    if node is None or node.id != "mapping":
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            raise ConfigError(
                f"{path}, line {key.start_mark.line + 1}: {prefix}{name} is given twice; leave one "
                "of them"
            )
        seen.add(name)
        _refuse_twice(value, f"{prefix}{name}.", path)


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split command line words into (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{word}: not an override; write --key value, for example --chunk_size 128"
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key}: has no value; write --{key} VALUE")
            text = rest.pop(0)
        pairs.append((key.replace("-", "_"), text))
    return pairs


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key; the text is converted later, to the key's type."""
    parts = key.split(".")
    if parts[0] in SECTIONS and len(parts) == 1:
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


def _check_keys(values: Mapping[Any, Any], spec: Any, prefix: str) -> None:
    """Refuse keys that a dataclass does not have, at every depth."""
    names = [item.name for item in dataclasses.fields(spec)]
    hints = typing.get_type_hints(spec)
    for key, value in values.items():
        if key not in names:
            raise ConfigError(
                f"{prefix}{key}: unknown key, value {show(value)}; "
                f"{suggest(str(key), names, prefix)}"
            )
        inner = _section(hints[key])
        if inner is not None and value is not None:
            if not isinstance(value, Mapping):
                keys = [item.name for item in dataclasses.fields(inner)]
                raise ConfigError(
                    f"{prefix}{key}: {show(value)} is not a section; give text, or the keys "
                    f"{' and '.join(keys)}"
                )
            _check_keys(value, inner, f"{prefix}{key}.")


def _section(hint: Any) -> Any:
    """The dataclass among a type's alternatives."""
    return next((kind for kind in members(hint) if dataclasses.is_dataclass(kind)), None)


def _build(values: Mapping[str, Any]) -> RunConfig:
    """Convert and check every value by its declared type."""
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        inner = _section(hints[key])
        if value is None and type(None) in members(hints[key]):
            checked[key] = None
        elif key == "reduce":
            checked[key] = reductions.read(value)
        elif inner is not None and value is not None:
            kinds = typing.get_type_hints(inner)
            converted = {
                name: convert(name, kinds[name], item, f"{key}.")
                for name, item in value.items()
                if item is not None
            }
            if "init_args" in converted:  # unconverted: only the signature tells their types
                converted["init_args"] = dict(value["init_args"])
            checked[key] = inner(**converted)
        else:
            checked[key] = convert(key, hints[key], value)
    return RunConfig(**checked)
