"""Plans as text."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from shardmap.engine import Lowered
from shardmap.planning.cost import machine
from shardmap.planning.memory import format_bytes
from shardmap.planning.observe import Observation, OpCost
from shardmap.planning.split import Lane, Split

TIERS = {"rule": "rule", "functorch": "torch.func.vmap", "loop": "loop over the samples"}
"""What serves an operator, as it is called in text."""


def layout(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells as text, right-aligned but for the columns in `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join(map(line, rows))


def format_seconds(seconds: float) -> str:
    """`1.2 s`, `3.4 ms`, as plans write it."""
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def overview(call: str, split: Split) -> str:
    """A table with a row for each device, and what they come to together."""
    rows = [("device", "rows", "chunk", "chunks", "predicted peak", "budget", "predicted time", "")]
    rows += [_row(lane) for lane in split.lanes]
    if split.collected is not None:
        budget = "unknown" if split.collected.budget_bytes is None else format_bytes(split.collected.budget_bytes)
        mark = "results" if split.collected.fits else "results: OVER BUDGET"
        rows.append((split.collected.device, "", "", "", format_bytes(split.collected.bytes), budget, "", mark))
    if len(split.lanes) > 1:
        chunks = sum(lane.chunks for lane in split.lanes)
        guess = "" if all(lane.measured for lane in split.lanes) else "~"
        rows.append(("all", str(split.samples), "", str(chunks), "", "", guess + format_seconds(split.seconds), ""))
    title = f"{call}: {split.samples} samples"
    refusal = split.refusal()
    return "\n".join([title, layout(rows, left=(0, 7)), *([f"over budget: {refusal}"] if refusal else [])])


def _row(lane: Lane) -> tuple[str, ...]:
    budget = "unknown" if lane.budget_bytes is None else format_bytes(lane.budget_bytes)
    seconds = format_seconds(lane.seconds) if lane.measured else f"~{format_seconds(lane.seconds)}"
    mark = "" if lane.fits else "OVER BUDGET"
    return (lane.name, str(lane.rows), str(lane.chunk), str(lane.chunks), format_bytes(lane.peak_bytes), budget, seconds, mark)


def explanation(overview: str, split: Split, low: Lowered, seen: Observation | None, notes: Sequence[str]) -> str:
    """The plan in full.

    Args:
        overview: Its table.
        split: Who computes how much.
        low: The program, lowered for the first lane's device.
        seen: What a chunk costs there; None for an empty batch.
        notes: Sentences about how the map runs.

    Returns:
        The table, then operators by cost with the tier that serves each, what is computed once for all samples, and the memory in words.
    """
    parts = [overview]
    if seen is not None and seen.costs:
        parts.append("Operators by cost, all samples together:\n" + _costs(split, low, seen))
    parts.append(_hoisted(low))
    parts += [_memory(lane) for lane in split.lanes if seen is not None]
    return "\n\n".join([*parts, *notes])


def _costs(split: Split, low: Lowered, seen: Observation) -> str:
    kind = split.lanes[0].device.partition(":")[0]
    m, samples = machine(kind), split.samples
    seconds = {c.name: max(c.flops / m.flops, c.bytes / m.bandwidth) for c in seen.costs}
    total = sum(seconds.values()) or 1.0
    rows: list[tuple[str, ...]] = [("operator", "calls per chunk", "GFLOP", "traffic", "share", "served by")]

    def row(name: str, costs: Sequence[OpCost], share: float, tier: str) -> tuple[str, ...]:
        flops, traffic = sum(c.flops for c in costs) * samples, sum(c.bytes for c in costs) * samples
        return (name, str(sum(c.calls for c in costs)), f"{flops / 1e9:.3g}", format_bytes(traffic), f"{share:.0%}", tier)

    for cost in sorted(seen.costs, key=lambda c: -seconds[c.name]):
        tier = TIERS.get(low.batched.tiers.get(cost.name, ""), "")
        rows.append(row(cost.name.removeprefix("aten::"), [cost], seconds[cost.name] / total, tier))
    rows.append(row("all", seen.costs, 1.0, ""))
    return layout(rows, left=(0, 5))


def _hoisted(low: Lowered) -> str:
    """What is computed once per device, by recorded operator."""
    equations = low.program.equations
    numbers = {call.equation for call in low.batched.fixed if call.equation < len(equations)}
    if not numbers:
        return "Computed once for all samples: nothing."
    counts = collections.Counter(equations[i].op.name().removeprefix("aten::") for i in sorted(numbers))
    return "Computed once for all samples: " + ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts.items()) + "."


def _memory(lane: Lane) -> str:
    memory = lane.memory
    fixed, sample = max(memory.chunk, key=lambda level: level.at(lane.chunk))
    text = (
        f"Memory on {lane.name}: {format_bytes(memory.resident_bytes)} stay during the whole run; a chunk adds "
        f"{format_bytes(memory.scale * sample)} per sample"
    )
    text += f" and {format_bytes(memory.scale * fixed)} whatever its size" if fixed >= 1 << 10 else ""
    return f"{text}; measured: {memory.scale:.2f} of what its tensors say." if memory.scale != 1 else f"{text}."
