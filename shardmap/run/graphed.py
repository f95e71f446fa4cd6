"""Decide which chunks are replayed as CUDA graphs: capture, compare, capture again, fall back.

A graph reads and writes the same memory at each replay. Samples are copied into memory of its own,
captured tensors are read where they are, and results are copied out, because the next replay
overwrites them. Only chunks of the planned size are captured; the rest, and all that a graph cannot
hold, runs as it is. A graph is compared with the program itself on its first two chunks. Nothing
here changes a result: what fails is a warning, and the chunk is computed anew.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shardmap import errors
from shardmap._threads import fork_safe_lock
from shardmap._torch import dispatch_depth, function_depth, storage_id
from shardmap.lower.cache import Lowered
from shardmap.lower.closeness import close, has_values, largest
from shardmap.lower.graphs import Chunk, Meta, UncompilableError
from shardmap.run import cuda_graphs
from shardmap.run.base import Job
from shardmap.run.capturable import Static, layout_of, obstacle
from shardmap.run.prepare import Ready

WARM_UPS = 2
"""Runs before a capture: libraries choose kernels in the first, by time where cuDNN tries them."""
MOST_GRAPHS = 16
"""Most graphs that are kept for one device: the one used longest ago is dropped."""
MOST_CAPTURES = 4
"""Captures for other numbers after which a program runs without graphs."""

CHANGES = (
    "a number that the function reads, or a setting of torch, changes from call to call, and "
    "numbers are constants of a graph; pass it as a tensor (in_dims=None)"
)


class Runner(Protocol):
    """What computes a chunk: a replay, or its compiled form."""

    @property
    def chunk(self) -> Callable[..., Sequence[torch.Tensor]]:
        """The function of `Replay.chunk`."""
        ...


@dataclass(slots=True)
class State:
    """What is known about the graphs of a program for chunks of one size on one device."""

    captures: int = 0
    """Captures so far that other numbers or settings made necessary."""
    refused: str = ""
    """Reason why chunks run without a graph; empty if they do not, or not yet."""
    text: str = ""
    """What is captured, for `plan.explain()`."""


@dataclass(slots=True)
class Site:
    """The graphs of one device, which share a memory pool: one runs at a time."""

    lock: AbstractContextManager[object] = field(default_factory=fork_safe_lock)
    pool: object = None
    mark: object = None
    """A mark behind the last replay, for which replays on other streams wait."""
    graphs: collections.OrderedDict[object, Graph] = field(default_factory=collections.OrderedDict)

    def wait(self, device: torch.device) -> None:
        """Let the current stream wait for the last replay, whose memory the next one uses."""
        if self.mark is not None:
            cuda_graphs.graphs.after(device, self.mark)


_sites: dict[str, Site] = {}
_sites_lock = fork_safe_lock()
_capturing = fork_safe_lock()
"""Torch captures one graph of a process at a time, whatever the device."""


def _site(device: torch.device) -> Site:
    with _sites_lock:
        return _sites.setdefault(str(device), Site())


class Graph:
    """A captured chunk: replays on other samples of the same layout."""

    def __init__(
        self, site: Site, job: Job, ready: Ready, chunk: Chunk, runner: Runner, moved: set[int]
    ):
        self.site, self.device, self.runner = site, chunk.device, runner
        self.program, self.loose = ready.low.batched, ready.low.loose
        self.moved = moved
        """Positions of captured tensors that have moved before: they are copied too."""
        self.numbers, self.settings = _numbers(job), _settings()
        self.chunks = 0
        """Chunks that were replayed for a result."""
        owners = _owners(job, ready)
        self.inputs = [Static.for_samples(t) for t in chunk.inputs]
        self.fixed = [
            Static.for_copies(t, always=owner is not None)
            if owner is None or i in moved
            else Static.in_place(t, owner)
            for i, (t, owner) in enumerate(zip(chunk.fixed, owners, strict=True))
        ]
        self.replay: Callable[[], None] | None = None
        self.outs: Sequence[torch.Tensor] = ()

    def runs(self, chunk: Chunk) -> Callable[[], Sequence[torch.Tensor]]:
        """The function that is captured: it computes the chunk in the graph's memory."""
        pairs = zip(self.fixed, chunk.fixed, strict=True)
        fixed = [t if s.memory is None else s.memory for s, t in pairs]
        arguments = chunk.size, chunk.start, chunk.device, chunk.seeds, chunk.scalars, fixed
        inputs = [s.memory for s in self.inputs]
        self._load(chunk.fixed, chunk.inputs)
        return lambda: self.runner.chunk(*arguments, list(inputs))

    def capture(
        self, run: Callable[[], Sequence[torch.Tensor]], expected: Sequence[torch.Tensor]
    ) -> None:
        """Capture the function, and compare its first replay.

        Raises:
            UncompilableError: A replay gives other values than the function.
        """
        with _capturing:
            self.replay, self.outs = cuda_graphs.graphs.captured(self.device, self.site.pool, run)
        self.replay()
        self._compare(expected)

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory of its own that stays between replays."""
        own = [s.memory for s in (*self.inputs, *self.fixed) if s.memory is not None]
        return sum(t.untyped_storage().nbytes() for t in (*own, *self.outs))

    def moves(self, job: Job, ready: Ready) -> set[int]:
        """Positions of the fixed values that the graph does not read as a call has them."""
        parts = zip(self.fixed, ready.fixed, _owners(job, ready), strict=True)
        return {i for i, (s, t, owner) in enumerate(parts) if not s.serves(t, owner)}

    def chunk(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        """The function of `Replay.chunk`, for chunks of the captured size."""
        return self._run(arguments, lambda outs: tuple([t.clone() for t in outs]))

    def chunk_into(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        """The function of `Replay.chunk_into`, for chunks of the captured size."""
        slices = arguments[-1]
        assert isinstance(slices, list | tuple)
        program = self.program

        def copied(outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            places = iter(slices)
            return tuple(
                [
                    next(places).copy_(t)
                    if v.mapped and v.index not in program.summed
                    else t.clone()
                    for v, t in zip(program.outputs, outs, strict=True)
                ]
            )

        return self._run(arguments[:-1], copied)

    def _run(
        self,
        arguments: tuple[object, ...],
        taken: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        fixed, inputs = arguments[5], arguments[6]
        assert isinstance(fixed, list | tuple)
        assert isinstance(inputs, list | tuple)
        graphs, site = cuda_graphs.graphs, self.site
        assert self.replay is not None
        with site.lock:
            site.wait(self.device)
            try:
                self._load(fixed, inputs)
                self.replay()
                self.chunks += 1
                if self.chunks == 2:  # the first one's samples are those of the capture
                    self._compare(self.runner.chunk(*arguments[:6], list(inputs)))
                return taken(self.outs)
            finally:
                site.mark = graphs.mark(self.device)

    def _load(self, fixed: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
        """Copy the arguments of a chunk to where the graph reads them."""
        for static, t in zip(self.fixed, fixed, strict=True):
            static.load(t)
        for static, t in zip(self.inputs, inputs, strict=True):
            static.load(t)

    def _compare(self, expected: Sequence[torch.Tensor]) -> None:
        entered = [s.memory for s in self.inputs if s.memory is not None]
        most = max([largest(t) for t in (*entered, *expected)], default=0.0)
        for k, (a, b) in enumerate(zip(expected, self.outs, strict=True)):
            if k not in self.loose and not close(a, b, most):
                raise UncompilableError(f"output {k} differs from the uncaptured program's")


def chosen(job: Job, ready: Ready, chunk: Chunk, runner: Runner) -> Graph | None:
    """The graph for a chunk of the planned size; None to run it as it is.

    Args:
        job: The mapped call.
        ready: The program on the chunk's device.
        chunk: The arguments of the chunk. It is computed if it is captured.
        runner: What computes the chunk otherwise.
    """
    if not job.cuda_graphs or not chunk.size or dispatch_depth() or function_depth():
        return None
    if cuda_graphs.graphs.capturing():  # the map is a part of a graph of the caller's
        return None
    if not all(map(has_values, chunk.inputs)):
        return None
    low = ready.low
    notes = low.notes.compiled
    reason = refusal(job, low) or layout_of(chunk)
    if reason:
        _warn_once(job, notes, reason)
        return None
    site = _site(chunk.device)
    where = runner, chunk.size, str(chunk.device), "graph"
    with site.lock:
        state = notes.setdefault(where, State())
        assert isinstance(state, State)
        if state.refused:
            _warn_once(job, notes, state.refused)
            return None
        key = *where, tuple([Meta.of(t)._replace(stride=t.stride()[1:]) for t in chunk.inputs])
        graph, moved = site.graphs.get(key), set()
        if graph is not None:
            same = graph.numbers == _numbers(job) and graph.settings == _settings()
            moves = graph.moves(job, ready)
            if same and not moves:
                site.graphs.move_to_end(key)
                return graph
            state.captures += not moves - graph.moved  # else one more tensor is copied from now on
            moved = graph.moved | moves
            del site.graphs[key], graph  # its memory serves the next one
            if state.captures >= MOST_CAPTURES:
                state.refused, state.text = CHANGES, ""
                _warn_once(job, notes, state.refused)
                return None
        return _captured(site, state, key, job, ready, chunk, runner, moved)


def _captured(
    site: Site,
    state: State,
    key: object,
    job: Job,
    ready: Ready,
    chunk: Chunk,
    runner: Runner,
    moved: set[int],
) -> Graph | None:
    """Capture a chunk; None if that fails, with a warning unless the data may be to blame."""
    graphs = cuda_graphs.graphs
    while len(site.graphs) >= MOST_GRAPHS:
        site.graphs.popitem(last=False)
    site.wait(chunk.device)
    warm = False
    try:
        if site.pool is None:
            site.pool = graphs.pool(chunk.device)
        with torch.inference_mode(False), torch.no_grad():
            graph = Graph(site, job, ready, chunk, runner, moved)
            run = graph.runs(chunk)
            expected: Sequence[torch.Tensor] = ()
            for _ in range(WARM_UPS):
                expected = ()  # freed before the next run
                expected = graphs.warmed(chunk.device, run)
            warm = True
            graph.capture(run, expected)
    except errors.ShardmapError:
        raise  # the chunk's own: it would raise it as well if it were run as it is
    except Exception as error:
        if not warm and not isinstance(error, torch.OutOfMemoryError):
            return None  # the program itself raised, and will again
        # The end of a capture may raise in the place of what the program did.
        cause = error.__context__ if isinstance(error.__context__, Exception) else error
        state.refused = (
            str(cause)
            if isinstance(cause, UncompilableError)
            else f"capturing a chunk raised {_line(cause)}"
        )
        _warn_once(job, ready.low.notes.compiled, state.refused)
        return None
    finally:
        site.mark = graphs.mark(chunk.device)
    site.graphs[key] = graph
    state.text = f"chunks of {chunk.size} samples on {chunk.device} are replayed as one graph"
    return graph


def refusal(job: Job, low: Lowered) -> str:
    """Reason why chunks of a program are never captured; empty if they can be."""
    if job.transformed:
        return (
            "the call stands inside a transform of torch.func, which graphs cannot be part of; put "
            "the transform inside the mapped function"
        )
    if job.grad:
        return (
            "gradients are recorded from outside, which graphs cannot be part of; take them inside "
            "the mapped function, or call it under torch.no_grad()"
        )
    if job.recording.written_inputs:
        return "the function writes in place to an argument; clone the argument inside it"
    notes = low.notes.compiled
    known = "obstacle", low.replay
    found = notes.get(known)
    if found is None:
        found = notes[known] = obstacle(low)
    assert isinstance(found, str)
    return found


def refuse_devices(names: Iterable[str], call: str) -> None:
    """Refuse devices that have no graphs.

    Raises:
        OptionError: One of them is no CUDA device.
    """
    kind = cuda_graphs.graphs.device_type
    others = [name for name in names if torch.device(name).type != kind]
    if others:
        raise errors.OptionError(
            f"{call}: cuda_graphs=True, and the call computes on {others[0]}: only CUDA devices "
            "have graphs; pass devices='cuda:*', or cuda_graphs=False"
        )


def failed(job: Job, ready: Ready, error: Exception) -> None:
    """Run a program without graphs from now on: a replay raised an error."""
    notes, reason = ready.low.notes.compiled, f"a replay raised {_line(error)}"
    for state in list(notes.values()):
        if isinstance(state, State):
            state.refused, state.text = reason, ""
    _warn_once(job, notes, reason)


def clear() -> None:
    """Drop all graphs and their memory pools."""
    with _sites_lock:
        _sites.clear()


def release(device: torch.device) -> None:
    """Drop the graphs of a device on which memory ran out."""
    with _sites_lock:
        _sites.pop(str(device), None)


def held_bytes(device: torch.device) -> int:
    """Bytes that the graphs of a device hold between replays, which the next capture may reuse."""
    with _sites_lock:
        site = _sites.get(str(device))
    return 0 if site is None else sum(graph.held_bytes for graph in list(site.graphs.values()))


def _owners(job: Job, ready: Ready) -> list[torch.Tensor | None]:
    """For each fixed value: the caller's tensor in whose memory it lies, if there is one."""
    own = {
        storage_id(t.untyped_storage()): t
        for t, given in zip(ready.captured, job.recording.captured, strict=True)
        if t is given
    }
    return [own.get(storage_id(t.untyped_storage())) for t in ready.fixed]


def _numbers(job: Job) -> tuple[str, ...]:
    """The numbers of a call, told apart by type and sign: they are constants of a graph."""
    return tuple(map(repr, job.recording.scalars))


def _settings() -> tuple[object, ...]:
    """Settings of torch that decide which kernels are launched."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    matmul = cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
    )


def _warn_once(job: Job, notes: dict[object, object], reason: str) -> None:
    if notes.setdefault(("warned", "graphs", reason), True) is True:
        notes["warned", "graphs", reason] = "said"
        warnings.warn(
            f"{job.call}: cuda_graphs=True, and chunks run without a graph: {reason}",
            errors.CompileWarning,
            stacklevel=2,
        )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def explained(job: Job, low: Lowered, size: int) -> str:
    """A paragraph about what is captured, for `plan.explain()`; empty if nothing was asked for."""
    if not job.cuda_graphs:
        return ""
    states = [s for s in low.notes.compiled.values() if isinstance(s, State)]
    reason = refusal(job, low) or next((s.refused for s in states if s.refused), "")
    if reason:
        return f"cuda_graphs=True: chunks run without a graph: {reason}."
    texts = [s.text for s in states if s.text]
    if texts:
        return f"cuda_graphs=True: {'; '.join(dict.fromkeys(texts))}."
    return (
        f"cuda_graphs=True: chunks of {size} samples are captured as a CUDA graph at their first "
        "run; a smaller last chunk runs as it is. The peak counts the graph's own memory."
    )
