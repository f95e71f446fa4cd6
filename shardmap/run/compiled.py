"""Decide which chunks run compiled: compile now or in the background, compare, switch, fall back.

Only chunks of the planned size are compiled; others, and everything that the compiler refuses, run
as they are. A compiled program is compared with the uncompiled one on its first chunk in each
process. Nothing here changes a result: what fails is a warning, and the chunk is computed anew.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardmap import errors
from shardmap._threads import fork_safe_lock
from shardmap._torch import dispatch_depth, function_depth
from shardmap.lower import artefacts
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.cache import Lowered
from shardmap.lower.closeness import close, has_values, largest
from shardmap.lower.codegen import Replay
from shardmap.lower.compiled import CompiledReplay, loaded
from shardmap.lower.graphs import (
    Chunk,
    Graphs,
    Meta,
    UncompilableError,
    call_name,
    graphs,
    probe,
    reads_numbers,
    taken_by_graphs,
)
from shardmap.rules import registry
from shardmap.run.base import Job
from shardmap.run.precision import Float32Precision
from shardmap.run.prepare import Ready

WORTH = 20
"""compile="auto" begins where the run is expected to take this many times the compilation."""
LEAST_SECONDS, SECONDS_PER_CALL = 15.0, 0.1
"""Expected seconds of a compilation: the compiler's headers alone take ten."""

_BUILT_IN = registry.version()
"""Version of the registry before a user has registered rules, which another process lacks."""

_lock = fork_safe_lock()


@dataclass(slots=True)
class State:
    """What is known about compiling a program for chunks of one size."""

    scalars: tuple[float, ...] = ()
    """The numbers that the compiled program holds as constants."""
    replay: CompiledReplay | None = None
    refused: str = ""
    """Reason why the program runs uncompiled; empty if it does not, or not yet."""
    text: str = ""
    """What is compiled, for `plan.explain()`."""
    work: Background | None = None


class Background:
    """A process that compiles a program while the run goes on."""

    def __init__(self, request: dict[str, object], base: Path, name: str):
        self.base, self.name = base, name
        self._folder = tempfile.TemporaryDirectory(prefix="shardmap-")
        path = Path(self._folder.name) / "request.json"
        path.write_text(json.dumps(request))
        self._log = path.with_name("log")
        paths = os.pathsep.join(p for p in sys.path if p)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shardmap.run.compile_process", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        atexit.register(self.stop)

    def done(self) -> bool:
        """True if the process has ended."""
        return self._process.poll() is not None

    def artefact(self) -> artefacts.Artefact:
        """What the process has made.

        Raises:
            UncompilableError: It has failed; the message is the last line that it wrote.
        """
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        self.stop()
        found = artefacts.find(self.base, self.name) if code == 0 else None
        if found is None:
            raise UncompilableError(lines[-1] if lines else f"the compiler ended with code {code}")
        return found

    def stop(self) -> None:
        """End the process if it still runs, and remove its files."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._folder.cleanup()


def chosen(
    job: Job, ready: Ready, chunk: Chunk, seconds: float | None = None
) -> CompiledReplay | None:
    """The compiled program for a chunk of the planned size; None to run it as it is.

    Args:
        job: The mapped call.
        ready: The program on the chunk's device.
        chunk: The arguments of the chunk. It may be computed for a comparison.
        seconds: Expected seconds of the rest of the run; None if it is short.
    """
    if not job.compile or not chunk.size or dispatch_depth() or function_depth():
        return None
    low = ready.low
    if not all(map(has_values, chunk.inputs)) or not isinstance(low.replay, Replay):
        return None
    notes = low.notes.compiled
    reason = refusal(job)
    if reason:
        if job.compile is True:
            _warn_once(job, notes, reason)
        return None
    with _lock:
        layout = tuple([Meta.of(t) for t in (*chunk.fixed, *chunk.inputs)]) if chunk.inputs else ()
        where = low.replay, chunk.size, str(chunk.device), torch.get_num_threads(), layout
        state = notes.get(where)
        assert state is None or isinstance(state, State)
        if state is None:
            if job.compile == "auto" and seconds is None:
                return None
            state = notes[where] = _begun(job, low, low.replay, chunk, seconds)
            if not state.text and not state.refused:
                del notes[where]  # not worth it yet
        if state.work is not None and state.work.done():
            _finished(job, low, low.replay, chunk, state)
    if state.replay is not None and state.scalars != _numbers(job, low):
        _warn_once(
            job, notes,
            "a number that the function reads has changed since, and numbers are constants of a "
            "compiled program; pass it as a tensor (in_dims=None)",
        )  # fmt: skip
        return None
    return state.replay


def refusal(job: Job) -> str:
    """Reason why a call is never compiled; empty if it can be."""
    if job.grad:
        return (
            "gradients are recorded from outside, which compiled programs cannot be part of; take "
            "them inside the mapped function, or call it under torch.no_grad()"
        )
    if job.transformed:
        return (
            "the call stands inside a transform of torch.func, which compiled programs cannot be "
            "part of; put the transform inside the mapped function"
        )
    if job.recording.written_inputs:
        return "the function writes in place to an argument; clone the argument inside it"
    return ""


def failed(job: Job, ready: Ready, error: Exception) -> None:
    """Run a program uncompiled from now on: a compiled chunk raised an error."""
    notes = ready.low.notes.compiled
    for state in list(notes.values()):
        if isinstance(state, State) and state.replay is not None:
            state.replay, state.refused = None, _line(error)
    _warn_once(job, notes, f"a compiled chunk raised {_line(error)}")


def _warn_once(job: Job, notes: dict[object, object], reason: str) -> None:
    if notes.setdefault(("warned", reason), True) is True:
        notes["warned", reason] = "said"
        warnings.warn(
            f"{job.call}: compile={job.compile!r}, and the program runs uncompiled: {reason}",
            errors.CompileWarning,
            stacklevel=2,
        )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _numbers(job: Job, low: Lowered) -> tuple[float, ...]:
    return tuple(job.recording.scalars) if reads_numbers(low.batched) else ()


def _begun(job: Job, low: Lowered, eager: Replay, chunk: Chunk, seconds: float | None) -> State:
    """Find the compiled program on disk, or compile it, or begin to."""
    state = State(_numbers(job, low))
    lasting = registry.version() == _BUILT_IN
    base, name = artefacts.place(lasting), _name(job, low, eager, chunk)
    try:
        found = artefacts.find(base, name)
        if found is None and job.compile == "auto":
            expected = LEAST_SECONDS + SECONDS_PER_CALL * len(low.batched.chunk)
            if not lasting or (seconds or 0.0) < WORTH * expected:
                return state
            known, _ = probe(low.batched, chunk)
            request = _request(job, low, eager, chunk, known)
            state.work = Background({**request, "base": str(base), "name": name}, base, name)
            state.text = "a process compiles it in the background"
            return state
        if found is None:
            known, _ = probe(low.batched, chunk)
            found = draft_of(low.batched, graphs(low.batched, known, chunk), base, name)
        _switched(low, eager, chunk, state, found)
    except Exception as error:
        _refused(job, low, state, error)
    return state


def _finished(job: Job, low: Lowered, eager: Replay, chunk: Chunk, state: State) -> None:
    assert state.work is not None
    work, state.work = state.work, None
    try:
        _switched(low, eager, chunk, state, work.artefact())
    except Exception as error:
        _refused(job, low, state, error)


def _refused(job: Job, low: Lowered, state: State, error: Exception) -> None:
    state.refused = str(error) if isinstance(error, UncompilableError) else _line(error)
    state.text = ""
    _warn_once(job, low.notes.compiled, state.refused)


def draft_of(batched: BatchedProgram, found: Graphs, base: Path, name: str) -> artefacts.Artefact:
    """Compile the graphs of a program into a folder of the cache."""
    with artefacts.Draft(base, name) as draft:
        seconds = found.compiled_into(draft.folder)
        taken = taken_by_graphs(batched, found.eager)
        notes: dict[str, object] = {
            "eager": sorted(found.eager),
            "taken": {str(index): list(found.known[index]) for index in sorted(taken)},
            "seconds": seconds,
        }
        return draft.finish(notes)


def _switched(
    low: Lowered, eager: Replay, chunk: Chunk, state: State, found: artefacts.Artefact
) -> None:
    """Load a compiled program, and keep it if it gives what the uncompiled one gives."""
    outside = frozenset(int(i) for i in _listed(found.notes["eager"]))
    taken = found.notes["taken"]
    assert isinstance(taken, dict)
    known = {
        int(i): Meta(tuple(shape), tuple(stride), dtype, device)
        for i, (shape, stride, dtype, device) in taken.items()
    }
    replay = loaded(eager, outside, known, found.folder, chunk.device)
    expected = eager.chunk(*chunk.arguments, list(chunk.inputs))
    got = replay.chunk(*chunk.arguments, list(chunk.inputs))
    entered = max([largest(t) for t in (*chunk.inputs, *expected)], default=0.0)
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            raise UncompilableError(f"output {k} is {b.dtype} {tuple(b.shape)} when compiled")
        if k not in low.loose and not close(a, b, entered):
            raise UncompilableError(
                f"output {k} differs from the uncompiled program's by "
                f"{float((a - b).abs().max()):.2g} (largest entry {largest(a):.2g})"
            )
    names = dict.fromkeys(call_name(low.batched.chunk[i]) for i in sorted(outside))
    beside = f"; beside them run {', '.join(names)}" if names else ""
    state.text = (
        f"chunks of {chunk.size} samples on {chunk.device} run compiled by Inductor{beside}"
    )
    state.replay = replay


def _listed(value: object) -> Sequence[int]:
    assert isinstance(value, list)
    return value


def _name(job: Job, low: Lowered, eager: Replay, chunk: Chunk) -> str:
    """The name of a compiled program: a hash of all that decides it."""
    device = chunk.device
    hardware: tuple[object, ...] = (torch.backends.cpu.get_cpu_capability(),)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device), torch.version.cuda
    return artefacts.key(
        low.program.dumps(),
        eager.source,
        [call_name(call) for call in low.batched.chunk],
        [chunk.size, str(device), _numbers(job, low)],
        [Meta.of(t) for t in (*chunk.fixed, *chunk.inputs)],
        hardware,
        _settings(),
        artefacts.versions(),
    )


def _settings() -> dict[str, object]:
    """Settings of torch that decide what is compiled."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": Float32Precision.current(),
    }


def _request(
    job: Job, low: Lowered, eager: Replay, chunk: Chunk, known: dict[int, Meta]
) -> dict[str, object]:
    """The text from which another process makes the same program and compiles it."""
    fixes = dataclasses.asdict(low.fixes)
    fixes["restride"] = sorted(low.fixes.restride)
    return {
        "program": low.program.dumps(),
        "options": dataclasses.asdict(low.options),
        "fixes": fixes,
        "size": chunk.size,
        "device": str(chunk.device),
        "scalars": list(job.recording.scalars),
        "known": {str(i): list(meta) for i, meta in known.items()},
        "settings": _settings(),
        "source": eager.source,
    }


def explained(job: Job, low: Lowered, size: int) -> str:
    """A paragraph about what is compiled, for `plan.explain()`; empty if nothing was asked for."""
    if not job.compile:
        return ""
    reason = refusal(job)
    if not isinstance(low.replay, Replay):
        reason = "the function itself is run on each sample"
    states = [s for s in low.notes.compiled.values() if isinstance(s, State)]
    reason = reason or next((s.refused for s in states if s.refused), "")
    head = f"compile={job.compile!r}: "
    if reason:
        return f"{head}the program runs uncompiled: {reason}."
    texts = [s.text for s in states if s.text]
    if texts:
        return f"{head}{'; '.join(texts)}."
    when = (
        "at their first run"
        if job.compile is True
        else f"in the background, once a run is expected to take {WORTH} times the compilation"
    )
    return (
        f"{head}chunks of {size} samples are compiled by Inductor {when}; a smaller last chunk "
        "runs as it is."
    )
