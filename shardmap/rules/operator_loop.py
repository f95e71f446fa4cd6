"""The loop over the samples of one operator, which serves what no rule batches.

The calls of a block of samples are one generated list comprehension over the unbound rows, so that
python does nothing between two calls. A block is as many samples as have results that stay in the
cache; they are stacked into their rows of one preallocated result. Measured on 256 samples of few
elements, one thread, as a multiple of the plain python loop: `bincount` 2.8 with a call of
`select` for each argument and sample, 0.7 so; a custom operator written in python 1.4 and 0.9.

Where a call takes long, and its kernel is torch's own and runs on one thread, blocks are shared out
over as many threads as torch may use. Each sample is computed by the same call in any case, so that
its bits do not depend on that.
"""

from __future__ import annotations

import contextlib
import copy
import keyword
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

from shardmap._torch import (
    OpOverload,
    below_autograd,
    custom_operators,
    dispatch_depth,
    python_kernels,
    schema_of,
)
from shardmap.program.analysis import written
from shardmap.program.ir import Equation, Packed, Param, SampleDevice
from shardmap.program.schema import base_name
from shardmap.rules import huge_pages as pages
from shardmap.rules.loop_results import Results
from shardmap.rules.lowering import Seed, V

BLOCK_BYTES = 2**20
"""Bytes of the results that are stacked at a time."""
MOST_SAMPLES = 4096
"""Most samples of a block: each is a python object for each argument."""
PROBED = 16
"""Most samples that are timed before threads are started."""
LONG_CALL_SECONDS, LONG_REST_SECONDS = 50e-6, 2e-3
"""Threads are started for calls of that length, if those that are left take that long: starting and
joining a thread takes about 0.1 ms."""
BUSY = 1.3
"""CPU seconds of the process in a second from which on its other cores count as used: by the
kernel's own threads, or by other work."""


class Arguments(NamedTuple):
    """The arguments of a recorded call, and the function that calls an operator with them."""

    calls: Callable[..., list[object]]
    """`calls(rows, *shared)`: the results of a call for each row of mapped arguments."""
    mapped: tuple[V, ...]
    shared: tuple[object, ...]
    """Unmapped tensors, and numbers, devices and seeds that are bound at each call."""


def row_calls(
    function: Callable[..., Any],
    args: Sequence[object],
    kwargs: dict[str, object],
    numbered: bool = False,
) -> Arguments:
    """Generate the function that calls `function` for each row.

    Args:
        function: An operator.
        args: Its arguments, with a `V` for each tensor.
        kwargs: Its keyword arguments.
        numbered: True if each row begins with a number of its own, the first argument.
    """
    mapped: dict[V, str] = {}
    shared: dict[tuple[type, object], str] = {}  # by kind, too: named tuples equal plain ones
    scope: dict[str, Any] = {"f": function}

    def text(value: Any) -> str:
        kind = type(value)
        if kind is V and value.mapped:
            return mapped.setdefault(value, f"a{len(mapped)}")
        if kind in (V, SampleDevice, Param, Seed):
            return shared.setdefault((kind, value), f"s{len(shared)}")
        if kind is list or kind is tuple:
            return f"[{', '.join(map(text, value))}]"
        if value is None or kind in (bool, int, str):
            return repr(value)
        name = f"k{len(scope)}"
        scope[name] = value.value if kind is Packed else value
        return name

    first = ["number"] if numbered else []
    given = [*first, *map(text, args)]
    for name, value in kwargs.items():
        plain = name.isidentifier() and not keyword.iskeyword(name)
        given.append(f"{name}={text(value)}" if plain else f"**{{{name!r}: {text(value)}}}")
    rows = ", ".join([*first, *mapped.values()])
    names = ", ".join(["rows", *shared.values()])
    source = f"def calls({names}):\n    return [f({', '.join(given)}) for ({rows},) in rows]"
    exec(compile(source, "<shardmap loop>", "exec"), scope)
    return Arguments(scope["calls"], tuple(mapped), tuple([v for _, v in shared]))


class OperatorLoop:
    """Function that calls an operator for each sample: `loop(size, *mapped, *shared)`."""

    def __init__(
        self,
        eq: Equation,
        given: Arguments,
        results: Results | None,
        tracked: bool,
        ordered: bool = True,
    ):
        """Make the function.

        Args:
            eq: The recorded call.
            given: Its arguments.
            results: Its results; None if it only writes to its arguments.
            tracked: True if autograd or a transform records what is done.
            ordered: True if its calls must run one after the other.
        """
        self.calls = given.calls
        self.count = len(given.mapped)
        self.results = results
        self.one_by_one = tracked and bool(written(eq))
        """True if rows are views one by one: autograd refuses to have those of `unbind` written."""
        self.tracked = tracked
        self.ordered = ordered
        self.below = not (tracked or written(eq)) and is_plain_below_autograd(eq.op)
        self.block = MOST_SAMPLES
        if results is not None:
            self.block = max(1, min(MOST_SAMPLES, BLOCK_BYTES // max(1, results.sample_bytes)))
        self.__name__ = f"loop_{base_name(eq.op)}"

    def __call__(self, size: int, *values: Any) -> Any:
        """The results of all samples, each `[B, *shape]`."""
        return self.packed(self.run(size, values))

    def packed(
        self, found: Sequence[torch.Tensor]
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """The results as the emitted call returns them, None for one that is not used."""
        if self.results is None:
            return ()
        if self.results.single:
            return found[0]
        each = iter(found)
        return tuple([next(each) if wanted else None for wanted in self.results.wanted])

    def only(self, wanted: Sequence[bool]) -> OperatorLoop:
        """This loop, of whose results only some are used."""
        made = copy.copy(self)
        if self.results is not None:
            made.results = self.results.only(wanted)
        return made

    def into(self, size: int, *values: Any, out: torch.Tensor) -> torch.Tensor:
        """Compute the only result into `out`."""
        self.run(size, values, [out])
        return out

    def run(
        self,
        size: int,
        values: Sequence[object],
        memory: list[torch.Tensor] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Sequence[torch.Tensor]:
        """The results of all samples, each `[B, *shape]`.

        Args:
            size: Number of samples.
            values: The mapped arguments, then the shared ones.
            memory: Where to compute the results, if they have a place.
            numbers: For each sample the number with which its row begins, if rows do.
        """
        mapped = cast("Sequence[torch.Tensor]", values[: self.count])
        shared, results = values[self.count :], self.results
        if results is None:
            for start in range(0, size, MOST_SAMPLES):
                stop = min(start + MOST_SAMPLES, size)
                self.calls(self.rows(mapped, start, stop, numbers), *shared)
            return ()
        if not size:
            if memory is not None:
                return memory
            device = next(t.device for t in values if isinstance(t, torch.Tensor))
            return [torch.empty((0, *s.shape), dtype=s.dtype, device=device) for s in results.used]
        alone = self.tracked or bool(dispatch_depth())
        share = not (self.ordered or alone) and size > 2 and torch.get_num_threads() > 1
        with below_autograd() if self.below and not alone else contextlib.nullcontext():
            at_once = alone or results.quantised or (size <= self.block and not share)
            if memory is None and at_once:
                columns = results.columns(self.calls(self.rows(mapped, 0, size, numbers), *shared))
                return [results.stacked(i, column) for i, column in enumerate(columns)]
            blocks = _Blocks(self, results, mapped, shared, memory, numbers)
            blocks.run(size, share)
            assert blocks.memory is not None
            return blocks.memory

    def rows(
        self,
        mapped: Sequence[torch.Tensor],
        start: int,
        stop: int,
        numbers: Sequence[int] | None,
    ) -> Iterable[object]:
        """The arguments of the samples from `start` to `stop` that differ by sample."""
        columns: list[Sequence[object]] = [] if numbers is None else [numbers[start:stop]]
        for t in mapped:
            if self.one_by_one:
                columns.append([t.select(0, i) for i in range(start, stop)])
            elif start == 0 and stop == t.shape[0]:
                columns.append(t.unbind(0))
            else:
                columns.append(t.narrow(0, start, stop - start).unbind(0))
        return zip(*columns, strict=True)


class _Blocks:
    """One run of a loop, block by block."""

    def __init__(
        self,
        loop: OperatorLoop,
        results: Results,
        mapped: Sequence[torch.Tensor],
        shared: Sequence[object],
        memory: list[torch.Tensor] | None,
        numbers: Sequence[int] | None,
    ):
        self.loop = loop
        self.results = results
        self.mapped = mapped
        self.shared = shared
        self.memory = memory
        self.numbers = numbers

    def run(self, size: int, may_share: bool) -> None:
        """Compute all samples, in threads if their calls take long and leave cores unused."""
        start, step = 0, self.loop.block
        if may_share:
            start = min(step, PROBED, max(1, size // 8))
            wall, cpu = time.perf_counter(), time.process_time()
            self._compute(size, 0, start)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            each = wall / start
            long = each > LONG_CALL_SECONDS and each * (size - start) > LONG_REST_SECONDS
            if long and cpu < BUSY * wall:
                threads = torch.get_num_threads()
                step = max(1, min(step, (size - start) // (4 * threads)))
                self._share(size, start, step, threads)
                return
        for at in range(start, size, step):
            self._compute(size, at, min(at + step, size))

    def _compute(self, size: int, start: int, stop: int) -> None:
        """Compute the samples from `start` to `stop` into their rows."""
        rows = self.loop.rows(self.mapped, start, stop, self.numbers)
        columns = self.results.columns(self.loop.calls(rows, *self.shared))
        if self.memory is None:
            shapes = [(size, *spec.shape) for spec in self.results.used]
            pairs = zip(shapes, columns, strict=True)
            self.memory = [pages.whole(shape, c[0].dtype, c[0].device) for shape, c in pairs]
        for i, (column, memory) in enumerate(zip(columns, self.memory, strict=True)):
            self.results.write(i, column, memory.narrow(0, start, stop - start))

    def _share(self, size: int, start: int, step: int, threads: int) -> None:
        """Compute the samples from `start` on in this thread and others.

        The error that is raised is that of the earliest sample, as in a loop.
        """
        starts = iter(range(start, size, step))
        failed: dict[int, Exception] = {}
        inference = torch.is_inference_mode_enabled()
        stopped = threading.Event()

        def work() -> None:
            if torch.get_num_threads() != threads:
                return  # its kernels would split sums otherwise
            with torch.inference_mode(inference), torch.no_grad(), below_autograd():
                for at in starts:
                    if stopped.is_set() or any(before < at for before in failed):
                        return
                    try:
                        self._compute(size, at, min(at + step, size))
                    except Exception as error:
                        failed[at] = error

        others = [threading.Thread(target=work, daemon=True) for _ in range(threads - 1)]
        try:
            for thread in others:
                thread.start()
            work()
        except BaseException:  # an interrupt
            stopped.set()
            raise
        finally:
            for thread in others:
                if thread.ident is not None:
                    thread.join()
        if failed:
            raise failed[min(failed)]


def is_plain_below_autograd(op: OpOverload) -> bool:
    """True if a call that autograd does not record is what an operator's layer for autograd does.

    So it is for torch's own operators and those of `torch.library.custom_op`, for which that layer
    is python code: without it a call of one that adds three numbers takes 0.6 of the time.
    """
    return op.namespace == "aten" or schema_of(op).name in custom_operators


def runs_python(op: OpOverload) -> bool:
    """True if a call of an operator on the CPU may run python code, which needs python's lock.

    Only torch's own operators are known not to, unless python code has been put in the place of a
    kernel of any of them: other operators call that.
    """
    if op.namespace != "aten" or not isinstance(python_kernels, set):
        return True
    elsewhere = "Meta", "MPS", "CUDA", "Conjugate", "Negative", "Python"
    return any(name.startswith("aten/") and not name.endswith(elsewhere) for name in python_kernels)
