"""One call of a mapped function: record or recall it, check a new one, plan, run, compare."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import arguments as edges
from shardmap.call import confirm
from shardmap.call import outputs as out_edges
from shardmap.call.asked_later import outdated
from shardmap.call.automatic import OneCall
from shardmap.call.by_number import by_number, can_be_taken
from shardmap.call.by_sample import SampleLoop, WiderError, cause, lowering, warn_of_loop, widened
from shardmap.call.fingerprint import prepared_by_code
from shardmap.call.first_use import FirstUse
from shardmap.call.flattened import Flattened, asks_outside
from shardmap.call.forked import Forked, Instead, may_draw
from shardmap.call.gram_passes import compared
from shardmap.call.here import locally, refuse_elsewhere, shares_torchs_draws
from shardmap.call.into_store import into_store, refuse_store
from shardmap.call.job import has_tangents, job_of, names_of, seeds_of, with_expected
from shardmap.call.memo import Memory, Prepared
from shardmap.call.nested import Nested, Run, Unsplit
from shardmap.call.once import OnceCall
from shardmap.call.options import Options
from shardmap.call.shapes import ShapesOfCall
from shardmap.call.surroundings import Surroundings, is_empty, of_call
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Lowered
from shardmap.rules.philox import Seeds, TorchDraws
from shardmap.run import ray as on_ray
from shardmap.run.base import Job, unheard
from shardmap.store import Store
from shardmap.trace.batch import Batch, flatten_outputs, unflatten_outputs
from shardmap.trace.outside_graphs import may_reach
from shardmap.trace.record import record
from shardmap.trace.recording import Recording
from shardmap.trace.saved_hooks import are_saved_hooks_around, is_checkpoint_around
from shardmap.trace.shared_writes import refuse_shared_writes
from shardmap.trace.traced import traced_recording

Kept = Memory | ShapesOfCall | OnceCall
Recordings = Kept | OneCall


def run_map(
    func: Callable[..., Any], batch: Batch, options: Options, memory: Recordings | None
) -> Any:
    """Run one call of a mapped function, and return its results.

    Args:
        func: The user's function.
        batch: The call's arguments.
        options: The call's options.
        memory: Recordings of earlier calls that may serve this one.
    """
    around, batch, options = of_call(batch, options)
    call = recalled(func, batch, options, around, memory)
    if memory is not None and call is not None:
        with contextlib.suppress(errors.StaleRecordingError):
            result = call.run()
            if isinstance(memory, OneCall | OnceCall):
                memory.replayed(call.prepared, batch, call.whole_job)
            return result
        memory.forget(batch)
    try:
        call = recorded(func, batch, options, around, memory)
    except errors.HistoryError:
        if not can_be_taken(batch):
            raise
        call = recorded(*by_number(func, batch, options), around, None)
    return call.run()


def recalled(
    func: Callable[..., Any],
    batch: Batch,
    options: Options,
    around: Surroundings,
    memory: Recordings | None,
) -> Call | None:
    """The call with a recording of an earlier one; None if none serves it."""
    if memory is None or not around.comparable(isinstance(memory, OneCall)):
        return None
    if (remembered := memory.recall(batch)) is None:
        return None
    prepared = remembered.rebound(batch)
    if prepared.recording.asked and is_checkpoint_around():
        return None  # samples are told from the recorded one, which a later call may have replaced
    if may_reach(prepared.recording, batch.tensors()) or outdated(prepared, memory, batch):
        return None
    refuse_shared_writes(prepared.recording, batch, options.call)
    once, program = not isinstance(memory, OneCall), prepared.recording.program
    use = FirstUse(func, batch, None, options, once, program)
    return Call(prepared, batch, options, around, use)


def recorded(
    func: Callable[..., Any],
    batch: Batch,
    options: Options,
    around: Surroundings,
    memory: Recordings | None,
) -> Call:
    """The call, recorded now."""
    memory = memory if around.comparable(isinstance(memory, OneCall)) else None
    once, watch = isinstance(memory, Kept), memory and memory.watch(batch)
    how = options.randomness, once, options.call
    look = options.check == "always" or once or watch is not None or batch.size == 1
    pair = record(func, batch, *how, look=look, watch=watch)
    use = FirstUse(func, batch, pair, options, once)
    varies = use.verdict().varies  # may replace the first sample's recording
    recording, structure = use.first()
    recording = traced_recording(recording, options.call) if around.traced else recording
    prepared = Prepared(recording, structure)
    if isinstance(memory, Kept):
        memory.keep(batch, prepared)
    elif memory is not None and not varies:
        alone = options.alone(), around, None
        memory.keep(batch, prepared, lambda p, rows: Call(p, rows, *alone).run_flat(), use.on)
    return Call(prepared, batch, options, around, use)


class Call:
    """One call that has been recorded.

    Args:
        prepared: The recording.
        batch: The call's arguments.
        options: The call's options.
        around: The transforms and recordings around the call.
        use: The function run on the call's samples; None for a map with outputs that the function
            does not return (factors of what it returns).
    """

    def __init__(
        self,
        prepared: Prepared,
        batch: Batch,
        options: Options,
        around: Surroundings,
        use: FirstUse | None,
    ):
        self.prepared = prepared
        self.batch = batch
        self.options = options
        self.use = use
        self._seed: Seeds | None = None
        self._numbers: np.ndarray | None = None
        if not around.transformed and has_tangents(batch, prepared.recording.captured):
            around = dataclasses.replace(around, transformed=True)
        self.around = around

    def run(self) -> Any:
        """The results, or the store that holds them."""
        try:
            return self._run_any()
        except errors.RaggedError:
            if self.options.ragged == "error" or self.use is None:
                raise
            return self._forked().ragged()

    def _run_any(self) -> Any:
        recording = self.prepared.recording
        if self.use is not None and not is_empty(self.batch, self.around, recording):
            verdict = self.use.verdict()
            if verdict.varies:
                return self._run_by_sample(verdict.varies)
            if self.around.transformed and asks_outside(self.prepared, self.batch):
                return self._run_flattened()
            if self.around.inlined and recording.asked:
                return self._run_nested()
            forks = verdict.forks or (bool(recording.asked) and self._is_asked_first())
            if forks and not self.around.inlined:
                return self._run_by_paths()
        try:
            return self._run(None)
        except errors.VariesError as error:
            if self.use is not None and recording.asked and not self.around.inlined:
                self.use.forked()
                return self._run_by_paths()
            if self.use is None or self.around.inlined or recording.written_inputs:
                raise
            if self.options.strict:
                raise
            return self._run_by_sample(self.use.varies(cause(error, self.options.call)).varies)

    def _is_asked_first(self) -> bool:
        """True if all samples' answers are computed before any is run: writes cannot be undone.

        Nor can what hooks around the call were given to save.
        """
        undone = self.options.out is None and not self.prepared.recording.written_inputs
        return not undone or are_saved_hooks_around()

    def _run(self, by_sample: Instead | None) -> Any:
        prepared, batch, options, around = self.prepared, self.batch, self.options, self.around
        single = around.plain and by_sample is None
        plain = not single or (
            torch.is_grad_enabled() and any(prepared.recording.program.output_flags)
        )
        comparison = compared(prepared, options, batch.size, plain, several=single)
        if comparison is not None:
            if by_sample is not None:
                stacked = Call(prepared, batch, comparison.stacked, around, self.use)
                outputs = comparison.whole(stacked.run_flat(by_sample), batch)
            else:
                outputs = comparison.outputs(self.map_of, batch)
            return unflatten_outputs(outputs, prepared.structure, comparison.dims, batch.size)
        job = self.job(by_sample)
        cluster = None if around.inlined else on_ray.asked_for(options.devices)
        if by_sample is not None:
            refuse_elsewhere(job, options, around.inlined, cluster is not None)
        if options.out is not None:
            refuse_store(job, options, around.inlined)
            with options.watching():
                store = into_store(job, options, prepared.structure, cluster)
            self._confirm(job, store, by_sample)
            return store
        # Inside another map it is a part of that one, and reports no events.
        with unheard() if around.inlined else options.watching():
            if cluster is not None:
                outputs = on_ray.run(job, options.chunk_size, cluster, options.budget)
            else:
                outputs = locally(job, options, around.inlined or shares_torchs_draws(job, options))
        self._confirm(job, outputs, by_sample)
        placed = [o.dim for o in job.outputs]
        dims = out_edges.result_dims(prepared.structure, options.out_dims, placed, options.call)
        return unflatten_outputs(outputs, prepared.structure, dims, batch.size)

    def map_of(self, prepared: Prepared, options: Options, batch: Batch) -> Sequence[torch.Tensor]:
        """The results of another map, with the draws of this call."""
        call = self._part(prepared, batch, options, None)
        call._seed = self._seed
        found = call.run_flat()
        self._seed = call._seed
        return found

    def run_as(self, instead: Instead | None) -> Any:
        """The results, with `instead` in the place of a replay."""
        return self._run(instead)

    def run_flat(self, by_sample: Instead | None = None) -> Sequence[torch.Tensor]:
        """The results as a flat list."""
        return flatten_outputs(self._run(by_sample), self.options.call)[0]

    def job(self, by_sample: Instead | None = None) -> Job:
        """The job that executors run."""
        around = self.around
        job = job_of(
            self.prepared,
            self.batch,
            self.options,
            around.inlined,
            around.transformed,
            pairs_of,
            by_sample=by_sample,
            seed=self._seed,
            traced=around.traced,
        )
        self._seed = job.seed  # one seed per call, even if its job is made again
        if self._numbers is not None:
            job = dataclasses.replace(job, numbers=self._numbers)
        if self.use is None or by_sample is not None:
            return job
        return with_expected(job, self.names(job), self.use)

    def whole_job(self) -> Job | None:
        """The job if all samples go one way, as far as is known."""
        verdict = self.use and self.use.verdict()
        return None if verdict and (verdict.forks or verdict.varies) else self.job()

    def names(self, job: Job) -> tuple[str, ...]:
        """The devices on which a new lowering is tried; for a cluster, that of the samples."""
        inlined = self.around.inlined
        if not inlined and on_ray.asked_for(self.options.devices) is not None:
            return (str(job.home),)
        return names_of(job, self.options, inlined)

    def _run_by_paths(self) -> Any:
        """Split the batch by the answers that its samples give, and run each on its own path."""
        forked = self._forked()
        elsewhere = not self.around.inlined and on_ray.asked_for(self.options.devices) is not None
        if elsewhere and forked.parts():
            return forked.by_groups()
        while True:
            call, instead = self._settled(forked)
            try:
                return call._run(instead)
            except WiderError as error:
                self._widen(error)
                forked.widen(error)

    def _widen(self, wider: WiderError) -> None:
        """Let outputs hold a wider sample's, as `torch.stack` does; not in a store, which is made.

        Raises:
            WiderError: There is a store, or samples that have been written to.
        """
        if self.options.out is not None or self.prepared.recording.written_inputs:
            raise wider
        before = self.prepared.recording.program
        self.prepared = widened(self.prepared, wider)
        after = self.prepared.recording.program
        assert (after.outputs, after.output_flags) != (before.outputs, before.output_flags), (
            f"the outputs hold the sample's already, or the call is repeated without end: {wider}"
        )

    def _run_flattened(self) -> Any:
        """Let the samples of this map and of vmaps around it go their ways together."""
        flat = Flattened(self.prepared, self.batch, *self._inside(), self.options)
        outputs, structure = flat.outputs()
        rows = edges.collect(tuple(outputs), {}, 0, None, self.options.call)

        def whole(*row: torch.Tensor) -> pytree.PyTree:
            return pytree.tree_unflatten(list(row), structure)

        return run_map(whole, rows, self.options, None)

    def _run_nested(self) -> Any:
        """Split inner samples by their answers, as a part of the outer recording."""
        try:
            nested = Nested(self.prepared, self.batch, *self._inside(), self.options)
            prepared, instead = nested.whole()
        except Unsplit as error:  # the outer function asks each inner sample
            return self._run_by_sample(str(error))
        return self._part(prepared, self.batch, self.options, None)._run(instead)

    def _inside(self) -> tuple[Callable[[int], Prepared], Run]:
        """Two functions: one records a sample, the other computes a recording for a batch."""
        use, options = self.use, self.options
        assert use is not None
        how = options.randomness, False, options.call

        def run(prepared: Prepared, batch: Batch) -> Sequence[torch.Tensor]:
            return self._part(prepared, batch, options.alone(), None).run_flat()

        return lambda number: Prepared(*record(use.func, self.batch, *how, number)), run

    def _forked(self) -> Forked:
        assert self.use is not None
        return Forked(
            self.prepared, self.batch, self.options, self.use, self._part, self._seeds_for
        )

    def _seeds_for(self, recording: Recording) -> Seeds:
        """The seeds of another recording of this call: those that were drawn are not drawn anew."""
        drawn = None if self._seed is None else (self.prepared.recording, self._seed)
        return seeds_of(recording, False, drawn)

    def draw_by(self, seeds: Seeds, numbers: np.ndarray | None) -> None:
        """Draw by these seeds, and by these numbers of its samples."""
        self._seed, self._numbers = seeds, numbers

    def _part(
        self, prepared: Prepared, batch: Batch, options: Options, use: FirstUse | None
    ) -> Call:
        """A call that computes a part of this one."""
        return Call(prepared, batch, options, self.around, use)

    def _settled(self, forked: Forked) -> tuple[Call, Instead | None]:
        try:
            prepared, batch, use, instead = forked.whole()
        except errors.VariesError as error:
            if isinstance(error, errors.RaggedError) or self.options.strict:
                raise
            return self, self._loop(cause(error, self.options.call))
        call = self._part(prepared, batch, self.options, use)
        if self._seed is not None and not any(isinstance(s, TorchDraws) for s in self._seed):
            call.draw_by(self._seeds_for(prepared.recording), None)
        return call, instead

    def settled(self) -> tuple[Call, Instead | None]:
        """The call to run, and what replaces its replay; None to run the replay."""
        if self.use is None or is_empty(self.batch, self.around, self.prepared.recording):
            return self, None
        verdict = self.use.verdict()
        if verdict.varies:
            return self, self._loop(verdict.varies)
        if verdict.forks or self.prepared.recording.asked:
            return self._settled(self._forked())
        return self, None

    def _run_by_sample(self, why: str) -> Any:
        instead = self._loop(why)
        while True:
            try:
                return self._run(instead)
            except WiderError as error:
                self._widen(error)

    def _loop(self, why: str) -> Instead:
        """The stand-in that runs the function itself, sample by sample.

        Raises:
            VariesError: `strict=True` refuses it.
        """
        options, use = self.options, self.use
        assert use is not None
        if self.prepared.recording.asked:
            if not self.prepared.recording.torchs_own:
                self._seed = None  # none has been drawn
            self.prepared = may_draw(self.prepared, options)
        if options.out is not None:
            self.prepared = prepared_by_code(self.prepared, use.func)
        warn_of_loop(options.call, why, options.strict)

        def instead(how: LoweringOptions) -> Lowered:
            recording = self.prepared.recording
            program, specs = recording.program, [v.spec for v in recording.program.outputs]
            loop = SampleLoop(
                use.func, self.batch, self.prepared.structure, specs, options.randomness,
                recording.random, how.grad or how.transformed, options.call, recording.generators,
                options.remat,
            )  # fmt: skip
            return lowering(program, how, loop)

        return instead

    def _confirm(
        self, job: Job, found: list[torch.Tensor] | Store, by_sample: Instead | None
    ) -> None:
        """Compare the results with the function's own, if it was run for that."""
        if by_sample is None and self.use is not None and self.use.looked and self.around.plain:
            here = str(job.home) in self.names(job)
            names = out_edges.output_names(self.prepared.structure)
            confirm.whole(job, found, names, self.use.expected(), here)


def pairs_of(combine: Callable[..., Any]) -> Callable[..., Any]:
    """A function of two tensors, mapped over many pairs of them in one chunk."""
    call = edges.call_name(combine, 0)
    options = Options(
        0, 0, "error", None, "auto", None, None, None, 0.9, "once", False, False, None, None, False,
        False, call,
    )  # fmt: skip
    memory = Memory(combine, call)

    def pairs(a: torch.Tensor, b: torch.Tensor) -> Any:
        return run_map(combine, edges.collect((a, b), {}, 0, None, call), options, memory)

    return pairs
