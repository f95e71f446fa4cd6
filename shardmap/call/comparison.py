"""`shardmap.compare`: the plain loop on some samples, compared with the map's rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import outputs as out_edges
from shardmap.call import ragged
from shardmap.call.execute import Call, run_map
from shardmap.call.first_use import FirstUse, Pair, consumed
from shardmap.call.memo import Prepared
from shardmap.call.options import Options
from shardmap.call.reachable import reachable
from shardmap.call.rounding import Rounding
from shardmap.call.standin import ways_of
from shardmap.call.surroundings import surroundings
from shardmap.call.unequal import run_by_shape
from shardmap.lower import apart
from shardmap.lower.batched import slowest
from shardmap.lower.cache import Lowered
from shardmap.lower.closeness import largest
from shardmap.lower.trial import Trial
from shardmap.run import prepare
from shardmap.run.base import Job
from shardmap.trace.batch import Batch, flatten_outputs
from shardmap.trace.key_order import positions
from shardmap.trace.record import record, rows_of, sample_of
from shardmap.trace.recording import Recording


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """Difference between one output of the map and the loop's."""

    name: str
    largest: float
    """The largest absolute difference over the compared samples; infinite where one is not finite
    and the other is, or where shapes or dtypes differ."""
    magnitude: float
    """The largest finite entry of the loop's results."""
    sample: int
    """The sample in which they differ most."""
    agrees: bool
    """True if the difference is one of rounding."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of some samples of a map with the plain loop. `print` it.

    Attributes:
        call: The user's call.
        samples: The numbers of the samples that were compared.
        outputs: One entry per output.
        parted: Text about the first operator where map and loop differ; None if they agree.
        tiers: For each operator, the slowest tier that serves a call of it: "rule", "functorch" or
            "loop".
        ways: Text about which samples take which path, if samples take several; else empty.
        parameter_share: The part, among parameters that the function reads and that require grad,
            (0 to 1) whose gradient is among the outputs and is not zero in every compared sample;
            None if no output has the shape of a parameter.
    """

    call: str
    samples: tuple[int, ...]
    outputs: tuple[OutputDifference, ...]
    parted: str | None
    tiers: Mapping[str, str]
    parameter_share: float | None
    ways: str = ""

    @property
    def agrees(self) -> bool:
        """True if every output of every compared sample is the loop's, up to rounding."""
        return all(out.agrees for out in self.outputs)

    def __str__(self) -> str:
        word = "agrees with" if self.agrees else "DIFFERS from"
        lines = [f"{self.call}: the map {word} the loop on {len(self.samples)} samples"]
        width = max([len(out.name) for out in self.outputs], default=0)
        for out in self.outputs:
            mark = "" if out.agrees else "  <- differs"
            lines.append(
                f"  {out.name:<{width}}  largest difference {out.largest:.2g} of "
                f"{out.magnitude:.2g} "
                f"(sample {out.sample}){mark}"
            )
        if self.parted is not None:
            lines.append(f"  they part at {self.parted}")
        loops = sorted(name for name, tier in self.tiers.items() if tier == "loop")
        counted = {tier: list(self.tiers.values()).count(tier) for tier in set(self.tiers.values())}
        served = ", ".join(f"{count} by {tier}" for tier, count in sorted(counted.items()))
        lines.append(
            f"  operators: {served or 'none'}" + (f" ({', '.join(loops)})" if loops else "")
        )
        if self.ways:
            lines.append("  " + self.ways.replace("\n", "\n  "))
        if self.parameter_share is not None:
            lines.append(f"  parameters with a gradient: {self.parameter_share:.1%}")
        return "\n".join(lines)


def compare(
    func: Callable[..., Any], batch: Batch, options: Options, samples: int | Sequence[int]
) -> Comparison:
    """Compare the map with the loop.

    Args:
        func: The function of one sample.
        batch: The call's arguments.
        options: The call's options.
        samples: Number of random samples, or the samples' numbers.

    Raises:
        OptionError: The function draws random numbers, or there are no samples to compare.
        ShardmapError: Any error of the map itself.
    """
    numbers = _chosen(batch.size, samples, options.call)
    pair = _recorded(func, batch, options)
    structure = pair[1]
    own = [_run_on(func, batch, number, structure, options.call) for number in numbers]
    result = run_map(func, _own(batch, pair[0]), options, None)
    found = _columns(result, structure, options)
    job, low = _lowered(func, batch, pair, options)
    names, dims = out_edges.output_names(structure), [output.dim for output in job.outputs]
    rows = [
        [_row(column, d, number) for column, d in zip(found, dims, strict=True)]
        for number in numbers
    ]
    rounding = [
        _rounding(pair, batch, number, results)
        for number, results in zip(numbers, own, strict=True)
    ]
    outputs = tuple(
        [_difference(name, k, numbers, own, rows, rounding) for k, name in enumerate(names)]
    )
    worst = next((out for out in outputs if not out.agrees), None)
    parted = None
    if worst is not None and job.lowerings.instead is None:
        parted = _parted(job, low, worst.sample)
    share = _share(func, batch, found, numbers, dims)
    tiers, ways = dict(low.batched.tiers), ways_of(low)
    return Comparison(options.call, tuple(numbers), outputs, parted, tiers, share, ways)


def compare_by_shape(
    func: Callable[..., Any],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
    samples: int | Sequence[int],
) -> Comparison:
    """Compare a map over samples of unequal shapes with the loop.

    Args:
        func: The function of one sample.
        args: The call's arguments, some of them `Ragged`.
        kwargs: Its keyword arguments, likewise.
        options: The call's options.
        samples: Number of random samples, or the samples' numbers.

    Raises:
        OptionError: The function draws random numbers, or there are no samples to compare.
        ShardmapError: Any error of the map itself.
    """
    groups = ragged.grouped(args, kwargs, options)
    numbers = _chosen(sum(len(rows) for rows, _ in groups), samples, options.call)
    pairs = [_recorded(func, batch, options) for _, batch in groups]
    structure = pairs[0][1]
    place = {row: (g, k) for g, (rows, _) in enumerate(groups) for k, row in enumerate(rows)}
    own = []
    for number in numbers:
        group, k = place[number]
        own.append(_run_on(func, groups[group][1], k, structure, options.call))
    asked = replace(options, ragged="error")  # unequal results come back as a `Ragged`
    found = [t for t in pytree.tree_leaves(run_by_shape(func, args, kwargs, asked, None))
             if t is not None]  # fmt: skip
    rows = [[t[number] for t in found] for number in numbers]
    names = out_edges.output_names(structure)
    rounding = []
    for number, results in zip(numbers, own, strict=True):
        group, k = place[number]
        rounding.append(_rounding(pairs[group], groups[group][1], k, results))
    outputs = tuple(
        [_difference(name, k, numbers, own, rows, rounding) for k, name in enumerate(names)]
    )
    worst = next((out for out in outputs if not out.agrees), None)
    parted, tiers, ways = None, dict[str, str](), []
    for g, ((_, batch), pair) in enumerate(zip(groups, pairs, strict=True)):
        job, low = _lowered(func, batch, pair, options)
        tiers = slowest(tiers, low.batched.tiers)
        ways += [ways_of(low)] if ways_of(low) else []
        if worst is not None and place[worst.sample][0] == g and job.lowerings.instead is None:
            parted = _parted(job, low, place[worst.sample][1])
    share = None
    if all(isinstance(t, torch.Tensor) for t in found):
        share = _share(func, groups[0][1], found, numbers, [0] * len(found))
    return Comparison(options.call, tuple(numbers), outputs, parted, tiers, share, "\n".join(ways))


def _recorded(func: Callable[..., Any], batch: Batch, options: Options) -> Pair:
    """The recording of the first sample, which must not draw."""
    pair = record(func, batch, options.randomness, False, options.call)
    if pair[0].random:
        raise errors.OptionError(
            f"{options.call}: the function draws random numbers, and the loop draws others than "
            "the map; switch them off (model.eval()) to compare the rest"
        )
    return pair


def _own(batch: Batch, recording: Recording) -> Batch:
    """The batch with a copy of each argument that samples may write to: they are called again."""
    leaves, every = list(batch.leaves), range(len(batch.mapped))
    # Samples that answer questions differently may write to others than the first does.
    for position in every if recording.asked else recording.written_inputs:
        i = batch.mapped[position][0]
        t = leaves[i]
        leaves[i] = t.detach().clone().requires_grad_(t.requires_grad) if t.is_leaf else t.clone()
    return replace(batch, leaves=leaves)


Column = torch.Tensor | list[torch.Tensor]
"""One output of all samples: a list where `ragged="list"` is asked for and shapes are unequal."""


def _columns(result: object, structure: pytree.TreeSpec, options: Options) -> Sequence[Column]:
    """The outputs of a map, of the structure of one sample's."""
    found, own = flatten_outputs(result, options.call)
    listed = options.ragged == "list" and own != structure
    return structure.flatten_up_to(result) if listed else found


def _row(column: Column, dim: int | None, number: int) -> torch.Tensor:
    if isinstance(column, list):
        return column[number]
    return column if dim is None else column.select(dim, number)


def _rounding(pair: Pair, batch: Batch, number: int, results: Sequence[torch.Tensor]) -> Rounding:
    """What one sample's results are compared by."""
    recording = pair[0]
    rows = [row for row, _ in rows_of(batch, number, False)]
    return Rounding(recording.program, rows, recording.captured, results)


def _lowered(
    func: Callable[..., Any], batch: Batch, pair: Pair, options: Options
) -> tuple[Job, Lowered]:
    """The job of some samples of equal shapes, and its lowering."""
    use = FirstUse(func, batch, pair, options, False)
    call = Call(Prepared(*pair), batch, options, surroundings(), use)
    call, instead = call.settled()
    job = call.job(instead)
    return job, prepare.Devices(job).on(str(job.home), job.samples > 1).low


def _chosen(size: int, samples: int | Sequence[int], call: str) -> list[int]:
    if not size:
        raise errors.OptionError(f"{call}: compare: the batch is empty; pass at least one sample")
    if isinstance(samples, int):
        if isinstance(samples, bool) or samples < 1:
            raise errors.OptionError(
                f"{call}: compare: samples={samples!r}; pass a positive number of samples, or "
                "their "
                "numbers"
            )
        picked = random.Random(0).sample(range(size), min(samples, size))
        return sorted(picked)
    numbers = [int(n) for n in samples]
    wrong = [n for n in numbers if not 0 <= n < size]
    if wrong or not numbers:
        raise errors.OptionError(
            f"{call}: compare: samples={samples!r} of a batch of {size}; name samples from 0 "
            "to "
            f"{size - 1}"
        )
    return numbers


def _run_on(
    func: Callable[..., Any], batch: Batch, number: int, wanted: pytree.TreeSpec, call: str
) -> list[torch.Tensor]:
    """Call the function on a copy of one sample, and return its outputs in the order wanted."""
    rows = [sample_of(row.detach(), grad) for row, grad in rows_of(batch, number, False)]
    args, kwargs = batch.unflatten(rows)
    try:
        result = func(*args, **kwargs)
    except RuntimeError as error:
        if consumed(error):
            raise errors.OptionError(
                f"{call}: compare runs the function several times, and it frees the graph that it "
                "differentiates; pass retain_graph=True to torch.autograd.grad"
            ) from error
        raise
    leaves, structure = flatten_outputs(result, call)
    order = positions(structure, wanted) or range(len(leaves))
    return [leaves[k].detach() for k in order]


def _difference(
    name: str,
    k: int,
    numbers: Sequence[int],
    own: Sequence[Sequence[torch.Tensor]],
    rows: Sequence[Sequence[torch.Tensor]],
    rounding: Sequence[Rounding],
) -> OutputDifference:
    worst, at, agrees = -1.0, numbers[0], True
    for number, wanted, got, by in zip(numbers, own, rows, rounding, strict=True):
        a, b = wanted[k], got[k].detach().to(wanted[k].device)
        difference = _largest_difference(a, b)
        if difference > worst:
            worst, at = difference, number
        same = a.shape == b.shape and a.dtype == b.dtype
        agrees = agrees and same and by.explains(a, b)
    magnitude = max(largest(wanted[k]) for wanted in own)
    return OutputDifference(name, worst, magnitude, at, agrees)


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    equal = (x == y) | (x.isnan() & y.isnan())
    gap = torch.where(equal, torch.zeros_like(x), x - y).abs()
    return float(torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf")).max())


def _parted(job: Job, low: Lowered, sample: int) -> str:
    """Text about the first operator whose batched result differs from the sample's own."""
    if low.batched.factored or low.batched.summed:
        return "results from factors, which stand for several operators"
    shifted = replace(
        job,
        inputs=[torch.stack([t[sample], t[sample]]) for t in job.inputs],
        samples=2,
    )
    trial = Trial(
        job.home,
        job.seed,
        2,
        tuple([t.detach() for t in prepare.samples_at_the_ends(shifted, 2)]),
        tuple([t.detach() for t in job.recording.captured]),
        job.recording.literals,
        job.recording.scalars,
        job.recording.written_inputs,
        (),
        job.recording.random,
    )
    with torch.no_grad():
        found = apart.compare(low.program, low.batched, trial)
    if not found.wrong:
        own = [torch.stack(column) for column in zip(*found.samples, strict=True)]
        pairs = zip(own, found.outputs, low.batched.outputs, strict=True)
        results = [t for row in found.samples for t in row]
        by = Rounding(low.program, trial.inputs, trial.captured, results)
        if all(by.explains(a if v.mapped else a[0], b) for a, b, v in pairs):
            return (
                "the size of a chunk: of two samples alone the map gives what the loop gives; a "
                "rule, "
                "or a kernel, is wrong for more"
            )
        return (
            "no single operator: each gives what the recorded call gives, and rounding grows along "
            "the program"
        )
    return found.wrong[min(found.wrong)]


def _share(
    func: Any,
    batch: Batch,
    found: Sequence[Column],
    numbers: Sequence[int],
    dims: Sequence[int | None],
) -> float | None:
    """The part of the parameters with a gradient among the outputs that is not zero."""
    others = [leaf for i, leaf in enumerate(batch.leaves) if i not in dict(batch.mapped)]
    parameters = {
        id(p): p
        for p in reachable(func, *others)
        if isinstance(p, nn.Parameter) and p.requires_grad
    }
    left = list(parameters.values())
    if not left:
        return None
    total, covered, matched = sum(p.numel() for p in left), 0, False
    index = torch.tensor(list(numbers))
    for t, d in zip(found, dims, strict=True):
        if d is None or isinstance(t, list) or t.is_nested:
            continue
        rows = t.detach().movedim(d, 0)
        parameter = next((p for p in left if p.shape == rows.shape[1:]), None)
        if parameter is None:
            continue
        matched = True
        left = [p for p in left if p is not parameter]
        taken = rows[index.to(rows.device)]
        covered += int((taken != 0).any(0).sum())
    return covered / total if matched else None
