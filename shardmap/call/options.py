"""The options of one mapped call, and their allowed values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict

from shardmap import errors
from shardmap.planning.device import Budget
from shardmap.planning.memory import parse_bytes
from shardmap.run import progress
from shardmap.store import Sink


class MapOptions(TypedDict, total=False):
    """The options that every call takes and hands to `shardmap.vmap`, which describes them."""

    randomness: str
    devices: Any
    chunk_size: Any
    output_device: Any
    memory_budget: int | str | None
    memory_fraction: float
    trace: str
    check: str
    strict: bool
    max_paths: int
    ragged: str
    batch_norm: str
    compile: bool | str
    cuda_graphs: bool
    remat: bool
    reduce: Any
    out: Sink | None
    resume: bool
    progress: bool | str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call; see `shardmap.vmap`."""

    in_dims: Any
    out_dims: Any
    randomness: str
    kw_in_dims: Any
    devices: Any
    chunk_size: Any
    output_device: Any
    memory_budget: int | str | None
    memory_fraction: float
    trace: str
    strict: bool
    remat: bool
    reduce: Any
    out: Sink | None
    resume: bool
    progress: bool | str
    call: str
    check: str = "first"
    max_paths: int = 64
    ragged: str = "error"
    batch_norm: str = "error"
    compile: bool | str = False
    cuda_graphs: bool = False

    def alone(self) -> Options:
        """The options of a part of the call that is computed by itself."""
        return dataclasses.replace(
            self, reduce=None, out=None, resume=False, out_dims=0, output_device=None,
            progress=False,
        )  # fmt: skip

    def refuse_wrong(self, func: Any) -> None:
        """Refuse values that an option cannot have.

        Raises:
            OptionError: The message has the call, the option, its value and the allowed ones.
        """
        if not callable(func):
            raise errors.OptionError(
                f"{self.call.partition('(')[0]}: func={func!r} is a {type(func).__name__}, not a "
                "function; pass a function of one sample"
            )
        for name, choices in (
            ("randomness", ("error", "same", "different")),
            ("trace", ("auto", "each", "once")),
            ("check", ("first", "always", "off")),
            ("ragged", ("error", "list", "nested")),
            ("batch_norm", ("error", "frozen", "per_sample")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                names = [repr(c) for c in choices]
                raise errors.OptionError(
                    f"{self.call}: {name}={value!r}; choose {', '.join(names[:-1])} or {names[-1]}"
                )
        if self.out is not None and not isinstance(self.out, Sink):
            raise errors.OptionError(
                f"{self.call}: out={self.out!r} is a {type(self.out).__name__}; pass a sink, such "
                "as shardmap.ZarrSink(path), or None for "
                "tensors"
            )
        if self.resume is True and self.out is None:
            raise errors.OptionError(
                f"{self.call}: resume=True without out=: only a run with a store can be "
                "resumed; pass a sink"
            )
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise errors.OptionError(
                f"{self.call}: compile={self.compile!r}; pass True, False, or 'auto' to compile in "
                "the background of long runs"
            )
        for name in ("strict", "remat", "resume", "cuda_graphs"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise errors.OptionError(
                    f"{self.call}: {name}={value!r} is a {type(value).__name__}; pass True or False"
                )
        if not isinstance(self.progress, bool) and self.progress != "always":
            raise errors.OptionError(
                f"{self.call}: progress={self.progress!r}; pass True, False, or 'always' to draw "
                "without a terminal"
            )
        paths = self.max_paths
        if isinstance(paths, bool) or not isinstance(paths, int) or paths < 1:
            raise errors.OptionError(
                f"{self.call}: max_paths={paths!r}; pass a positive number of ways that samples "
                "may go"
            )
        self._check_chunk_size()
        fraction = self.memory_fraction
        if (
            isinstance(fraction, bool)
            or not isinstance(fraction, int | float)
            or not 0 < fraction <= 1
        ):
            raise errors.OptionError(
                f"{self.call}: memory_fraction={fraction!r}; pass a number above 0 and at most 1"
            )
        budget = self.memory_budget
        if budget is not None and self._budget_bytes() is None:
            raise errors.OptionError(
                f"{self.call}: memory_budget={budget!r}; pass a positive number of bytes, or text "
                "such as '6GiB' or '512 MiB'"
            )

    def _check_chunk_size(self) -> None:
        if not isinstance(self.chunk_size, Mapping):
            _check_size(self.chunk_size, f"{self.call}: chunk_size={self.chunk_size!r}")
            return
        for device, size in self.chunk_size.items():
            if not isinstance(device, str):
                raise errors.OptionError(
                    f"{self.call}: chunk_size={self.chunk_size!r} has the key {device!r}, a "
                    f"{type(device).__name__}; name devices by text, "
                    "such as 'cuda:0', or 'cuda' for all of a kind"
                )
            _check_size(size, f"{self.call}: chunk_size[{device!r}]={size!r}")

    def _budget_bytes(self) -> int | None:
        budget = self.memory_budget
        if isinstance(budget, str):
            return parse_bytes(budget)
        return (
            budget
            if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
            else None
        )

    @property
    def budget(self) -> Budget:
        """Bytes that the map may add on each device to those already in use."""
        return Budget(self._budget_bytes(), self.memory_fraction)

    def watching(self) -> AbstractContextManager[Any]:
        """Context that draws the requested progress bar while a map runs inside."""
        return (
            progress.bar(always=self.progress == "always")
            if self.progress
            else contextlib.nullcontext()
        )


def _check_size(size: Any, where: str) -> None:
    accepted = "pass a positive int, 'auto', or None for no chunks"
    if size is None or (isinstance(size, str) and size == "auto"):
        return
    if isinstance(size, bool) or not isinstance(size, int):
        raise errors.OptionError(f"{where} is a {type(size).__name__}; {accepted}")
    if size < 1:
        raise errors.OptionError(f"{where} is not positive; {accepted}")
