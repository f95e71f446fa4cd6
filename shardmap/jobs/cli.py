"""The command line: `shardmap run`, `plan`, `resume`, `verify`, `report`, `ops`, `devices`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shardmap.errors import (
    ClusterError,
    ConfigError,
    MissingExtraError,
    OverBudget,
    ShardmapError,
    StoreMismatchError,
)
from shardmap.jobs import commands
from shardmap.jobs.commands import INTERRUPTED
from shardmap.jobs.printing import complain

USAGE_ERROR = 2
MISTAKES = (ValueError, MissingExtraError, OverBudget, StoreMismatchError, ClusterError)
"""Errors that the user can correct: wrong values (`ConfigError` is a ValueError), and missing
packages, memory, stores or clusters."""
WITH_RULE, WITHOUT_RULE = ("rule", "decomposition"), ("functorch", "loop")
"""The tiers of `shardmap.rules.registry.tier`."""
SCOREBOARD = Path(__file__).resolve().parents[2] / "tests" / "data" / "op_db_scoreboard.json"
"""The stored sweep over PyTorch's operator database; it exists in a checkout."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of the process by default.

    Returns:
        The exit code: 0; 1 for an error of shardmap while it ran, or a damaged store;
        2 for a wrong command line or configuration; 130 after Ctrl-C. An exception
        raised by the user's own function passes through with its traceback.
    """
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        if options.command == "run":
            return commands.run(options.config, rest, options.allow)
        if options.command == "plan":
            return commands.plan(options, rest)
        if options.command == "resume":
            return commands.resume(options.run, rest, options.allow)
        if rest:
            parser.error(f"unknown argument {rest[0]}; see shardmap {options.command} --help")
        if options.command == "verify":
            return commands.verify(options)
        if options.command == "report":
            return commands.report(options.run, options.output)
        if options.command == "devices":
            return commands.devices()
        if options.missing or options.tier:
            return commands.operators_of([options.tier] if options.tier else WITHOUT_RULE)
        return commands.ops(options.scoreboard)
    except KeyboardInterrupt:
        complain("interrupted; nothing was left behind")
        return INTERRUPTED
    except ShardmapError as error:
        if isinstance(error, MISTAKES):
            complain(str(error))
            return USAGE_ERROR
        # in full: a worker's error brings its traceback
        print(f"shardmap: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `shardmap ops | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands; it leaves unknown words, the configuration's keys, over."""
    parser = _Parser(
        prog="shardmap",
        description="Map a PyTorch function over a batch: in chunks, on every device you name.",
    )
    parser.add_argument("--version", action="version", version=_version())
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = parsers.add_parser(
        "run",
        help="carry out the run that a configuration describes",
        usage="shardmap run CONFIG [--allow PREFIX] [--key value ...]",
        allow_abbrev=False,
    )
    run.add_argument(
        "config",
        help="a YAML file, such as configs/digits_gradients/run.yaml, or a folder with a run.yaml; "
        "it names functions by import path and so is code",
    )
    plan = parsers.add_parser(
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
    resume = parsers.add_parser(
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
    verify = parsers.add_parser(
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
    report = parsers.add_parser(
        "report", help="make one HTML page of a run folder", allow_abbrev=False
    )
    report.add_argument("run", type=Path, help="the run folder")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (report.html in the run folder)"
    )
    ops = parsers.add_parser(
        "ops",
        help="list the operators that have a batching rule, and what the last sweep over PyTorch's "
        "found",
    )
    ops.add_argument(
        "--scoreboard", type=Path, default=SCOREBOARD, help="the sweep's stored result"
    )
    which = ops.add_mutually_exclusive_group()
    which.add_argument(
        "--missing",
        action="store_true",
        help="list the operators of this torch that have neither a rule nor a decomposition",
    )
    which.add_argument(
        "--tier",
        choices=(*WITH_RULE, *WITHOUT_RULE),
        help="list the operators of this torch that this tier serves",
    )
    parsers.add_parser("devices", help="list the devices that a map can run on here")
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors as `ConfigError`, so that they are one line."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  argparse declares NoReturn, and this raises
        raise ConfigError(message)


def _version() -> str:
    try:
        return importlib.metadata.version("shardmap")
    except importlib.metadata.PackageNotFoundError:
        return "not installed, run from its sources"


if __name__ == "__main__":
    sys.exit(main())
