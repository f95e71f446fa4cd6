"""Plans as text."""

from __future__ import annotations

import collections
import math
import textwrap
from collections.abc import Mapping, Sequence

from shardmap._torch import OpOverload, schema_of
from shardmap.lower.cache import Lowered
from shardmap.planning.cost import machine
from shardmap.planning.memory import format_bytes
from shardmap.planning.observe import Observation, OpCost
from shardmap.planning.refusal import refusal_of
from shardmap.planning.split import Lane, Split
from shardmap.program.schema import short_name

TIERS = {"rule": "rule", "functorch": "torch.func.vmap", "loop": "loop over the samples"}
"""Name of each tier that serves operators, for text."""
WIDTH, NAME = 120, 44
"""Characters in a line, and in an operator's name."""
MOST = 8
"""Operators that a plan lists when it is printed."""


def layout(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Format rows of cells as text, right-aligned but for the columns in `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join(map(line, rows))


def format_seconds(seconds: float) -> str:
    """Format a time for plans: `1.2 s`, `3.4 ms`."""
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def wrap(text: str) -> str:
    """Wrap sentences to the width of the tables."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def overview(call: str, split: Split) -> str:
    """A table with a row for each device, and their totals."""
    rows = [("device", "rows", "chunk", "chunks", "predicted peak", "budget", "predicted time", "")]
    rows += [_row(lane, split.samples) for lane in split.lanes]
    if split.collected is not None:
        budget = (
            "unknown"
            if split.collected.budget_bytes is None
            else format_bytes(split.collected.budget_bytes)
        )
        mark = "results" if split.collected.fits else "results: OVER BUDGET"
        rows.append(
            (
                split.collected.device,
                "",
                "",
                "",
                format_bytes(split.collected.bytes),
                budget,
                "",
                mark,
            )
        )
    if len(split.lanes) > 1:
        chunks = sum(lane.chunks for lane in split.lanes)
        guess = "" if all(lane.measured for lane in split.lanes) else "~"
        rows.append(
            (
                "all",
                str(split.samples),
                "",
                str(chunks),
                "",
                "",
                guess + format_seconds(split.seconds),
                "",
            )
        )
    refusal = refusal_of(split)
    return "\n".join(
        [
            wrap(f"{call}: {split.samples} samples"),
            layout(rows, left=(0, 7)),
            *([wrap(f"over budget: {refusal}")] if refusal else []),
        ]
    )


def _row(lane: Lane, samples: int) -> tuple[str, ...]:
    unknown = "unknown" if samples else ""  # an empty batch has no budget
    budget = unknown if lane.budget_bytes is None else format_bytes(lane.budget_bytes)
    seconds = format_seconds(lane.seconds) if lane.measured else f"~{format_seconds(lane.seconds)}"
    mark = "" if lane.fits else "OVER BUDGET"
    return (
        lane.name,
        str(lane.rows),
        str(lane.chunk),
        str(lane.chunks),
        format_bytes(lane.peak_bytes),
        budget,
        seconds,
        mark,
    )


def operators(split: Split, low: Lowered, seen: Observation | None, everything: bool) -> str:
    """The operators by cost with the tier that serves each.

    Operators that are computed once for all samples are listed after them.

    Args:
        split: Who computes how much.
        low: The program, lowered for the first lane's device.
        seen: Cost of a chunk there; None for an empty batch.
        everything: True to list every operator; otherwise the most costly and those that only a
            loop serves, the others as one row.
    """
    once = _hoisted(low)
    counted = [f"{_name(op)} x{n}" if n > 1 else _name(op) for op, n in once.items()]
    said = wrap(f"Computed once for all samples: {', '.join(counted) or 'nothing'}.")
    return (
        f"{_costs(split, low, seen, once, everything)}\n\n{said}"
        if seen is not None and seen.costs
        else said
    )


def memory(split: Split) -> str:
    """Paragraphs about the memory that the map needs on each device."""
    devices: dict[str, list[Lane]] = {}
    for lane in split.lanes:
        devices.setdefault(lane.worker or lane.device, []).append(lane)
    return "\n".join(_memory(device, lanes) for device, lanes in devices.items())


def chunk_sizes(split: Split) -> str:
    """Paragraphs about how each device's chunk size was chosen; empty where the user chose it."""
    return "\n".join([_chunk_size(lane) for lane in split.lanes if lane.estimated is not None])


def _chunk_size(lane: Lane) -> str:
    """Sentence about the speed that was measured with each chunk size, or about the estimate."""
    measured = [s for s in lane.speeds if s.chunks > 1]
    if not measured:
        text = (
            f"Chunks on {lane.name}: {lane.estimated} samples by an estimate from operations, "
            "bytes, weights that each chunk reads, and launches; nothing was measured yet."
        )
        return wrap(text + (" The run measures other sizes too." if len(lane.trials) > 1 else ""))
    told = ", ".join(
        f"{s.size} samples {format_seconds(s.sample_seconds)} ({s.chunks} chunks)" for s in measured
    )
    return wrap(
        f"Chunks on {lane.name}: {lane.chunk} samples by measured speed; the estimate was "
        f"{lane.estimated}. Least time per sample in chunks of: {told}."
    )


def _costs(
    split: Split, low: Lowered, seen: Observation, once: Mapping[OpOverload, int], everything: bool
) -> str:
    kind = split.lanes[0].device.partition(":")[0]
    m, samples, chunks = machine(kind), split.samples, sum(lane.chunks for lane in split.lanes)
    seconds = {
        c.name: samples * max(c.flops / m.flops, c.bytes / m.bandwidth)
        + chunks * m.launch_seconds * c.calls
        for c in seen.costs
    }
    around = chunks * m.chunk_seconds
    total = sum(seconds.values()) + around
    tiers, part = low.batched.tiers, {op.name(): n for op, n in once.items()}
    digits = _digits(seen.flops * samples / 1e9)

    def row(name: str, costs: Sequence[OpCost], tier: str, share: float) -> tuple[str, ...]:
        launched, loops = (
            sum(c.calls for c in costs if tiers.get(c.name) != "loop"),
            any(tiers.get(c.name) == "loop" for c in costs),
        )
        calls = (
            "per sample"
            if loops and not launched
            else f"{launched}, and loops"
            if loops
            else str(launched)
        )
        gflop, size = (
            samples * sum(c.flops for c in costs) / 1e9,
            samples * sum(c.bytes for c in costs),
        )
        return (name, calls, _fixed(gflop, digits), format_bytes(size), _percent(share), tier)

    ranked = sorted(seen.costs, key=lambda c: -seconds[c.name])
    kept = (
        ranked
        if everything or len(ranked) <= MOST + 1
        else [c for i, c in enumerate(ranked) if i < MOST or tiers.get(c.name) == "loop"]
    )
    rows: list[tuple[str, ...]] = [
        ("operator", "calls per chunk", "GFLOP", "traffic", "share", "served by")
    ]
    for c in kept:
        served = [TIERS[tiers[c.name]]] if c.name in tiers else []
        served += [f"{part[c.name]} once for all"] if c.name in part else []
        rows.append(
            row(
                _short(c.name.removeprefix("aten::")),
                [c],
                "; ".join(served),
                seconds[c.name] / total,
            )
        )
    rest = [c for c in ranked if c not in kept]
    if rest:
        rows.append(row(f"{len(rest)} more", rest, "", sum(seconds[c.name] for c in rest) / total))
    shown = {c.name for c in seen.costs}
    for op, n in once.items():
        if everything and op.name() not in shown and not _is_view(op):
            rows.append(
                (
                    _short(_name(op)),
                    "",
                    "",
                    "",
                    "",
                    f"once for all samples{f', x{n}' if n > 1 else ''}",
                )
            )
    rows.append(("around each chunk", "", "", "", _percent(around / total), ""))
    rows.append(row("all", seen.costs, "", 1.0))
    where = (
        f" as on {kind}" if len({lane.device.partition(":")[0] for lane in split.lanes}) > 1 else ""
    )
    told = [
        wrap(
            f"Operators by cost, all samples together{where}; shares of the time are a guess from "
            "operations, bytes and calls:"
        ),
        layout(rows, left=(0, 5)),
    ]
    if "loop" in [tiers.get(c.name) for c in kept]:
        told.append(
            wrap(
                "A loop calls its operator for each sample by itself; what that costs the host is "
                "not in the prediction."
            )
        )
    return "\n".join(told)


def _hoisted(low: Lowered) -> dict[OpOverload, int]:
    """Count of recorded calls that are computed once per device, by operator.

    No chunk has a part in these calls.

    A rule may prepare what all samples share (a transposed weight) of a call that it computes in
    each chunk: such a call is not counted.
    """
    equations = low.program.equations
    in_chunks = {call.equation for call in low.batched.chunk}
    numbers = {
        call.equation for call in low.batched.fixed if call.equation < len(equations)
    } - in_chunks
    return dict(collections.Counter(equations[i].op for i in sorted(numbers)))


def _is_view(op: OpOverload) -> bool:
    """True if an operator only returns views and computes nothing."""
    return any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema_of(op).returns
    )


def _memory(device: str, lanes: Sequence[Lane]) -> str:
    memory, samples = lanes[0].memory, max(min(lane.most, lane.rows) for lane in lanes)
    fixed, sample = max(memory.chunk, key=lambda level: level.at(samples))
    each, whatever = memory.scale * sample, memory.scale * fixed
    lines = [
        f"{format_bytes(size)} {what}"
        for size, what in ((each, "per sample"), (whatever, "whatever its size"))
        if size >= 1
    ]
    adds = (
        f"{format_bytes(memory.chunk_bytes(samples))} ({' and '.join(lines)})"
        if lines
        else "nothing to that"
    )
    text = (
        f"Memory on {device}{f' ({len(lanes)} lanes)' if len(lanes) > 1 else ''}: "
        f"{format_bytes(memory.resident_bytes)} stay during the "
        f"whole run; a chunk of {samples} adds {adds}; with a margin at most "
        f"{format_bytes(memory.peak_bytes(samples))}."
    )
    if memory.scale != 1:
        text += (
            f" The first chunks took {memory.scale:.2f} times what their tensors say, and so does "
            "this count."
        )
    return wrap(text)


def _name(op: OpOverload) -> str:
    return short_name(op)


def _short(name: str) -> str:
    """Shorten a long name by leaving out its middle."""
    return name if len(name) <= NAME else f"{name[: NAME - 18]}…{name[-17:]}"


def _digits(largest: float) -> int:
    """Number of decimals that shows three digits of a column's largest value."""
    return max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0


def _fixed(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"{value:,.{digits}f}" if value >= least or not value else f"<{least:.{digits}f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 or not share else "<1%"
