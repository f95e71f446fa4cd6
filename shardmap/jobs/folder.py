"""The run folder: made when the run begins, marked when it is complete."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from shardmap._extras import require
from shardmap.errors import ConfigError, StoreError
from shardmap.jobs.base import named
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted
from shardmap.store import Store, open_store
from shardmap.store.manifest import JOURNAL

STATE, UNFINISHED, COMPLETE = "state.json", "unfinished", "complete"
RESULTS = "results.zarr"
"""The store in a run folder."""


class RunFolder:
    """A run folder, marked as complete at the end.

    `state.json` turns from `unfinished` to `complete` when all else is written.

    Use it as a context manager. An exception, Ctrl-C included, removes the folder, unless the run
    can be resumed.
    """

    def __init__(self, path: Path, made_parents: list[Path], resumed: bool):
        """Use `create` or `reopen`."""
        self.path = path
        self.resumed = resumed
        """True if the run continues in an existing folder."""
        self._made_parents = made_parents
        self._log: TextIO | None = None
        self._handler: logging.Handler | None = None

    @staticmethod
    def create(output: str, configuration: str) -> RunFolder:
        """Make a run folder, with its state and configuration in it from the beginning.

        Args:
            output: Path of the folder. The next free one (`NAME-2`, ...) is used if it exists. Its
                parent is made if it is missing.
            configuration: The text of `config.yaml`.

        Raises:
            ConfigError: `output` cannot be written.
        """
        wanted, made, hidden = Path(output), list[Path](), None
        try:
            for parent in reversed([wanted.parent, *wanted.parent.parents]):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
            hidden = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.new-", dir=wanted.parent))
            hidden.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            (hidden / "config.yaml").write_text(configuration, encoding="utf-8")
            write_json(hidden / STATE, _running())
            return RunFolder(_renamed(hidden, wanted), made, resumed=False)
        except OSError as error:
            if hidden is not None:
                shutil.rmtree(hidden, ignore_errors=True)
            _remove(made)
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                f"output: {output!r} cannot be written ({reason}); give a folder that can be made"
            ) from None

    @staticmethod
    def reopen(path: Path) -> RunFolder:
        """Open the folder of a run that has stopped, to resume it.

        Raises:
            ConfigError: The run is still running, or the folder cannot be written.
        """
        state = state_of(path)
        assert state is not None, path
        if _alive(state):
            raise ConfigError(
                f"{path}: the run is still running, as process {state['process']}; wait for it, or "
                "stop it first"
            )
        try:
            write_json(path / STATE, _running())
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); make it writable, or start the run "
                "anew elsewhere"
            ) from None
        return RunFolder(path, [], resumed=True)

    @property
    def results(self) -> Path:
        """The path of the store for outputs if the configuration names none."""
        return self.path / RESULTS

    def found(self) -> Store | None:
        """The store in the folder; None if there is none.

        A store folder whose run was killed before its header was written is removed: it is empty.
        """
        try:
            return open_store(self.results)
        except StoreError:
            if self.results.is_dir() and not (self.results / JOURNAL).exists():
                shutil.rmtree(self.results)
            return None

    def __enter__(self) -> RunFolder:
        """Start the log, or continue it."""
        log = self.path / "log.jsonl"
        torn = log.exists() and log.read_bytes()[-1:] not in (
            b"",
            b"\n",
        )  # killed in the middle of a line
        self._log = log.open("a", encoding="utf-8")
        if torn:
            self._log.write("\n")
        self._handler = _JsonLines(self)
        package = logging.getLogger("shardmap")
        self._level = package.level
        package.setLevel(min(package.level or logging.INFO, logging.INFO))
        package.addHandler(self._handler)
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        """Stop the log; after an error, keep the folder only if the run can be resumed."""
        if self._handler is not None:
            logging.getLogger("shardmap").removeHandler(self._handler)
            logging.getLogger("shardmap").setLevel(self._level)
        if kind is not None:
            self.log("stopped", error=kind.__name__ if isinstance(kind, type) else str(kind))
        if self._log is not None:
            self._log.close()
            self._log = None
        if kind is None:
            return
        if self.keeps:
            with contextlib.suppress(
                OSError
                # a full disk: the state then names a process that does not run, which is
                # detected
            ):
                write_json(self.path / STATE, {"state": UNFINISHED})
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            _remove(self._made_parents)

    @property
    def keeps(self) -> bool:
        """True if the folder is kept when the run stops.

        That is so if units are committed in it, or if it existed before.
        """
        if self.resumed:
            return True
        try:
            return bool(open_store(self.results).receipts())
        except StoreError:
            return False

    def log(self, event: str, **values: Any) -> None:
        """Append a line to log.jsonl: the time in seconds since the epoch, an event, its values."""
        if self._log is not None:
            self._log.write(
                json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n"
            )
            self._log.flush()

    def log_event(self, event: Event) -> None:
        """Append an executor's event to log.jsonl."""
        if isinstance(event, RunStarted):
            self.log(
                "map started",
                samples=event.samples,
                chunks=event.chunks,
                devices=list(event.devices),
            )
        elif isinstance(event, ChunkDone):
            self.log(
                "chunk done",
                device=event.device,
                start=event.start,
                stop=event.stop,
                seconds=round(event.seconds, 4),
            )
        elif isinstance(event, ChunkRedone):
            self.log(
                "chunk redone",
                device=event.device,
                start=event.start,
                stop=event.stop,
                reason=event.reason,
            )
        elif isinstance(event, RunFinished):
            self.log("map finished", seconds=round(event.seconds, 4), redone=dict(event.redone))

    def finish(self) -> Path:
        """Mark the folder as complete, and return its path."""
        self.log("finished")
        write_json(self.path / STATE, {"state": COMPLETE})
        return self.path


def state_of(path: Path) -> dict[str, Any] | None:
    """Read `state.json` of a folder; None if it is no run folder.

    Raises:
        ConfigError: It cannot be parsed.
    """
    file = path / STATE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({' '.join(str(error).split())}); start the run anew"
        ) from None
    if not isinstance(values, dict) or values.get("state") not in (UNFINISHED, COMPLETE):
        raise ConfigError(f"{file}: says neither {UNFINISHED} nor {COMPLETE}; start the run anew")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    hidden = path.with_name(f".{path.name}.new")
    hidden.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    hidden.replace(path)


def _running() -> dict[str, Any]:
    """The state of a run in this process."""
    return {
        "state": UNFINISHED,
        "host": platform.node(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _alive(state: Mapping[str, Any]) -> bool:
    """True if the process that a state names is still running on this machine.

    For a process on another machine it is False, as nothing is known.
    """
    if state.get("host") != platform.node() or "process" not in state:
        return False
    try:
        return (
            abs(psutil.Process(state["process"]).create_time() - state["started"]) < 1
        )  # another process may have its number now
    except psutil.Error:
        return False


def _renamed(hidden: Path, wanted: Path) -> Path:
    """Give a folder its name, or the next free one if that is taken."""
    for number in itertools.count(1):
        final = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            hidden.rename(final)  # refused if a file or a folder with content exists
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        else:
            return final
    raise AssertionError("itertools.count ends")


def _remove(parents: list[Path]) -> None:
    for parent in reversed(parents):
        with contextlib.suppress(OSError):  # other files are in it now
            parent.rmdir()


class _JsonLines(logging.Handler):
    """Send the package's log records to the run's log."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(logging.INFO)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        self._folder.log(
            "message", source=record.name, level=record.levelname.lower(), text=record.getMessage()
        )


def environment() -> dict[str, Any]:
    """Describe the environment of a run: versions, processor, memory, accelerators."""
    versions = {}
    for package in (
        "shardmap",
        "torch",
        "numpy",
        "ray",
        "scikit-learn",
        "safetensors",
        "matplotlib",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda_devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def save_tensors(path: Path, tree: Any) -> None:
    """Save a pytree of tensors as safetensors, each named by its place in the tree.

    A single tensor is named `result`, others `0` or `loss.1`.
    """
    safetensors = require("safetensors.torch", extra="run", purpose="to save outputs")
    tensors = {name: leaf.detach().cpu().contiguous() for name, leaf in named(tree).items()}
    safetensors.save_file(tensors, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
