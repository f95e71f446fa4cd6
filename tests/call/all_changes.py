"""Every way to change what a function does between two calls of its map (`changes.WAYS`)."""

from __future__ import annotations

import importlib

from tests.call.changes import STATES, WAYS

__all__ = ["STATES", "WAYS"]

for part in (
    "values", "objects", "surroundings", "modules", "settings", "tensors", "builtins", "classes",
    "libraries", "arrays", "caches", "absent",
):  # fmt: skip
    importlib.import_module(f"tests.call.changes_of_{part}")
for part in ("found", "unspelled", "seldom", "of_keys"):
    importlib.import_module(f"tests.call.changes_{part}")
