"""What a call stands in: another recording, transforms, a trace."""

from __future__ import annotations

import dataclasses

from shardmap._torch import dispatch_depth, dispatch_modes, functorch
from shardmap.trace.recorder import Recorder


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What a call stands in."""

    inlined: bool
    """Whether it is a part of a function that is being recorded: then it has no plan of its own."""
    transformed: bool
    """Whether `torch.func` transforms, or forward-mode AD, are active around it."""
    traced: bool = False
    """Whether its samples hold no values that python may look at."""

    @property
    def plain(self) -> bool:
        """Whether nothing is around it."""
        return not (self.inlined or self.transformed)


def surroundings() -> Surroundings:
    """What a call that is made now stands in."""
    return Surroundings(under_recording(), functorch.peek_interpreter_stack() is not None)


def under_recording() -> bool:
    """Whether the call is made inside a function that is being recorded."""
    if dispatch_depth() == 0:
        return False
    return any(isinstance(m, Recorder) for m in dispatch_modes())
