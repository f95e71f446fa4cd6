"""The scoreboard: for each operator of the database what shardmap and torch.func make of it."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import torch

SCOREBOARD = Path(__file__).parent / "data" / "op_db_scoreboard.json"
RANKS = {"refused": 0, "fallback": 1, "right": 2}
"""Ranks of scoreboard entries: an entry may only rise."""
DIRECTIONS = ("forward", "gradient")


def load() -> dict[str, Any]:
    """The stored scoreboard: operator to direction to what each subject makes of it."""
    return (
        json.loads(SCOREBOARD.read_text())
        if SCOREBOARD.exists()
        else {"torch_version": torch.__version__, "operators": {}}
    )


def complaints(name: str, result: dict[str, Any], board: dict[str, Any]) -> list[str]:
    """Complaints about a fresh result of shardmap.

    Wrong, worse than stored, or less than `torch.func.vmap` does.
    """
    entry = board["operators"].get(name, {})
    found = []
    for direction in DIRECTIONS:
        now, detail = result[direction], result.get(f"{direction}_detail", "")
        stored = entry.get(direction, {})
        if now not in (*RANKS, "uncounted"):
            found.append(f"{name} {direction} is {now}: {detail}")
        elif now in RANKS:
            if RANKS[now] < RANKS.get(stored.get("shardmap"), 0):
                found.append(f"{name} {direction} was {stored['shardmap']}, is {now}: {detail}")
            served, reference = result[f"{direction}_served"], stored.get("torch_served", 0)
            if served < reference:
                found.append(
                    f"{name} {direction}: {served} samples served, torch.func.vmap serves "
                    f"{reference}: {detail}"
                )
            if served < stored.get("shardmap_served", 0):
                found.append(
                    f"{name} {direction}: {served} samples served, were "
                    f"{stored['shardmap_served']}: {detail}"
                )
    return found


def store(results: dict[str, dict[str, Any]], subject_name: str) -> None:
    """Writes one subject's column."""
    board = load()
    board["torch_version"] = torch.__version__
    for name, result in results.items():
        for direction in DIRECTIONS:
            if result.get(direction, "uncounted") != "uncounted":
                board["operators"].setdefault(name, {}).setdefault(direction, {}).update(
                    {
                        subject_name: result[direction],
                        f"{subject_name}_served": result.get(f"{direction}_served", 0),
                    }
                )
    board["operators"] = dict(sorted(board["operators"].items()))
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in board["operators"].items()
    ]
    SCOREBOARD.parent.mkdir(exist_ok=True)
    SCOREBOARD.write_text(
        f'{{"torch_version": {json.dumps(board["torch_version"])}, "operators": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Counts per direction."""
    return "\n".join(
        f"{d}: {dict(collections.Counter(r.get(d, 'crashed') for r in results.values()))}"
        for d in DIRECTIONS
    )
