"""The sentence that refuses a plan over its budget: its numbers add up, its remedies lead out.

Each remedy is computed before it is named: the plan's own memory, with the results stored or
combined, with chunks computed again in backward, or of fewer samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from shardmap.planning import device as devices
from shardmap.planning.memory import GIB, KIB, MIB, MemoryModel, format_bytes
from shardmap.planning.split import Collected, Lane, Split

_Change = Callable[[MemoryModel], MemoryModel | None]

_CHANGES: tuple[tuple[str, Sequence[_Change]], ...] = (
    ("remat=True", [MemoryModel.if_again]),
    ("out=shardmap.ZarrSink(path), which writes them to a store", [MemoryModel.if_stored]),
    ("reduce='sum' for example, which combines them", [MemoryModel.if_reduced]),
    (
        "remat=True and reduce='sum' for example, together",
        [MemoryModel.if_again, MemoryModel.if_reduced],
    ),
)
"""Options that a call may be given, and what each makes of the memory that it needs."""


def refusal_of(split: Split, task: bool = False) -> str | None:
    """Sentence that says why a split cannot run: the first device over its budget.

    Args:
        split: A batch cut among devices.
        task: True if the batch is a task of a cluster's worker, which a call's options are not for.

    Returns:
        The sentence, or None if every lane is within its budget.
    """
    if split.collected is not None and not split.collected.fits:
        return _collected(split.collected, split.samples)
    for lane in split.lanes:
        if not lane.fits:
            return _lane(split, lane, task)
    return None


def _collected(collected: Collected, samples: int) -> str:
    room = collected.budget_bytes or 0
    least = samples * room // max(1, collected.bytes)
    ways = [
        "" if collected.grad else "write them to a store with out=shardmap.ZarrSink(path)",
        "keep less of them with reduce=",
        f"map at most {_samples(least)} per call" if least else "",
        "name another output_device=",
    ]
    return (
        f"the results need {format_bytes(collected.bytes)} on {collected.device}, where they are "
        f"collected, budget {format_bytes(room)}; {_either([way for way in ways if way])}"
    )


def _lane(split: Split, lane: Lane, task: bool) -> str:
    memory, budget = lane.memory, lane.budget_bytes or 0
    size = 1 if memory.bound else min(lane.most, lane.rows)
    what = "the map needs at least" if memory.bound else f"a chunk of {size} needs"
    text = (
        f"{what} {format_bytes(lane.peak_bytes)} on {lane.device}, budget {format_bytes(budget)} "
        f"({_parts(memory, size)})"
    )
    room = memory.room_bytes(budget)
    largest = memory.largest_chunk(room, size) if room > 0 else 0
    if largest and not memory.bound:
        return f"{text}; pass chunk_size='auto', or at most {largest}"
    if not _fits(lane, memory.of_part(1 / max(1, split.samples))):
        text += "; not even one sample fits"
    auto = "pass chunk_size='auto', and " if lane.chunk > 1 else ""
    return f"{text}: {auto}{_either([*_ways(split, lane, task)])}"


def _parts(memory: MemoryModel, size: int) -> str:
    """The parts of the peak of a chunk of `size` samples: they add up to it."""
    chunk, peak = memory.chunk_bytes(size), memory.peak_bytes(size)
    rest = memory.resident_bytes - memory.stacked_bytes - memory.kept_bytes
    forward = max((level.at(size) for level in memory.chunk), default=0)
    backward = max((level.at(size) for level in memory.backward), default=0)
    told = [
        (memory.stacked_bytes, f"for the results at {format_bytes(memory.result_bytes)} a sample"),
        (memory.kept_bytes, "that gradients from outside keep until backward"),
        (rest, "for what else stays during the run"),
        (
            chunk,
            f"while {_samples(size)} {'is' if size == 1 else 'are'} computed"
            f"{' with the backward' if backward > forward else ''}",
        ),
        (peak - memory.resident_bytes - chunk, "of margin"),
    ]
    return ", ".join([f"{format_bytes(count)} {what}" for count, what in told if count >= 1])


def _ways(split: Split, lane: Lane, task: bool) -> Iterator[str]:
    """What leads out, each by itself."""
    found = 0
    for name, changes in _CHANGES if not task else ():
        if len(changes) > 1 and found:
            continue  # one of them alone is enough
        if _helps(split, changes):
            found += 1
            yield f"pass {name}"
    most = _most(split)
    if most and task:
        yield f"pass chunk_size={most} or less"
    elif most:
        kept = lane.memory.kept_bytes or lane.memory.backward
        yield f"map at most {_samples(most)} per call" + (
            ", with the gradients of each taken before the next" if kept else ""
        )
    needed = lane.memory.peak_bytes(1)
    free = None if lane.worker else devices.free_bytes(torch.device(lane.device))
    if free is not None and needed > free:
        yield f"use a device with more memory than the {format_bytes(free)} that are free here"
    elif lane.memory.bound:
        yield f"allow more with memory_budget=, at least {_rounded_up(needed)}"
    else:
        yield f"allow more with memory_budget='{_rounded_up(needed)}'"


def _helps(split: Split, changes: Sequence[_Change]) -> bool:
    """True if all lanes are within their budgets in chunks of one sample, after the changes."""
    changed = False
    for lane in split.lanes:
        memory = lane.memory
        for change in changes:
            other = change(memory)
            changed |= other is not None
            memory = memory if other is None else other
        if not _fits(lane, memory):
            return False
    return changed


def _most(split: Split) -> int:
    """The most samples of a batch that is within all budgets in chunks of one; 0 if none is."""
    low, high = 0, split.samples - 1
    while low < high:
        middle = (low + high + 1) // 2
        part = middle / split.samples
        if all(_fits(lane, lane.memory.of_part(part)) for lane in split.lanes):
            low = middle
        else:
            high = middle - 1
    return low


def _fits(lane: Lane, memory: MemoryModel) -> bool:
    return lane.budget_bytes is None or memory.peak_bytes(1) <= lane.budget_bytes


def _rounded_up(count: int) -> str:
    """Bytes as text that is read back as no less."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{math.ceil(10 * count / size) / 10:.1f} {unit}"
    return f"{count} B"


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def _either(ways: Sequence[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
