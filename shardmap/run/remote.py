"""What a worker process does: load the recorded program once, then compute chunk after chunk. Knows nothing of Ray.

Tensors travel as plain bytes with their strides beside them: pickling a torch tensor would send its whole storage, copied
twice, where numpy's buffers go to shared memory as they are and are read there without a copy.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
import platform
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from shardmap import engine
from shardmap.batch import LoweringOptions
from shardmap.codegen import Replay
from shardmap.engine import Lowered
from shardmap.program import Program
from shardmap.recording import Recording
from shardmap.verify import Trial, check

logger = logging.getLogger("shardmap")


_ALIGNMENT = 64
"""Bytes: torch's allocator and Ray's object store both align to this."""


class Packed(NamedTuple):
    """A tensor on its way: its distinct elements, and how they lay in memory."""

    data: np.ndarray | None
    """The elements as bytes, row by row; None for a tensor on the meta device, which has none."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements; recorded views depend on them. Dimensions of stride 0 are sent once."""
    dtype: torch.dtype
    misalignment: int
    """Bytes from the last multiple of 64 to the first element on the CPU. Kernels add up in another order where it differs,
    so that without it a chunk would differ in the last bits from the same chunk computed in the driver's process."""


def _repeated(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    return [d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if s == 0 and n > 1]


def pack(t: torch.Tensor) -> Packed:
    """The elements of `t`, and only those: nothing else of the storage that it views.

    Args:
        t: Any strided tensor, on any device. Bytes are shared where it is dense, so send them before `t` changes.
    """
    t = t.detach()
    shape, stride = tuple(t.shape), t.stride()
    if t.device.type == "meta":
        return Packed(None, shape, stride, t.dtype, 0)
    misalignment = t.data_ptr() % _ALIGNMENT if t.device.type == "cpu" else 0
    for d in _repeated(shape, stride):
        t = t.narrow(d, 0, 1)
    dense = t.cpu().resolve_conj().resolve_neg().contiguous()
    return Packed(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy(), shape, stride, t.dtype, misalignment)


def unpack(p: Packed, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, with the strides that it was packed with.

    On the CPU a dense tensor shares the bytes of `p`, which nobody may write to.
    """
    if p.data is None:
        return torch.empty_strided(p.shape, p.stride, dtype=p.dtype, device="meta")
    repeated = _repeated(p.shape, p.stride)
    kept = tuple(1 if d in repeated else n for d, n in enumerate(p.shape))
    t = _tensor_of(p.data)
    in_place = device.type == "cpu" and t.data_ptr() % _ALIGNMENT == p.misalignment
    t = t.view(p.dtype).view(kept)
    if t.numel() and not (in_place and t.stride() == p.stride):
        t = _empty(kept, p.stride, p.dtype, p.misalignment, device).copy_(t)
    return t.to(device).expand(p.shape)


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, misalignment: int, device: torch.device) -> torch.Tensor:
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if device.type != "cpu":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    memory = torch.empty(span + _ALIGNMENT // dtype.itemsize, dtype=dtype)
    return memory.as_strided(shape, stride, (misalignment - memory.data_ptr()) % _ALIGNMENT // dtype.itemsize)


def _tensor_of(data: np.ndarray) -> torch.Tensor:
    if not data.flags.writeable:
        _accept_read_only_memory()
    return torch.from_numpy(data)


@functools.cache
def _accept_read_only_memory() -> None:
    """Torch warns, once per process, when a tensor shares memory that must not be written; we only read it."""
    data = np.zeros(1, np.uint8)
    data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(data)


@dataclass(frozen=True, slots=True)
class Settings:
    """Torch's global settings that decide what recorded calls compute: a worker takes over the driver's."""

    default_dtype: torch.dtype
    deterministic: bool
    deterministic_warn_only: bool
    matmul_precision: str
    attention: tuple[bool, bool, bool, bool]
    """Which kernels scaled_dot_product_attention may choose: flash, memory-efficient, math, cuDNN."""

    @staticmethod
    def current() -> Settings:
        """Those of this process."""
        cuda = torch.backends.cuda
        return Settings(
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        )

    def apply(self) -> None:
        """Set them in this process."""
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warn_only)
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
    seed: int
    sources: dict[str, str]
    settings: Settings


@dataclass(frozen=True, slots=True)
class Task:
    """One chunk: consecutive samples."""

    start: int
    inputs: tuple[Packed, ...]
    size: int
    unmapped: bool
    """Whether to return the outputs that no sample changes: one chunk of a call does."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error raised while a chunk was computed."""

    error: str
    """Its type and message, on one line."""
    traceback: str
    poisoned: bool
    """The process can compute nothing more (an error inside a CUDA kernel): it must be replaced."""


@dataclass(slots=True)
class _Bound:
    """A program bound to one call's tensors, on this worker's device."""

    call: str
    program: Program
    options: LoweringOptions
    constants: Constants
    captured: list[torch.Tensor]
    literals: list[torch.Tensor]
    lowered: dict[tuple[bool, ...], Lowered] = field(default_factory=dict)
    """By layout of the inputs."""
    fixed: dict[tuple[bool, ...], tuple[Replay, tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    """By layout: what no sample changes, with the replay that computed it."""


class Worker:
    """Computes chunks of recorded programs in a process of its own.

    Every call brings the program and its constants along by reference, and the worker keeps what it has made of them: a
    replacement for a worker that died needs nothing told again.
    """

    PROGRAMS = 32
    """Most programs kept."""

    def __init__(self, threads: int, device_type: str):
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore", engine.SlowLoopWarning)  # the driver has warned
        on_cuda = device_type == "cuda" and torch.cuda.is_available()  # Ray's GPUs may be logical: numbers without hardware
        self.device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
        self.programs: collections.OrderedDict[str, Program] = collections.OrderedDict()
        self.bound: _Bound | None = None

    def info(self) -> dict[str, Any]:
        """Which process this is, and what it computes with."""
        return {
            "pid": os.getpid(),
            "node": platform.node(),
            "torch": torch.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "programs": len(self.programs),
        }

    def forget(self) -> None:
        """Let go of the last call's tensors."""
        self.bound = None

    def chunk(self, call: str, digest: str, text: np.ndarray, constants: Constants, task: Task) -> list[Packed | None] | Failure:
        """The outputs of one chunk, on the CPU.

        Args:
            call: Tells one mapped call from the next.
            digest: Tells one program from the next.
            text: The program's text, as bytes.
            constants: What all chunks of the call share.
            task: The chunk.

        Returns:
            The packed outputs (None for an unmapped one that was not asked for), or the failure.
        """
        try:
            bound = self._bind(call, digest, text, constants)
            with torch.no_grad():
                return _compute(bound, self.device, task)
        except Exception as error:
            self.bound = None  # the traceback's frames and the bound tensors go: they may be what memory was short of
            message = "\n".join(traceback.format_exception_only(error)).strip()
            poisoned = isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
            return Failure(message, traceback.format_exc(), poisoned)

    def _bind(self, call: str, digest: str, text: np.ndarray, constants: Constants) -> _Bound:
        if self.bound is not None and self.bound.call == call:
            return self.bound
        self.bound = None
        constants.settings.apply()
        program = self.programs.get(digest)
        if program is None:
            program = Program.loads(text.tobytes().decode())
            while len(self.programs) >= self.PROGRAMS:
                self.programs.popitem(last=False)
            self.programs[digest] = program
        self.programs.move_to_end(digest)
        options = dataclasses.replace(constants.options, device_type=self.device.type)
        captured = [unpack(p, self.device) for p in constants.captured]
        host = torch.device("cpu")
        literals = [unpack(p, self.device if follows else host) for p, follows in constants.literals]
        self.bound = _Bound(call, program, options, constants, captured, literals)
        return self.bound


def _compute(bound: _Bound, device: torch.device, task: Task) -> list[Packed | None]:
    inputs = [unpack(p, device) for p in task.inputs]
    low, fixed = _prepare(bound, device, inputs, task.size)
    constants = bound.constants
    _seed(constants, task.start)
    outs = low.replay.chunk(task.size, task.start, device, constants.seed, constants.scalars, fixed, inputs)
    del inputs
    return [pack(t) if v.mapped or task.unmapped else None for t, v in zip(outs, low.batched.outputs, strict=True)]


def _prepare(bound: _Bound, device: torch.device, inputs: list[torch.Tensor], size: int) -> tuple[Lowered, tuple[torch.Tensor, ...]]:
    """The lowering for inputs that lie in memory as these do, checked on the first rows, and what no sample changes."""
    layout = tuple(t.is_contiguous() for t in inputs)
    constants = bound.constants
    low = bound.lowered.get(layout)
    if low is None:
        low = bound.lowered[layout] = engine.lowered(bound.program, bound.options, layout, constants.sources)
    if (size > 1) not in low.checked:
        rows = min(size, 2)
        trial = Trial(device, constants.seed, rows, [t[:rows] for t in inputs], list(bound.captured), list(bound.literals))
        # Chunks do not begin with the sample that was recorded, so that there is no output to compare with: the driver has done it.
        recording = Recording(
            bound.program, tuple(bound.captured), tuple(bound.literals), constants.scalars, frozenset(), False, constants.sources, ()
        )
        check(low, recording, trial)
    replay, fixed = bound.fixed.get(layout, (None, ()))
    if replay is not low.replay:  # the check may have mended the lowering
        _seed(constants, 0)
        fixed = low.replay.fixed(device, constants.seed, constants.scalars, bound.captured, bound.literals)
        bound.fixed[layout] = (low.replay, fixed)
    return low, fixed


def _seed(constants: Constants, start: int) -> None:
    """Seed torch's generator, for operators that draw from it: one draw for all samples must be one on all workers."""
    if constants.options.randomness != "error":
        torch.manual_seed(constants.seed + (start if constants.options.randomness == "different" else 0))
