"""A map inside a map whose inner samples go different ways.

The outer map records what the inner one does to the inner samples of one outer sample. Which ways
those go differs by outer sample, and so the split itself is recorded: the inner samples are sorted
by their answers, and only how many gave each answer is a question that the outer samples are asked.
The recording depends on those numbers alone: never on which inner sample was looked at first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardmap._torch import dispatch_modes, pytree
from shardmap.call import standin
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.paths import merged
from shardmap.call.routes import Path, taken, unwrapped
from shardmap.call.standin import StandIn, in_order
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Lowered, Notes
from shardmap.program.analysis import asking_about, random_call
from shardmap.program.ir import Spec
from shardmap.program.questions import Question, key_of, stages
from shardmap.rules.philox import SampleNumbers, Seeds
from shardmap.trace.batch import Batch
from shardmap.trace.recorder import Recorder
from shardmap.trace.surroundings import outer_recordings_suspended

MOST_QUESTIONS = 16
"""Questions of one way up to which the split is recorded: each computes what led to it anew."""

Run = Callable[[Prepared, Batch], Sequence[torch.Tensor]]


class Unsplit(Exception):
    """The split cannot be recorded; the message says why."""


@dataclass(frozen=True, slots=True)
class Group:
    """Inner samples that go one way."""

    rows: torch.Tensor | None
    """Their numbers; None for all of them in order."""
    count: int
    path: Path
    known: int
    """Number of the path's answers that they are known to have given."""


class Nested:
    """One call inside another map.

    Args:
        prepared: The recording of the first inner sample.
        batch: The call's arguments.
        record: Records the function on an inner sample, by its number.
        run: Computes a recording for a batch, as a part of the outer recording.
        options: The call's.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch: Batch,
        record: Callable[[int], Prepared],
        run: Run,
        options: Options,
    ):
        self.batch = batch
        self.record = lambda number: _all_asked(record(number))
        self.prepared = _all_asked(prepared)
        self.run = run
        self.most = options.max_paths
        self.randomness = options.randomness
        self.call = options.call

    def whole(self) -> tuple[Prepared, Callable[[LoweringOptions], Lowered]]:
        """A recording for all paths, and what replaces its replay.

        Raises:
            Unsplit: The samples cannot be split inside a recording.
            VariesError: The results of different ways do not fit together.
        """
        groups = self._groups()
        whole = merged([dataclasses.replace(g.path, rows=_first(g)) for g in groups], self.call)
        random = any(g.path.prepared.recording.random for g in groups)
        if random and self.randomness == "same":
            raise Unsplit("inner samples go different ways and share their draws")
        # Each group draws for itself: the recording that stands for all draws nothing.
        recording = dataclasses.replace(
            whole.recording, random=False, torchs_own=False, generators=()
        )
        whole = dataclasses.replace(whole, recording=recording)

        def instead(how: LoweringOptions) -> Lowered:
            program = whole.recording.program
            replay = NestedReplay(groups, self.batch, self.run, [v.spec for v in program.outputs])
            return standin.lowering(program, how, replay, {}, 0, Notes())

        return whole, instead

    def _groups(self) -> list[Group]:
        found: list[Group] = []
        waiting = [Group(None, self.batch.size, Path.of(self.prepared, 0), 0)]
        while waiting:
            group = waiting.pop()
            recording = group.path.prepared.recording
            if recording.written_inputs:
                raise Unsplit("inner samples go different ways and are written in place")
            if group.known < len(recording.asked):
                waiting += reversed(self._split(group))
            else:
                found.append(group)
            if len(found) + len(waiting) > self.most:
                raise Unsplit(f"inner samples go more than max_paths={self.most} different ways")
        return found

    def _split(self, group: Group) -> list[Group]:
        """Split a group by its next question."""
        prepared, known = group.path.prepared, group.known
        if known >= MOST_QUESTIONS:
            raise Unsplit(f"inner samples are asked more than {MOST_QUESTIONS} questions each")
        recording = prepared.recording
        stage = stages(recording.program, recording.asked, singly=True)[known]
        question = stage.questions[0]
        if any(random_call(eq) for eq in stage.program.equations):
            raise Unsplit("inner samples go different ways by what they draw")
        if question.numbers is None:
            raise Unsplit("what python asks of inner samples is no number")
        computes = dataclasses.replace(
            recording, program=stage.program, sample=(), asked=(), random=False,
            torchs_own=False, generators=(),
        )  # fmt: skip
        structure = pytree.tree_flatten([0] * len(stage.program.outputs))[1]
        with torch.no_grad():
            outputs = self.run(Prepared(computes, structure), part_of(self.batch, group.rows))
            given = _values(question, [outputs[k] for k in question.outputs])
            pieces = _sorted(given, group.count)
        split = []
        for answer, order, count in pieces:
            rows = group.rows
            if order is not None:
                rows = order if rows is None else rows.index_select(0, order)
            prefix = (*group.path.answers[:known], key_of(answer))
            path = group.path
            if prefix != path.answers[: known + 1]:
                path = self._recorded(rows, prefix)
            split.append(Group(rows, count, path, known + 1))
        return split

    def _recorded(self, rows: torch.Tensor | None, prefix: tuple[object, ...]) -> Path:
        """The path of samples that gave certain answers, recorded on the first of them."""
        with outer_recordings_suspended():
            first = 0 if rows is None else int(unwrapped(rows)[0])
        path = Path.of(self.record(first), first)
        if path.answers[: len(prefix)] != prefix:
            raise Unsplit("inner samples answer otherwise together than by themselves")
        return path


def _all_asked(prepared: Prepared) -> Prepared:
    """The recording with the questions that differ by outer sample alone, too, in their places."""
    recording = prepared.recording
    program = recording.program
    outer = [m for m in dispatch_modes() if isinstance(m, Recorder)]
    reached = {v.group for v in program.inputs}
    for var, tensor in zip(program.captured, recording.captured, strict=True):
        if any(m.is_mapped(unwrapped(tensor)) for m in outer):
            reached.add(var.group)
    asked = {*recording.asked, *asking_about(program, reached)}
    recording = dataclasses.replace(recording, asked=tuple(sorted(asked)))
    return dataclasses.replace(prepared, recording=recording)


def _first(group: Group) -> torch.Tensor:
    """The number of a group's first sample, for messages: `[1]`."""
    with outer_recordings_suspended():
        rows = torch.zeros(1, dtype=torch.int64) if group.rows is None else unwrapped(group.rows)
        return rows[:1].clone()


def _values(question: Question, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The answers as numbers, one for each inner sample."""
    assert question.numbers is not None
    given = unwrapped(question.numbers(outputs))
    if given.is_complex():
        raise Unsplit("inner samples are asked for complex numbers")
    return given


def _sorted(
    given: torch.Tensor, count: int
) -> list[tuple[bool | int | float, torch.Tensor | None, int]]:
    """Each answer, the places of those who gave it (None for all of them), and how many they are.

    Only numbers that all inner samples have in common are asked for: extremes, counts, answers.
    """
    numbers = given.to(torch.uint8) if given.dtype is torch.bool else given
    low, high = numbers.min().item(), numbers.max().item()
    kind = bool if given.dtype is torch.bool else type(low)
    if low == high:
        return [(kind(low), None, count)]
    ordered, order = numbers.sort(stable=True)
    if kind is bool:
        zeros = count - int(numbers.sum().item())
        starts = [0, zeros]
    else:
        before, behind = ordered[:-1], ordered[1:]
        changes = (before != behind) & ~((before != before) & (behind != behind))
        places = changes.nonzero().flatten()
        starts = [0, *[1 + int(place.item()) for place in places.unbind()]]
    found = []
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        answer = kind(ordered[start].item())
        found.append((answer, order[start:stop] if stop - start < count else None, stop - start))
    return found


def part_of(batch: Batch, rows: torch.Tensor | None) -> Batch:
    """The inner samples of a group."""
    return batch if rows is None else taken(batch, rows)


class NestedReplay(StandIn):
    """Runs each group of inner samples along its path, as a part of the outer recording.

    Args:
        groups: The inner samples by path.
        batch: The call's arguments.
        run: Computes a recording for a batch.
        specs: The outputs' metadata: what the results of all paths are brought to.
    """

    source = "a program for each path of a map inside a map"

    def __init__(self, groups: Sequence[Group], batch: Batch, run: Run, specs: Sequence[Spec]):
        self.groups = groups
        self.batch = batch
        self.run = run
        self.specs = specs

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
        """The outputs of all inner samples, `[size, *shape]` each."""
        assert size == self.batch.size, "a map inside a map is not cut"
        parts, orders = [], []
        for group in self.groups:
            found = self.run(unasked(group.path.prepared), part_of(self.batch, group.rows))
            parts.append([t.to(spec.dtype) for t, spec in zip(found, self.specs, strict=True)])
            orders.append(group.rows)
        if len(parts) == 1 and orders[0] is None:
            return tuple(parts[0])
        return in_order([rows for rows in orders if rows is not None], parts)


def unasked(prepared: Prepared) -> Prepared:
    """The recording of a path for samples that are known to take it: nothing is asked again."""
    recording, asked = prepared.recording, set(prepared.recording.asked)
    equations = [
        eq
        for at, eq in enumerate(recording.program.equations)
        if at not in asked or (eq.answer is not None and eq.answer[0] == "shape")
    ]
    program = recording.program._replace(equations=tuple(equations))
    recording = dataclasses.replace(recording, program=program, sample=(), asked=())
    return Prepared(recording, prepared.structure)
