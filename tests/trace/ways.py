"""The ways in which tests of this folder run a map, besides by default."""

from __future__ import annotations

from typing import Any

WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 2},
    {"devices": ["cpu", "cpu"], "chunk_size": 2},
    {"trace": "once"},
    {"trace": "each"},
]
