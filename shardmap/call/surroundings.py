"""What a call stands in: another recording, transforms, a trace."""

from __future__ import annotations

import dataclasses

from shardmap._torch import dispatch_depth, dispatch_modes, functorch
from shardmap.trace.recorder import Recorder


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What a call stands in."""

    inlined: bool
    """True if it is a part of a function that is being recorded: then it has no plan of its own."""
    transformed: bool
    """True if `torch.func` transforms, or forward-mode AD, are active around it."""
    traced: bool = False
    """True if its samples hold no values that python may look at."""

    @property
    def plain(self) -> bool:
        """True if nothing is around it."""
        return not (self.inlined or self.transformed)


def surroundings() -> Surroundings:
    """What a call that is made now stands in."""
    return Surroundings(under_recording(), functorch.peek_interpreter_stack() is not None)


def under_recording() -> bool:
    """True if the call is made inside a function that is being recorded."""
    if dispatch_depth() == 0:
        return False
    return any(isinstance(m, Recorder) for m in dispatch_modes())
