"""Estimate, from a few samples, whether many of them give the same answers.

To ask all samples what a function asks is a program of its own, which must be lowered: it costs as
much as running the function on dozens of samples. It pays where many samples give the same
answers. A few samples show whether they do; where they do not, the function itself is run.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from shardmap._torch import OpOverload, TorchDispatchMode
from shardmap.program.ir import Program
from shardmap.program.operators import op_info, shape_depends_on_values

Answers = tuple[Hashable, ...]
"""Answers to python's questions about one sample's values, in order."""

TRIED_OF = 128
"""One sample is tried of so many: that takes as long as three runs of the function."""
MOST_TRIED = 16
"""Samples tried in one call at most."""
SHARE = 0.5
"""The least share of the samples that must have answers in common with many others."""
MOST_SKIPPED = 31
"""Calls that go by, at most, before samples are tried again."""
_GOLDEN = 0.6180339887498949
"""Its multiples, without their integers, spread evenly however many are taken."""


class Spread:
    """The answers of samples that were tried, in all calls of a function."""

    most = 256
    """Samples that are remembered; after that many, what was seen counts half."""

    def __init__(self) -> None:
        self.counts: collections.Counter[Answers] = collections.Counter()
        """Number of tried samples for each sequence of answers."""
        self.looped = 0
        """Calls since the batch was last split: all their samples were looped."""
        self.splits = False
        """True if a batch is to be split."""
        self._tried = 0
        self._skip = 0
        self._pause = 0

    def is_due(self) -> bool:
        """True if samples are to be tried in this call; the pauses between such calls grow."""
        if self._skip:
            self._skip -= 1
            return False
        return not self.splits

    def next_tried(self, size: int) -> list[int]:
        """The numbers of the samples to be tried, others than in calls before."""
        count = min(MOST_TRIED, size // TRIED_OF)
        numbers = range(self._tried + 1, self._tried + count + 1)
        self._tried += count
        return [int(number * _GOLDEN % 1 * size) for number in numbers]

    def look(self, given: Sequence[Answers], size: int, each: int, in_all: int) -> None:
        """Judge by samples of a call, and those of calls before, whether to split batches.

        Args:
            given: The answers of the samples that were tried.
            size: N, the samples of the call.
            each: Samples of one call from which a path is worth following.
            in_all: Samples of all calls from which a path is worth recording.
        """
        self.counts.update(given)
        if self.counts.total() > self.most:
            halved = {answers: count // 2 for answers, count in self.counts.items() if count > 1}
            self.counts = collections.Counter(halved)
        tried, shared = max(1, self.counts.total()), 0
        for count in self.counts.values():
            likely = count * size / tried
            if count > 1 and likely >= each and likely * (self.looped + 1) >= in_all:
                shared += count
        self.splits = shared >= SHARE * tried
        if not self.splits:
            self._wait()

    def too_few(self, last: str) -> str:
        """Why no path is worth following.

        Args:
            last: The clause that names the line at which python asked last.
        """
        tried, ways = self.counts.total(), len(self.counts)
        asked = f"to what python asks about their values{last}"
        if tried == 1:
            return f"one sample was tried, and gave answers {asked} that no other is known to give"
        if ways == 1:
            return (
                f"{tried} samples that were tried gave the same answers {asked}, and are too few "
                "for a batch"
            )
        return (
            f"{tried} samples that were tried gave {ways} different sequences of answers {asked}, "
            "and too few alike for a batch of each"
        )

    def was_split(self, served: int, size: int) -> None:
        """Note how many samples of a call took a path."""
        self.looped = 0
        self.splits = served >= SHARE * size
        if self.splits:
            self._pause = 0
        else:
            self._wait()

    def was_looped(self) -> None:
        """Note that all samples of a call were looped."""
        self.looped += 1

    def _wait(self) -> None:
        self._skip = self._pause
        self._pause = min(MOST_SKIPPED, 2 * self._pause + 1)


class Asked(TorchDispatchMode):
    """While it is entered, notes what python is told of values, and refuses lasting effects.

    Args:
        given: Tensors that may be written to.
    """

    def __init__(self, given: Sequence[torch.Tensor]):
        super().__init__()
        self.answers: list[Hashable] = []
        self._own = {t.untyped_storage().data_ptr() for t in given}
        self._leaves: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that skipping adds imports torch._dynamo, and takes as long

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator."""
        info, kwargs = op_info(func), kwargs or {}
        read = self._read(args)
        if kwargs:
            read |= self._read(kwargs.values())
        if not info.plain:
            self._refuse(func, args, kwargs)
        out = func(*args, **kwargs)
        if info.question:
            self.answers.append(repr(out))
        elif info.dynamic and shape_depends_on_values(func, args):
            self.answers.append(tuple([tuple(t.shape) for t in _tensors(out)]))
        for t in (out,) if isinstance(out, torch.Tensor) else _tensors(out):
            address = t.untyped_storage().data_ptr()
            if address not in read:  # a view of what was there before is no memory of its own
                self._own.add(address)
        return out

    def __exit__(self, *error: object) -> None:
        """Take back gradients that have reached tensors from outside."""
        super().__exit__(*error)
        for t, grad in self._leaves.values():
            if t.grad is not grad:
                t.grad = grad

    def _read(self, values: Iterable[object]) -> set[int]:
        """The addresses of the tensors that an operator is given."""
        found = set()
        for value in values:
            if isinstance(value, torch.Tensor):
                found.add(value.untyped_storage().data_ptr())
                if value.requires_grad and value.is_leaf and id(value) not in self._leaves:
                    self._leaves[id(value)] = value, value.grad
            elif isinstance(value, tuple | list):
                found |= self._read(value)
        return found

    def _refuse(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        info = op_info(func)
        written = [args[i] for i in info.writes if i < len(args)]
        written += [kwargs[name] for name in info.writes_named if name in kwargs]
        outside = [t for t in _tensors(written) if t.untyped_storage().data_ptr() not in self._own]
        if info.random or info.hidden_writes or outside:
            raise RuntimeError(f"{func} draws, or writes to what was there before the sample")


def given_in(program: Program) -> Answers:
    """The answers in a recording."""
    found: list[Hashable] = []
    for eq in program.equations:
        if eq.answer is None:
            continue
        if eq.answer[0] == "shape":
            found.append(eq.answer[1])
        elif op_info(eq.op).question:
            found.append(repr(eq.answer[1]))
    return tuple(found)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
