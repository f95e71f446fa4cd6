"""Optional packages.

Imported where they are used, and named with their extra when they are missing.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from shardmap.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name of the module, for example `"matplotlib.figure"`.
        extra: The extra of shardmap that brings it.
        purpose: What needs it, for the message: `"to draw pictures"`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed; one of its dependencies is not
        raise MissingExtraError(
            f'{package} is needed {purpose} and is not installed: pip install "shardmap[{extra}]"',
            name=package,
        ) from error
