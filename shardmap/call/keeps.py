"""What is kept of a function for later calls with `trace="auto"`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from shardmap.call.direct import Direct
from shardmap.call.guards import Guards
from shardmap.call.keepable import seen_apart
from shardmap.call.memo import Prepared


@dataclass(slots=True)
class Kept:
    """A recording of one function and signature, and the facts that it stands on."""

    key: Hashable
    """The function's key (`Root.key`)."""
    prepared: Prepared
    """The recording, without its captured tensors, which must not be kept alive."""
    guards: Guards
    shared: tuple[int, ...]
    """For each captured tensor the first one that has the same memory."""
    rows: list[torch.Tensor]
    """The first row of each mapped argument; empty once all are `apart`."""
    apart: list[bool]
    """For each mapped argument: True if the function has been compared on two different rows. What
    it reads unseen shows only there: of others each call's rows must all be the known one."""
    confirmed: bool = False
    """True once a second recording was the same, with all that was read unchanged."""
    replays: int = 0
    again: int = 2
    """Number of the replay at whose place the function is recorded again: at the 4th, 8th, 16th,
    ... call; at the 2nd it was."""
    of: tuple[int, int] = (0, 0)
    """The state of the caches and of the rules that it was made in."""
    direct: Direct | None = None
    """The shortest way to replay it, for the last number of samples."""

    def see(self, rows: list[torch.Tensor], apart: list[bool]) -> None:
        """Note that the function does the same on other rows."""
        if not all(self.apart):
            self.apart = seen_apart(self.rows, self.apart, rows, apart)
        self.rows = [] if all(self.apart) else rows


def captured_of(kept: Kept, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The captured tensors of a recording now.

    Args:
        kept: The recording.
        tensors: The tensors that its guards have found.
    """
    return tuple([tensors[number] for number in kept.guards.captured])


@dataclass(slots=True)
class Refused:
    """The reason why a function is recorded each time, and when to look again.

    What was read for the first time only (modules that were imported) is not read again.
    """

    why: str
    calls: int = 0
    again: int = 1
    """Number of the call at which the function is watched again."""


@dataclass(slots=True)
class Known:
    """Everything that is known of one function and its options."""

    kept: dict[Hashable, Kept] = field(default_factory=dict)
    refused: dict[Hashable, Refused] = field(default_factory=dict)
    """Signatures for which the function is recorded each time."""
    changes: dict[Hashable, int] = field(default_factory=dict)
    """Number of recordings in a row that another state was found before."""
