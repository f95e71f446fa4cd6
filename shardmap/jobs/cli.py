"""The command line: `shardmap run`, `plan`, `resume`, `verify`, `report`, `ops`, `devices`."""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardmap._extras import require
from shardmap.errors import (
    ClusterError,
    ConfigError,
    MissingExtraError,
    OverBudget,
    ShardmapError,
    StoreMismatchError,
)
from shardmap.run.base import Event

if TYPE_CHECKING:
    from shardmap.jobs.config import BoundRun
    from shardmap.jobs.folder import RunFolder

USAGE_ERROR = 2
MISTAKES = (ValueError, MissingExtraError, OverBudget, StoreMismatchError, ClusterError)
"""Errors of ours that say what to write otherwise: those of values, of which `ConfigError` is
one, and of what is not there."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
SCOREBOARD = (
    Path(__file__).resolve().parents[2] / "tests" / "data" / "op_db_scoreboard.json"
)  # there in a checkout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of the process by default.

    Returns:
        The exit code: 0; 1 for an error of shardmap while it ran, or a store that is not as it
        should be; 2 for a wrong command line or configuration; 130 after Ctrl-C. An exception
        raised by the user's own function passes through with its traceback.
    """
    parser = _Parser(
        prog="shardmap",
        description="Map a PyTorch function over a batch: in chunks, on every device you name.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="carry out the run that a configuration describes",
        usage="shardmap run CONFIG [--allow PREFIX] [--key value ...]",
        allow_abbrev=False,
    )
    run.add_argument(
        "config",
        help="a YAML file, such as configs/digits_gradients.yaml; it names functions by import "
        "path and so is code",
    )
    plan = commands.add_parser(
        "plan",
        help="print what a run would do, without running it",
        usage="shardmap plan CONFIG [--workers N] [--measure] [--allow PREFIX] [--key value ...]",
        allow_abbrev=False,
    )
    plan.add_argument(
        "config", help="as for run; data is loaded and the model made, for the plan depends on them"
    )
    plan.add_argument(
        "--workers",
        metavar="N",
        help="forecast the run for N workers like this machine: time, bytes, requests, bottleneck",
    )
    plan.add_argument(
        "--measure",
        action="store_true",
        help="compute about a second's worth of samples, so that seconds are no guess",
    )
    resume = commands.add_parser(
        "resume",
        help="go on with a run that was killed",
        usage="shardmap resume RUN_OR_STORE [--allow PREFIX] [--key value ...]",
        allow_abbrev=False,
    )
    resume.add_argument(
        "run",
        help="the run folder, or the path or URL of the run's store; it holds the configuration, "
        "which is run as code",
    )
    verify = commands.add_parser(
        "verify",
        help="hash a store's units, compute some of them again, and compare",
        allow_abbrev=False,
    )
    verify.add_argument(
        "store",
        help="a run folder, or the path or URL of a store; the configuration in it is run as code",
    )
    verify.add_argument(
        "--units", type=int, metavar="N", help="how many units to compute again (3)"
    )
    verify.add_argument("--all", action="store_true", help="compute all units again")
    verify.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice of units (0)"
    )
    verify.add_argument(
        "--devices", help="where to compute on this machine; by default where the run did"
    )
    verify.add_argument(
        "--discard",
        action="store_true",
        help="take back the commits of units that are wrong: `shardmap resume` makes them anew",
    )
    for command in (run, plan, resume, verify):
        command.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="PREFIX",
            help="import only what lies below this package or module; repeatable",
        )
    report = commands.add_parser(
        "report", help="make one HTML page of a run folder", allow_abbrev=False
    )
    report.add_argument("run", type=Path, help="the run folder")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (report.html in the run folder)"
    )
    ops = commands.add_parser(
        "ops",
        help="list the operators that have a batching rule, and what the last sweep over PyTorch's "
        "found",
    )
    ops.add_argument(
        "--scoreboard", type=Path, default=SCOREBOARD, help="the sweep's stored result"
    )
    commands.add_parser("devices", help="list the devices that a map can run on here")
    try:
        options, rest = parser.parse_known_args(arguments)
        if options.command == "run":
            return _run(options.config, rest, options.allow)
        if options.command == "plan":
            return _plan(options, rest)
        if options.command == "resume":
            return _resume(options.run, rest, options.allow)
        if rest:
            parser.error(f"unknown argument {rest[0]}; see shardmap {options.command} --help")
        if options.command == "verify":
            return _verify(options)
        if options.command == "report":
            return _report(options.run, options.output)
        return _ops(options.scoreboard) if options.command == "ops" else _devices()
    except KeyboardInterrupt:
        _complain("interrupted; nothing was left behind")
        return INTERRUPTED
    except ShardmapError as error:
        if isinstance(error, MISTAKES):
            _complain(str(error))
            return USAGE_ERROR
        print(
            f"shardmap: {type(error).__name__}: {error}", file=sys.stderr
        )  # in full: a worker's error brings its traceback
        return 1
    except BrokenPipeError:  # `shardmap ops | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, like every other error here."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  argparse declares NoReturn, and this raises
        raise ConfigError(message)


def _run(path: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Check everything, then carry out the run, with a progress bar if someone watches."""
    from shardmap.jobs.config import bind, load

    _import_from_here()
    return _carried_out(bind(load(path, overrides), allow), None)


def _resume(place: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Go on with a run that has stopped."""
    from shardmap.jobs.config import bind
    from shardmap.jobs.resume import find

    _import_from_here()
    stopped = find(place, overrides)
    if stopped.complete:
        _say(f"{stopped.folder} is complete: there is nothing to go on with")
        return 0
    bound = bind(stopped.config, allow)
    stopped.check(bound.config)
    if not stopped.partly():
        _say("its outputs are not in a store: the run starts from the beginning")
    return _carried_out(bound, stopped.reopen())


def _carried_out(bound: BoundRun, folder: RunFolder | None) -> int:
    from shardmap.jobs.run import (
        RunInterrupted,
        execute,
    )  # after the checks: a wrong key is answered without loading more

    config = bound.config
    try:
        with _progress() as listener:
            written, findings = execute(bound, folder=folder, say=_say, listener=listener)
    except RunInterrupted as stopped:
        _complain(
            f"interrupted; what is in {stopped.folder} stays, and `shardmap resume "
            f"{stopped.folder}` goes on with it"
        )
        return INTERRUPTED
    except KeyboardInterrupt:
        if config.store is None or not _is_there(config.store):
            raise
        _complain(
            f"interrupted; units that are in {config.store} stay, and `shardmap resume "
            f"{config.store}` goes on with them"
        )
        return INTERRUPTED
    if findings is not None:
        _say(findings.headline)
    _say(
        f"written to {written}"
        + ("" if config.store is None else f", the outputs to {config.store}")
    )
    return 0


def _report(run: Path, output: Path | None) -> int:
    """Make a page of a run folder."""
    from shardmap.jobs.report.page import write

    _say(f"written to {write(run, output)}")
    return 0


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print a run's plan, and a forecast for workers."""
    workers = options.workers
    if workers is not None and not (workers.isascii() and workers.isdigit() and int(workers)):
        raise ConfigError(f"--workers {workers}: does not fit; give a whole number of at least 1")
    from shardmap.jobs.config import bind, load

    _import_from_here()
    bound = bind(load(options.config, overrides), options.allow)
    from shardmap.jobs.plan import plan

    with _progress():
        plan(
            bound,
            workers=None if workers is None else int(workers),
            measure=options.measure,
            say=_say,
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Check a store; what is wrong is listed."""
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
    from shardmap.jobs.verify import verify

    store = store_in(options.store)

    units = None if options.all else 3 if options.units is None else options.units
    with _progress() as listener:
        found = verify(
            store,
            units=units,
            seed=options.seed,
            devices=options.devices,
            allow=options.allow,
            say=_say,
            listener=listener,
        )
    if not found.wrong:
        return 0
    if options.discard:
        for unit in found.wrong:
            store.discard(unit)
        _say(
            f"{len(found.wrong)} units are discarded: `shardmap resume {options.store}` computes "
            "them anew"
        )
    else:
        _say(
            f"`shardmap verify {options.store} --discard` takes these units back, `shardmap resume "
            f"{options.store}` computes them anew"
        )
    return 1


def _is_there(url: str) -> bool:
    """Whether there is a store already.

    It is made when the data is loaded and the function recorded.
    """
    from shardmap.jobs.resume import opened

    try:
        opened(url)
    except ConfigError:
        return False
    return True


def _import_from_here() -> None:
    """Import paths in a configuration may name the user's own files."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _ops(scoreboard: Path) -> int:
    """Print the registry of rules, and what the stored sweep over PyTorch's operator database found."""
    from shardmap.jobs.report import format_table
    from shardmap.rules.registry import lacking, table

    rows = sorted(table(), key=lambda row: (row[2], row[0]))
    _say(
        format_table(
            {
                "operator": [row[0] for row in rows],
                "tier": [row[1] for row in rows],
                "family": [row[2] for row in rows],
            }
        )
    )
    counts = collections.Counter(row[1] for row in rows)
    known = ", ".join(f"{count} by {tier}" for tier, count in sorted(counts.items()))
    _say(
        f"\nbatched: {known}; every other operator by torch.func.vmap of it alone, or by a loop "
        "with a warning"
    )
    for line in lacking():
        _say(f"\n{line}")
    if not scoreboard.is_file():
        _say(
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
    _say(
        f"\nPyTorch's operator database, torch {board.get('torch_version', 'unknown')}, number of "
        "operators:"
    )
    _say(format_table(columns))
    return 0


def _devices() -> int:
    """Print what a map can run on."""
    import psutil
    import torch

    gib = 2**30
    memory = psutil.virtual_memory()
    free_text = f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free"
    _say(f"cpu     {os.cpu_count()} cores, {torch.get_num_threads()} threads, {free_text}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        _say(
            f"cuda:{index}  {torch.cuda.get_device_name(index)}, {free / gib:.1f} of "
            f"{total / gib:.1f} GiB free"
        )
    if torch.cuda.device_count() == 0:
        _say("cuda    none")
    try:
        _say(
            f"ray     {require('ray', extra='ray', purpose='for devices=ray').__version__} "
            "installed"
        )
    except MissingExtraError as error:
        _say(f"ray     {error}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """Draw the events of a map, and what is done before it, on stderr.

    Draw nothing where that is not a terminal.
    """
    from shardmap.run.progress import bars

    with bars(preparing=True) as drawn:
        with _heard(drawn.say):
            yield drawn


@contextlib.contextmanager
def _heard(show: Callable[[str], None]) -> Iterator[None]:
    """Show the package's log messages as they come, and python's warnings as one line each, in the run's log too."""

    class Show(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                _complain(f"warning: {record.getMessage()}")
            elif record.name.startswith(
                "shardmap.jobs"
            ):  # the engine's own messages are long, and for the log
                show(record.getMessage())

    def warn(
        message: Warning | str, category: type[Warning], filename: str, line: int, *rest: object
    ) -> None:
        logger.warning("%s: %s", category.__name__, message)

    logger, handler = logging.getLogger("shardmap"), Show()
    logger.addHandler(handler)
    before, warnings.showwarning = warnings.showwarning, warn
    try:
        yield
    finally:
        warnings.showwarning = before
        logger.removeHandler(handler)


def _version() -> str:
    try:
        return importlib.metadata.version("shardmap")
    except importlib.metadata.PackageNotFoundError:
        return "not installed, run from its sources"


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(message: str) -> None:
    print("shardmap: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
