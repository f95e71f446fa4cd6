"""A call whose samples have unequal shapes: one map for all of them.

So chunks, lanes, stores, reductions and autograd work as for any map. Results stay in the order of
the samples; rows are computed in the order of their shapes, the largest first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import confirm, ragged, standin
from shardmap.call import outputs as out_edges
from shardmap.call.arguments import HEAD
from shardmap.call.execute import Call, pairs_of, recalled, recorded
from shardmap.call.fingerprint import known_by_code
from shardmap.call.first_use import FirstUse
from shardmap.call.here import locally, refuse_elsewhere
from shardmap.call.into_store import into_store, refuse_store
from shardmap.call.job import job_of
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.ragged import flat, joined
from shardmap.call.routes import rows_of
from shardmap.call.shape_replay import Group, ShapeReplay
from shardmap.call.shapes import ShapesOfCall
from shardmap.call.surroundings import Surroundings
from shardmap.factors import gram
from shardmap.lower.batched import LoweringOptions, slowest
from shardmap.lower.cache import Kept, Lowered, Notes
from shardmap.program.ir import Program, Spec
from shardmap.reduce.reduction import Reduction
from shardmap.run import ray as on_ray
from shardmap.run.base import Job
from shardmap.run.sites import WATCHED_FROM, recorded_bytes
from shardmap.store import Store
from shardmap.store.ragged import PickedColumn
from shardmap.trace.batch import Batch, unflatten_outputs
from shardmap.trace.key_order import in_order_of

ROUND_BYTES = 256 << 20
"""Results of a cluster's workers that are put together to units of a store at a time."""

_learned = Kept(64)
"""Measurements of earlier maps over several shapes, by their programs."""


def clear() -> None:
    """Forget what was learned."""
    _learned.clear()


def after_fork() -> None:
    """Make the lock of this module new."""
    _learned.after_fork()


class ByShape:
    """One call over samples of several shapes.

    Args:
        func: The user's function.
        groups: The samples of each shape: the numbers of the rows, and the batch.
        options: The call's.
        around: What it stands in.
        shapes: What earlier calls have recorded.
        cluster: Whether it is computed by the workers of a cluster.
    """

    def __init__(
        self,
        func: Callable[..., object],
        groups: Sequence[tuple[list[int], Batch]],
        options: Options,
        around: Surroundings,
        shapes: ShapesOfCall,
        cluster: bool = False,
    ):
        self.options = options
        self._alone = dataclasses.replace(
            options, reduce=None, out=None, resume=False, out_dims=0, output_device=None,
            progress=False, remat=False,
        )  # fmt: skip
        self.size = sum(len(rows) for rows, _ in groups)
        found: list[Group] = []
        for rows, batch in groups:
            call = recalled(func, batch, self._alone, around, shapes)
            call = call or recorded(func, batch, self._alone, around, shapes)
            if found:
                call = _in_order_of(call, found[0].call.prepared.structure)
            call, instead = call.settled()
            if call.prepared.recording.written_inputs:
                raise errors.CapturedWriteError(
                    f"{options.call}: the function writes in place to a mapped argument of a call "
                    "with a shardmap.Ragged argument, of which it is given copies; clone the "
                    "argument inside the function"
                )
            job = call.job(instead)
            if options.out is not None and (instead is not None or job.recording.asked):
                job = dataclasses.replace(job, recording=known_by_code(job.recording, func))
            if instead is not None:
                refuse_elsewhere(job, options, False, cluster)
            found.append(Group(rows, call, instead, job))
        shapes.finish()
        structure = found[0].call.prepared.structure
        for group in found:
            own = group.call.prepared.structure
            if own != structure:
                raise errors.OutputError(
                    f"{options.call}: the function returns {structure} for samples of one shape "
                    f"and {own} for those of another; return the same structure for all"
                )
        self.structure = structure
        self.groups = sorted(found, key=lambda group: -recorded_bytes(group.job))
        self._reduced = out_edges.spread_reductions(options.reduce, structure, options.call)
        """Each output's reduction."""
        self._kept = [None if _is_gram(r) else r for r in self._reduced]
        """The same, where outputs that are compared with each other are stacked before."""

    @property
    def unequal(self) -> int | None:
        """The first output whose shape differs by sample; None if all are equal."""
        jobs = [group.job for group in self.groups]
        for k, out in enumerate(jobs[0].outputs):
            if any(job.outputs[k].shape != out.shape for job in jobs):
                return k
        return None

    def refuse_unequal(self, what: str) -> None:
        """Refuse results of unequal shapes where they cannot be had.

        Raises:
            RaggedError: The message names `what`, the output and two of its shapes.
        """
        k = self.unequal
        if k is None:
            return
        shapes = sorted({group.job.outputs[k].shape for group in self.groups})
        raise errors.RaggedError(
            f"{self.options.call}: {what} and output {k} has shape {list(shapes[0])} for some "
            f"samples and {list(shapes[-1])} for others; return results of one shape (a mean over "
            "the unequal dimension, or padded), or leave it away"
        )

    @property
    def folds(self) -> bool:
        """True if results are combined in the order of the samples."""
        return any(r is not None and r.name == "fold" for r in self._kept)

    def run(self, cluster: on_ray.Ray | None) -> object:
        """The results of all samples, in their order, or the store that holds them."""
        options = self.options
        if options.out is not None:
            self.refuse_unequal("out= keeps rows of one shape,")
            job = self.job(scattered=False)
            refuse_store(job, options, False)
            with options.watching():
                compute = None
                if cluster is not None:
                    compute = functools.partial(self._fill, cluster=cluster)
                store = into_store(job, options, self.structure, cluster, compute)
            self._confirm(None, store)
            return store
        if self.unequal is not None:
            if options.out_dims != 0:
                self.refuse_unequal(f"out_dims={options.out_dims!r} is of equal results,")
            if any(r is not None and r.name not in ragged.COMBINED for r in self._reduced):
                self.refuse_unequal(f"reduce={options.reduce!r} takes equal results,")
            return self._by_groups()
        if cluster is not None:
            outputs = flat(self._by_groups(), self._alone)[0]
            results, dims = self._compared(outputs, [0] * len(outputs))
            return unflatten_outputs(results, self.structure, dims, self.size)
        large = recorded_bytes(self.groups[0].job) * self.size >= WATCHED_FROM
        job = self.job(scattered=large and not self.folds)
        with options.watching():
            outputs = locally(job, options, False)
        self._confirm(outputs, None)
        return self.finish(outputs, job)

    def finish(self, outputs: Sequence[torch.Tensor], job: Job) -> object:
        """Assemble the mapped function's result from the outputs of a run."""
        options, placed = self.options, [o.dim for o in job.outputs]
        found, placed = self._compared(outputs, placed)
        dims = out_edges.result_dims(self.structure, options.out_dims, placed, options.call)
        return unflatten_outputs(found, self.structure, dims, self.size)

    def _fill(self, store: Store, cluster: on_ray.Ray) -> None:
        """Fill a store by the workers of a cluster: a few units at a time, shape by shape.

        Raises:
            OptionError: The function draws random numbers.
        """
        options, outputs = self.options, self.groups[0].job.outputs
        if any(group.job.recording.random for group in self.groups):
            raise errors.OptionError(
                f"{options.call}: out=, devices={options.devices!r} and samples of unequal shapes "
                "for which the function draws random numbers; draw them outside and pass them as "
                "an argument, or use devices='auto'"
            )
        header = store.header
        specs = [spec for spec in header.outputs]
        row_bytes = sum(out.sample_bytes for out in outputs)
        several = max(1, ROUND_BYTES // max(1, row_bytes * header.unit))
        missing = list(store.missing())
        for at in range(0, len(missing), several):
            units = missing[at : at + several]
            rows = torch.cat([torch.arange(*header.rows(unit)) for unit in units])
            columns = [torch.empty((len(rows), *s.shape), dtype=s.dtype) for s in specs]
            for group in self.groups:
                inside = torch.isin(torch.tensor(group.rows), rows).nonzero().flatten()
                if not len(inside):
                    continue
                where = torch.searchsorted(rows, torch.tensor(group.rows)[inside])
                job = _part(group.job, inside)
                found = on_ray.run(job, options.chunk_size, cluster, options.budget)
                for column, t in zip(columns, found, strict=True):
                    column.index_copy_(0, where, t.to(device="cpu", dtype=column.dtype))
            start = 0
            for unit in units:
                first, last = header.rows(unit)
                stop = start + last - first
                store.commit(store.write(unit, [column[start:stop] for column in columns]))
                start = stop
        store.finish()

    def _compared(
        self, outputs: Sequence[torch.Tensor], placed: list[int | None]
    ) -> tuple[list[object], list[int | None]]:
        """The outputs with the matrices of inner products in the places of what they compare."""
        found: list[object] = [*outputs]
        placed = list(placed)
        marks = {id(r): r for r in self._reduced if _is_gram(r)}
        for mark in marks.values():
            own = [k for k, r in enumerate(self._reduced) if r is mark]
            parts = [gram.Part(dense=k) for k in own]
            matrix = gram.add_to(None, parts, outputs, self.size)
            for k in own:
                found[k], placed[k] = None, None
            found[own[0]] = matrix
        return found, placed

    def _by_groups(self) -> object:
        """The results, group by group: of unequal shapes, or computed by a cluster's workers."""
        found = []
        for group in self.groups:
            result = group.call.run_as(group.instead)
            found.append(flat(result, self._alone)[0])
        rows = [group.rows for group in self.groups]
        return joined(found, rows, self.structure, self._alone)

    def job(self, scattered: bool) -> Job:
        """All samples as executors take them.

        Args:
            scattered: Whether rows are computed in the order of their shapes; else in their own.
        """
        groups = self.groups
        kept = pytree.tree_unflatten(self._kept, self.structure)
        reduce = None if self.options.reduce is None else kept
        options = dataclasses.replace(self.options, reduce=reduce)
        main = groups[0].call.prepared
        program = main.recording.program
        outputs, flags = list(program.outputs), list(program.output_flags)
        for group in groups[1:]:
            other = group.call.prepared.recording.program
            for k, (var, flag) in enumerate(zip(other.outputs, other.output_flags, strict=True)):
                dtype = torch.promote_types(outputs[k].spec.dtype, var.spec.dtype)
                outputs[k] = outputs[k]._replace(spec=outputs[k].spec._replace(dtype=dtype))
                flags[k] = max(flags[k], flag)
        order = torch.tensor([row for group in groups for row in group.rows])
        rows = (order if scattered else torch.arange(self.size)).to(groups[0].job.home)
        row = program.inputs[0]
        row = row._replace(spec=row.spec._replace(shape=(), stride=(), dtype=torch.int64, offset=0))
        program = program._replace(inputs=(row,), outputs=tuple(outputs), output_flags=tuple(flags))
        recording = dataclasses.replace(
            main.recording, program=program, sample=(), asked=(), random=False, torchs_own=False,
            generators=(), written_inputs=frozenset(),
        )  # fmt: skip
        whole = Prepared(recording, self.structure)
        batch = Batch([rows], pytree.tree_flatten(((0,), {}))[1], ((0, 0),), self.size)
        specs = [v.spec for v in outputs]

        def instead(how: LoweringOptions) -> Lowered:
            return self._lowering(how, program, specs)

        job = job_of(whole, batch, options, False, False, pairs_of, by_sample=instead, seed=(0,))
        parts = sorted(groups, key=lambda group: group.rows[0])
        return dataclasses.replace(
            job,
            places=order if scattered else None,
            bounds=tuple(itertools.accumulate([len(g.rows) for g in groups])) if scattered else (),
            parts=tuple([group.job for group in parts]),
        )

    def _lowering(self, how: LoweringOptions, program: Program, specs: Sequence[Spec]) -> Lowered:
        jobs = [group.job for group in self.groups]
        drafts = [job.lowerings.outline(job.home.type) for job in jobs]
        tiers = slowest(*[draft.tiers for draft in drafts])
        key = "notes", how, *[id(job.recording.program) for job in jobs]
        programs = [job.recording.program for job in jobs]  # what it holds keeps its ids
        _, notes = _learned.made(key, lambda: (programs, Notes()))
        replay = ShapeReplay(self.groups, specs, self.options)
        return standin.lowering(program, how, replay, tiers, recorded_bytes(jobs[0]), notes)

    def _confirm(self, outputs: Sequence[torch.Tensor] | None, store: Store | None) -> None:
        """Compare results with what the function returned, where it was run for that."""
        names = out_edges.output_names(self.structure)
        for group in self.groups:
            use = group.call.use
            if use is None or not use.looked or group.instead is not None:
                continue
            ends = sorted({group.rows[0], group.rows[-1]})
            found = []
            for k, (name, reduction) in enumerate(zip(names, self._kept, strict=True)):
                if store is not None:
                    rows = [store.read(name, row, row + 1)[0] for row in ends]
                elif outputs is None or reduction is not None:
                    rows = [t[k] for t in use.expected()][: len(ends)]
                else:
                    dim = self._dim(k)
                    rows = [outputs[k].select(dim, row) for row in ends]
                found.append(torch.stack(rows))
            job = dataclasses.replace(group.job, samples=len(ends))
            confirm.outputs(job, found, use.expected())

    def _dim(self, k: int) -> int:
        """Position of the sample dimension in output `k`."""
        ndims = [len(o.shape) for o in self.groups[0].job.outputs]
        mapped = [True] * len(ndims)
        dims = out_edges.place_outputs(
            ndims, mapped, self.structure, self.options.out_dims, self.options.call, self._kept
        )
        return dims[k] or 0

    def described(self) -> str:
        """The shapes, how many samples have each, and what one of them takes, in words."""
        lines = [
            f"  {len(group.rows):>6} x {group.shapes}: "
            f"{len(group.job.recording.program.equations)} calls recorded, "
            f"{recorded_bytes(group.job):,} bytes of results on the way of one sample"
            + ("" if group.instead is None else ", samples answer differently")
            for group in self.groups
        ]
        head = (
            f"Samples of {len(lines)} shapes, each a program of its own; the operators, the memory "
            "of a chunk and the time above are those of the largest:"
        )
        return "\n".join([head, *lines])


def _part(job: Job, numbers: torch.Tensor) -> Job:
    """The job of some of its samples."""
    columns = {i: PickedColumn(c, numbers.tolist()) for i, c in job.columns.items()}
    inputs = [
        columns[i].rows_between(0, min(HEAD, len(numbers)))
        if i in columns
        else rows_of(t, numbers.to(t.device))
        for i, t in enumerate(job.inputs)
    ]
    # What the function returned for the last sample is not known of another one.
    lowerings = dataclasses.replace(job.lowerings, expected=())
    return dataclasses.replace(
        job, inputs=inputs, columns=columns, samples=len(numbers), lowerings=lowerings
    )


def _in_order_of(call: Call, structure: pytree.TreeSpec) -> Call:
    """The call with its results in another's order of keys, if they differ in nothing else."""
    prepared, use = call.prepared, call.use
    own = in_order_of((prepared.recording, prepared.structure), structure)
    if own[1] == prepared.structure or use is None:
        return call
    pair = own if own[0].sample else None
    use = FirstUse(
        use.func, use.batch, pair, use.options, use.once, own[0].program, structure=structure
    )
    return Call(Prepared(*own), call.batch, call.options, call.around, use)


def _is_gram(reduction: Reduction | None) -> bool:
    return reduction is not None and reduction.name == "gram"
