"""The process that compiles a program in the background: reads a request, fills the cache."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shardmap.lower import artefacts
from shardmap.lower.batched import Fixes, LoweringOptions
from shardmap.lower.cache import lower_with
from shardmap.lower.graphs import Chunk, Meta, UncompilableError, graphs
from shardmap.program.ir import Program
from shardmap.run.compiled import draft_of
from shardmap.run.precision import Float32Precision


def main(path: Path) -> None:
    """Compile the program that `path` asks for."""
    request = json.loads(path.read_text())
    settings = request["settings"]
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(getattr(torch, settings["dtype"].removeprefix("torch.")))
    torch.use_deterministic_algorithms(settings["deterministic"])
    overall, by_operator = settings["precision"]
    Float32Precision(overall, tuple((name, value) for name, value in by_operator)).apply()
    program = Program.loads(request["program"])
    options = LoweringOptions(
        **request["options"] | {"summed": tuple(request["options"]["summed"])}
    )
    batched, replay = lower_with(program, options, _fixes(request["fixes"]), {}, quiet=True)
    if replay.source != request["source"]:
        raise UncompilableError("another process lowers the program differently")
    known = {
        int(i): Meta(tuple(shape), tuple(stride), dtype, device)
        for i, (shape, stride, dtype, device) in request["known"].items()
    }
    device, scalars = torch.device(request["device"]), request["scalars"]
    chunk = Chunk(request["size"], 0, device, (), scalars, (), ())
    base, name = Path(request["base"]), request["name"]
    if artefacts.find(base, name) is None:
        with torch.no_grad():
            draft_of(batched, graphs(batched, known, chunk), base, name)


def _fixes(given: Mapping[str, Any]) -> Fixes:
    def numbered(table: Mapping[str, str]) -> dict[int, str]:
        return {int(i): text for i, text in table.items()}

    return Fixes(
        numbered(given["tiers"]),
        numbered(given["reasons"]),
        frozenset(given["restride"]),
        given["plain"],
        given["copied"],
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))  # drafts are removed
    if hasattr(os, "nice"):
        os.nice(10)  # the run that waits for nothing comes first
    main(Path(sys.argv[1]))
