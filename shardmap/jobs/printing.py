"""Output of the command line: results on stdout, errors and progress on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from shardmap.run import progress as drawing
from shardmap.run.base import Event


def say(text: str) -> None:
    """Print a result, and flush."""
    print(text, flush=True)


def complain(message: str) -> None:
    """Print an error or a warning on stderr, as one line."""
    print("shardmap: " + " ".join(message.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Event], None]]:
    """Draw a map's events, and the log messages before it begins, on stderr.

    Nothing is drawn if stderr is not a terminal.
    """
    with drawing.bars(preparing=True) as drawn:
        with _heard(drawn.say):
            yield drawn


@contextlib.contextmanager
def _heard(show: Callable[[str], None]) -> Iterator[None]:
    """Show the package's log messages, and python's warnings as one line each.

    The warnings become log messages, so that a run's log has them too.
    """

    class Show(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                complain(f"warning: {record.getMessage()}")
            elif record.name.startswith("shardmap.jobs"):  # the engine's are long: for the log only
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
