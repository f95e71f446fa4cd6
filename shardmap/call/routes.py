"""Find each sample's path: the batch is split by the answers that its samples give.

A recording holds one sample's answers to the questions that the function asks about values. The
operands of the questions are computed for the whole batch, question by question; samples with other
answers leave the path, and the function is recorded on one of them. Paths form a tree:
a recording serves all samples with the same answers.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from shardmap import errors
from shardmap._torch import functorch, pytree
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.spread import Answers, Spread
from shardmap.lower.cache import Kept
from shardmap.lower.replayed import restride
from shardmap.program.analysis import random_call
from shardmap.program.questions import Stage, answers, stages
from shardmap.trace.batch import Batch
from shardmap.trace.recording import UNKNOWN, Recording
from shardmap.trace.saved_hooks import are_saved_hooks_around

logger = logging.getLogger("shardmap")

WORTH = 64
"""Number of samples, in this call and those before, from which a new path is recorded: recording,
lowering and trying it costs about as much as running the function itself on this many."""
WORTH_KNOWN = 8
"""Number of samples from which a path recorded before is used."""
LOOP = -1
"""Path number of samples for which the function itself is run, sample by sample."""

_seen = Kept(512)
"""Answers that functions have given, by the functions' identity."""


def clear() -> None:
    """Clear the answers."""
    _seen.clear()


def after_fork() -> None:
    """Renew the lock of this module."""
    _seen.after_fork()


def seen_of(key: Hashable | None) -> Seen:
    """The answers that a function has given; a new record for a function without identity."""
    return Seen() if key is None else _seen.made(("answers", key), Seen)


_PASSED_ON = (errors.OverBudget, errors.VariesError)
"""Errors about the call, and not about samples that have left a path."""


def warn_looped(call: str, why: str, samples: int) -> None:
    """Warn that the function itself is run on samples that could have had a path."""
    warnings.warn(
        f"{call}: {why}, so the function itself is run on {samples} samples; pass strict=True to "
        "refuse that",
        errors.SlowLoopWarning,
        stacklevel=2,
    )


def last_asked(recording: Recording) -> str:
    """The clause that names the last line at which python asked; empty if no line is known."""
    asked = [recording.program.equations[at] for at in reversed(recording.asked)]
    lines = [eq.source or recording.sources.get(eq.op.name()) for eq in asked]
    place = next((line for line in lines if line and line != UNKNOWN), None)
    return f" (the last at {place})" if place else ""


class Seen:
    """The answers that a function has given, in all calls."""

    most = 4096
    """Most answers without a path that are remembered."""

    def __init__(self) -> None:
        self.known: set[Answers] = set()
        """Answers of paths that have been recorded."""
        self.waiting: collections.Counter[Answers] = collections.Counter()
        """Number of samples that gave answers without a path, by answers."""
        self.spread = Spread()
        """Distribution of the tried samples over paths."""

    def is_worth(self, prefix: Answers, samples: int) -> bool:
        """True if a path pays for these samples; if not, they count for later calls."""
        if prefix in self.known:
            return samples >= WORTH_KNOWN
        if len(self.waiting) >= self.most:
            self.waiting.clear()
        # As many are taken to have come in calls whose samples were all looped.
        self.waiting[prefix] += samples * (1 + self.spread.looped)
        return self.waiting[prefix] >= WORTH

    def note(self, answers: Answers) -> None:
        """Add the answers of a path that has been recorded."""
        self.known.update(answers[:k] for k in range(len(answers) + 1))


Compute = Callable[[Prepared, Batch], Sequence[torch.Tensor]]


@dataclass(slots=True)
class Path:
    """The path of samples that give certain answers: its recording, answers and samples."""

    prepared: Prepared
    answers: Answers
    recorded: int
    """The sample that it was recorded on; -1 for one of an earlier call."""
    stages: list[Stage]
    """The programs that compute the operands of the questions."""
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The samples that take it, in order."""

    @staticmethod
    def of(prepared: Prepared, recorded: int) -> Path:
        """Make the path of a recording; its questions are worked out once for each program."""
        recording = prepared.recording
        key = "questions", id(recording.program), recording.asked
        found = _seen.get(key)
        if found is None or found[0] is not recording.program:
            program = recording.program
            given, through = answers(program, recording.asked), stages(program, recording.asked)
            found = program, given, through
            _seen.replace(key, found)
        return Path(prepared, found[1], recorded, found[2])


@dataclass(slots=True)
class Routes:
    """The paths of one call, and the samples that take none."""

    paths: list[Path]
    looped: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Samples for which the function itself is run."""

    def of_row(self, size: int) -> torch.Tensor:
        """The number of each sample's path, `LOOP` where it has none: `[size]`."""
        found = torch.full((size,), LOOP)
        for number, path in enumerate(self.paths):
            found[path.rows] = number
        return found


class Router:
    """Finds the paths of one call's samples.

    Args:
        batch: The call's arguments.
        options: The call's options.
        known: The paths that are known; every sample starts on the first one.
        record: Records the function on a sample, by its number.
        compute: Computes the program of a stage for a batch.
        seen: Answers that the function has given, in this call or before.
    """

    def __init__(
        self,
        batch: Batch,
        options: Options,
        known: Sequence[Path],
        record: Callable[[int], Prepared],
        compute: Compute,
        seen: Seen,
    ):
        self.batch = batch
        self.options = options
        self.record = record
        self.compute = compute
        self.seen = seen
        self.routes = Routes(list(known))
        self._full = False
        self._used = {id(path) for path in self.routes.paths[:1]}
        """Paths that samples of this call take; the others are from earlier calls."""

    def run(self) -> Routes:
        """Split the batch.

        Raises:
            DataDependentError: `strict=True`, and there are more paths than `max_paths`.
        """
        every = torch.arange(self.batch.size)
        waiting = collections.deque([(every, self.routes.paths[0], 0)])
        while waiting:
            rows, path, known = waiting.popleft()
            for prefix, leaving in self._follow(path, rows, known).items():
                self._send(prefix, torch.cat(leaving), waiting)
        for path in self.routes.paths:
            path.rows = path.rows.sort().values
            if not bool((path.rows == path.recorded).any()):
                path.recorded = -1  # with the batch's rounding it takes another path
        self.routes.looped = self.routes.looped.sort().values
        return self.routes

    def _send(
        self,
        prefix: Answers,
        rows: torch.Tensor,
        waiting: collections.deque[tuple[torch.Tensor, Path, int]],
    ) -> None:
        """Send samples that gave these answers on along a path that begins with them."""
        for path in self.routes.paths:
            if path.answers[: len(prefix)] == prefix:
                self._used.add(id(path))
                waiting.append((rows, path, len(prefix)))
                return
        if len(self._used) >= self.options.max_paths:
            self._refuse_more()
        # What a sample draws must not depend on whether its path has been worth recording, nor what
        # is saved for its gradients where hooks see it.
        asked = self.options.strict or self.options.randomness != "error"
        asked = asked or are_saved_hooks_around()
        if self._full or not (asked or self.seen.is_worth(prefix, len(rows))):
            self._loop(rows)
            return
        first = int(rows[0])
        path = Path.of(self.record(first), first)
        if path.answers[: len(prefix)] != prefix:
            # Batched kernels round differently from a sample's own: run the loop.
            self._loop(rows)
            return
        self.routes.paths.append(path)
        self._used.add(id(path))
        self.seen.note(path.answers)
        path.rows = torch.cat([path.rows, rows[:1]])
        waiting.append((rows[1:], path, len(prefix)))

    def _loop(self, rows: torch.Tensor) -> None:
        self.routes.looped = torch.cat([self.routes.looped, rows])

    def _refuse_more(self) -> None:
        path = self.routes.paths[-1]
        text = (
            f"{self.options.call}: the samples go more than max_paths={self.options.max_paths} "
            "different ways by what python asks about their values"
            f"{last_asked(path.prepared.recording)}"
        )
        if self.options.strict:
            raise errors.DataDependentError(
                f"{text}, and strict=True refuses to run the others one by one; keep the value in "
                "a tensor (torch.where, masks), pass a larger max_paths, or strict=False"
            )
        if not self._full:
            warnings.warn(
                f"{text}, so the others are run one by one; keep the value in a tensor "
                "(torch.where, masks), or pass a larger max_paths",
                errors.SlowLoopWarning,
                stacklevel=2,
            )
        self._full = True

    def _follow(
        self, path: Path, rows: torch.Tensor, known: int
    ) -> dict[Answers, list[torch.Tensor]]:
        """Follow a path with some samples; return those that leave it, by their answers.

        They are known to have given its first `known` answers.
        """
        if not len(rows):
            return {}
        try:
            return self._walk(path, path.stages, rows, known)
        except _PASSED_ON:
            raise
        except Exception as error:  # of a sample that has left the path before
            logger.debug("%s: question by question, for %s", self.options.call, error)
        recording = path.prepared.recording
        try:
            singly = stages(recording.program, recording.asked, singly=True)
            return self._walk(path, singly, rows, known)
        except _PASSED_ON:
            raise
        except Exception as error:  # if it is the user's error, the function itself raises it
            if self.options.strict:
                raise
            warn_looped(self.options.call, f"what python asks raises {error!r}", len(rows))
            self._loop(rows)
            return {}

    def _walk(
        self, path: Path, through: Sequence[Stage], rows: torch.Tensor, known: int
    ) -> dict[Answers, list[torch.Tensor]]:
        left: dict[Answers, list[torch.Tensor]] = {}
        for stage in through:
            if not len(rows) or all(q.number < known for q in stage.questions):
                continue
            found = self._computed(path, stage, rows)
            staying = torch.ones(len(rows), dtype=torch.bool)
            for question in stage.questions:
                given = [found[k] for k in question.outputs]
                alike = question.alike(given).cpu() if given else staying
                leaving = (staying & ~alike).nonzero().flatten()
                if not len(leaving):
                    continue
                of_row, kinds = question.read(
                    [t.index_select(0, leaving.to(t.device)) for t in given]
                )
                for number, kind in enumerate(kinds):
                    prefix = (*path.answers[: question.number], kind)
                    own = leaving[(of_row == number).cpu()]
                    left.setdefault(prefix, []).append(rows[own])
                staying &= alike
            rows = rows[staying]
        path.rows = torch.cat([path.rows, rows])
        return left

    def _computed(self, path: Path, stage: Stage, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        prepared = path.prepared
        if any(random_call(eq) for eq in stage.program.equations):
            raise errors.VariesError(
                f"{self.options.call}: the function draws random numbers, and samples take "
                "different paths depending on them"
            )
        recording = dataclasses.replace(
            prepared.recording, program=stage.program, sample=(), asked=(), random=False,
            torchs_own=False, generators=(),
        )  # fmt: skip
        structure = pytree.tree_flatten([0] * len(stage.program.outputs))[1]
        writes = bool(recording.written_inputs)
        part = (
            self.batch if len(rows) == self.batch.size and not writes else taken(self.batch, rows)
        )
        return [unwrapped(t) for t in self.compute(Prepared(recording, structure), part)]


def unwrapped(t: torch.Tensor) -> torch.Tensor:
    """The plain values of a tensor that outer transforms differentiate by."""
    while functorch.is_gradtrackingtensor(t):
        t = functorch.get_unwrapped(t)
    return t


def taken(batch: Batch, rows: torch.Tensor) -> Batch:
    """The batch of some samples, copied, with the strides that each had."""
    leaves = list(batch.leaves)
    for position, (leaf, dim) in enumerate(batch.mapped):
        if position in batch.columns:
            column = batch.columns[position]
            parts = [column.rows_between(row, row + 1) for row in rows.tolist()]
            leaves[leaf] = torch.cat(parts)
            continue
        tensor = leaves[leaf].movedim(dim, 0)
        leaves[leaf] = rows_of(tensor, rows.to(tensor.device)).movedim(0, dim)
    return dataclasses.replace(batch, leaves=leaves, size=len(rows), columns={})


def rows_of(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a batch, copied, with the strides that they had: recorded views need them."""
    return restride(tensor.index_select(0, rows), tensor.stride()[1:])
