"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from shardmap.engine import Lowered
from shardmap.planning.memory import format_bytes
from shardmap.planning.split import Lane, Split


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
    if len(split.lanes) > 1:
        chunks = sum(lane.chunks for lane in split.lanes)
        rows.append(("all", str(split.samples), "", str(chunks), "", "", format_seconds(split.seconds), ""))
    title = f"{call}: {split.samples} samples"
    refusal = split.refusal()
    return "\n".join([title, layout(rows), *([f"over budget: {refusal}"] if refusal else [])])


def _row(lane: Lane) -> tuple[str, ...]:
    budget = "unknown" if lane.budget_bytes is None else format_bytes(lane.budget_bytes)
    seconds = format_seconds(lane.seconds) if lane.measured else f"~{format_seconds(lane.seconds)}"
    mark = "" if lane.fits else "OVER BUDGET"
    return (lane.name, str(lane.rows), str(lane.chunk), str(lane.chunks), format_bytes(lane.peak_bytes), budget, seconds, mark)


def explanation(overview: str, low: Lowered, grad: bool, device: str) -> str:
    """The table, then operators by cost with the tier that serves each, then what runs once for all samples."""
    return overview
