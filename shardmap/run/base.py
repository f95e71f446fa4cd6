"""Types that all executors share: the job that they run, and the events that they report."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from shardmap.reduce import Reduction
from shardmap.rules.philox import SampleNumbers, Seeds
from shardmap.run.lowerings import Lowerings
from shardmap.store.columns import Column
from shardmap.trace.recording import Recording
from shardmap.trace.thread_state import keep


@dataclass(frozen=True, slots=True)
class Output:
    """One output of the mapped function: its shape and dtype, and where its results go."""

    shape: tuple[int, ...]
    """Shape for one sample."""
    dtype: torch.dtype
    device: torch.device
    """Device of the result."""
    mapped: bool
    """True if it differs by sample."""
    dim: int | None
    """Position of the mapped dimension in the result; None if the result has none."""
    reduction: Reduction | None
    requires_grad: bool
    summed: bool = False
    """True if a chunk gives only the sum over its samples."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's result."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def stacked(self) -> bool:
        """True if the results of all samples are kept, stacked."""
        return self.mapped and self.reduction is None

    @property
    def sliced(self) -> bool:
        """True if a chunk gives a row for each of its samples."""
        return self.mapped and not self.summed


@dataclass(frozen=True, slots=True)
class Job:
    """One mapped call, ready to run on any executor."""

    recording: Recording
    inputs: list[torch.Tensor]
    """The mapped tensors, mapped dimension first; for a column that is read from a source, its
    first few rows."""
    samples: int
    """N, the size of the batch."""
    home: torch.device
    """Device of the samples."""
    outputs: tuple[Output, ...]
    lowerings: Lowerings
    """Lowerings of the program, one for each kind of device."""
    seed: Seeds
    """Seeds of the random draws."""
    grad: bool
    """True if outer autograd is recording."""
    transformed: bool
    """True if `torch.func` transforms are active around the call."""
    remat: bool
    """True if chunks are computed again in backward instead of keeping what they saved."""
    call: str
    """The user's call, for errors."""
    unit: int | None = None
    """Samples per storage unit if results go to a store: chunks do not cross units."""
    columns: Mapping[int, Column] = field(default_factory=dict)
    """The inputs, by position, that are read from sources as they are needed."""
    offset: int = 0
    """Index of the first sample in the larger job of which this one is a part: random draws depend
    on a sample's index in it."""

    numbers: np.ndarray | None = None
    """The numbers of all samples, ascending, where this job is of samples that are apart."""

    partial: bool = False
    """True if reduced outputs are returned as unfinished totals, to be combined with those of other
    parts."""
    places: torch.Tensor | None = None
    """Position of each computed row in the result, `[N]`; None if rows are in the samples' order.
    Samples of unequal shapes are computed shape by shape."""
    bounds: tuple[int, ...] = ()
    """Ends of the runs of samples of one shape, ascending: chunks end there where they can."""
    parts: tuple[Job, ...] = ()
    """The jobs of samples of each shape, which stand in the place of this one's program."""

    compile: bool | str = False
    """True to compile chunks of the planned size, "auto" to do so in the background of long
    runs."""
    cuda_graphs: bool = False
    """True to replay chunks of the planned size as CUDA graphs."""

    def numbered(self, start: int, stop: int) -> SampleNumbers:
        """The numbers by which the samples `start` to `stop` draw."""
        return self.offset + start if self.numbers is None else self.numbers[start:stop]

    def read(self, start: int, stop: int) -> list[torch.Tensor]:
        """The samples `start` to `stop` of each input, on the device where they are.

        Rows that are read from a source must not be written to.
        """
        if not self.columns and start == 0 and stop == self.samples:
            return list(self.inputs)
        return [
            self.columns[i].rows_between(start, stop)
            if i in self.columns
            else t.narrow(0, start, stop - start)
            for i, t in enumerate(self.inputs)
        ]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A map begins; carries its number of samples and of planned chunks."""

    samples: int
    chunks: int
    devices: tuple[str, ...]
    """Names of the lanes: a device named twice is two of them."""


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """One chunk was computed."""

    device: str
    """The lane."""
    start: int
    stop: int
    seconds: float
    """Wall time on the host between hand-out and completion."""
    at: float = field(default_factory=time.perf_counter)
    """Time of completion, on the clock of `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class ChunkRedone:
    """A chunk failed and is computed again in this process, in halves or on another device."""

    device: str
    start: int
    stop: int
    reason: str
    at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class RunFinished:
    """All chunks are computed and gathered."""

    seconds: float
    redone: Mapping[str, int] = field(default_factory=dict)
    """Number of chunks that were handed out again, by cause."""
    at: float = field(default_factory=time.perf_counter)


Event = RunStarted | ChunkDone | ChunkRedone | RunFinished
Listener = Callable[[Event], None]

_listeners: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar(
    "shardmap_listeners", default=()
)
keep(_listeners)


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Report the events of every map that runs inside this context to `listener`."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Report no events of the maps inside this context: they are part of another one."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


def emit(event: Event) -> None:
    """Report `event` to the listeners of the current context."""
    for listener in _listeners.get():
        listener(event)


def heard() -> bool:
    """True if there is a listener in this context."""
    return bool(_listeners.get())
