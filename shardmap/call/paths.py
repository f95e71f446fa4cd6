"""Maps whose samples take different paths: each chunk's samples run along their own paths.

The executors see one program, though there is one for each path: a chunk's samples are sorted by
path, each group is replayed, and its results go back to the rows that they belong to. So chunks,
lanes, reductions, stores and autograd work as for any map.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardmap import errors
from shardmap._torch import generator_id, version_of
from shardmap.call import standin
from shardmap.call.by_sample import SampleLoop
from shardmap.call.memo import Prepared
from shardmap.call.routes import LOOP, Path, rows_of
from shardmap.call.standin import ITSELF, StandIn, in_order
from shardmap.lower.batched import LoweringOptions, slowest
from shardmap.lower.cache import Kept, Lowered, Notes
from shardmap.program.ir import Program, Spec
from shardmap.rules.philox import SampleNumbers, Seeds, numbers_at
from shardmap.run.prepare import Ready
from shardmap.run.rewritten import refusing_changes
from shardmap.trace.recording import Recording

_learned = Kept(256)
"""The planner's notes on maps with several paths, by the lowerings of their paths."""


def clear() -> None:
    """Clear the notes."""
    _learned.clear()


def after_fork() -> None:
    """Renew the lock of this module."""
    _learned.after_fork()


@dataclass(frozen=True, slots=True)
class Branch:
    """One path, ready to run on each device of the call."""

    prepared: Prepared
    ready: dict[str, Ready]
    """The prepared program on each device, by the device's name."""
    seeds: tuple[int, ...]
    """Positions, among the call's seeds, of those that the path's draws follow from."""
    grad: bool
    """True if gradients may flow through its outputs; those of other paths' samples may all the
    same, and its program is made for calls that are not recorded then."""


class PathReplay(StandIn):
    """Runs each sample of a chunk along its path, in the form of a replay (`codegen.Replay`).

    Args:
        of_row: The number of each sample's path, `LOOP` where the function itself is run.
        branches: The paths.
        loop: The loop that runs the function itself.
        specs: The outputs' metadata: all paths' results are converted to these.
    """

    source = "a program for each path"

    def __init__(
        self,
        of_row: torch.Tensor,
        branches: Sequence[Branch],
        loop: SampleLoop,
        specs: Sequence[Spec],
    ):
        self.of_row = of_row
        self.branches = branches
        self.loop = loop
        self.specs = specs
        self._shared: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}
        """Values that all samples of a path share and that are drawn, by path, device and seeds."""
        self._guards: dict[torch.device, Callable[[], None]] = {}

    def described(self) -> str:
        """The samples of each path, and what they answer."""
        size, lines = len(self.of_row), []
        for number, branch in enumerate(self.branches):
            count = int((self.of_row == number).sum())
            lines.append(f"  {count} of {size}, batched: {answered(branch.prepared)}")
        looped = int((self.of_row == LOOP).sum())
        if looped:
            lines.append(f"  {looped} of {size}, one by one: {ITSELF}")
        ways = len(self.branches) + bool(looped)
        lines.insert(0, f"Samples go {ways} ways by what python asks about their values:")
        return "\n".join(lines)

    def fixed(self, device: torch.device, seed: Seeds, *_: object) -> tuple[()]:
        """Compute what samples of each path share and draw."""
        captured: list[torch.Tensor] = []
        for number, branch in enumerate(self.branches):
            self._fixed(number, device, tuple([seed[k] for k in branch.seeds]))
            captured += branch.ready[str(device)].captured
        self._guards[device] = refusing_changes(self.loop.call, captured)
        return ()

    def _refuse_changes(self, device: torch.device) -> None:
        guard = self._guards.get(device)
        if guard is not None:
            guard()

    def chunk(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one chunk, `[size, *shape]` each."""
        self._refuse_changes(device)
        order, parts = [], []
        for at, found in self._groups(size, start, device, seed, inputs):
            order.append(at)
            parts.append(found)
        if len(parts) == 1:
            return parts[0]
        return in_order(order, parts)

    def chunk_into(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
        slices: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Compute one chunk as `chunk` does, and write its outputs into the given slices."""
        for at, found in self._groups(size, start, device, seed, inputs):
            for t, where in zip(found, slices, strict=True):
                if len(at) == size:
                    where.copy_(t)
                else:
                    where.index_copy_(0, at.to(where.device), t.to(where.device))
        return tuple(slices)

    def _groups(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        inputs: list[torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """Yield for each path the positions of its samples in the chunk, and their outputs.

        In-place writes to samples reach `inputs`.
        """
        assert isinstance(start, int), "a chunk is a run of samples"
        paths = self.of_row[start : start + size]
        for number in paths.unique().tolist():
            at = (paths == number).nonzero().flatten()
            if len(at) == size:
                yield at, self._along(number, size, start, device, seed, inputs)
                continue
            numbers = numbers_at(start, np.array(at.tolist()))
            rows = at.to(device)
            own = [rows_of(t, rows) for t in inputs]
            before = [_version(t) for t in own]
            found = self._along(number, len(at), numbers, device, seed, own)
            for t, copied, version in zip(inputs, own, before, strict=True):
                if version is None or _version(copied) != version:
                    t.index_copy_(0, rows, copied)
            yield at, found

    def _along(
        self,
        number: int,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of samples that all take one path."""
        if number == LOOP:
            found = self.loop.chunk(size, start, device, seed, (), (), inputs)
        else:
            branch = self.branches[number]
            ready = branch.ready[str(device)]
            scalars = branch.prepared.recording.scalars
            own = tuple([seed[k] for k in branch.seeds])
            with torch.set_grad_enabled(branch.grad and torch.is_grad_enabled()):
                fixed = self._fixed(number, device, own)
                outs = ready.low.replay.chunk(size, start, device, own, scalars, fixed, inputs)
            found = tuple(
                [
                    t if v.mapped else t.expand(size, *t.shape)
                    for t, v in zip(outs, ready.low.batched.outputs, strict=True)
                ]
            )
        return tuple([t.to(spec.dtype) for t, spec in zip(found, self.specs, strict=True)])

    def _fixed(
        self, number: int, device: torch.device, own: tuple[object, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Values that all samples of a path share; its draws follow from the call's seeds."""
        branch = self.branches[number]
        ready, recording = branch.ready[str(device)], branch.prepared.recording
        if not (recording.random and self.loop.randomness == "same"):
            return ready.fixed
        key = number, str(device), own
        found = self._shared.get(key)
        if found is None:
            found = self._shared[key] = ready.low.replay.fixed(
                device, own, recording.scalars, ready.captured, ready.literals
            )
        return found


_MOST_ANSWERS = 4
"""Answers of a path that are shown."""


def answered(prepared: Prepared) -> str:
    """Text on the answers of a path's samples, with the lines that ask."""
    recording = prepared.recording
    texts = []
    for eq in [recording.program.equations[at] for at in recording.asked]:
        what = eq.answer[1]
        if eq.answer[0] == "shape":
            what = ", ".join(f"shape {list(shape)}" for shape in what)
        texts.append(f"{what} at {eq.source}" if eq.source else str(what))
    runs = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    shown = [f"{count} times {text}" if count > 1 else text for text, count in runs]
    more = sum(count for _, count in runs[_MOST_ANSWERS:])
    said = ", ".join(shown[:_MOST_ANSWERS])
    return f"{said} and {more} more answer{'s' if more > 1 else ''}" if more else said


def _version(t: torch.Tensor) -> int | None:
    """Number of writes to a tensor so far; None if torch does not count them."""
    return None if t.is_inference() else version_of(t)


def merged(paths: Sequence[Path], call: str) -> Prepared:
    """A recording that describes the outputs of all paths.

    Raises:
        VariesError: The paths' outputs cannot be stacked.
    """
    first = paths[0].prepared
    outputs = list(first.recording.program.outputs)
    flags = list(first.recording.program.output_flags)
    for path in paths[1:]:
        if path.prepared.structure != first.structure:
            raise errors.VariesError(
                f"{call}: the function returns another structure for sample {int(path.rows[0])} "
                f"than for others ({path.prepared.structure} and {first.structure}), so the "
                "results cannot be stacked; return one structure for all samples"
            )
        program = path.prepared.recording.program
        for k, (var, flag) in enumerate(zip(program.outputs, program.output_flags, strict=True)):
            own, other = outputs[k].spec, var.spec
            if own.shape != other.shape:
                raise errors.RaggedError(
                    f"{call}: output {k} has shape {list(own.shape)} for some samples and "
                    f"{list(other.shape)} for others (sample {int(path.rows[0])}), so the results "
                    f"cannot be stacked; {errors.RaggedError.REMEDY}"
                )
            dtype = torch.promote_types(own.dtype, other.dtype)
            outputs[k] = outputs[k]._replace(spec=own._replace(dtype=dtype))
            flags[k] = max(flags[k], flag)
    program = first.recording.program._replace(outputs=tuple(outputs), output_flags=tuple(flags))
    recording = first.recording
    written = frozenset().union(*[path.prepared.recording.written_inputs for path in paths])
    recording = dataclasses.replace(
        recording, program=program, written_inputs=written, sample=(), asked=()
    )
    recording = drawing(recording, paths)
    return Prepared(recording, first.structure)


def drawing(recording: Recording, paths: Sequence[Path]) -> Recording:
    """A recording that draws whatever one of the paths draws."""
    of_paths = [path.prepared.recording for path in paths]
    generators = {generator_id(g): g for r in of_paths for g in r.generators}
    return dataclasses.replace(
        recording,
        random=any(r.random for r in of_paths),
        torchs_own=any(r.torchs_own for r in of_paths),
        generators=tuple(generators.values()),
    )


def seeds_within(part: Recording, whole: Recording) -> tuple[int, ...]:
    """Positions, among a call's seeds, of those that the draws of one path follow from."""
    places = {generator_id(g): 1 + at for at, g in enumerate(whole.generators)}
    return (0, *[places[generator_id(g)] for g in part.generators])


def lowering(program: Program, options: LoweringOptions, replay: PathReplay) -> Lowered:
    """Wrap the paths as a lowering, which executors take."""
    ready = [next(iter(branch.ready.values())).low for branch in replay.branches]
    tiers = slowest(*[low.batched.tiers for low in ready])
    if bool((replay.of_row == LOOP).any()):
        tiers[ITSELF] = "loop"
    size = max([low.sample_bytes for low in ready], default=0)
    key = "notes", *[id(low) for low in ready]
    _, notes = _learned.made(key, lambda: (ready, Notes()))  # holding `ready` keeps the ids
    return standin.lowering(program, options, replay, tiers, size, notes)
