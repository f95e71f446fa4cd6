"""A call whose samples have unequal shapes: one map for all of them.

Samples of one shape have a recording, a lowering and inputs of their own. What executors take for
one program stands for all of these: its samples are numbers of rows, and each chunk's rows are
computed shape by shape and put back to where they belong. So chunks, lanes, stores, reductions and
autograd work as for any map. Results stay in the order of the samples; rows are computed in the
order of their shapes, the largest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import confirm, ragged, standin
from shardmap.call import outputs as out_edges
from shardmap.call.execute import (
    Call,
    into_store,
    locally,
    pairs_of,
    recalled,
    recorded,
    refuse_elsewhere,
    refuse_store,
    run_map,
)
from shardmap.call.forked import Instead
from shardmap.call.job import job_of, names_of, split_of
from shardmap.call.memo import Memory, Prepared
from shardmap.call.options import Options
from shardmap.call.planned import Plan
from shardmap.call.ragged import flat, joined
from shardmap.call.shapes import ShapesOfCall
from shardmap.call.standin import StandIn
from shardmap.call.surroundings import Surroundings, surroundings
from shardmap.factors import gram
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Kept, Lowered, Notes
from shardmap.program.ir import Program, Spec
from shardmap.reduce.reduction import Reduction
from shardmap.rules.philox import Seeds
from shardmap.run import prepare
from shardmap.run import ray as on_ray
from shardmap.run.base import Job
from shardmap.run.prepare import there
from shardmap.run.sites import WATCHED_FROM, recorded_bytes
from shardmap.store import Store
from shardmap.trace.batch import Batch, unflatten_outputs
from shardmap.trace.traced import is_traced

_learned = Kept(64)
"""What the planner has learned of maps over several shapes, by their programs."""


def clear() -> None:
    """Forget what was learned."""
    _learned.clear()


def after_fork() -> None:
    """Make the lock of this module new."""
    _learned.after_fork()


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one shape."""

    rows: list[int]
    """Their numbers among all, ascending."""
    call: Call
    """The map over them."""
    instead: Instead | None
    """What runs in the place of a replay."""
    job: Job

    @property
    def shapes(self) -> str:
        """Those of a sample's mapped arguments, in words."""
        shapes = [list(v.spec.shape) for v in self.job.recording.program.inputs]
        return " and ".join(map(str, shapes))


class ShapeReplay(StandIn):
    """Computes a chunk's rows shape by shape, in the form of a replay (`codegen.Replay`).

    Args:
        groups: The samples of each shape.
        specs: The outputs' metadata.
        budget: What the map may add on a device.
    """

    source = "a program for each shape"

    def __init__(self, groups: Sequence[Group], specs: Sequence[Spec], options: Options):
        self.specs = specs
        self.jobs = [group.job for group in groups]
        self.grad = torch.is_grad_enabled()
        self._on = [prepare.Devices(job, options.budget.on) for job in self.jobs]
        size = sum(len(group.rows) for group in groups)
        self.of_row = torch.empty(size, dtype=torch.int64)
        """The number of each row's shape: `[N]`."""
        self.place = torch.empty(size, dtype=torch.int64)
        """Its number among the samples of that shape: `[N]`."""
        for number, group in enumerate(groups):
            rows = torch.tensor(group.rows)
            self.of_row[rows] = number
            self.place[rows] = torch.arange(len(rows))
        self.largest = torch.tensor(groups[0].rows[:3])
        """Rows that show what a chunk costs at most."""

    def chunk(
        self,
        size: int,
        start: int,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one chunk, `[size, *shape]` each; `inputs` is the numbers of its rows."""
        order, parts = [], []
        for at, found in self._groups(device, inputs[0]):
            order.append(at)
            parts.append(found)
        if len(parts) == 1:
            return parts[0]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        where = torch.cat(order)
        if torch.equal(where, torch.arange(len(where))):
            return tuple(columns)
        back = where.argsort().to(device)
        return tuple([column.index_select(0, back) for column in columns])

    def chunk_into(
        self,
        size: int,
        start: int,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
        slices: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """As `chunk`, written into memory that is there."""
        for at, found in self._groups(device, inputs[0]):
            for t, where in zip(found, slices, strict=True):
                where.index_copy_(0, at.to(where.device), t.to(where.device))
        return tuple(slices)

    def marked(self, slices: bool) -> Any:
        """`chunk`, or `chunk_into`, of samples of the largest shape."""
        run = super().marked(slices)

        def watched(*arguments: Any) -> tuple[torch.Tensor, ...]:
            given = list(arguments)
            rows = given[standin.INPUTS][0]
            largest = self.largest.repeat(-(-len(rows) // len(self.largest)))[: len(rows)]
            given[standin.INPUTS] = [largest]
            return run(*given)

        return watched

    def _groups(
        self, device: torch.device, rows: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The samples of each shape in a chunk, by their places in it, and their outputs."""
        rows = rows.cpu()
        of_row = self.of_row[rows]
        for number in of_row.unique().tolist():
            at = (of_row == number).nonzero().flatten()
            places = self.place[rows[at]]
            first, count = int(places[0]), len(places)
            if torch.equal(places, torch.arange(first, first + count)):
                yield at, self._rows(number, device, first, first + count)
                continue
            singly = [self._rows(number, device, p, p + 1) for p in places.tolist()]
            yield at, tuple([torch.cat(column) for column in zip(*singly, strict=True)])

    def _rows(
        self, number: int, device: torch.device, start: int, stop: int
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of consecutive samples of one shape."""
        job, size = self.jobs[number], stop - start
        with torch.set_grad_enabled(job.grad and self.grad):
            ready = self._on[number].on(str(device), job.samples > 1, slices=False)
            inputs = [there(t, device) for t in job.read(start, stop)]
            outs = ready.low.replay.chunk(
                size, start, device, job.seed, job.recording.scalars, ready.fixed, inputs
            )
        wide = [
            t if v.mapped else t.expand(size, *t.shape)
            for t, v in zip(outs, ready.low.batched.outputs, strict=True)
        ]
        return tuple([t.to(spec.dtype) for t, spec in zip(wide, self.specs, strict=True)])


class ByShape:
    """One call over samples of several shapes.

    Args:
        func: The user's function.
        groups: The samples of each shape: the numbers of the rows, and the batch.
        options: The call's.
        around: What it stands in.
        shapes: What earlier calls have recorded.
    """

    def __init__(
        self,
        func: Any,
        groups: Sequence[tuple[list[int], Batch]],
        options: Options,
        around: Surroundings,
        shapes: ShapesOfCall,
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
            call, instead = call.settled()
            if call.prepared.recording.written_inputs:
                raise errors.CapturedWriteError(
                    f"{options.call}: the function writes in place to a mapped argument of a call "
                    "with a shardmap.Ragged argument, of which it is given copies; clone the "
                    "argument inside the function"
                )
            job = call.job(instead)
            if instead is not None:
                refuse_elsewhere(job, options, False, False)
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

    def run(self, cluster: on_ray.Ray | None) -> Any:
        """The results of all samples, in their order, or the store that holds them."""
        options = self.options
        if options.out is not None:
            self.refuse_unequal("out= keeps rows of one shape,")
            job = self.job(scattered=False)
            refuse_store(job, options, False)
            with options.watching():
                store = into_store(job, options, self.structure, cluster)
            self._confirm(None, store)
            return store
        if self.unequal is not None:
            if options.out_dims != 0:
                self.refuse_unequal(f"out_dims={options.out_dims!r} is of equal results,")
            if any(r is not None and r.name not in ragged.COMBINED for r in self._reduced):
                self.refuse_unequal(f"reduce={options.reduce!r} takes equal results,")
            return self._unequal()
        large = recorded_bytes(self.groups[0].job) * self.size >= WATCHED_FROM
        job = self.job(scattered=large and not self.folds)
        with options.watching():
            outputs = locally(job, options, False)
        self._confirm(outputs, None)
        return self.finish(outputs, job)

    def finish(self, outputs: Sequence[torch.Tensor], job: Job) -> Any:
        """What the mapped function returns, from the outputs of a run."""
        options, placed = self.options, [o.dim for o in job.outputs]
        found, placed = self._compared(outputs, placed)
        dims = out_edges.result_dims(self.structure, options.out_dims, placed, options.call)
        return unflatten_outputs(found, self.structure, dims, self.size)

    def _compared(
        self, outputs: Sequence[Any], placed: list[int | None]
    ) -> tuple[list[Any], list[int | None]]:
        """The outputs with the matrices of inner products in the places of what they compare."""
        outputs, placed = list(outputs), list(placed)
        marks = {id(r): r for r in self._reduced if _is_gram(r)}
        for mark in marks.values():
            own = [k for k, r in enumerate(self._reduced) if r is mark]
            parts = [gram.Part(dense=k) for k in own]
            matrix = gram.add_to(None, parts, outputs, self.size)
            for k in own:
                outputs[k], placed[k] = None, None
            outputs[own[0]] = matrix
        return outputs, placed

    def _unequal(self) -> Any:
        """Results of unequal shapes: group by group."""
        found = []
        for group in self.groups:
            result = group.call.run_as(group.instead)
            found.append(flat(result, self._alone)[0])
        rows = [group.rows for group in self.groups]
        return joined(found, rows, self.structure, self.options)

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
            parts=tuple([group.job for group in parts]),
        )

    def _lowering(self, how: LoweringOptions, program: Program, specs: Sequence[Spec]) -> Lowered:
        jobs = [group.job for group in self.groups]
        drafts = [job.lowerings.outline(job.home.type) for job in jobs]
        tiers = {name: tier for draft in drafts for name, tier in draft.tiers.items()}
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
        """Where the dimension of samples is in a result."""
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
        return "\n".join([f"Samples of {len(lines)} shapes, each a program of its own:", *lines])


def _is_gram(reduction: Reduction | None) -> bool:
    return reduction is not None and reduction.name == "gram"


def run_by_shape(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    memory: Memory | None,
) -> Any:
    """One call of a mapped function over samples of unequal shapes."""
    around = surroundings()
    cluster = None if around.inlined else on_ray.asked_for(options.devices)
    alone = around.plain and not is_traced(pytree.tree_leaves((args, kwargs)))
    stored = cluster is not None and options.out is not None
    if alone and (stored or (cluster is None and ragged.is_whole(options))):
        try:
            return _whole(func, args, kwargs, options, memory, cluster)
        except errors.VariesError as error:
            if options.out is not None or isinstance(error, errors.RaggedError):
                raise
    shapes = ShapesOfCall(func, memory, options.randomness, options.call)
    result = ragged.run(lambda batch: run_map(func, batch, options, shapes), args, kwargs, options)
    shapes.finish()
    return result


def _whole(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    memory: Memory | None,
    cluster: on_ray.Ray | None,
) -> Any:
    around, found = surroundings(), ragged.grouped(args, kwargs, options)
    shapes = ShapesOfCall(func, memory, options.randomness, options.call)
    if options.out is not None:
        shapes.record_all()  # what is written cannot be taken back
    try:
        return ByShape(func, found, options, around, shapes).run(cluster)
    except errors.StaleRecordingError:
        shapes.record_all()
        return ByShape(func, found, options, around, shapes).run(cluster)


def planned_by_shape(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    finished: Callable[[Any], Any],
) -> Plan:
    """The plan of a call over samples of unequal shapes.

    Raises:
        OptionError: The call is for a cluster.
        RaggedError: Results have unequal shapes.
    """
    call = options.call
    if on_ray.asked_for(options.devices) is not None:
        raise errors.OptionError(
            f"{call}: a plan for devices={options.devices!r} of samples of unequal shapes, which "
            "are handed to the cluster shape by shape; plan it for this machine, devices='auto', "
            "or call the mapped function"
        )
    shapes = ShapesOfCall(func, None, options.randomness, call)
    shapes.record_all()
    found = ByShape(func, ragged.grouped(args, kwargs, options), options, surroundings(), shapes)
    found.refuse_unequal("a plan is of equal results,")
    job = found.job(scattered=not found.folds)
    on = prepare.Devices(job, options.budget.on)
    cut = split_of(job, on, names_of(job, options, False), options, False, always=True)

    def finish(outputs: list[torch.Tensor]) -> Any:
        return finished(found.finish(outputs, job))

    return Plan(job, cut, on, options, finish, [], shapes=found.described())
