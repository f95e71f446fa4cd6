"""The run folder: written under a temporary name, renamed when it is complete."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardmap.errors import ConfigError
from shardmap.extras import require
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted


class RunFolder:
    """A folder that carries its final name only once everything is in it.

    Use as a context manager. Leaving it by an exception, Ctrl-C included, removes what was written.
    """

    def __init__(self, output: str) -> None:
        """Claim a temporary folder beside `output`.

        Args:
            output: The run folder's path. Its parent is made if it is missing.

        Raises:
            ConfigError: `output` cannot be written.
        """
        self._wanted = Path(output)
        self._made_parents: list[Path] = []
        try:
            for parent in reversed([self._wanted.parent, *self._wanted.parent.parents]):
                if not parent.exists():
                    parent.mkdir()
                    self._made_parents.append(parent)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self._wanted.name}.unfinished-", dir=self._wanted.parent))
            self.path.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        except OSError as error:
            self._remove_parents()
            reason = error.strerror or type(error).__name__
            raise ConfigError(f"output: {output!r} cannot be written ({reason}); give a folder that can be made") from None
        self._log: TextIO | None = None
        self._handler: logging.Handler | None = None

    def __enter__(self) -> RunFolder:
        """Start the log."""
        self._log = (self.path / "log.jsonl").open("w", encoding="utf-8")
        self._handler = _JsonLines(self)
        package = logging.getLogger("shardmap")
        self._level = package.level
        package.setLevel(min(package.level or logging.INFO, logging.INFO))
        package.addHandler(self._handler)
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        """Stop the log; remove the folder unless `finish` gave it its name."""
        if self._handler is not None:
            logging.getLogger("shardmap").removeHandler(self._handler)
            logging.getLogger("shardmap").setLevel(self._level)
        if self._log is not None:
            self._log.close()
            self._log = None
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._remove_parents()

    def log(self, event: str, **values: Any) -> None:
        """Append a line to log.jsonl: the time in seconds since the epoch, the event and its values."""
        if self._log is not None:
            self._log.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n")
            self._log.flush()

    def log_event(self, event: Event) -> None:
        """Append an executor's event to log.jsonl."""
        if isinstance(event, RunStarted):
            self.log("map started", samples=event.samples, chunks=event.chunks, devices=list(event.devices))
        elif isinstance(event, ChunkDone):
            self.log("chunk done", device=event.device, start=event.start, stop=event.stop, seconds=round(event.seconds, 4))
        elif isinstance(event, ChunkRedone):
            self.log("chunk redone", device=event.device, start=event.start, stop=event.stop, reason=event.reason)
        elif isinstance(event, RunFinished):
            self.log("map finished", seconds=round(event.seconds, 4), redone=dict(event.redone))

    def finish(self) -> Path:
        """Give the folder its name, or the next free one (`NAME-2`, ...) if that is taken, and return it."""
        self.log("finished")
        for number in itertools.count(1):
            final = self._wanted if number == 1 else self._wanted.with_name(f"{self._wanted.name}-{number}")
            try:
                self.path.rename(final)  # refused where a file or a folder with something in it stands
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            else:
                return final
        raise AssertionError("itertools.count ends")

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()


class _JsonLines(logging.Handler):
    """Send the package's log records to the run's log."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(logging.INFO)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        self._folder.log("message", source=record.name, level=record.levelname.lower(), text=record.getMessage())


def environment() -> dict[str, Any]:
    """Describe what a run ran on: versions, processor, memory, accelerators."""
    versions = {}
    for package in ("shardmap", "torch", "numpy", "ray", "scikit-learn", "safetensors", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def save_tensors(path: Path, tree: Any) -> None:
    """Save a pytree of tensors as safetensors, each named by its place in the tree: `output`, `0`, `loss.1`."""
    safetensors = require("safetensors.torch", extra="run", purpose="to save outputs")
    tensors = {}
    for place, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            # a key of a dict, an index of a sequence, or a field: whichever this step of the place is
            steps = [next(str(getattr(key, kind)) for kind in ("key", "idx", "name") if hasattr(key, kind)) for key in place]
            tensors[".".join(steps) or "output"] = leaf.detach().cpu().contiguous()
    safetensors.save_file(tensors, path)


@contextlib.contextmanager
def one_seed(seed: int) -> Iterator[None]:
    """Seed torch for a run, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
