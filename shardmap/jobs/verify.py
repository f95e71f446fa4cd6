"""Verify a store: checksums of all units, then some units computed again and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardmap import Store
from shardmap.errors import StoreMismatchError
from shardmap.jobs.config import RunConfig, bind
from shardmap.jobs.parts import check_machine, load_parts, map_options
from shardmap.jobs.reproducible import one_seed
from shardmap.jobs.stores import configuration_of, with_keys
from shardmap.jobs.tasks import mapped
from shardmap.run.base import Event, listen
from shardmap.store import Comparison, Recompute, Recomputed
from shardmap.store.recompute import choose


@dataclass(frozen=True)
class Verified:
    """The findings of a verification."""

    store: Store
    committed: int
    """Number of committed units, all of which were hashed."""
    damaged: tuple[int, ...]
    """Units whose bytes differ from those that were written."""
    comparisons: tuple[Comparison, ...] | None
    """Comparisons of units computed again; None if the store holds no configuration."""

    @property
    def differing(self) -> tuple[int, ...]:
        """Units that were computed again and differ beyond rounding."""
        return tuple(c.unit for c in self.comparisons or () if not c.agrees)

    @property
    def wrong(self) -> tuple[int, ...]:
        """Units that should be computed again."""
        return tuple(sorted({*self.damaged, *self.differing}))

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
    """Hash all committed units of a store, and compute some of them again and compare.

    The units are chosen at random, and computed from the configuration that the store holds.

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
        comparisons = _compared(store, config, chosen, allow, say, listener) if chosen else []
        found = dataclasses.replace(found, comparisons=tuple(comparisons))
    say(found.recomputed)
    return found


def _compared(
    store: Store,
    config: RunConfig,
    chosen: list[int],
    allow: Sequence[str],
    say: Callable[[str], None],
    listener: Callable[[Event], None],
) -> list[Comparison]:
    if config.devices == "ray":
        config = dataclasses.replace(config, devices="auto", workers=None)
    check_machine(config)
    run = bind(config, allow)
    with one_seed(config.seed):
        parts = load_parts(run, say)
        again = mapped(
            parts, config, {**map_options(run), "out": Recompute(store.url, chosen), "resume": True}
        )
        try:
            with listen(listener):
                compared = again()
        except StoreMismatchError as error:
            raise with_keys(error, store, run.config) from None
    assert isinstance(compared, Recomputed)
    return compared.comparisons


def _count(number: int, some: str, none: str) -> str:
    return f"{number} {some}" if number else none
