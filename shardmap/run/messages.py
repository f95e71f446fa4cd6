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
from shardmap.run.precision import Float32Precision
from shardmap.store import Receipt, Store
from shardmap.store.columns import Column

HOST = torch.device("cpu")

LASTING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
)
"""Failures of a disk that another attempt does not cure."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Torch's global settings that decide what recorded calls compute.

    A worker takes over the driver's.
    """

    default_dtype: torch.dtype
    deterministic: bool
    deterministic_warn_only: bool
    precision: Float32Precision
    attention: tuple[bool, bool, bool, bool]
    """The kernels that scaled_dot_product_attention may choose: flash, memory-efficient, math,
    cuDNN."""

    @staticmethod
    def current() -> Settings:
        """The settings of this process."""
        cuda = torch.backends.cuda
        return Settings(
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            Float32Precision.current(),
            (
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
                cuda.cudnn_sdp_enabled(),
            ),
        )

    def apply(self) -> None:
        """Set these settings in this process."""
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(
            self.deterministic, warn_only=self.deterministic_warn_only
        )
        self.precision.apply()
        cuda, (flash, efficient, math, cudnn) = torch.backends.cuda, self.attention
        cuda.enable_flash_sdp(flash)
        cuda.enable_mem_efficient_sdp(efficient)
        cuda.enable_math_sdp(math)
        cuda.enable_cudnn_sdp(cudnn)


@dataclass(frozen=True, slots=True)
class Constants:
    """Data that one call sends to each worker once, besides the program's text."""

    options: LoweringOptions
    """Options for the kind of device that the program was recorded on; a worker puts in its own."""
    captured: tuple[Packed, ...]
    literals: tuple[tuple[Packed, bool], ...]
    """Each literal with True if it moves to the worker's device with the samples; others stay on
    the CPU."""
    scalars: tuple[float, ...]
    seed: Seeds
    sources: dict[str, str]
    """The user's line for operators that have no rule of ours."""
    settings: Settings
    outputs: tuple[Output, ...]
    """The outputs as a worker returns them: on the host, samples first; reduced if it can reduce
    them."""
    budget: Budget
    columns: Mapping[int, Column] = field(default_factory=dict)
    """The inputs, by position, that workers read themselves."""
    store: Store | None = None
    """Store that workers write their results to; without one they return them."""
    chunk_size: Any = None
    """Most samples computed at a time: "auto", or None for all of a task."""
    fixes: Fixes = field(default_factory=Fixes)
    """Fixes that the driver found to be needed when it tried the program."""
    compile: bool | str = False
    """The call's option of that name; compiled programs are kept on each worker's machine."""
    cuda_graphs: bool = False
    """The call's option of that name."""


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive samples that a worker computes."""

    start: int
    size: int
    inputs: tuple[Packed | None, ...]
    """The samples' values, by input; None for a column that the worker reads."""
    unmapped: bool
    """True to return the outputs that do not depend on the sample: one task of a call does."""
    halvings: int = 0
    """Number of workers that died because chunks were too large: chunks are halved that many
    times."""
    peers: int = 1
    """Number of workers that share this one's memory, itself included."""
    numbers: np.ndarray | None = None
    """Indices of samples that are not consecutive, by which they draw; else None."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task."""

    outputs: tuple[Packed | None, ...]
    """The outputs; None for one that went to the store, is returned apart, or was not requested."""
    receipt: Receipt | None
    """Receipt for the rows that were written to a store."""
    seconds: float
    redone: tuple[ChunkRedone, ...] = ()
    """Chunks of the task that were too large for the memory, by their numbers in the batch."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error raised while a task was computed."""

    error: str
    """Type and message of the error, on one line."""
    traceback: str
    poisoned: bool
    """True if the process can compute no more (after an error in a CUDA kernel) and must be
    replaced."""
    kind: str = ""
    """The name of the error in `shardmap.errors`; empty if it is none of ours."""
    passing: bool = False
    """True if another attempt may succeed: a store or source could not be reached."""

    @staticmethod
    def of(error: Exception) -> Failure:
        """Describe an error that is being handled."""
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
