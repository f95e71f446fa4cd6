"""The plan that `shardmap.plan` returns: print it, run it, and look at the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardmap import errors
from shardmap._torch import not_compiled
from shardmap.call.job import names_of, split_of
from shardmap.call.options import Options
from shardmap.call.standin import ways_of
from shardmap.planning import table
from shardmap.planning.observe import Observation
from shardmap.planning.refusal import refusal_of
from shardmap.planning.split import Lane, Split
from shardmap.program.schema import short_name
from shardmap.run import compiled, graphed, local, storing, timeline
from shardmap.run import ray as on_ray
from shardmap.run.base import Job, listen
from shardmap.run.prepare import Devices
from shardmap.run.watch import watched
from shardmap.store import Sink


class Plan:
    """A map that is ready to run: samples per device and chunk, memory and time needed.

    `print(plan)` shows the devices, the most costly operators and those computed once. The plan
    holds the call's tensors.

    Example:
        >>> import torch, shardmap
        >>> plan = shardmap.plan(torch.sin, chunk_size=4)(torch.zeros(10))
        >>> plan.fits, plan.samples, plan.lanes[0].chunks
        (True, 10, 3)
    """

    def __init__(
        self,
        job: Job,
        split: Split,
        on: Devices,
        options: Options,
        finish: Callable[[list[Any]], Any],
        compared: Sequence[str],
        looked: str = "",
        shapes: str = "",
        recorded: str = "",
    ):
        self.split = split
        self._job = job
        self._on = on
        self._options = options
        self._finish = finish
        self._compared = compared
        self._looked = looked
        self._shapes = shapes
        self._recorded = recorded
        self._events: list[Any] = []

    @property
    def samples(self) -> int:
        """N, the size of the batch."""
        return self.split.samples

    @property
    def job(self) -> Job:
        """The planned call: its recording, its inputs, and its outputs."""
        return self._job

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes, one per entry of `devices`."""
        return self.split.lanes

    @property
    def fits(self) -> bool:
        """True if every device's predicted peak is within its budget."""
        return self.split.fits

    @property
    def seconds(self) -> float:
        """Predicted seconds for the run."""
        return self.split.seconds

    def __str__(self) -> str:
        return f"{self.summary}\n\n{self._operators(everything=False)}"

    @property
    def summary(self) -> str:
        """The table of devices alone."""
        return table.overview(self._job.call, self.split)

    def _operators(self, everything: bool) -> str:
        ready = self._on.on(self.lanes[0].device, self._job.samples > 1)
        return table.operators(self.split, ready.low, self._seen(), everything)

    def _seen(self) -> Observation | None:
        """Measured cost of a chunk; None if running one would exceed the budget."""
        if not self._job.samples or self.lanes[0].memory.bound:
            return None
        return watched(self._on.on(self.lanes[0].device, self._job.samples > 1), self._job)

    def _backward_unknown(self) -> str:
        """Reason why the cost of gradients is unknown; empty if it is known or not needed."""
        seen = self._seen() if self._job.grad else None
        return "" if seen is None else seen.backward_unknown

    def __repr__(self) -> str:
        lanes = ", ".join(
            f"{lane.name}: {lane.rows} in chunks of {lane.chunk}" for lane in self.lanes
        )
        return f"<Plan of {self.samples} samples; {lanes}{'' if self.fits else '; over budget'}>"

    @not_compiled
    def explain(self) -> str:
        """The plan in full, as text.

        It has the text of `print` with every operator, then paragraphs on each device's memory and
        on how the map runs.
        """
        job = self._job
        parts = [self.summary, self._operators(everything=True)]
        if job.samples:
            parts.append(table.memory(self.split))
            parts += [text for text in (table.chunk_sizes(self.split),) if text]
        if job.remat:
            parts.append(
                "Gradients are recorded from outside; backward computes each chunk again, so that "
                "only one keeps what it saves."
            )
        elif job.grad:
            parts.append(
                "Gradients are recorded from outside: what backward needs of each chunk stays; "
                "remat=True computes it again instead."
            )
        unknown = self._backward_unknown()
        if unknown:
            parts.append(
                "The memory that gradients take is not known, and no part of the peaks above: "
                f"computing them raises an error ({unknown})."
            )
        reduced = [o.reduction.name for o in job.outputs if o.reduction is not None]
        if reduced:
            parts.append(
                f"Reduced as they are computed: {len(reduced)} of {len(job.outputs)} outputs "
                f"({', '.join(dict.fromkeys(reduced))})."
            )
        parts += self._from_factors()
        low = self._on.on(self.lanes[0].device, job.samples > 1).low
        size = self.lanes[0].chunk
        said = (compiled.explained(job, low, size), graphed.explained(job, low, size))
        parts += [text for text in said if text]
        ways = ways_of(self._on.on(self.lanes[0].device, job.samples > 1).low)
        parts += [text for text in (self._shapes, ways, self._looked, self._recorded) if text]
        return "\n\n".join(parts)

    def _from_factors(self) -> list[str]:
        """Paragraph on the outputs that are computed without their per-sample values."""
        low = self._on.on(self.lanes[0].device, self._job.samples > 1).low
        found = [
            f"  {short_name(low.program.equations[i].op)}: {text}"
            for i, text in sorted(low.batched.factored.items())
        ]
        found += [f"  {text}" for text in self._compared]
        return (
            ["\n".join(["From factors, without the products themselves:", *found])] if found else []
        )

    def into(self, sink: Sink, chunk_size: Any) -> Plan:
        """The plan of the same map whose results go to a store.

        Memory then holds only the units that are being filled.

        Args:
            sink: The store for the results.
            chunk_size: The user's option.
        """
        job = dataclasses.replace(self._job, unit=storing.unit_of(self._job, chunk_size, sink))
        if job.places is not None:  # rows of a store are computed in their order
            job = dataclasses.replace(
                job, inputs=[job.places.sort().values], places=None, bounds=()
            )
        options = self._options
        on = Devices(job, options.budget.on)
        cut = split_of(job, on, names_of(job, options, False), options, False, always=True)
        return Plan(
            job, cut, on, options, self._finish, self._compared, self._looked, self._shapes,
            self._recorded,
        )  # fmt: skip

    @not_compiled
    def run(self) -> Any:
        """Run the map and return what `shardmap.vmap` returns.

        Raises:
            OverBudget: A device's predicted peak exceeds its budget.
            ShardmapError: Any error of `shardmap.vmap`.
        """
        refusal = refusal_of(self.split)
        if refusal is not None:
            raise errors.OverBudget(f"{self._job.call}: {refusal}")
        events: list[Any] = []
        cluster = on_ray.asked_for(self._options.devices)
        with self._options.watching(), listen(events.append):
            if cluster is not None:
                outputs = on_ray.run(
                    self._job, self._options.chunk_size, cluster, self._options.budget
                )
            else:
                outputs = local.run(self._job, self.split, self._on)
        self._events = events
        return self._finish(outputs)

    def timeline(self, path: str | Path) -> None:
        """Write a timeline of the last run, for chrome://tracing or https://ui.perfetto.dev.

        It has one lane per device.

        Args:
            path: The JSON file to write.

        Raises:
            OptionError: The plan has not run.
        """
        timeline.write(Path(path), self._ran("timeline"))

    def plot(self, path: str | Path) -> None:
        """Draw the last run, one lane per device.

        The picture shows the computed chunks, and predicted against measured times.

        Args:
            path: The picture to write; its suffix says which kind.

        Raises:
            OptionError: The plan has not run.
            MissingExtraError: matplotlib is not installed.
        """
        timeline.draw(Path(path), self.split, self._ran("plot"))

    def _ran(self, what: str) -> list[Any]:
        if not self._events:
            raise errors.OptionError(
                f"{self._job.call}: {what}() shows what happened, and the plan has not run yet; "
                "call run() first"
            )
        return self._events
