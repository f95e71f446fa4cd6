"""Find out if a backward does the same each time that it is called.

It may change what it reads itself (a counter on `ctx`, a flag), or read what other backwards
change, or ask how the gradient is taken. One that has changed what it reads is recorded again, and
its calls are compared.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable

import torch

from shardmap import errors
from shardmap._torch import without_functions
from shardmap.program.autocast import asked_modes
from shardmap.program.facts import Itself
from shardmap.program.ir import Param, Var
from shardmap.program.python_state import (
    CONTEXT,
    Reader,
    backward_in,
    keep,
    name_of,
    reader_of,
)
from shardmap.program.settings import VALUES
from shardmap.trace.backward_calls import Calls
from shardmap.trace.compare import same_values
from shardmap.trace.histories import Applied, HookNode, described, is_torchs
from shardmap.trace.recorder import Recorder
from shardmap.trace.repeat import alike


def readers_of(recorder: Recorder, node: object) -> tuple[str, list[Reader]]:
    """What reads python state in a backward, and the name by which it is kept; empty if nothing."""

    def is_sample(tensor: torch.Tensor) -> bool:
        var = recorder.known(tensor)
        return var is not None and var.index not in recorder.captured

    given: dict[str, object] = {}
    if isinstance(node, HookNode):
        if node.guard is not None:
            return node.name, node.guard.readers(is_sample)
        owner, functions, name = None, [hook.function for hook in node.hooks], node.name
    else:
        owner = getattr(type(node), "_forward_cls", None)
        if owner is None:
            return "", []
        functions, name = [backward_in(owner)], name_of(owner)
        given = {CONTEXT + key: value for key, value in vars(node).items()}
    found = [reader_of(each, given, is_sample, owner) for each in functions]
    return name, [reader for reader in found if reader is not None]


class Ran:
    """The code that ran in this thread while it was entered."""

    def __init__(self) -> None:
        self.codes: set[types.CodeType] | None = set()
        """The code; None where a profiler of C hides it."""
        self._outer: Callable[..., object] | None = None

    def __enter__(self) -> None:
        self._outer = sys.getprofile()
        if self._outer is not None and not callable(self._outer):
            self.codes = None
        else:
            sys.setprofile(self)

    def __exit__(self, *_: object) -> None:
        if self.codes is not None:
            sys.setprofile(self._outer)

    def __call__(self, frame: types.FrameType, event: str, arg: object) -> None:
        """Note one event; called by python."""
        if self._outer is not None:
            self._outer(frame, event, arg)
        if event == "call" and self.codes is not None:
            self.codes.add(frame.f_code)


class Watched:
    """What a backward reads, at several moments of a recording.

    Args:
        recorder: The recorder.
        applied: The application of the Function, or the hooks.
    """

    def __init__(self, recorder: Recorder, applied: Applied):
        self.recorder = recorder
        self.applied = applied
        self.calls: Calls | None = None
        """The calls of the backward, once they are recorded."""
        self._moments: list[dict[str, object]] = []
        with without_functions():
            found = "", list[Reader]()
            if not is_torchs(applied.node):
                found = readers_of(recorder, applied.node)
        self.name, self._readers = found
        self.ran = Ran() if any(reader.unnamed for reader in self._readers) else None
        """Notes the code that runs, if methods may run that no name leads to."""
        self.asks_for_mode = False
        self.asks: frozenset[str] = frozenset()
        """The names by which the backward asks for autocast and the like."""

    def keep(self) -> str:
        """Keep what reads python state in the backward, by the name that is returned."""
        for reader in self._readers:
            if self.ran is not None:
                with without_functions():  # our look at tensors that objects hold is no door
                    reader.follow(self.ran.codes)
            keep(reader.kept_as or self.name, reader)
            named = reader.names.attributes | reader.names.globals
            if not reader.kept_as:
                self.asks_for_mode |= "is_grad_enabled" in named
                self.asks |= asked_modes(named)
        return self.name

    def running(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the backward runs."""
        return self.ran if self.ran is not None else contextlib.nullcontext()

    def look(self) -> None:
        """Note what the backward reads at this moment."""
        found: dict[str, object] = {}
        with without_functions():
            for number, reader in enumerate(self._readers):
                facts = reader.first_facts()
                found |= {f"{name}\0{number}": fact for name, fact in facts.items()}
            node = self.applied.node
            if isinstance(node, HookNode):
                for number, hook in enumerate(node.hooks):
                    found[f"its registration\0{number}"] = hook.is_active
            elif self._readers:
                found |= {f"ctx.{key}": _fact(value) for key, value in vars(node).items()}
        self._moments.append(found)

    def changed(self) -> str:
        """The first name whose value is another one after the recording; empty if none is."""
        first, last = self._moments[0], self._moments[-1]
        for name in sorted(first.keys() | last.keys()):
            if name not in last or first.get(name) != last[name]:
                # Keys may be other ones in each recording, whose programs must be the same.
                return name.partition("\0")[0].partition("[")[0]
        ran = self.ran and self.ran.codes
        if ran is None or all(ran.isdisjoint(reader.first_unnamed) for reader in self._readers):
            return ""
        return "what methods of its objects read"

    def changes_itself(self) -> bool:
        """True if its own run, the last one, has changed what it reads."""
        start, end = self._moments[-2:]
        return start != end

    def changed_by_others(self) -> bool:
        """True if not all changes are the work of the backward's own run."""
        before, start, end, after = self._moments
        return before != start or end != after

    def settle(self, name: str, run: Callable[[bool], Calls]) -> str:
        """What a second gradient would read otherwise; empty if nothing matters.

        Args:
            name: What has changed.
            run: Runs and records the backward again; True to do so as for a gradient that is
                differentiated again.

        Raises:
            AutogradFunctionError: The first gradient would depend on the order of backwards.
        """
        if self.same_again(run, True):
            return ""
        if self.changed_by_others():
            raise errors.AutogradFunctionError(
                f"{self.recorder.call}: {described(self.applied.node)} reads {name}, which another "
                "backward changes, so that its gradient follows from the order in which gradients "
                "from outside reach them; keep it on ctx or in the hook's own variables, or take "
                "the gradient inside the mapped function (torch.autograd.grad)"
            )
        return name

    def same_again(self, run: Callable[[bool], Calls], differentiated: bool) -> bool:
        """True if the backward makes the same calls when it is run again."""
        recorder = self.recorder
        marks = len(recorder.literals), len(recorder.scalars), len(recorder.types)
        raised = recorder.raised
        try:
            again = run(differentiated)
            return self.calls is not None and same_calls(recorder, self.calls, again)
        except errors.AutogradFunctionError:
            recorder.raised = raised
            return False  # it cannot be run twice: its graph is freed, say
        finally:
            del recorder.literals[marks[0] :], recorder.scalars[marks[1] :]
            del recorder.types[marks[2] :]


def same_calls(recorder: Recorder, first: Calls, again: Calls) -> bool:
    """True if two runs of one backward compute the same."""
    return _Same(recorder).calls(first, again)


def _fact(value: object) -> object:
    return (type(value), repr(value)) if isinstance(value, VALUES) else Itself(value)


class _Same:
    """The comparison of two recordings of one backward, whose variables have other numbers."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.literals = {var.index: value for var, value in recorder.literals}
        self.names: dict[int, int] = {}

    def calls(self, first: Calls, again: Calls) -> bool:
        """True if both compute the same, whether or not it is differentiated."""
        self.names = {
            b.index: a.index for a, b in zip(first.cotangents, again.cotangents, strict=True)
        }
        before, now = first.leading(), again.leading()
        if len(before) != len(now) or len(first.outs) != len(again.outs):
            return False
        for a, b in zip(before, now, strict=True):
            if a.op is not b.op or not self._alike((a.args, a.kwargs), (b.args, b.kwargs)):
                return False
            pairs = list(zip(a.results(), b.results(), strict=False))
            if len(pairs) != len(list(a.results())) or any(x.spec != y.spec for x, y in pairs):
                return False
            self.names |= {y.index: x.index for x, y in pairs}
        return all(map(self._alike, first.outs, again.outs))

    def _alike(self, a: object, b: object) -> bool:
        if type(a) is Var and type(b) is Var:
            if a.index in self.literals and b.index in self.literals:
                return same_values(self.literals[a.index], self.literals[b.index])
            return self.names.get(b.index, b.index) == a.index
        if type(a) is Param and type(b) is Param:
            numbers = self.recorder.scalars
            return numbers[a.scalar].hex() == numbers[b.scalar].hex()
        if type(a) is tuple and type(b) is tuple:
            return len(a) == len(b) and all(map(self._alike, a, b))
        return alike(a, b)
