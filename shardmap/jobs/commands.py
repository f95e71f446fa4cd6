"""The commands of `shardmap`: each does its work and returns the exit code."""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardmap._extras import require
from shardmap.errors import ConfigError, MissingExtraError
from shardmap.jobs.printing import complain, progress, say

if TYPE_CHECKING:
    from shardmap.jobs.config import BoundRun
    from shardmap.jobs.folder import RunFolder

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run(path: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Check everything, then carry out the run, with a progress bar on a terminal."""
    from shardmap.jobs.config import bind, load

    _import_from_here()
    return _carry_out(bind(load(path, overrides), allow), None)


def resume(place: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Resume a run that has stopped."""
    from shardmap.jobs.config import bind
    from shardmap.jobs.resume import find

    _import_from_here()
    stopped = find(place, overrides)
    if stopped.complete:
        say(f"{stopped.folder} is complete: there is nothing to go on with")
        return 0
    bound = bind(stopped.config, allow)
    stopped.check(bound.config)
    if not stopped.partly():
        say("its outputs are not in a store: the run starts from the beginning")
    return _carry_out(bound, stopped.reopen())


def _carry_out(bound: BoundRun, folder: RunFolder | None) -> int:
    # after the checks: a wrong key is refused without loading more
    from shardmap.jobs.run import RunInterrupted, execute

    config = bound.config
    try:
        with progress() as listener:
            written, findings = execute(bound, folder=folder, say=say, listener=listener)
    except RunInterrupted as stopped:
        complain(
            f"interrupted; what is in {stopped.folder} stays, and `shardmap resume "
            f"{stopped.folder}` goes on with it"
        )
        return INTERRUPTED
    except KeyboardInterrupt:
        if config.store is None or not _is_there(config.store):
            raise
        complain(
            f"interrupted; units that are in {config.store} stay, and `shardmap resume "
            f"{config.store}` goes on with them"
        )
        return INTERRUPTED
    if findings is not None:
        say(findings.headline)
    say(
        f"written to {written}"
        + ("" if config.store is None else f", the outputs to {config.store}")
    )
    return 0


def report(run: Path, output: Path | None) -> int:
    """Make a page of a run folder."""
    from shardmap.jobs.report.page import write

    say(f"written to {write(run, output)}")
    return 0


def plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print a run's plan, and a forecast for workers."""
    workers = options.workers
    if workers is not None and not (workers.isascii() and workers.isdigit() and int(workers)):
        raise ConfigError(f"--workers {workers}: does not fit; give a whole number of at least 1")
    from shardmap.jobs.config import bind, load

    _import_from_here()
    bound = bind(load(options.config, overrides), options.allow)
    from shardmap.jobs.plan import plan as plan_run

    with progress():
        plan_run(
            bound,
            workers=None if workers is None else int(workers),
            measure=options.measure,
            say=say,
        )
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a store, and list the units that are wrong."""
    if options.all and options.units is not None:
        raise ConfigError(f"--all and --units {options.units}: give one of them")
    if options.units is not None and options.units < 0:
        raise ConfigError(
            f"--units {options.units}: negative; give how many units to compute again, 0 for none"
        )
    if options.devices == "ray":
        raise ConfigError(
            "--devices ray: units are computed again on this machine; give auto, cpu or cuda:*"
        )
    _import_from_here()
    from shardmap.jobs.resume import store_in
    from shardmap.jobs.verify import verify as verify_store

    store = store_in(options.store)

    units = None if options.all else 3 if options.units is None else options.units
    with progress() as listener:
        found = verify_store(
            store,
            units=units,
            seed=options.seed,
            devices=options.devices,
            allow=options.allow,
            say=say,
            listener=listener,
        )
    if found.right:
        return 0
    if not found.wrong:
        return 1  # computing such rows anew by the same map would not mend them
    if options.discard:
        for unit in found.wrong:
            store.discard(unit)
        say(
            f"{len(found.wrong)} units are discarded: `shardmap resume {options.store}` computes "
            "them anew"
        )
    else:
        say(
            f"`shardmap verify {options.store} --discard` takes these units back, `shardmap resume "
            f"{options.store}` computes them anew"
        )
    return 1


def _is_there(url: str) -> bool:
    """True if the store exists; a run makes it only after it has recorded the function."""
    from shardmap.jobs.resume import opened

    try:
        opened(url)
    except ConfigError:
        return False
    return True


def _import_from_here() -> None:
    """Let import paths name modules in the current directory."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def operators_of(tiers: Collection[str]) -> int:
    """Print the operators of this torch that these tiers serve, with rules or without."""
    from shardmap.rules.registry import recordable

    rows = [row for row in recordable() if row[1] in tiers]
    _print_operators(rows)
    torchs = f"torch {importlib.metadata.version('torch')}"
    say(f"\n{len(rows)} operators of {torchs} by {' or '.join(sorted(tiers))}")
    return 0


def _print_operators(rows: Sequence[tuple[str, str, str]]) -> None:
    from shardmap.jobs.report import format_table

    names = "operator", "tier", "family"
    say(format_table({name: [row[i] for row in rows] for i, name in enumerate(names)}))


def ops(scoreboard: Path) -> int:
    """Print the registry of rules, and the results of the stored sweep over PyTorch's operators."""
    from shardmap.jobs.report import format_table
    from shardmap.rules.registry import lacking, table

    rows = sorted(table(), key=lambda row: (row[2], row[0]))
    _print_operators(rows)
    counts = collections.Counter(row[1] for row in rows)
    known = ", ".join(f"{count} by {tier}" for tier, count in sorted(counts.items()))
    say(
        f"\nbatched: {known}; every other operator by torch.func.vmap of it alone, or by a loop "
        "with a warning"
    )
    for line in lacking():
        say(f"\n{line}")
    if not scoreboard.is_file():
        say(
            f"no scoreboard at {scoreboard}: it belongs to the source repository, "
            "tests/data/op_db_scoreboard.json"
        )
        return 0
    board = json.loads(scoreboard.read_text(encoding="utf-8"))
    results = collections.Counter(
        (direction, subject, verdict)
        for directions in board["operators"].values()
        for direction, stored in directions.items()
        for subject, verdict in stored.items()
        if isinstance(verdict, str)
    )
    verdicts = sorted({verdict for _, _, verdict in results})
    pairs = sorted({(direction, subject) for direction, subject, _ in results})
    columns: dict[str, list[object]] = {
        "direction": [pair[0] for pair in pairs],
        "subject": [pair[1] for pair in pairs],
    }
    columns |= {verdict: [results[(*pair, verdict)] for pair in pairs] for verdict in verdicts}
    say(
        f"\nPyTorch's operator database, torch {board.get('torch_version', 'unknown')}, number of "
        "operators:"
    )
    say(format_table(columns))
    return 0


def devices() -> int:
    """Print the devices that a map can run on."""
    import psutil
    import torch

    gib = 2**30
    memory = psutil.virtual_memory()
    free_text = f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free"
    say(f"cpu     {os.cpu_count()} cores, {torch.get_num_threads()} threads, {free_text}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        say(
            f"cuda:{index}  {torch.cuda.get_device_name(index)}, {free / gib:.1f} of "
            f"{total / gib:.1f} GiB free"
        )
    if torch.cuda.device_count() == 0:
        say("cuda    none")
    try:
        ray = require("ray", extra="ray", purpose="for devices=ray")
        say(f"ray     {ray.__version__} installed")
    except MissingExtraError as error:
        say(f"ray     {error}")
    return 0
