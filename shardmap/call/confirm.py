"""Compare the assembled results of a map with the function's own results for two samples.

The lowering has been tried before; this compares the path that really ran: slices, chunks,
lanes, workers, stores, reductions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from shardmap import errors
from shardmap._threads import default_generator_states, restore_default_generators
from shardmap.call.amplified import Amplified, explains
from shardmap.call.rounding import Rounding
from shardmap.lower.closeness import has_values, thinned
from shardmap.planning.split import split
from shardmap.program.analysis import never_written
from shardmap.run import local, prepare
from shardmap.run.base import Job, Output, unheard
from shardmap.run.lowerings import Samples
from shardmap.run.sites import sites
from shardmap.store import Store


def whole(
    job: Job,
    found: list[torch.Tensor] | Store,
    names: Sequence[str],
    expected: Samples,
    here: bool,
) -> None:
    """Compare all results of a call with the function's own.

    Args:
        job: The call.
        found: Its results, or the store of them.
        names: The outputs' names.
        expected: The function's own results for the first sample, and the last.
        here: True if the call ran on the device of the samples, where reductions are compared too.

    Raises:
        MismatchError: A row, or a reduction, differs.
    """
    if isinstance(found, Store):
        stored(job, found, names, expected)
        return
    outputs(job, found, expected)
    if here:
        reductions(job, expected)


def outputs(job: Job, found: Sequence[torch.Tensor], expected: Samples) -> None:
    """Compare the rows of stacked results.

    Args:
        job: The call.
        found: Its results.
        expected: The function's own results for the first sample, and the last.

    Raises:
        MismatchError: A row differs.
    """
    rows = _rows(job, expected)
    compared = _compared(job) if rows else set()
    rounding, moved = _rounding(job, expected), Amplified(job)
    for row, sample in rows:
        for k, (out, t, wanted) in enumerate(zip(job.outputs, found, sample, strict=True)):
            if out.reduction is None and k in compared and has_values(t) and has_values(wanted):
                got = t if out.dim is None else t.select(out.dim, row)
                _refuse_other(job, rounding, k, row, wanted, got, moved)


def stored(job: Job, store: Store, names: Sequence[str], expected: Samples) -> None:
    """Compare rows that are read back from a store.

    Args:
        job: The call.
        store: The store of its results.
        names: The outputs' names there.
        expected: The function's own results for the first sample, and the last.

    Raises:
        MismatchError: A row differs.
    """
    rows = _rows(job, expected)
    compared = _compared(job) if rows else set()
    rounding, moved = _rounding(job, expected), Amplified(job)
    for row, sample in rows:
        for k, (name, wanted) in enumerate(zip(names, sample, strict=True)):
            if k in compared and has_values(wanted):
                got = store.read(name, row, row + 1)[0]
                _refuse_other(job, rounding, k, row, wanted, got, moved)


def reductions(job: Job, expected: Samples) -> None:
    """Reduce two samples in two chunks, as all are reduced, and compare with their own results.

    Args:
        job: The call.
        expected: The function's own results for the first sample, and the last.

    Raises:
        MismatchError: The reduction of the two is not that of the function's own results.
    """
    reduced = [k for k, out in enumerate(job.outputs) if out.reduction is not None]
    if not reduced or len(expected) < 2 or job.recording.random or job.grad:
        return
    if job.recording.written_inputs:
        return
    # Without the `finish` of a fold: it is user-defined, and runs once.
    unfinished = tuple(
        [
            dataclasses.replace(o, reduction=dataclasses.replace(o.reduction, finish=None))
            if o.reduction is not None
            else o
            for o in job.outputs
        ]
    )
    pair = dataclasses.replace(
        job,
        outputs=unfinished,
        inputs=prepare.samples_at_the_ends(job, 2),
        samples=2,
        columns={},
        offset=0,
        numbers=None,
    )
    on, name = prepare.Devices(pair), str(job.home)
    states = default_generator_states(job.home)
    with unheard(), torch.no_grad():
        cut = split(2, sites(pair, on, (name,), lambda _: None, False, False), 1, False, None)
        found = local.run(pair, cut, on)
    restore_default_generators(states)
    compared, rounding, moved = _compared(job), _rounding(job, expected), Amplified(job)
    for k in reduced:
        wanted = _reduced(job.outputs[k], expected[0][k], expected[1][k])
        if k in compared and has_values(found[k]) and has_values(wanted):
            _refuse_other(job, rounding, k, None, wanted, found[k], moved)


def _reduced(out: Output, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The reduction of two samples' results, computed without the map."""
    reduction = out.reduction
    assert reduction is not None
    first, last = first.detach(), last.detach()
    if reduction.name in ("max", "min"):
        return (torch.maximum if reduction.name == "max" else torch.minimum)(first, last)
    if reduction.name in ("sum", "mean"):
        total = torch.stack([first, last]).sum(0)
        return (total / 2).to(out.dtype) if reduction.name == "mean" else total
    assert reduction.combine is not None
    return reduction.combine(first[None], last[None])[0]


def _rows(job: Job, expected: Samples) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
    """The numbers of the samples that the function was run on, each with its own results."""
    if job.recording.random:
        return []
    return list(zip((0, job.samples - 1), expected, strict=False))


def _compared(job: Job) -> set[int]:
    """Positions of the outputs that must equal the function's own."""
    program = job.recording.program
    empty = never_written(program)
    low = prepare.tried(job, job.home, several=job.samples > 1)
    loose = () if low is None else low.loose
    return {k for k, var in enumerate(program.outputs) if var.group not in empty and k not in loose}


def _rounding(job: Job, expected: Samples) -> Rounding:
    recording = job.recording
    ends = prepare.samples_at_the_ends(job, 1)
    own = [t for sample in expected for t in sample]
    return Rounding(recording.program, ends, recording.captured, own)


def _refuse_other(
    job: Job,
    rounding: Rounding,
    k: int,
    row: int | None,
    wanted: torch.Tensor,
    got: torch.Tensor,
    moved: Amplified,
) -> None:
    same = got.shape == wanted.shape and (
        rounding.explains(thinned(wanted), thinned(got).to(wanted.device))
        or explains(_moved(job, moved, k, row), wanted, got)
    )
    if not same:
        what = "the reduction of two samples" if row is None else f"sample {row}"
        raise errors.MismatchError(
            f"{job.call}: output {k} of the map is not what the function returned for {what}, "
            "although "
            "its lowering was right when it was tried; use chunk_size=None on one device, or the "
            "plain "
            "loop, and report the function"
        )


def _moved(job: Job, moved: Amplified, k: int, row: int | None) -> list[torch.Tensor]:
    """An output from operands that are rounded otherwise, several times."""
    if row is not None:
        return [rows[0 if row == 0 else -1][k] for rows in moved.results()]
    return [_reduced(job.outputs[k], rows[0][k], rows[-1][k]) for rows in moved.results()]
