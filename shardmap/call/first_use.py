"""Checks of a function that is mapped for the first time: it is run on a second sample.

The recording of one sample is replayed for all others. To check that, the function is also run on
the last sample: both recordings must be the same program with the same constants. A difference
was read by python without an operator of torch's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call.alike_rows import rows_unlike_first, samples_to_compare
from shardmap.call.identity import identity
from shardmap.call.options import Options
from shardmap.call.surroundings import surroundings
from shardmap.lower.cache import Kept
from shardmap.lower.closeness import close
from shardmap.program.analysis import asking_about_draws
from shardmap.program.ir import Program
from shardmap.trace import repeat
from shardmap.trace.batch import Batch
from shardmap.trace.compare import difference, forks, rubbish_apart
from shardmap.trace.key_order import in_order_of
from shardmap.trace.record import record
from shardmap.trace.recording import Recording, element
from shardmap.trace.surroundings import outer_recordings_suspended
from shardmap.trace.traced import is_traced

logger = logging.getLogger("shardmap")

Pair = tuple[Recording, pytree.TreeSpec]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings from running a function on a second sample."""

    varies: str = ""
    """Description of a value that differs by sample though no operator shows it, or empty."""
    forks: bool = False
    """True if samples take different paths: they answer questions about values differently."""
    alone: str = ""
    """Reason why the function was run on one sample only; empty if it was not."""


_verdicts = Kept(512)
_quick = Kept(512)
_sure = Kept(512)
"""Programs of functions that did the same on samples which differ in each argument: so they do on
any others, as far as can be seen."""
"""The same verdicts by address of their programs, which the values hold: a program that was
expected and recorded again is not hashed again."""

_steady = Kept(512)
"""Functions that take different paths, and that did the same when they were run again: answers to
questions make many programs of one function, and it is run again for the first one only."""


def clear() -> None:
    """Clear the verdicts."""
    _verdicts.clear()
    _steady.clear()
    _quick.clear()
    _sure.clear()


def after_fork() -> None:
    """Renew the locks of this module."""
    _verdicts.after_fork()
    _steady.after_fork()
    _quick.after_fork()
    _sure.after_fork()


class FirstUse:
    """One call's samples, on which the function is run as needed.

    Args:
        func: The user's function.
        batch: The call's arguments.
        pair: The recording of the first sample, and the structure of its result; None if
            the recording is one of an earlier call.
        options: The call's options.
        once: True if the recording is kept for later calls.
        program: The program of an earlier call's recording.
        of_path: True if the samples are those of one path: their answers are known.
        structure: That of other samples' results, in whose order of keys results are compared.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        batch: Batch,
        pair: Pair | None,
        options: Options,
        once: bool,
        program: Program | None = None,
        of_path: bool = False,
        structure: pytree.TreeSpec | None = None,
    ):
        self._of_path = of_path
        self.looked = False
        """True if the function has been run to compare its results."""
        self._program = program
        self.func = func
        self.batch = batch
        self.options = options
        self.once = once
        self._first = pair
        self._structure = structure if pair is None else pair[1]
        self._last: Pair | None = None
        self._alone = ""
        self._verdict: Verdict | None = None
        self._unlike: tuple[int | None, ...] = ()
        """For each argument a sample with another row than the first one's, if it is recorded."""

    def _record(self, number: int) -> Pair:
        options = self.options
        known = () if self._first is None else self._first[0].generators
        pair = record(
            self.func,
            self.batch,
            options.randomness,
            self.once,
            options.call,
            number,
            self.always,
            known,
        )
        self._structure = self._structure or pair[1]
        return in_order_of(pair, self._structure)

    def first(self) -> Pair:
        """The recording of the first sample."""
        if self._first is None:
            self.looked = True
            self._first = self._record(0)
        return self._first

    def on(self, number: int) -> Recording | None:
        """The recording of one more sample; None if the function cannot be run twice."""
        pair = self._recorded_again(number)
        return None if pair is None else pair[0]

    def programs(self) -> list[Program]:
        """Programs of the samples that the function has been run on for comparison."""
        return [pair[0].program for pair in (self._first, self._last) if pair is not None]

    def expected(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Return the function's own results for the first sample, and for the last one."""
        if self.options.check == "off" or not self.batch.size:
            return ()
        self.looked = True
        first, _ = self.first()
        rows = [first.sample]
        if self.batch.size > 1 and not self._cannot_fit():
            self._run_last()
            if self._last is not None:
                rows.append(self._last[0].sample)
        return tuple(rows)

    def verdict(self) -> Verdict:
        """The verdict of a second sample on this function and recording, found once.

        Raises:
            EscapeError: The function does something else each time that it is called.
        """
        if self._verdict is None:
            self._verdict = self._found()
        return self._verdict

    def _found(self) -> Verdict:
        check, size = self.options.check, self.batch.size
        if size and self._first is not None and self._first[0].outside:
            return self.varies(self._first[0].outside)
        if size > 1 and self._first is not None and self._first[0].caught:
            return Verdict(varies=f"{self._first[0].caught}, which the function catches")
        if size == 1 and check != "off" and self._first is not None:
            self._refuse_kept_history(self._first[0])
        program = self._program or self.first()[0].program
        if self.options.randomness == "same" and size and asking_about_draws(program):
            # A recording's answer holds for its own draws: to replay it where another call's agree,
            # and to loop where not, would draw twice.
            return Verdict(varies="python asks about a random number that all samples share")
        if check == "off" or size < 2 or self._cannot_fit():
            return Verdict()
        key = self._key()
        if check == "always" or key is None:
            return self._look()
        if _sure.get((key, id(program), self.options.randomness)) is program:
            return Verdict()  # rows need not be read
        # Arguments whose rows are all alike prove nothing about others: then a verdict is one of
        # batches of which that is true.
        if self._first is not None:
            self._unlike = rows_unlike_first(self.batch)
        apart = tuple([number is not None for number in self._unlike])
        quick = key, id(program), self.options.randomness, apart
        known = _quick.get(quick)
        if known is not None and known[0] is program:
            return known[1]
        # No lock is held while the user's function runs: two threads may both run it.
        whole = key, program, self.options.randomness, apart
        found = _verdicts.get(whole)
        if found is None:
            found = self._look()
        self._remember(found)
        return found

    def _cannot_fit(self) -> bool:
        """True if the results alone exceed the budget, so that planning is sure to refuse the map.

        The last sample, of which nothing would be learned, takes as much memory as the first.
        """
        options = self.options
        elsewhere = options.devices != "auto" or options.output_device is not None
        if self._first is None or elsewhere or options.out_dims != 0 or not surroundings().plain:
            return False
        recording = self._first[0]
        if options.out is not None or options.reduce is not None or recording.asked:
            return False
        specs = [v.spec for v in recording.program.outputs]
        each = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
        if each < _LARGE or is_traced(self.batch.leaves):
            return False
        limit = options.budget.on(element(self.batch.tensors()[0]).device)
        return limit is not None and each * self.batch.size > limit

    def _key(self) -> Hashable | None:
        key = identity(self.func)
        return key if key is None or not self._of_path else ("path", key)

    @property
    def always(self) -> bool:
        """True if the function is checked at each call."""
        return self.options.check == "always"

    def varies(self, why: str) -> Verdict:
        """Record the verdict that samples differ though the first and the last did not."""
        return self._remember(Verdict(varies=why))

    def forked(self) -> Verdict:
        """Record the verdict that samples take different paths, unlike the first and the last."""
        return self._remember(Verdict(forks=True))

    def _remember(self, found: Verdict) -> Verdict:
        key = self._key()
        self._verdict = found
        program = self._program if self._first is None else self._first[0].program
        if key is not None and program is not None:
            if self._first is not None and not self._unlike:
                self._unlike = rows_unlike_first(self.batch)
            apart = tuple([number is not None for number in self._unlike])
            if found != Verdict() or (apart and all(apart)):
                sure = program if found == Verdict() else None
                _sure.replace((key, id(program), self.options.randomness), sure)
            # that of a recording that is known needs more than samples that are all alike
            whatever = [()] if any(apart) or found != Verdict() else []
            for seen in (*whatever, apart):
                _verdicts.replace((key, program, self.options.randomness, seen), found)
                quick = key, id(program), self.options.randomness, seen
                _quick.replace(quick, (program, found))
        return found

    def _look(self) -> Verdict:
        self._refuse_kept(self.first()[0])
        self._run_last()
        if self._last is None:
            return Verdict(alone=self._alone)
        first, structure = self.first()
        other, found = self._last, self._difference((first, structure), self._last)
        self._unlike = self._unlike or rows_unlike_first(self.batch)
        for number in samples_to_compare(self.batch, self._unlike):
            if found is None and (another := self._recorded_again(number)) is not None:
                other, found = another, self._difference((first, structure), another)
        if found is None:
            return Verdict()
        forked = bool(first.asked) and forks(first, other[0])
        key = self._key()
        if forked and key is not None and _steady.get(key):
            return Verdict(forks=True)
        again = self._record(0)
        if self._difference((first, structure), again) is None:
            if forked and key is not None:
                _steady.replace(key, True)
            return Verdict(forks=True) if forked else Verdict(varies=found)
        # Where it is alike now, the first run made what later ones find: caches, lazy modules. They
        # change no result, unlike a total that the function keeps.
        if _same_results(first, again[0]):
            forked = bool(again[0].asked) and forks(again[0], other[0])
            if forked or self._difference(again, other) is None:
                self._first = again
                return Verdict(forks=forked)
            if again[1] == structure and rubbish_apart(first, again[0]):
                return Verdict()
            varies = self._difference(again, other)
            if varies is not None and self._difference(again, self._record(0)) is None:
                # It does the same each time from the second call on, and something else by sample.
                self._first = again
                return Verdict(varies=varies)
        raise self._stateful(found)

    def _stateful(self, found: str) -> errors.EscapeError:
        return errors.EscapeError(
            f"{self.options.call}: the function does something else each time that it is called ("
            f"{found}): it reads what an earlier call has changed, such as a counter, an iterator "
            "or the clock; pass what changes as an argument, one for each sample"
        )

    def _refuse_kept(self, first: Recording) -> None:
        """Refuse a function whose side effects outlive its call.

        Raises:
            EscapeError: It keeps a tensor that differs by sample, or another call gives something
                else.
        """
        if first.kept is None:  # recorded as expected: such tensors were not looked for
            repeat.forget(self.func)
            again = self._recorded_again(0)
            if again is not None:
                if not _same_results(first, again[0]):
                    raise self._stateful(difference(first, again[0]) or "its results differ")
                self._first, first = again, again[0]
        if first.kept:
            repeat.forget(self.func)
            raise errors.EscapeError(
                f"{self.options.call}: the function keeps a tensor that differs by sample: "
                f"{first.kept[0]}; the loop would leave the last sample's, or those of all, where "
                "a map leaves the first sample's: return the tensor instead, or pass check='off' "
                "if the kept tensor is not used"
            )

    def _refuse_kept_history(self, first: Recording) -> None:
        """Refuse that the only sample's tensor is kept where gradients are taken outside.

        Raises:
            EscapeError: It keeps such a tensor: its history would not be that of the result.
        """
        if first.kept and torch.is_grad_enabled() and any(first.program.output_flags):
            raise errors.EscapeError(
                f"{self.options.call}: the function keeps a tensor: {first.kept[0]}; gradients "
                "from outside would not go through it as they go through the result: return the "
                "tensor instead, call the map under torch.no_grad(), or pass check='off' if the "
                "kept tensor is not used"
            )

    def _difference(self, first: Pair, second: Pair) -> str | None:
        if first[1] != second[1]:
            return "it returns another structure for one sample than for another"
        return difference(first[0], second[0])

    def _run_last(self) -> None:
        """Run the function on the last sample, unless it cannot be run twice."""
        if self._last is not None or self._alone:
            return
        self.looked = True
        self.first()
        self._last = self._recorded_again(self.batch.size - 1)

    def _recorded_again(self, number: int) -> Pair | None:
        """Record the function on a sample again; None if it cannot be run twice."""
        try:
            return self._record(number)
        except errors.ShardmapError:
            raise
        except Exception as error:
            text = str(error).partition("\n")[0]
            if not consumed(error):
                self._record(0)  # an error that only the last sample raises is the user's
                raise
            self._alone = (
                "The function was compared on the first sample alone: it frees the graph that it "
                f"differentiates, so it cannot be run twice ({text[:60]})."
            )
            logger.debug("%s: %s", self.options.call, self._alone)
        return None


_LARGE = 1 << 24
"""Bytes of one sample's results from which on it is asked whether those of all can fit.

Results of 16 MiB take less than a millisecond to compute again, and what is found by that makes
the refusal no later; those of 64 MiB lie in fresh pages, which took 40 ms. To ask for the free
memory takes 30 us, which would be much for small functions."""


def _same_results(first: Recording, again: Recording) -> bool:
    """True if two runs on one sample gave the same, or drew numbers and so cannot be compared."""
    if first.random or again.random:
        return True
    pairs = zip(first.sample, again.sample, strict=False)
    with outer_recordings_suspended():  # which would take it for a question of the function
        return len(first.sample) == len(again.sample) and all(
            a.shape == b.shape and a.dtype == b.dtype and close(a, b, 0.0) for a, b in pairs
        )


def consumed(error: Exception) -> bool:
    """True if an error says that a function has freed the graph that it differentiates."""
    return isinstance(error, RuntimeError) and "backward through the graph a second time" in str(
        error
    )
