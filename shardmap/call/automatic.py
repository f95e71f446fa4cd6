"""`trace="auto"`: a function is recorded until two recordings agree, and replayed from then on.

What the function reads is listed while it is recorded (`reads`), and compared at each call
(`guards`). A recording is used only once it has been made twice, with all that was read unchanged
before and after: a function that changes what it reads never comes to that. It is made again at the
4th, 8th, 16th, ... call, and compared; a difference there is an error, since replays in
between may have been wrong. A function that reads what cannot be compared is recorded each time.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from shardmap import errors
from shardmap.call.blame import why_not
from shardmap.call.direct import NOT_DIRECT, direct_of, form_of
from shardmap.call.guards import Guards
from shardmap.call.keepable import (
    hold_known,
    memories_of,
    others_than_first,
    rows_of,
)
from shardmap.call.keeps import Kept, Known, Refused, captured_of
from shardmap.call.memo import (
    Prepared,
    Remembered,
    are_leaves_of,
    modes,
    setting_left,
    shared_among,
    shared_arguments,
    signature,
)
from shardmap.call.options import Options
from shardmap.call.reachable import History
from shardmap.call.reads import Walk
from shardmap.call.root import Root
from shardmap.call.routes import taken
from shardmap.lower.closeness import close
from shardmap.rules import registry
from shardmap.run.base import Job
from shardmap.trace.batch import Batch
from shardmap.trace.compare import difference, forks
from shardmap.trace.recording import Recording
from shardmap.trace.saved_hooks import saved_hooks_set_aside
from shardmap.trace.watch import PythonWatch

_FUNCTIONS = 256
"""Number of functions whose recordings are kept."""
_SIGNATURES = 64
"""Number of signatures of one function whose recordings are kept."""


_known: collections.OrderedDict[Hashable, Known] = collections.OrderedDict()
_lock = threading.RLock()
_cleared = 0
"""How often the recordings have been dropped."""


def state() -> tuple[int, int]:
    """The state of the caches and of the rules."""
    return _cleared, registry.version()


def clear() -> None:
    """Drop the recordings of all functions."""
    global _cleared
    with _lock:
        _known.clear()
        _cleared += 1


def known() -> list[Known]:
    """What is known of all functions."""
    with _lock:
        return list(_known.values())


def after_fork() -> None:
    """Renew the lock of this module."""
    global _lock
    _lock = threading.RLock()


Replay = Callable[[Prepared, Batch], Sequence[torch.Tensor]]
On = Callable[[int], Recording | None]


class Automatic(History):
    """The recordings of a mapped function, found by its code and by what it closes over.

    Args:
        func: The user's function.
        options: The call's options.
    """

    def __init__(self, func: Callable[..., object], options: Options):
        self.func = func
        self.options = options
        self.last: Kept | None = None
        self._own: dict[Hashable, Known] = {}
        try:
            hash(options)
            self._shared = True
        except TypeError:  # dims in a dict, for example: kept for this mapped function alone
            self._shared = False

    def directly(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The results of a call that is like the last one, or `NOT_DIRECT`."""
        kept = self.last
        if kept is None or not kept.confirmed or kept.replays + 1 == kept.again or kept.rows:
            return NOT_DIRECT
        if kept.of != state():
            return NOT_DIRECT
        direct = kept.direct
        if direct is None or (found := form_of(args, kwargs)) is None:
            return NOT_DIRECT
        form, leaves = found
        if form != direct.form:
            return NOT_DIRECT
        shared = shared_among(leaves, direct.positions)
        root = Root(self.func, shared)
        if root.key != kept.key:
            return NOT_DIRECT
        tensors = kept.guards.check(root.parts)
        if tensors is None:
            return NOT_DIRECT
        captured = captured_of(kept, tensors)
        kept.replays += 1
        try:
            return direct.called(leaves, captured)
        except errors.StaleRecordingError:  # a question about a value has another answer
            kept.direct = None
            return NOT_DIRECT

    def of_call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> OneCall:
        """The memory of one call."""
        return OneCall(self, args, kwargs)

    def find(self, key: Hashable) -> Known:
        """Everything that is known of a function by its key, with these options."""
        if not self._shared:
            return self._own.setdefault(key, Known())
        whole = key, self.options
        with _lock:
            found = _known.get(whole)
            if found is None:
                found = _known[whole] = Known()
                if len(_known) > _FUNCTIONS:
                    _known.popitem(last=False)
            else:
                _known.move_to_end(whole)
            return found


class OneCall:
    """The recordings that one call may use, and adds to.

    Args:
        of: The recordings of the mapped function.
        args: The call's arguments.
        kwargs: Those that have names.
    """

    def __init__(self, of: Automatic, args: tuple[object, ...], kwargs: dict[str, object]):
        self._of = of
        self._arguments = args, kwargs
        self._call = of.options.call
        self._root: Root | None = None
        self._known = Known()
        self._signature: Hashable = None
        self._modes: tuple[object, ...] = ()
        self._before: Kept | None = None
        """The recording that this call's is to be compared with."""
        self._tensors: list[torch.Tensor] = []
        """The tensors that its guards have found."""
        self._watch: PythonWatch | None = None

    def recall(self, batch: Batch) -> Remembered | None:
        """The recording that serves this call; None if the function must be recorded."""
        self._root = root = Root(self._of.func, shared_arguments(batch))
        self._signature = key = signature(batch)
        self._known = self._of.find(root.key)
        kept = self._known.kept.get(key)
        if kept is None:
            return None
        tensors = kept.guards.check(root.parts)
        if tensors is None:
            self._drop()
            self._changed(f"{kept.guards.broken} has changed")
            return None
        self._before, self._tensors = kept, tensors
        if not kept.confirmed or (kept.rows and not hold_known(batch, kept.rows, kept.apart)):
            return None
        kept.replays += 1
        if kept.replays == kept.again:
            kept.again = 2 * kept.again + 2
            return None
        captured = captured_of(kept, tensors)
        recording = dataclasses.replace(kept.prepared.recording, captured=captured)
        return Remembered(dataclasses.replace(kept.prepared, recording=recording), [], {}, {})

    def _changed(self, what: str) -> None:
        """Count a change; a function whose state always changes is recorded unwatched."""
        count = self._known.changes[self._signature] = (
            self._known.changes.get(self._signature, 0) + 1
        )
        if count >= _CHANGES:
            self._refuse(f"{what}, at each of {count} calls")

    def _refuse(self, why: str) -> None:
        refused = self._known.refused.setdefault(self._signature, Refused(why))
        refused.why = why
        self._drop()

    def _drop(self) -> None:
        """Drop the recording of this signature, also for direct replays."""
        if (kept := self._known.kept.pop(self._signature, None)) is not None:
            kept.direct = None

    def watch(self, batch: Batch) -> PythonWatch | None:
        """The watch for the recording that this call makes; None if it is not to be kept."""
        del batch
        refused = self._known.refused.get(self._signature)
        if refused is not None:
            refused.calls += 1
            if refused.calls < refused.again:
                return None
            refused.again *= 4
        self._watch, self._modes = PythonWatch(), modes()
        return self._watch

    def keep(self, batch: Batch, prepared: Prepared, replay: Replay, on: On) -> None:
        """Keep a recording of this call, or find out that it cannot be kept.

        Args:
            batch: The call's arguments.
            prepared: The recording.
            replay: Computes the stacked results of another recording for some of the samples.
            on: Records one more sample, by its number.

        Raises:
            StaleReplayError: An earlier recording gives other results, and no change was seen.
        """
        watch, root, before = self._watch, self._root, self._before
        if watch is None or root is None:
            return
        recording = prepared.recording
        if recording.kept:
            self._refuse(f"it keeps {recording.kept[0]}")
            return
        if left := setting_left(watch, self._modes):
            self._refuse(left)
            return
        what = self._changes(root, batch)
        if what:
            self._drop()
            self._changed(f"the function changes what it reads: {what}")
            before = None
            if not root.is_as(self._root_now(batch)):
                return
        if before is not None:
            found = difference(before.prepared.recording, recording, shared=False)
            if found is not None and forks(before.prepared.recording, recording):
                if before.confirmed:
                    return  # the first sample goes another way now, and proves nothing
                before = None
            elif found is not None:
                self._drop()
                with saved_hooks_set_aside():
                    stale = self._is_stale(before, batch, recording, replay)
                if stale:
                    self._refuse(f"two recordings differ: {found}")
                    raise errors.StaleReplayError(
                        f"{self._call}: the function was recorded again, which trace='auto' does "
                        f"now and then, and does something else than before ({found}), though "
                        "nothing that it was seen to read has changed; results of the calls since "
                        "its last recording may be wrong: pass trace='each', or what changes as "
                        "an argument"
                    )
                self._changed(f"it does something else at the next call: {found}")
                before = None
            elif before.confirmed:
                before.see(*rows_of(batch, self._of.options.check))
                return
        why, kept = self._made(root, watch, prepared)
        if kept is None:
            self._refuse(why)
            return
        kept.rows, kept.apart = rows_of(batch, self._of.options.check)
        kept.confirmed = before is not None
        if before is not None:
            kept.see(before.rows, before.apart)
            self._look_further(kept, batch, recording, on)
            self._known.refused.pop(self._signature, None)
            self._known.changes.pop(self._signature, None)
        elif (refused := self._known.refused.get(self._signature)) is not None:
            if not self._known.changes.get(self._signature):
                refused.again = refused.calls + 1  # it can be kept now: compare at the next call
        entries = self._known.kept
        if len(entries) >= _SIGNATURES:
            entries.pop(next(iter(list(entries))), None)
        entries[self._signature] = kept

    def _root_now(self, batch: Batch) -> Root:
        return Root(self._of.func, shared_arguments(batch))

    def _changes(self, root: Root, batch: Batch) -> str:
        """What is other than before the function was recorded in this call, or empty."""
        before = self._before
        if not root.is_as(self._root_now(batch)):
            return "a container or a value that it closes over"
        if before is None:
            return ""
        tensors = before.guards.check(root.parts)
        if tensors is None:
            return before.guards.broken
        if any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            return "a tensor, in whose place it puts another one"
        return ""

    def _look_further(self, kept: Kept, batch: Batch, recording: Recording, on: On) -> None:
        """Record a sample whose row of an argument is another, if the first and last are alike."""
        for place, number in others_than_first(batch, kept.apart):
            other = on(number)
            if other is not None and difference(recording, other) is None:
                kept.apart[place] = True
        if all(kept.apart):
            kept.rows = []

    def _is_stale(self, before: Kept, batch: Batch, recording: Recording, replay: Replay) -> bool:
        """True if replays of an earlier recording may have been wrong, and no change was seen.

        A function may do the same in another way: derivatives are cut by the memory that is free.
        """
        if not before.confirmed or before.shared != memories_of(recording):
            return False
        assert self._root is not None
        tensors = before.guards.check(self._root.parts)
        sample = recording.sample if batch.size else [None] * len(recording.program.outputs)
        if tensors is None or recording.random or not sample:
            return tensors is not None
        captured = captured_of(before, tensors)
        old = dataclasses.replace(before.prepared.recording, captured=captured)
        first = taken(batch, torch.tensor([0])) if batch.size else batch
        try:
            found = replay(dataclasses.replace(before.prepared, recording=old), first)
        except errors.StaleRecordingError:  # a question has another answer: a replay would see it
            return False
        return not all(
            v.spec.shape == b.shape[1:]
            and v.spec.dtype == b.dtype
            and (a is None or close(a, b[0], 0.0))
            for v, a, b in zip(recording.program.outputs, sample, found, strict=False)
        )

    def _made(self, root: Root, watch: PythonWatch, prepared: Prepared) -> tuple[str, Kept | None]:
        """The recording with its guards, or the reason why it cannot be kept."""
        entries, key = self._known.kept, self._signature

        def gone(_: object) -> None:
            if (kept := entries.pop(key, None)) is not None:
                kept.direct = None

        walk = Walk(watch, root, gone)
        recording = prepared.recording
        why = why_not(walk, recording)
        if why:
            return why, None
        guards = Guards(walk.found, recording.captured)
        return "", Kept(
            root.key,
            dataclasses.replace(
                prepared, recording=dataclasses.replace(recording, captured=(), sample=())
            ),
            guards,
            memories_of(recording),
            [],
            [],
        )

    def replayed(
        self, prepared: Prepared, batch: Batch, whole_job: Callable[[], Job | None]
    ) -> None:
        """Remember how to repeat a call that has been replayed."""
        kept = self._of.last = self._before
        if kept is None or (found := form_of(*self._arguments)) is None:
            return
        form, leaves = found
        if kept.direct is not None and kept.direct.form == form and kept.of == state():
            return
        if not are_leaves_of(batch, leaves):
            return
        kept.of = state()
        with saved_hooks_set_aside():  # the call's result has been computed: this is no part of it
            job = whole_job()
            kept.direct = job and direct_of(prepared, batch, self._of.options, job, form)

    def forget(self, batch: Batch) -> None:
        """Drop the recording for this signature because it is stale."""
        del batch
        self._drop()
        self._before = None


_CHANGES = 4
"""Number of calls in a row that find another state before a function is recorded each time."""
