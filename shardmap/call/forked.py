"""Calls whose samples take different paths: the paths are found, lowered and combined."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from shardmap import errors
from shardmap.call import by_sample, routes
from shardmap.call.by_sample import SampleLoop, WiderError, widened
from shardmap.call.fingerprint import prepared_by_code
from shardmap.call.first_keys import other_structure, prepared_in_order, refuse_another_first
from shardmap.call.first_use import FirstUse
from shardmap.call.identity import identity
from shardmap.call.into_store import groups_into_store
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.paths import Branch, PathReplay, drawing, lowering, merged, seeds_within
from shardmap.call.ragged import as_asked, joined, refuse_groups
from shardmap.call.routes import LOOP, Path, Router, Routes, Seen, seen_of, taken, warn_looped
from shardmap.call.spread import given_in
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Lowered
from shardmap.rules.philox import Seeds
from shardmap.run import prepare
from shardmap.run import ray as on_ray
from shardmap.run.base import Job
from shardmap.store import Store
from shardmap.trace.batch import Batch, flatten_outputs, unflatten_outputs
from shardmap.trace.containers import refuse_unequal
from shardmap.trace.key_order import positions
from shardmap.trace.record import record
from shardmap.trace.recording import Recording
from shardmap.trace.saved_hooks import are_saved_hooks_around, is_checkpoint_around

logger = logging.getLogger("shardmap")

Instead = Callable[[LoweringOptions], Lowered]
"""Makes a lowering that replaces the replay."""


class Part(Protocol):
    """A call that computes a part of another one (`shardmap.call.execute.Call`)."""

    def run_flat(self) -> Sequence[torch.Tensor]:
        """The results, flat."""
        ...

    def job(self, by_sample: Instead | None = None) -> Job:
        """The job that executors run."""
        ...

    def names(self, job: Job) -> tuple[str, ...]:
        """The devices that it runs on."""
        ...

    def draw_by(self, seeds: Seeds, numbers: np.ndarray | None) -> None:
        """Draw by these seeds, and by these numbers of its samples."""
        ...


def may_draw(prepared: Prepared, options: Options) -> Prepared:
    """The recording marked as random, for samples on which it was not recorded.

    The function may draw random numbers on them; it is assumed to if `randomness` allows it.
    """
    if options.randomness == "error":
        return prepared
    recording = dataclasses.replace(prepared.recording, random=True, torchs_own=True)
    return dataclasses.replace(prepared, recording=recording, outputs={})


class Forked:
    """A call whose samples take different paths.

    Args:
        prepared: The recording of one sample.
        batch: The call's arguments.
        options: The call's options.
        use: The function run on the call's samples.
        part: Makes the call that runs another recording on some of the samples.
        seeds: Gives the seeds of a recording's draws in this call.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch: Batch,
        options: Options,
        use: FirstUse,
        part: Callable[[Prepared, Batch, Options, FirstUse | None], Part],
        seeds: Callable[[Recording], Seeds],
    ):
        self.prepared = prepared
        self.batch = batch
        self.options = options
        self.use = use
        self.part = part
        self.seeds = seeds
        self._found: Routes | None = None
        self._wider: list[WiderError] = []
        self._alone = options.alone()
        """The options of a part that is computed as a call of its own."""

    def widen(self, wider: WiderError) -> None:
        """Let outputs hold those of a sample that takes no path."""
        self._wider.append(wider)

    def whole(self) -> tuple[Prepared, Batch, FirstUse | None, Instead | None]:
        """A recording for all paths, its samples and first use, and what replaces its replay.

        Raises:
            VariesError: The paths' results do not fit together; `RaggedError` if their shapes
                differ.
        """
        routes = self._routes()
        paths = [path for path in routes.paths if len(path.rows)]
        if len(paths) == 1 and not len(routes.looped):
            path = paths[0]
            use = self._use(path, self.batch) if path.recorded in (0, -1) else None
            return self._known(path.prepared), self.batch, use, None
        if not paths:
            return self._by_loop()
        branches: dict[int, Branch] = {}
        for number, path in enumerate(routes.paths):
            branch = self._branch(path) if len(path.rows) else None
            if branch is not None:
                branches[number] = branch
            else:
                routes.looped = torch.cat([routes.looped, path.rows])
        self._refuse_loop(routes)
        if not branches:
            raise errors.VariesError(
                f"{self.options.call}: samples take different paths by what python asks about "
                "their values, and too few take the same one"
            )
        whole = merged([routes.paths[number] for number in branches], self.options.call)
        for wider in self._wider:
            whole = widened(whole, wider)
        if len(routes.looped) or self.options.out is not None:  # a store is known by its seeds
            whole = may_draw(whole, self.options)
        whole = self._known(whole)
        if whole.recording.written_inputs and torch.is_grad_enabled():
            if any(t.requires_grad for t in self.batch.tensors()):
                raise errors.VariesError(
                    f"{self.options.call}: samples take different paths, and the function writes "
                    "to them in place where gradients are recorded"
                )
        placed = [
            dataclasses.replace(b, seeds=seeds_within(b.prepared.recording, whole.recording))
            for b in branches.values()
        ]
        of_row = torch.full((self.batch.size,), LOOP)
        for place, number in enumerate(branches):
            of_row[routes.paths[number].rows] = place

        def instead(how: LoweringOptions) -> Lowered:
            program = whole.recording.program
            specs = [v.spec for v in program.outputs]
            loop = self._loop_of(self.batch, whole, how.grad or how.transformed)
            replay = PathReplay(of_row, placed, loop, specs)
            return lowering(program, how, replay)

        return whole, self.batch, self.use, instead

    def _by_loop(self) -> tuple[Prepared, Batch, FirstUse, Instead]:
        """A recording, samples and first use for a call whose samples are all looped."""
        whole = may_draw(self.prepared, self.options)
        for wider in self._wider:
            whole = widened(whole, wider)
        whole = self._known(whole)

        def instead(how: LoweringOptions) -> Lowered:
            loop = self._loop_of(self.batch, whole, how.grad or how.transformed)
            return by_sample.lowering(whole.recording.program, how, loop)

        return whole, self.batch, self.use, instead

    def _known(self, prepared: Prepared) -> Prepared:
        """The recording as a store knows it: not by the paths that happen to be recorded."""
        return prepared if self.options.out is None else prepared_by_code(prepared, self.use.func)

    def _loop_of(self, batch: Batch, prepared: Prepared, tracked: bool) -> SampleLoop:
        recording = prepared.recording
        specs = [v.spec for v in recording.program.outputs]
        return SampleLoop(
            self.use.func, batch, prepared.structure, specs, self.options.randomness,
            recording.random, tracked, self.options.call, recording.generators,
            self.options.remat,
        )  # fmt: skip

    def _refuse_loop(self, routes: Routes) -> None:
        """Refuse samples without a path if `strict=True`.

        Raises:
            VariesError: There are some, and `strict=True`.
        """
        if len(routes.looped) and self.options.strict:
            raise errors.VariesError(
                f"{self.options.call}: sample {int(routes.looped[0])} and "
                f"{len(routes.looped) - 1} others can only be served by the function itself, and "
                "strict=True refuses that: keep values in tensors (torch.where, masks), or pass "
                "strict=False"
            )

    def ragged(self) -> Any:
        """The results if their shapes differ by sample: a list of tensors for each output.

        Raises:
            OptionError: `reduce=` or `out=` is given.
        """
        options = self.options
        if options.reduce is not None or options.out is not None or options.out_dims != 0:
            raise errors.OptionError(
                f"{options.call}: ragged={options.ragged!r} and reduce=, out= or out_dims=: "
                "results of unequal shapes are handed back as they are; leave these away, or "
                "return results of one shape"
            )
        asked = bool(self.prepared.recording.asked)
        routes = self._routes() if asked else Routes([], torch.arange(self.batch.size))
        whole = drawing(self.prepared.recording, routes.paths)
        if whole.random and len(routes.looped) and routes.paths:
            raise self._draws()
        seeds = self.seeds(whole)
        rows: dict[int, Sequence[torch.Tensor]] = {}
        structure = self.prepared.structure
        for path in routes.paths:
            if len(path.rows):
                part = taken(self.batch, path.rows)
                if (own := path.prepared.structure) != structure:
                    raise other_structure(own, structure, options.call)
                call = self.part(path.prepared, part, self._alone, None)
                _draw(call, path, path.rows, whole, seeds)
                found = call.run_flat()
                rows |= zip(
                    path.rows.tolist(), zip(*[t.unbind(0) for t in found], strict=True), strict=True
                )
        tensors = self.batch.tensors()
        for row in routes.looped.tolist():
            args, kwargs = self.batch.unflatten([t[row] for t in tensors])
            leaves, own = flatten_outputs(self.use.func(*args, **kwargs), options.call)
            order = positions(own, structure)
            if order is None:
                raise other_structure(own, structure, options.call)
            rows[row] = [leaves[k] for k in order]
        columns = zip(*[rows[row] for row in range(self.batch.size)], strict=True)
        outputs = [as_asked(list(column), options.ragged, options.call) for column in columns]
        refuse_unequal(outputs, structure, options.call)
        return unflatten_outputs(outputs, structure, [0] * len(outputs), self.batch.size)

    def parts(self) -> bool:
        """True if samples go several ways, of those that are computed elsewhere."""
        # A worker has no function: every sample needs a path; one that raises does so here.
        self.options = dataclasses.replace(self.options, strict=True)
        taken_by = [path for path in self._routes().paths if len(path.rows)]
        return len(taken_by) > 1 or len(self._routes().looped) > 0

    def by_groups(self) -> Any:
        """The results of samples that are computed on a cluster: path by path, on all workers.

        Raises:
            OptionError: An option cannot be combined with a run path by path.
            VariesError: Some samples take no path, and only the function itself can serve them.
        """
        options = self.options
        what = "a function whose samples go different ways by what python asks about their values"
        paths = [path for path in self._routes().paths if len(path.rows)]
        if options.out is None:
            refuse_groups(options, f"devices={options.devices!r} and {what}", "their answers")
        if len(self._routes().looped):
            raise errors.VariesError(
                f"{options.call}: some samples can only be served by the function itself, run "
                f"where they are, and devices={options.devices!r}; use devices='auto'"
            )
        paths.sort(key=lambda path: int(path.rows[0]))
        whole = self._known(merged(paths, options.call))
        seeds = self.seeds(whole.recording)
        if options.out is not None:
            return self._groups_into_store(paths, whole, seeds)
        found = [self._group(path, path.rows, whole, seeds, options) for path in paths]
        return joined(found, [path.rows.tolist() for path in paths], whole.structure, options)

    def _group(
        self, path: Path, rows: torch.Tensor, whole: Prepared, seeds: Seeds, options: Options
    ) -> list[torch.Tensor]:
        """The outputs of samples that take one path."""
        part = taken(self.batch, rows)
        use = self._use(path, part) if path.recorded == int(rows[0]) else None
        call = self.part(path.prepared, part, options, use)
        _draw(call, path, rows, whole.recording, seeds)
        outputs = whole.recording.program.outputs
        return [t.to(v.spec.dtype) for t, v in zip(call.run_flat(), outputs, strict=True)]

    def _groups_into_store(self, paths: Sequence[Path], whole: Prepared, seeds: Seeds) -> Store:
        """Write the results of paths that are computed elsewhere to a store."""
        options, cluster = self.options, on_ray.asked_for(self.options.devices)
        assert cluster is not None
        program = whole.recording.program

        def instead(how: LoweringOptions) -> Lowered:
            loop = self._loop_of(self.batch, whole, how.grad or how.transformed)
            return by_sample.lowering(program, how, loop)

        def compute(start: int, stop: int) -> list[torch.Tensor]:
            found, order = [], []
            for path in paths:
                rows = path.rows[(path.rows >= start) & (path.rows < stop)]
                if len(rows):
                    found.append(self._group(path, rows, whole, seeds, options.alone()))
                    order.append(rows)
            back = torch.cat(order).argsort()
            return [torch.cat(column)[back] for column in zip(*found, strict=True)]

        call = self.part(whole, self.batch, options, None)
        call.draw_by(seeds, None)
        return groups_into_store(call.job(instead), options, whole.structure, cluster, compute)

    def _routes(self) -> Routes:
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> Routes:
        use, options = self.use, self.options
        derived = self.prepared.derived
        # A checkpoint around makes the call again: what has been found since must not count.
        kept = use.once and not is_checkpoint_around()
        known = [self.prepared, *derived.get("paths", ())] if kept else [self.prepared]
        paths = []
        for number, prepared in enumerate(known):
            recording = prepared.recording
            paths.append(Path.of(prepared, 0 if number == 0 and recording.sample else -1))

        def on(number: int) -> Prepared:
            pair = record(
                use.func, self.batch, options.randomness, use.once, options.call, number, use.always
            )
            return prepared_in_order(pair, self.prepared.structure)

        def compute(prepared: Prepared, part: Batch) -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return self.part(prepared, part, self._alone, None).run_flat()

        seen = Seen() if is_checkpoint_around() else seen_of(identity(use.func))
        if not self._pays(seen):
            seen.spread.was_looped()
            return Routes([], torch.arange(self.batch.size))
        found = Router(self.batch, self.options, paths, on, compute, seen).run()
        refuse_another_first(found.paths, options.call)
        size = self.batch.size
        seen.spread.was_split(size - len(found.looped), size)
        if kept:
            leaves = {id(leaf) for leaf in self.batch.leaves}
            derived["paths"] = [
                path.prepared
                for path in found.paths[1:][-4 * options.max_paths :]
                if not any(id(t) in leaves for t in path.prepared.recording.captured)
            ]
        return found

    def _pays(self, seen: Seen) -> bool:
        """True to split the batch: where few samples answer alike, looping them is faster."""
        spread, size, options = seen.spread, self.batch.size, self.options
        verdict = self.use.verdict()
        known = options.strict or options.randomness != "error" or are_saved_hooks_around()
        if known or verdict.alone or not verdict.forks:
            # Looping is refused, or would draw other numbers, or save others; or no sample can be
            # tried, or all are taken to answer alike.
            return True
        if spread.is_due():
            numbers = spread.next_tried(size)
            given = [given_in(program) for program in self.use.programs()]
            try:
                if numbers:
                    part = taken(self.batch, torch.tensor(numbers))
                    given += self._loop_of(part, self.prepared, False).answered()
            except Exception as error:  # the function's own is raised again where samples are asked
                logger.debug("%s: a sample that was tried: %s", options.call, error)
                return True
            spread.look(given, size, routes.WORTH_KNOWN, routes.WORTH)
        if not spread.splits and size >= routes.WORTH:
            last = routes.last_asked(self.prepared.recording)
            warn_looped(options.call, spread.too_few(last), size)
        return spread.splits

    def _draws(self) -> errors.VariesError:
        return errors.VariesError(
            f"{self.options.call}: the function draws random numbers, and its samples go different "
            "ways; draw outside of the function and pass the numbers in as an argument"
        )

    def _use(self, path: Path, part: Batch) -> FirstUse:
        """The function run on samples that all take one path; the first is the recorded one."""
        recording, structure = path.prepared.recording, path.prepared.structure
        pair = None if path.recorded < 0 else (recording, structure)
        return FirstUse(
            self.use.func,
            part,
            pair,
            self._alone,
            self.use.once,
            recording.program,
            True,
            structure,
        )

    def _branch(self, path: Path) -> Branch | None:
        """One path, lowered and tried; None if its samples differ in more than operators."""
        ends = int(path.rows[0]), int(path.rows[-1])
        first = ends[0] if path.recorded < 0 else path.recorded
        others = [row for row in reversed(ends) if row != first]
        part = taken(self.batch, torch.tensor([first, *others[:1]]))
        use = self._use(path, part)
        verdict = use.verdict()
        if verdict.varies or verdict.forks:
            why = verdict.varies or "samples that answer alike together do not by themselves"
            warn_looped(self.options.call, why, len(path.rows))
            return None
        recording = path.prepared.recording
        call = self.part(path.prepared, part, self._alone, use)
        call.draw_by((0,) * (1 + len(recording.generators)), None)  # a trial leaves no trace
        job = call.job()
        on = prepare.Devices(job, self.options.budget.on)
        with torch.set_grad_enabled(job.grad and torch.is_grad_enabled()):
            ready = {name: on.on(name, job.samples > 1, slices=False) for name in call.names(job)}
        return Branch(path.prepared, ready, (), job.grad or job.transformed)


def _draw(call: Part, path: Path, rows: torch.Tensor, whole: Recording, seeds: Seeds) -> None:
    """Let samples of a path draw what they draw in the whole call."""
    own = [seeds[k] for k in seeds_within(path.prepared.recording, whole)]
    call.draw_by(tuple(own), np.array(rows.tolist()))
