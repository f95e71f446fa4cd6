"""`trace="once"`: the calls of one map that keeps its recordings itself.

What the function reads is compared at each call (`guards`), and where that cannot be listed whole,
all that it can reach (`memo`). A call whose arguments have the same properties as the last one's is
then replayed directly, without a plan (`direct`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from shardmap import errors
from shardmap.call.automatic import state
from shardmap.call.direct import NOT_DIRECT, Direct, direct_of, form_of
from shardmap.call.memo import (
    Memory,
    Prepared,
    Remembered,
    are_leaves_of,
    modes,
    setting_left,
    shared_among,
    signature,
)
from shardmap.call.options import Options
from shardmap.call.reachable import History, Unknown, reachable, same
from shardmap.run.base import Job
from shardmap.trace.batch import Batch
from shardmap.trace.saved_hooks import saved_hooks_set_aside
from shardmap.trace.watch import PythonWatch


@dataclass(frozen=True, slots=True)
class _Last:
    """The last replay, and what it stands on."""

    direct: Direct
    remembered: Remembered
    signature: Hashable
    """The key under which `remembered` is kept."""
    of: tuple[int, int]
    """The state of the caches and of the rules that it was made in."""


class Once(History):
    """The recordings of a mapped function.

    Args:
        func: The user's function.
        options: The call's options.
    """

    def __init__(self, func: Callable[..., object], options: Options):
        self.func = func
        self.options = options
        self.memory = Memory(func, options.call)
        self.last: _Last | None = None
        self.changes = 0
        """Number of recordings in a row during which what the function can reach has changed."""

    def directly(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The results of a call that is like the last one, or `NOT_DIRECT`."""
        last = self.last
        if last is None or last.of != state() or (found := form_of(args, kwargs)) is None:
            return NOT_DIRECT
        form, leaves = found
        remembered, direct = last.remembered, last.direct
        if form != direct.form or self.memory.kept.get(last.signature) is not remembered:
            return NOT_DIRECT
        if any(leaves[leaf] is not tensor for leaf, tensor in remembered.fixed.items()):
            return NOT_DIRECT
        if not remembered.flat and not same(remembered.reads, reachable(self.func)):
            return NOT_DIRECT
        if not self.memory.holds(remembered, shared_among(leaves, direct.positions)):
            return NOT_DIRECT
        captured = remembered.captured(leaves)
        try:
            return direct.called(leaves, captured)
        except errors.StaleRecordingError:  # a question about a value has another answer
            self.last = None
            return NOT_DIRECT

    def of_call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> OnceCall:
        """The memory of one call."""
        return OnceCall(self, args, kwargs)


class OnceCall:
    """The recordings that one call may use, and adds to.

    Args:
        of: The recordings of the mapped function.
        args: The call's arguments.
        kwargs: Those that have names.
    """

    def __init__(self, of: Once, args: tuple[object, ...], kwargs: dict[str, object]):
        self._of = of
        self._arguments = args, kwargs
        self._found: Remembered | None = None
        self._reads: list[object] = []
        """What the function could reach before it was recorded."""
        self._modes: tuple[object, ...] = ()
        self._watch: PythonWatch | None = None

    def recall(self, batch: Batch) -> Remembered | None:
        """The recording that serves this call; None if the function must be recorded."""
        self._found = self._of.memory.recall(batch)
        if self._found is None:
            self._reads = self._of.memory.reads(batch)
        return self._found

    def watch(self, batch: Batch) -> PythonWatch | None:
        """The watch for this call's recording."""
        del batch
        self._watch, self._modes = PythonWatch(), modes()
        return self._watch

    def keep(self, batch: Batch, prepared: Prepared) -> None:
        """Keep a recording of this call, if the function has left what it can reach as it was."""
        memory, now = self._of.memory, self._of.memory.reads(batch)
        if self._watch is not None and (left := setting_left(self._watch, self._modes)):
            memory.say(left)
            return
        unknown = any(type(each) is Unknown for each in now)  # which is the reason that is given
        if unknown or (not prepared.recording.kept and same(self._reads, now)):
            self._of.changes = 0
            memory.keep(batch, prepared, now, self._watch)
            return
        self._of.changes += 1
        if self._of.changes > 1:  # the first call may fill a table that stays
            memory.say("the function changes what it can reach")

    def forget(self, batch: Batch) -> None:
        """Drop the recording for this signature because it is stale."""
        self._of.memory.forget(batch)
        self._reads = self._of.memory.reads(batch)

    def replayed(
        self, prepared: Prepared, batch: Batch, whole_job: Callable[[], Job | None]
    ) -> None:
        """Remember how to repeat a call that has been replayed."""
        remembered, last = self._found, self._of.last
        if remembered is None or (found := form_of(*self._arguments)) is None:
            return
        form, leaves = found
        if (
            last is not None
            and last.remembered is remembered
            and last.direct.form == form
            and last.of == state()
        ):
            return
        if not are_leaves_of(batch, leaves):
            return
        with saved_hooks_set_aside():  # the call's result has been computed: this is no part of it
            of, job = state(), whole_job()
            direct = job and direct_of(prepared, batch, self._of.options, job, form)
        self._of.last = direct and _Last(direct, remembered, signature(batch), of)
