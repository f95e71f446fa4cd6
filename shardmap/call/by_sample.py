"""Run the function itself, one sample after another, where no recording serves all samples.

If python reads a value that differs by sample without an operator of torch's (through numpy, a
printed number, the length of a selection), the recording of one sample does not serve the others.
Then a loop over the samples runs in the same chunks, and writes to the same memory, as a replay: it
gives the results of the map, only not faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap._threads import alone
from shardmap._torch import pytree, without_dispatch, without_functions
from shardmap.call import standin
from shardmap.call.memo import Prepared
from shardmap.call.reachable import reachable
from shardmap.call.sample_draws import Drawing
from shardmap.call.spread import Answers, Asked
from shardmap.call.standin import ITSELF, StandIn
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.cache import Lowered, Notes
from shardmap.program.ir import GRAD, NO_GRAD, Program, Spec
from shardmap.rules.philox import SampleNumbers, Seeds, number_of
from shardmap.run.rewritten import refusing_changes
from shardmap.trace.batch import Batch, flatten_outputs
from shardmap.trace.compiled import CompiledCodeRunsEagerly
from shardmap.trace.control_flow import AsPython
from shardmap.trace.key_order import positions
from shardmap.trace.saved_hooks import saved_hooks_set_aside

_BLOCK = 64
"""Number of samples whose results are copied together; random states are compared between such
blocks."""
_UNBOUND = "This view is the output of a function that returns multiple views"
"""Start of torch's error for a write to one of many views while gradients are recorded."""


@dataclass(frozen=True, slots=True)
class _Autocast:
    """The autocast state of the map's caller, in which the function runs."""

    device_type: str
    dtype: torch.dtype

    @staticmethod
    def current() -> tuple[_Autocast, ...]:
        return tuple(
            [
                _Autocast(kind, torch.get_autocast_dtype(kind))
                for kind in ("cpu", "cuda")
                if torch.is_autocast_enabled(kind)
            ]
        )


class WiderError(errors.VariesError):
    """A sample's output does not fit into those of others: its dtype, or that it requires grad.

    Args:
        text: The message.
        dtypes: For each output the dtype that holds this sample's and the others'.
        flags: For each output `GRAD` where this sample's requires grad.
    """

    def __init__(self, text: str, dtypes: Sequence[torch.dtype], flags: Sequence[int]):
        super().__init__(text)
        self.dtypes = tuple(dtypes)
        self.flags = tuple(flags)


def widened(prepared: Prepared, wider: WiderError) -> Prepared:
    """The recording with outputs that hold a wider sample's, of what its program does not compute.

    A call that is made again for a wider sample ends: the outputs are wider each time.
    """
    recording = prepared.recording
    before = recording.program
    outputs = [
        v._replace(spec=v.spec._replace(dtype=torch.promote_types(v.spec.dtype, dtype)))
        for v, dtype in zip(before.outputs, wider.dtypes, strict=True)
    ]
    flags = map(max, before.output_flags, wider.flags)
    program = before._replace(outputs=tuple(outputs), output_flags=tuple(flags))
    recording = dataclasses.replace(recording, program=program)
    return dataclasses.replace(prepared, recording=recording, outputs={})


class SampleLoop(StandIn):
    """Runs a function sample by sample, in the form of a replay (`shardmap.lower.codegen.Replay`).

    Args:
        func: The user's function.
        batch: The call's arguments; those that are not mapped are passed as they are.
        structure: Structure of the function's result for the first sample.
        specs: The outputs' metadata for the first sample.
        randomness: As for `shardmap.vmap`.
        draws: True if the function draws random numbers.
        tracked: True if outer autograd is recording.
        call: The user's call, for errors.
        generators: The user's generators that the function draws from.
        remat: True if chunks are computed again in backward.
    """

    source = f"{ITSELF}, sample by sample"

    def __init__(
        self,
        func: Callable[..., Any],
        batch: Batch,
        structure: pytree.TreeSpec,
        specs: Sequence[Spec],
        randomness: str,
        draws: bool,
        tracked: bool,
        call: str,
        generators: Sequence[torch.Generator] = (),
        remat: bool = False,
    ):
        self.func = func
        self.batch = batch
        self.structure = structure
        self.specs = specs
        self.randomness = randomness
        self.draws = draws
        self.generators = generators
        self.tracked = tracked
        self.call = call
        self.grad_mode = torch.is_grad_enabled()
        self.autocast = _Autocast.current()
        self._alike = _is_positional(batch)
        self.singly = False
        """True if each row is taken by itself, so that it may be written under gradients."""
        self._tracked_rows = [
            self.grad_mode and not tracked and t.requires_grad for t in batch.tensors()
        ]
        """True for each argument whose rows require grad only so that a result is seen to, where
        none was expected to: what executors read is cut off."""
        self._refuse_changes: Callable[[], None] | None = None
        if remat and tracked:
            read = [t for t in reachable(func) if isinstance(t, torch.Tensor)]
            self._refuse_changes = refusing_changes(call, read)

    def chunk(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of one chunk, `[size, *shape]` each.

        Raises:
            VariesError: Two samples' outputs differ in shape, dtype or structure.
        """
        if self._refuse_changes is not None:
            self._refuse_changes()
        with self._as_called():
            try:
                rows = list(self._rows(size, start, seed, inputs))
            except RuntimeError as error:
                if not self._is_refused(error):
                    raise
                rows = list(self._rows(size, start, seed, inputs))
            return tuple([torch.stack(column) for column in zip(*rows, strict=True)])

    def chunk_into(
        self,
        size: int,
        start: SampleNumbers,
        device: torch.device,
        seed: Seeds,
        scalars: object,
        fixed: object,
        inputs: list[torch.Tensor],
        slices: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Compute one chunk as `chunk` does, and write its outputs into the given slices."""
        with self._as_called():
            try:
                self._fill(slices, self._rows(size, start, seed, inputs), size)
            except RuntimeError as error:
                if not self._is_refused(error):
                    raise
                self._fill(slices, self._rows(size, start, seed, inputs), size)
        return tuple(slices)

    def _fill(
        self, slices: list[torch.Tensor], rows: Iterator[list[torch.Tensor]], size: int
    ) -> None:
        for first in range(0, size, _BLOCK):
            block = list(itertools.islice(rows, _BLOCK))
            with torch.no_grad():
                for column, where in zip(zip(*block, strict=True), slices, strict=True):
                    where[first : first + len(block)].copy_(torch.stack(column))

    def _rows(
        self, size: int, start: SampleNumbers, seed: Seeds, inputs: list[torch.Tensor]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the function's results, sample by sample."""
        columns = inputs if self.singly else list(map(_rows_of, inputs))
        columns = [
            [_own(t, True) for t in rows] if seen else rows
            for rows, seen in zip(columns, self._tracked_rows, strict=True)
        ]
        if self.draws:
            how = self.randomness, self.call, _BEGIN
            with Drawing(seed, self.generators, *how, start, size) as drawing:
                for i in range(size):
                    with drawing.of(i):
                        found = self._one([rows[i] for rows in columns], number_of(start, i))
                    yield found
            return
        for first in range(0, size, _BLOCK):
            watched = self.randomness == "error" and alone()
            with without_dispatch(), without_functions():  # no read of a function around
                before = torch.get_rng_state() if watched else None
            last = min(first + _BLOCK, size) - 1
            for i in range(first, last + 1):
                yield self._one([rows[i] for rows in columns], number_of(start, i))
            with without_dispatch(), without_functions():
                drawn = before is not None and not torch.equal(before, torch.get_rng_state())
            if before is not None and drawn and alone():
                torch.set_rng_state(before)
                which = f"sample {number_of(start, first)}"
                if last > first:
                    which = f"one of samples {number_of(start, first)} to {number_of(start, last)}"
                raise errors.RandomnessError(
                    f"{self.call}: the function draws random numbers for {which} and randomness is "
                    "'error'; pass randomness='different' (each sample its own draw) or 'same' "
                    "(one draw for all)"
                )

    def _is_refused(self, error: RuntimeError) -> bool:
        """True if torch has refused that a row is written for how rows were taken; others follow.

        Nothing has been written then.
        """
        refused = not self.singly and _UNBOUND in str(error)
        self.singly |= refused
        return refused

    def answered(self) -> list[Answers]:
        """The answers that python is given to its questions about each sample's values.

        The results of these runs are dropped. They must not draw, nor write to outside tensors.

        Raises:
            RuntimeError: The function does.
        """
        tensors, found = self.batch.tensors(), []
        python, numbers = random.getstate(), np.random.get_state()
        try:
            with self._as_called(), saved_hooks_set_aside():
                for number in range(self.batch.size):
                    row = [_own(t[number], t.requires_grad) for t in tensors]
                    with Asked(row) as asked:
                        self._called(row)
                    found.append(tuple(asked.answers))
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
        return found

    @contextlib.contextmanager
    def _as_called(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad_mode))
            for how in self.autocast:
                stack.enter_context(torch.autocast(how.device_type, how.dtype))
            if AsPython.met:
                stack.enter_context(CompiledCodeRunsEagerly())
                stack.enter_context(AsPython())
            yield

    def _one(self, row: list[torch.Tensor], number: int) -> list[torch.Tensor]:
        out = self._called(row)
        if type(out) is torch.Tensor and self.structure.is_leaf():
            leaves, structure = [out], self.structure
        else:
            leaves, structure = flatten_outputs(out, self.call)
        if structure != self.structure:
            order = positions(structure, self.structure)
            if order is None:
                raise errors.VariesError(
                    f"{self.call}: the function returns another structure for sample {number} than "
                    f"for the first ({structure} and {self.structure}), so the results cannot be "
                    "stacked; return one structure for all samples"
                )
            if not number:
                raise errors.StaleRecordingError(
                    f"{self.call}: the first sample's results have their keys in another order "
                    "than when the function was recorded; return them in one order, or use "
                    "trace='each'"
                )
            leaves = [leaves[k] for k in order]
        for k, (t, spec) in enumerate(zip(leaves, self.specs, strict=True)):
            if t.shape != spec.shape:
                raise errors.RaggedError(
                    f"{self.call}: output {k} of sample {number} has shape {list(t.shape)}, that "
                    f"of others {list(spec.shape)}, so they cannot be stacked; "
                    f"{errors.RaggedError.REMEDY}"
                )
            same = t.dtype is spec.dtype
            if not same and torch.promote_types(t.dtype, spec.dtype) != spec.dtype:
                raise self._wider(
                    f"output {k} of sample {number} is of {t.dtype}, that of others of "
                    f"{spec.dtype}; return one dtype for all samples",
                    leaves,
                )
            if t.requires_grad and self.grad_mode and not self.tracked:
                raise self._wider(
                    f"output {k} of sample {number} requires grad, and that of others does not; "
                    "detach it, or make the call under torch.no_grad()",
                    leaves,
                )
        leaves = [t.to(spec.dtype) for t, spec in zip(leaves, self.specs, strict=True)]
        if self.tracked:
            return leaves
        return [t.detach() if t.requires_grad else t for t in leaves]

    def _wider(self, text: str, leaves: Sequence[torch.Tensor]) -> WiderError:
        pairs = zip(leaves, self.specs, strict=True)
        return WiderError(
            f"{self.call}: {text}",
            [torch.promote_types(t.dtype, spec.dtype) for t, spec in pairs],
            [GRAD if t.requires_grad else NO_GRAD for t in leaves],
        )

    def _called(self, row: list[torch.Tensor]) -> object:
        """Call the function with one sample's arguments."""
        if self._alike:
            return self.func(*row)
        args, kwargs = self.batch.unflatten(row)
        return self.func(*args, **kwargs)


_BEGIN = SampleLoop._called.__code__


def _rows_of(batch: torch.Tensor) -> Sequence[torch.Tensor] | torch.Tensor:
    """The rows as `for row in batch` gives them.

    Each `batch[i]` would have a gradient of the size of the whole batch.
    """
    return batch.unbind(0) if batch.requires_grad and torch.is_grad_enabled() else batch


def _own(row: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A row that a function may differentiate by without effect outside; it shares its memory."""
    own = row.detach()
    return own.requires_grad_().view_as(own) if requires_grad else own


def _is_positional(batch: Batch) -> bool:
    """True if the arguments are exactly the mapped tensors, in order.

    Unflattening the arguments takes as long as some functions do.
    """
    if batch.opened or [i for i, _ in batch.mapped] != list(range(len(batch.leaves))):
        return False
    tensors = batch.tensors()
    args, kwargs = batch.unflatten(tensors)
    return not kwargs and len(args) == len(tensors) and all(map(operator.is_, args, tensors))


def warn_of_loop(call: str, why: str, strict: bool) -> None:
    """Warn that the function itself is run sample by sample.

    Raises:
        VariesError: `strict=True` refuses it.
    """
    text = f"{call}: {why}"
    if strict:
        raise errors.VariesError(
            f"{text}; only a loop over the samples serves such a function, and strict=True refuses "
            "that: use torch's operators for it, or pass strict=False"
        )
    warnings.warn(
        f"{text}, so the function itself is run sample by sample; use torch's operators for it, or "
        "pass strict=True to refuse such functions",
        errors.SlowLoopWarning,
        stacklevel=3,
    )


def cause(error: errors.VariesError, call: str) -> str:
    """The cause of a VariesError, without the call and the remedy."""
    return str(error).removeprefix(f"{call}: ").partition(";")[0]


def lowering(program: Program, options: LoweringOptions, loop: SampleLoop) -> Lowered:
    """Wrap the loop as a lowering, which executors take."""
    size = sum([_bytes(v.spec) for eq in program.equations for v in eq.results()])
    notes = Notes()
    # One sample is computed at a time, and autograd keeps the same however chunks are cut. So the
    # results alone decide if a call is too small to be measured, which takes 50 samples' time.
    notes.recorded_bytes.append(sum([_bytes(v.spec) for v in program.outputs]))
    return standin.lowering(program, options, loop, {ITSELF: "loop"}, size, notes)


def _bytes(spec: Spec) -> int:
    return spec.dtype.itemsize * math.prod(spec.shape)
