"""Reductions of a configuration: a name, a name with arguments, or several under own names."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from shardmap import reduce
from shardmap._extras import require
from shardmap.errors import ConfigError, OptionError
from shardmap.jobs.config.words import convert, show, suggest

NAMES = ("sum", "mean", "max", "min", "norm", "clipped_sum", "second_moment", "gram", "project")
"""The reductions of `shardmap.reduce` without a user-defined function."""


def read(value: Any) -> str | dict[str, Any]:
    """Check the value of `reduce:`, and convert it to one form.

    Args:
        value: `mean`; `{name: clipped_sum, max_norm: 1.0}`; `[mean, norm]`; or `{average: mean,
            clipped: {name: clipped_sum, ...}}`. On the command line each may be text.

    Returns:
        A name; a mapping with `name` and all arguments; or a mapping from the user's names to
        these.

    Raises:
        ConfigError: A name or an argument is wrong.
    """
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):  # from the command line
        yaml = require("yaml", extra="run", purpose="to read configurations")
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"reduce: {show(value)} is not YAML; write for example '{{name: clipped_sum, "
                "max_norm: 1.0}'"
            ) from None
    if isinstance(value, list):
        names = [item.get("name") if isinstance(item, Mapping) else item for item in value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError(
                f"reduce: {show(twice[0])} is listed twice; give each a name of its own: {{first: "
                "..., second: ...}"
            )
        value = {str(name): item for name, item in zip(names, value, strict=True)}
    if isinstance(value, Mapping) and "name" not in value:
        if not value:
            raise ConfigError(
                "reduce: names no reduction; give one, or null to keep a row for each sample"
            )
        return {str(label): _one(item, f"reduce.{label}") for label, item in value.items()}
    return _one(value, "reduce")


def build(value: str | list[Any] | dict[str, Any] | None) -> Any:
    """Make the argument `reduce` of `shardmap.vmap` from the value that `read` returned.

    Raises:
        ConfigError: An argument has a value that the reduction refuses.
    """
    if value is None or isinstance(value, str):
        return None if value is None else _made("reduce", value, {})
    assert isinstance(value, dict)
    if "name" in value:
        return _made(
            "reduce", value["name"], {key: item for key, item in value.items() if key != "name"}
        )
    made = {}
    for label, item in value.items():
        given = {"name": item} if isinstance(item, str) else item
        made[label] = _made(
            f"reduce.{label}",
            given["name"],
            {key: part for key, part in given.items() if key != "name"},
        )
    return reduce.together(**made)


def _one(value: Any, key: str) -> str | dict[str, Any]:
    """Read one reduction: its name, and its arguments if it takes some."""
    if isinstance(value, Mapping) and "name" not in value:
        raise ConfigError(f"{key}.name: missing; give one of {', '.join(NAMES)}")
    name, given = (
        (value["name"], {k: v for k, v in value.items() if k != "name"})
        if isinstance(value, Mapping)
        else (value, {})
    )
    if name not in NAMES:
        where = f"{key}.name" if isinstance(value, Mapping) else key
        hint = suggest(name, NAMES) if isinstance(name, str) else f"known: {', '.join(NAMES)}"
        raise ConfigError(f"{where}: {show(name)} is no reduction; {hint}")
    function = _function(name)
    parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
    for argument, text in given.items():
        if argument not in parameters:
            hint = suggest(str(argument), list(parameters), f"{key}.")
            raise ConfigError(
                f"{key}.{argument}: unknown argument of the reduction {name}, value {show(text)}; "
                f"{hint}"
            )
    arguments: dict[str, Any] = {}
    for argument, parameter in parameters.items():
        if argument in given:
            arguments[argument] = convert(argument, hints[argument], given[argument], f"{key}.")
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"{key}.{argument}: missing; the reduction {name} needs it: {{name: {name}, "
                f"{argument}: ...}}"
            )
        else:
            arguments[argument] = parameter.default
    return {"name": name, **arguments} if arguments else name


def _function(name: str) -> Callable[..., Any]:
    return getattr(reduce, name)


def _made(key: str, name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return _function(name)(**arguments)
    except OptionError as error:
        raise ConfigError(f"{key}: {error}") from error
