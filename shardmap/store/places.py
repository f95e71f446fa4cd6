"""Places of files: a folder of this machine, or a URL that fsspec opens.

Failures become errors with a remedy here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from shardmap._extras import require
from shardmap.errors import ShardmapError, StoreError

logger = logging.getLogger("shardmap")

_REMEDIES = {
    errno.ENOSPC: "free space there, or let a larger disk hold it, then resume: what is committed "
    "is kept",
    errno.EDQUOT: "raise the quota or free space, then resume: what is committed is kept",
    errno.EFBIG: "the file system or a limit (`ulimit -f`) allows no larger files: lift it, or "
    "make the units smaller",
    errno.EACCES: "give this user the right to do so, or choose another place",
    errno.EPERM: "give this user the right to do so, or choose another place",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another place",
    errno.ENOENT: "check the path, and that it is mounted on this machine",
    errno.ENOTDIR: "a part of the path is a file: check it",
}


def reason(error: BaseException) -> str:
    """The text of an error on one line, with a remedy if one is known."""
    number = error.errno if isinstance(error, OSError) else None
    text = (
        os.strerror(number)
        if number is not None
        else f"{type(error).__name__}: {error}".replace("\n", " ")
    )
    remedy = _REMEDIES.get(
        number or 0, "check that the place can be reached from this machine, then resume"
    )
    return f"{text} (on {platform.node()}); {remedy}"


def join(folder: str, name: str) -> str:
    """The path or URL of `name` inside `folder`."""
    return f"{folder.rstrip('/')}/{name}" if name else folder


class Place(ABC):
    """Base of places: a folder of files by name."""

    remote: bool
    """True if fsspec opens it: files cannot be appended to, and a write replaces a file whole."""
    travels: bool
    """True if other processes find the same files under this URL."""

    def __init__(self, url: str):
        self.url = url

    @abstractmethod
    def exists(self, name: str) -> bool:
        """True if there is a file or folder of this name."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a file's content."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace a file whole, or create it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Read the content of several files."""
        return [self.read(name) for name in names]

    def signature(self, name: str) -> Any:
        """A value that changes when the file does; None if there is none."""
        return None

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Turn errors inside into a StoreError.

        Raises:
            StoreError: Its message has the place, the failure and the remedy.
        """
        try:
            yield
        except ShardmapError:
            raise
        except OSError as error:
            raise StoreError(f"{self.url}: {doing} failed: {reason(error)}") from error
        except Exception as error:
            if not self.remote:
                raise
            # Each client of an object store raises errors of its own (botocore, aiohttp,
            # google.auth).
            raise StoreError(f"{self.url}: {doing} failed: {reason(error)}") from error


class LocalPlace(Place):
    """A folder of this machine, or one that is mounted on it."""

    remote = False
    travels = True

    def path(self, name: str = "") -> str:
        """The path of a file in the folder."""
        return os.path.join(self.url, *name.split("/")) if name else self.url

    def exists(self, name: str) -> bool:
        """True if there is a file or folder of this name."""
        return os.path.exists(self.path(name))

    def is_folder(self) -> bool:
        """True if the place itself exists, as a folder."""
        return os.path.isdir(self.url)

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""
        with self.explained("listing"):
            try:
                return sorted(os.listdir(self.path(folder)))
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes:
        """Read a file's content."""
        with self.explained(f"reading {name}"), open(self.path(name), "rb") as f:
            return f.read()

    def write(self, name: str, data: bytes) -> None:
        """Replace a file whole, or create it, so that it survives a loss of power."""
        with self.explained(f"writing {name}"):
            path = self.path(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as temporary, open(temporary, "wb") as f:
                f.write(data)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""
        with self.explained(f"removing {name}"):
            path = self.path(name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)

    def signature(self, name: str) -> Any:
        """A value that changes when the file does."""
        with self.explained(f"reading {name}"):
            info = os.stat(self.path(name))
            return info.st_ino, info.st_size, info.st_mtime_ns


class RemotePlace(Place):
    """A URL that fsspec opens: an object store, a web server, the memory of this process."""

    remote = True

    def __init__(self, url: str):
        super().__init__(url)
        fsspec = require("fsspec", extra="run", purpose=f"to open {url}")
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (
            Exception
        ) as error:  # an unknown protocol, a client that is not installed, credentials
            raise StoreError(f"{url}: fsspec cannot open this URL: {reason(error)}") from error
        protocol = self._files.protocol
        self.travels = "memory" not in ((protocol,) if isinstance(protocol, str) else protocol)

    def _path(self, name: str) -> str:
        return join(self._root, name)

    def exists(self, name: str) -> bool:
        """True if there is a file or folder of this name."""
        with self.explained(f"looking for {name or 'it'}"):
            return bool(self._files.exists(self._path(name)))

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""
        path = self._path(folder)
        with self.explained("listing"):
            # fsspec caches listings, and workers write without its knowledge
            self._files.invalidate_cache()
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                return []
            names = {
                p.rstrip("/").rpartition("/")[2] for p in found if p.strip("/") != path.strip("/")
            }
            return sorted(names - {""})

    def read(self, name: str) -> bytes:
        """Read a file's content."""
        with self.explained(f"reading {name}"):
            return self._files.cat_file(self._path(name))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Read the content of several files concurrently."""
        if not names:
            return []
        with self.explained(f"reading {names[0]} and {len(names) - 1} more"):
            paths = [self._path(name) for name in names]
            found = self._files.cat(paths)
            return [found[self._files._strip_protocol(p)] for p in paths]

    def write(self, name: str, data: bytes) -> None:
        """Replace a file whole, or create it."""
        with self.explained(f"writing {name}"):
            path = self._path(name)
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""
        with self.explained(f"removing {name}"), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(name), recursive=True)


def place_of(url: str | os.PathLike[str]) -> Place:
    """The place that a path or URL names.

    Paths become absolute, as workers have another working directory.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise StoreError(f"{url!r} is no place for a store: give a path or a URL")
    for prefix in ("file://", "local://"):
        if text.startswith(prefix):
            text = text[len(prefix) :]
    if "://" in text:
        return RemotePlace(text.rstrip("/"))
    return LocalPlace(os.path.abspath(os.path.expanduser(text)))


def local_only(place: Place, sink: str) -> None:
    """Refuse a URL for a sink that writes files of a folder.

    Raises:
        StoreError: The place is no folder.
    """
    if not isinstance(place, LocalPlace):
        raise StoreError(
            f"{place.url}: {sink} writes to folders only: use ZarrSink for URLs, or a folder where "
            "the place is mounted"
        )


def sync(path: str) -> None:
    """Wait until the content of a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)


TEMPORARY = ".tmp"
"""Ending of the names of unfinished files."""


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary name beside `path`.

    The file of that name replaces `path` at the end, or is removed on failure.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync(folder)


def sweep(folder: str, ending: str) -> None:
    """Remove the files that killed writers left behind."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.endswith(ending):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def warn_if_full(place: Place, needed: int) -> None:
    """Warn if the disk has less room than the results need.

    A run of hours should not fail for that at its end.
    """
    if isinstance(place, LocalPlace):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(place.url).free
            if free < needed:
                logger.warning(
                    "%s: the results need %.1f MiB, and %.1f MiB are free there; when the disk is "
                    "full the run stops, and resuming goes on",
                    place.url,
                    needed / 2**20,
                    free / 2**20,
                )
