"""Verify a store: hash all units, compute some again by the map, and some rows by the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardmap import Store
from shardmap.call.comparison import Comparison
from shardmap.errors import OptionError, StoreMismatchError
from shardmap.jobs.config import RunConfig, bind
from shardmap.jobs.parts import check_machine, load_parts, map_options
from shardmap.jobs.reproducible import one_seed
from shardmap.jobs.stores import configuration_of, with_keys
from shardmap.jobs.tasks import compared, mapped
from shardmap.run.base import Event, listen
from shardmap.store import Recompute, Recomputed, UnitComparison
from shardmap.store.recompute import choose

LOOPED = 8
"""Number of rows that the plain loop computes too."""


@dataclass(frozen=True)
class Verified:
    """The findings of a verification."""

    store: Store
    committed: int
    """Number of committed units, all of which were hashed."""
    damaged: tuple[int, ...]
    """Units whose bytes differ from those that were written."""
    comparisons: tuple[UnitComparison, ...] | None
    """Comparisons of units computed again; None if the store holds no configuration."""
    beside_loop: Comparison | None = None
    """Rows computed by the map and by the plain loop; None if they were not compared."""

    @property
    def differing(self) -> tuple[int, ...]:
        """Units that were computed again and differ beyond rounding."""
        return tuple(c.unit for c in self.comparisons or () if not c.agrees)

    @property
    def wrong(self) -> tuple[int, ...]:
        """Units that should be computed again."""
        return tuple(sorted({*self.damaged, *self.differing}))

    @property
    def right(self) -> bool:
        """True if no fault was found."""
        return not self.wrong and (self.beside_loop is None or self.beside_loop.agrees)

    @property
    def checksums(self) -> str:
        """Text on the checksums, with a line for each damaged unit."""
        total = self.store.header.units
        lines = [
            f"{self.committed} of {total} units are committed; checksums: "
            f"{_count(len(self.damaged), 'damaged', 'all as written')}"
        ]
        for unit in self.damaged:
            start, stop = self.store.header.rows(unit)
            lines.append(
                f"unit {unit} (rows {start} to {stop - 1}): damaged, its bytes are not those that "
                "were written"
            )
        return "\n".join(lines)

    @property
    def recomputed(self) -> str:
        """Text on the comparison, with a line for each unit that differs."""
        if self.comparisons is None:
            return (
                "not written by a configured run, so nothing was computed again; in a script, make "
                "the call as it was made, with "
                f"out=shardmap.store.Recompute({self.store.url!r}), resume=True, and look at the "
                "result's comparisons"
            )
        if not self.comparisons:
            return "no unit was computed again"
        told = f"{len(self.comparisons)} of {self.store.header.units} units recomputed: "
        if self.differing:
            return "\n".join(
                [
                    told + f"{len(self.differing)} differ",
                    *[str(c) for c in self.comparisons if not c.agrees],
                ]
            )
        if all(c.exact for c in self.comparisons):
            return told + "equal to the last bit"
        worst = max(self.comparisons, key=lambda c: c.difference)
        return (
            told
            + f"equal within rounding, largest difference {worst.difference:.3g}, in {worst.output}"
        )


def verify(
    store: Store,
    *,
    units: int | None = 3,
    seed: int = 0,
    devices: str | None = None,
    allow: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    listener: Callable[[Event], None] = lambda event: None,
) -> Verified:
    """Hash all committed units of a store, compute some of them again, and compare.

    The units are chosen at random, and computed from the configuration that the store holds. Eight
    rows of the first one are computed by the plain loop as well (`shardmap.compare`): units
    computed again show that the run is reproducible, the loop that it is right.

    All data and the model are made as for the run; the map computes the chosen rows only.
    Nothing is written.

    Args:
        store: The store, opened by `shardmap.open_store`.
        units: Number of units to compute again; None for all.
        seed: Seed of the choice.
        devices: Devices of this machine; by default those of the run, if that was no
            cluster.
        allow: As for `shardmap.jobs.config.bind`.
        say: Receives the findings as soon as they are known.
        listener: Receives the events of the map, for a progress bar.

    Raises:
        ConfigError: The configuration's functions or files cannot be imported or found any more.
        StoreMismatchError: Function, model or data are no longer those of the run.
    """
    receipts = store.receipts()
    damaged = tuple(store.corrupt(receipts))
    found = Verified(store, len(receipts), damaged, None)
    say(found.checksums)
    config = configuration_of(
        store, () if devices is None else ("--devices", devices, "--workers", "null")
    )
    if config is not None:
        chosen = choose(store, len(receipts) if units is None else units, seed, damaged)
        found = dataclasses.replace(found, comparisons=())
        if chosen:
            found = _recomputed(found, config, chosen, allow, say, listener)
    if not found.comparisons:
        say(found.recomputed)
    return found


def _recomputed(
    found: Verified,
    config: RunConfig,
    chosen: list[int],
    allow: Sequence[str],
    say: Callable[[str], None],
    listener: Callable[[Event], None],
) -> Verified:
    """Compute units again by the run's map, and some rows of the first one by the plain loop."""
    store = found.store
    if config.devices == "ray":
        config = dataclasses.replace(config, devices="auto", workers=None)
    check_machine(config)
    run = bind(config, allow)
    with one_seed(config.seed):
        parts = load_parts(run, say)
        options = map_options(run)
        again = mapped(
            parts, config, {**options, "out": Recompute(store.url, chosen), "resume": True}
        )
        try:
            with listen(listener):
                recomputed = again()
        except StoreMismatchError as error:
            raise with_keys(error, store, run.config) from None
        assert isinstance(recomputed, Recomputed)
        found = dataclasses.replace(found, comparisons=tuple(recomputed.comparisons))
        say(found.recomputed)
        start, stop = store.header.rows(chosen[0])
        stop = min(stop, start + LOOPED)
        try:
            beside = compared(parts.between(start, stop), config, options)
        except OptionError as error:  # it draws, or runs only once: the error says which
            say(f"not compared with the plain loop: {error}")
            return found
        say(f"rows {start} to {stop - 1}: {beside}")
        return dataclasses.replace(found, beside_loop=beside)


def _count(number: int, some: str, none: str) -> str:
    return f"{number} {some}" if number else none
