"""The messages between the driver and its workers: a call's constants, its tasks, their results."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap.lower.batched import Fixes, LoweringOptions
from shardmap.planning.device import Budget
from shardmap.rules.philox import Seeds
from shardmap.run.base import ChunkRedone, Output
from shardmap.run.packing import Packed
from shardmap.store import Receipt, Store
from shardmap.store.columns import Column

HOST = torch.device("cpu")

LASTING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
)
"""Failures of a disk that trying again does not mend."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Torch's global settings that decide what recorded calls compute.

    A worker takes over the driver's.
    """

    default_dtype: torch.dtype
    deterministic: bool
    deterministic_warn_only: bool
    matmul_precision: str
    attention: tuple[bool, bool, bool, bool]
    """Which kernels scaled_dot_product_attention may choose: flash, memory-efficient, math,
    cuDNN."""

    @staticmethod
    def current() -> Settings:
        """Those of this process."""
        cuda = torch.backends.cuda
        return Settings(
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            (
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
                cuda.cudnn_sdp_enabled(),
            ),
        )

    def apply(self) -> None:
        """Set them in this process."""
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(
            self.deterministic, warn_only=self.deterministic_warn_only
        )
        torch.set_float32_matmul_precision(self.matmul_precision)
        cuda, (flash, efficient, math, cudnn) = torch.backends.cuda, self.attention
        cuda.enable_flash_sdp(flash)
        cuda.enable_mem_efficient_sdp(efficient)
        cuda.enable_math_sdp(math)
        cuda.enable_cudnn_sdp(cudnn)


@dataclass(frozen=True, slots=True)
class Constants:
    """What one call sends to each worker once, besides the program's text."""

    options: LoweringOptions
    """For the kind of device that the program was recorded on; a worker puts in its own."""
    captured: tuple[Packed, ...]
    literals: tuple[tuple[Packed, bool], ...]
    """Each with whether it follows the samples to the worker's device; others stay on the CPU."""
    scalars: tuple[float, ...]
    seed: Seeds
    sources: dict[str, str]
    """The user's line for operators that have no rule of ours."""
    settings: Settings
    outputs: tuple[Output, ...]
    """As a worker gives them: on the host, samples first; those that it can reduce, reduced."""
    budget: Budget
    columns: Mapping[int, Column] = field(default_factory=dict)
    """The inputs, by position, that workers read themselves."""
    store: Store | None = None
    """Where workers write their results; without one they return them."""
    chunk_size: Any = None
    """Most samples at a time: "auto", or None for all of a task."""
    fixes: Fixes = field(default_factory=Fixes)
    """What the driver found to be needed when it tried the program."""


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive samples."""

    start: int
    size: int
    inputs: tuple[Packed | None, ...]
    """Their values; None for a column that the worker reads."""
    unmapped: bool
    """Whether to return the outputs that no sample changes: one task of a call does."""
    halvings: int = 0
    """How often workers have died of chunks that were too large: they are so often cut in two."""
    peers: int = 1
    """Workers that share this one's memory, itself among them."""
    numbers: np.ndarray | None = None
    """The numbers of samples that are apart, by which they draw."""


@dataclass(frozen=True, slots=True)
class Done:
    """A task is computed."""

    outputs: tuple[Packed | None, ...]
    """None for what went to the store, is returned apart, or was not asked for."""
    receipt: Receipt | None
    """For what was written."""
    seconds: float
    redone: tuple[ChunkRedone, ...] = ()
    """Chunks of it that were too large for the memory, by their numbers in the whole batch."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error raised while a task was computed."""

    error: str
    """Its type and message, on one line."""
    traceback: str
    poisoned: bool
    """The process can compute nothing more (an error inside a CUDA kernel): it must be replaced."""
    kind: str = ""
    """The name of the error in `shardmap.errors`; empty if it is none of ours."""
    passing: bool = False
    """Whether it may be otherwise the next time: a store or source that could not be reached."""

    @staticmethod
    def of(error: Exception) -> Failure:
        """What is to be said of an error that is being handled."""
        message = "\n".join(traceback.format_exception_only(error)).strip()
        poisoned = isinstance(error, torch.AcceleratorError) and not isinstance(
            error, torch.OutOfMemoryError
        )
        known = (
            type(error).__name__
            if isinstance(error, errors.ShardmapError) and hasattr(errors, type(error).__name__)
            else ""
        )
        return Failure(
            str(error) if known else message,
            traceback.format_exc(),
            poisoned,
            known,
            _may_pass(error),
        )


def _may_pass(error: Exception) -> bool:
    cause = error.__cause__
    if not isinstance(error, errors.StoreError | errors.SourceError) or cause is None:
        return False
    return not (isinstance(cause, OSError) and cause.errno in LASTING)
