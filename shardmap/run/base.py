"""What every executor shares: the job it is given, and the events it reports while it runs."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from shardmap.reduce import Reduction
from shardmap.rules.philox import Seeds
from shardmap.run.lowerings import Lowerings
from shardmap.store.columns import Column
from shardmap.trace.recording import Recording
from shardmap.trace.thread_state import keep


@dataclass(frozen=True, slots=True)
class Output:
    """What is to become of one output of the mapped function."""

    shape: tuple[int, ...]
    """Of one sample."""
    dtype: torch.dtype
    device: torch.device
    """Where the result goes."""
    mapped: bool
    """Whether it differs by sample."""
    dim: int | None
    """Where the dimension of samples goes in the result; None: there is none."""
    reduction: Reduction | None
    requires_grad: bool
    summed: bool = False
    """Whether a chunk gives only the sum over its samples."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's result."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def stacked(self) -> bool:
        """Whether the results of all samples are kept, one beside the other."""
        return self.mapped and self.reduction is None

    @property
    def sliced(self) -> bool:
        """Whether a chunk gives a row for each of its samples."""
        return self.mapped and not self.summed


@dataclass(frozen=True, slots=True)
class Job:
    """One mapped call, ready to run on any executor."""

    recording: Recording
    inputs: list[torch.Tensor]
    """The mapped tensors, mapped dimension first; of a column that is read from a source, the
    first few rows."""
    samples: int
    """N, the size of the batch."""
    home: torch.device
    """Where the samples are."""
    outputs: tuple[Output, ...]
    lowerings: Lowerings
    """How it is lowered for each kind of device."""
    seed: Seeds
    """What random draws follow from, as `Seeds` says."""
    grad: bool
    """Whether outer autograd records."""
    transformed: bool
    """Whether `torch.func` transforms are active around the call."""
    remat: bool
    """Whether chunks are computed again in backward instead of keeping what they saved."""
    call: str
    """The user's call, for errors."""
    unit: int | None = None
    """Samples per storage unit, where results go to a store: chunks do not cross units."""
    columns: Mapping[int, Column] = field(default_factory=dict)
    """The inputs, by position, that are read from sources as they are needed."""
    offset: int = 0
    """The number of the first sample, where this job is a part of a larger one: draws go by a
    sample's number."""

    partial: bool = False
    """Whether reduced outputs are wanted as they are added up, to be added to those of other
    parts."""
    places: torch.Tensor | None = None
    """Where each sample's results belong among those of all, `[N]`, if not in the samples' order:
    samples of unequal shapes are computed shape by shape."""
    bounds: tuple[int, ...] = ()
    """Where samples of one shape end, ascending: chunks end there where they can."""
    parts: tuple[Job, ...] = ()
    """The jobs of samples of each shape, which stand in the place of this one's program."""

    def read(self, start: int, stop: int) -> list[torch.Tensor]:
        """The samples `start` to `stop` of each input, where they are.

        Nobody may write to what is read from a source.
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
    """A map begins: how many samples, in how many chunks as planned."""

    samples: int
    chunks: int
    devices: tuple[str, ...]
    """The lanes by name: a device named twice is two of them."""


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
    """When it was complete, on the clock of `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class ChunkRedone:
    """A chunk failed and goes back to be computed again, here in halves or on another device."""

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
    """How many chunks were handed out again, by cause."""
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
    """Report nothing of the maps inside this context: they are part of another one."""
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
    """Whether anybody listens."""
    return bool(_listeners.get())
