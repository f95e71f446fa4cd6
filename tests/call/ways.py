"""Options under which a map must return what the loop returns."""

from __future__ import annotations

from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks_of_one": {"chunk_size": 1},
    "chunks_of_three": {"chunk_size": 3},
    "two_lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "always": {"check": "always"},
}
