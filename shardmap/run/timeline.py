"""What happened in a run, as a Chrome trace and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardmap.planning.split import Split
from shardmap.run.base import Event


def write(path: Path, events: Sequence[Event]) -> None:
    """Write the events in Chrome's trace format."""
    raise AssertionError


def draw(path: Path, split: Split, events: Sequence[Event]) -> None:
    """Draw the events."""
    raise AssertionError
