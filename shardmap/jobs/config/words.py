"""Convert and check values by their types, and describe types in plain words."""

from __future__ import annotations

import argparse
import copy
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from shardmap._extras import require
from shardmap.errors import ConfigError
from shardmap.jobs.config.schema import Bounds


def convert(name: str, hint: Any, value: Any, prefix: str = "") -> Any:
    """Convert a value to a type by jsonargparse.

    Its errors of several lines become one line in plain words.

    Args:
        name: The key.
        hint: The type.
        value: A value from YAML, or text from the command line.
        prefix: The enclosing keys, with a dot at the end.

    Raises:
        ConfigError: The value does not fit.
    """
    jsonargparse = require("jsonargparse", extra="run", purpose="to read configurations")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument(f"--{name}", type=hint)
        parsed = getattr(
            parser.parse_object({name: copy.deepcopy(value)}), name
        )  # it converts its argument in place
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{prefix}{name}: {show(value)} does not fit; give {plain(hint)}"
        ) from error
    for member in members(hint):
        for bounds in getattr(member, "__metadata__", ()):
            if (
                isinstance(bounds, Bounds)
                and isinstance(parsed, int | float)
                and not bounds.admits(parsed)
            ):
                raise ConfigError(f"{prefix}{name}: {parsed} is out of range; give {plain(hint)}")
    return parsed


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; for another type the type itself."""
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def plain(hint: Any) -> str:
    """Describe a type in plain words."""
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    alternatives = members(hint)
    if len(alternatives) > 1:
        return " or ".join(plain(member) for member in alternatives)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return plain(arguments[0]) + "".join(
            str(item) for item in arguments[1:] if isinstance(item, Bounds)
        )
    if origin is Literal:
        names = [str(argument) for argument in arguments]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if origin in (list, tuple, Sequence):
        return f"a list (each {plain(arguments[0])})" if arguments else "a list"
    if origin in (dict, Mapping):
        return "names and values"
    return getattr(hint, "__name__", str(hint))


def suggest(key: str, names: Sequence[str], prefix: str = "") -> str:
    """A hint for an unknown key: the closest name, or all of them."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known: {', '.join(names)}" if names else "it takes none"


def show(value: Any) -> str:
    """Format a value in one line, cut if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
