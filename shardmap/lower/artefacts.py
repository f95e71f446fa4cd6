"""The folder on disk in which compiled programs are kept for later processes.

Each program has a folder of its own, named by a hash of all that decides it: the program, the
chunk, the device, the threads, the versions of torch and shardmap. It is made under another name
and renamed when it is complete. A manifest holds the hashes of its libraries: one that was cut
short or changed is removed and never loaded. Libraries are code: folders that other users may write
to are not used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from shardmap import errors

VARIABLE = "SHARDMAP_CACHE"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Artefact:
    """A complete folder: its libraries, and what their maker noted about them."""

    folder: Path
    notes: dict[str, object]


def home() -> Path:
    """The folder of all compiled programs: `$SHARDMAP_CACHE`, or one in the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "shardmap"


@functools.cache
def usable(folder: Path) -> bool:
    """True if the folder exists, or can be made, and nobody else can write to it; warns if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        why = str(error)
    else:
        foreign = hasattr(os, "getuid") and found.st_uid != os.getuid()
        if not foreign and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            if os.access(folder, os.W_OK):
                return True
            why = "it cannot be written to"
        else:
            why = "other users can write to it, and libraries in it would be loaded as code"
    warnings.warn(
        f"compiled programs are not kept in {folder}: {why}; set {VARIABLE} to a folder of your "
        "own, writable by you alone",
        errors.CompileWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def _private() -> Path:
    """A folder of this process, where the user's cannot be used."""
    return Path(tempfile.mkdtemp(prefix="shardmap-"))


def place(lasting: bool = True) -> Path:
    """The folder for compiled programs.

    Args:
        lasting: False for programs that only this process can know (rules of the user's).
    """
    found = home()
    return found if lasting and usable(found) else _private()


@functools.cache
def versions() -> tuple[str, str, str]:
    """What a program is made by: torch, python, and a hash of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return torch.__version__, sys.version, digest.hexdigest()


def key(*parts: object) -> str:
    """A hash of what decides a compiled program."""
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def find(base: Path, name: str) -> Artefact | None:
    """The complete folder of this name; None if there is none. One that is damaged is removed."""
    folder = base / name
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}")
        for file, digest in manifest["files"].items():
            if Path(file).name != file or _digest(folder / file) != digest:
                raise ValueError(f"{file} is not what was written")
        return Artefact(folder, dict(manifest["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the compiled program {folder} is damaged ({error}); it is removed and compiled again",
            errors.CompileWarning,
            stacklevel=2,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return None


class Draft:
    """A folder that is being filled; `finish` gives it its name, and an error leaves nothing."""

    def __init__(self, base: Path, name: str):
        self._target = base / name
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name[:12]}-", suffix=".part", dir=base))

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, notes: dict[str, object]) -> Artefact:
        """Write the manifest and give the folder its name, unless another process has."""
        for path in list(self.folder.iterdir()):
            if path.suffix in (".cpp", ".h", "") and path.is_file():
                path.unlink()  # sources are not needed any more
        files = {p.name: _digest(p) for p in sorted(self.folder.iterdir()) if p.is_file()}
        manifest = {"format": FORMAT, "files": files, "notes": notes}
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            self.folder.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
        found = find(self._target.parent, self._target.name)
        assert found is not None, f"{self._target} was written and cannot be read"
        return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
