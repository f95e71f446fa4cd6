"""Gather results into storage units and write them to a store as they are computed.

Memory holds only the units that are being filled.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap.errors import StoreError
from shardmap.planning.cluster import task_rows
from shardmap.rules import huge_pages as pages
from shardmap.run.base import Job
from shardmap.run.gather import Gather
from shardmap.store import Sink, Store, open_store, source
from shardmap.trace.recording import element

UNIT_BYTES = 32 << 20
"""Bytes of a storage unit, unless the user cuts the batch: large enough for a disk, small enough to
lose little."""


@dataclass(slots=True)
class _Unit:
    """A storage unit that is being filled."""

    first: int
    left: int
    """Number of rows that are still missing."""
    columns: list[torch.Tensor]


class StoreGather(Gather):
    """Puts chunks together into storage units; each is written and committed when it is complete.

    Chunks lie within one unit.
    """

    def __init__(self, job: Job, store: Store):
        super().__init__(job)
        self.store = store
        self.units: dict[int, _Unit] = {}
        self.spare: list[list[torch.Tensor]] = []
        """Memory of units that have been written: filling fresh pages costs more than computing."""

    def slot(self, k: int, start: int, stop: int) -> torch.Tensor:
        """The rows `start` to `stop` of output `k` in their unit."""
        unit = self._unit(start)
        return unit.columns[k][start - unit.first : stop - unit.first]

    def add(self, start: int, stop: int, outs: Sequence[torch.Tensor | None]) -> None:
        """Take the outputs of the samples `start` to `stop`.

        An output that is already written in place is None.
        """
        if start == stop:
            return
        unit = self._unit(start)
        for k, (t, out) in enumerate(zip(outs, self.job.outputs, strict=True)):
            if t is not None:
                self.slot(k, start, stop).copy_(
                    t if out.mapped else t.expand(stop - start, *t.shape)
                )
        unit.left -= stop - start
        if not unit.left:
            number = unit.first // self.store.header.unit
            first, last = self.store.header.rows(number)
            self.store.commit(
                self.store.write(number, [column[: last - first] for column in unit.columns])
            )
            self.spare.append(self.units.pop(number).columns)

    def finish(self) -> list[torch.Tensor]:
        """Finish the store; no output is returned."""
        self.store.finish()
        return []

    def forget(self) -> None:
        """Drop all results."""
        super().forget()
        self.units.clear()
        self.spare.clear()

    def _unit(self, start: int) -> _Unit:
        number = start // self.store.header.unit
        unit = self.units.get(number)
        if unit is None:
            first, stop = self.store.header.rows(number)
            columns = self.spare.pop() if self.spare else self._columns()
            unit = self.units[number] = _Unit(first, stop - first, columns)
        return unit

    def _columns(self) -> list[torch.Tensor]:
        rows, host = self.store.header.unit, torch.device("cpu")
        return [pages.whole((rows, *out.shape), out.dtype, host) for out in self.job.outputs]


def unit_of(
    job: Job,
    chunk_size: Any,
    stored: Sink | None,
    workers: int = 0,
    room_bytes: int | None = None,
) -> int:
    """Number of samples per storage unit.

    It is that of the store that is resumed, the user's chunk size, or about 32 MiB; less if workers
    would wait, or if memory is short.

    Args:
        job: The mapped call.
        chunk_size: The user's option.
        stored: The sink that is resumed, if any.
        workers: Number of workers of a cluster, where a unit is a task; 0 without one.
        room_bytes: Most bytes of a unit that is being filled; None if unlimited.
    """
    if stored is not None:
        with contextlib.suppress(
            StoreError
        ):  # there is none yet, or `create` will report its fault
            return open_store(stored.where).header.unit
    if isinstance(chunk_size, int):
        return chunk_size
    row = sum(o.sample_bytes for o in job.outputs)
    most = (
        task_rows(job.samples, workers, 0, chunk_size) if workers and job.samples else job.samples
    )
    size = UNIT_BYTES if room_bytes is None else min(UNIT_BYTES, room_bytes)
    return max(1, min(most, size // max(row, 1)))


def identity(job: Job, unit: int) -> dict[str, str]:
    """Hashes that identify this run: of the program, the samples, and the cut into units."""
    if job.parts:
        return _identity_of_parts(job, unit)
    recording = job.recording
    program = hashlib.blake2b(digest_size=16)
    outputs = [(o.shape, str(o.dtype)) for o in job.outputs]
    if recording.function:
        program.update(repr((recording.function, job.seed, outputs)).encode())
    else:
        program.update(recording.program.dumps().encode())
        program.update(repr((recording.scalars, job.seed, outputs)).encode())
        _update(program, (*recording.captured, *recording.literals))
    plan = hashlib.blake2b(f"{job.samples} {unit}".encode(), digest_size=16)
    return {"program": program.hexdigest(), "data": _digest(job), "plan": plan.hexdigest()}


def _identity_of_parts(job: Job, unit: int) -> dict[str, str]:
    """The hashes of a run whose samples have programs of their own, by shape."""
    own = [identity(part, unit) for part in job.parts]
    found = {
        key: hashlib.blake2b("\n".join([one[key] for one in own]).encode(), digest_size=16)
        for key in own[0]
    }
    _update(found["plan"], job.inputs)  # which sample is of which shape shows in the data alone
    return {key: digest.hexdigest() for key, digest in found.items()}


def _digest(job: Job) -> str:
    """Digest of the samples; columns in a store give their checksums, the rest is read once."""
    if not job.samples:
        return "no samples"
    known = {
        i: checksum
        for i, column in job.columns.items()
        if (checksum := column.checksum()) is not None
    }
    rest = [job.columns.get(i, t) for i, t in enumerate(job.inputs) if i not in known]
    read = source(tuple(rest)).digest() if rest else ""
    return (
        read
        if not known
        else hashlib.blake2b(
            repr((sorted(known.items()), read)).encode(), digest_size=16
        ).hexdigest()
    )


def _update(digest: hashlib.blake2b, tensors: Iterable[torch.Tensor]) -> None:
    for t in tensors:
        plain = element(t).detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(repr((tuple(plain.shape), str(plain.dtype))).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
