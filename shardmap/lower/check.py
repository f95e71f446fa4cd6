"""Try a lowering on real samples and return one that gives the function's own results.

Kernels choose the strides of their results by their inputs, so that no rule can guarantee them for
every layout, and a rule may be wrong. A fault leads to a new lowering: other strides are corrected
by a copy after the call; a call of another shape, dtype or value is served by the next tier.
Earlier lowerings are not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from shardmap import errors
from shardmap.lower import apart, trial
from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.closeness import close, largest, thinned
from shardmap.lower.codegen import Replay
from shardmap.lower.replayed import other_shape
from shardmap.lower.trial import Trial
from shardmap.program.analysis import never_written, recorded_bytes
from shardmap.program.ir import Program
from shardmap.rules import huge_pages as pages

logger = logging.getLogger("shardmap")


class Lower(Protocol):
    """Function that lowers one program."""

    def __call__(
        self, options: LoweringOptions, fixes: Fixes, quiet: bool = False
    ) -> tuple[BatchedProgram, Replay]:
        """The batched program and its functions.

        Args:
            options: The options of the lowering.
            fixes: Fixes that are known to be needed.
            quiet: True to neither warn of nor refuse calls that only the loop serves.
        """
        ...


@dataclass(frozen=True, slots=True)
class Verified:
    """A lowering that gives the function's own results for the samples of its trial."""

    batched: BatchedProgram
    replay: Replay
    fixes: Fixes
    loose: frozenset[int]
    """Positions of outputs whose rounding errors grow so far along the program that values cannot
    be compared: each operator by itself was right."""


def verified(
    program: Program,
    options: LoweringOptions,
    lower: Lower,
    tried: Trial,
    fixes: Fixes,
    slices: bool,
) -> Verified:
    """Lower `program`, try it on samples, and mend it until its results are right."""
    batched, replay = lower(options, fixes)
    rewritten = bool(batched.summed or batched.factored)
    if _is_heavy(program) and not (rewritten or options.grad or options.transformed):
        first = Verified(batched, replay, fixes, frozenset())
        if _is_right_at_once(program, first, tried, slices):
            return first
    if not rewritten:
        attempt = _Attempt(program, options, lower, tried)
        attempt.settle(fixes, (batched, replay))
        found = attempt.found
        outputs = attempt.outputs
    else:
        # First without sums over samples and factors: such values can be compared with
        # the function's own results.
        attempt = _Attempt(program, replace(options, summed=()), lower, tried)
        attempt.settle(replace(fixes, plain=True), None)
        found, outputs = _rewritten(program, options, lower, tried, attempt)
    if not (options.grad or options.transformed) and tried.size:
        found = _as_executed(program, options, lower, tried, found, outputs, slices)
    return found


HEAVY_FROM = 1 << 17
"""Bytes of recorded results per recorded call from which a program is first tried as a whole:
computing the samples a second time, call by call, takes longer than another generated function."""


def _is_heavy(program: Program) -> bool:
    """True if a program's arithmetic takes longer than the work around its calls."""
    return recorded_bytes(program) >= HEAVY_FROM * len(program.equations)


def _is_right_at_once(program: Program, found: Verified, tried: Trial, slices: bool) -> bool:
    """True if the function that executors call gives the function's own results for all samples.

    Every tensor on the way that is the batch of a recorded one has its shape, dtype and strides.
    Nothing is known about the faults of a program that is not right.
    """
    every = tried.comparable and len(tried.expected) == tried.size and not tried.random
    if not (every and program.inputs):
        return False
    batched, faults = found.batched, list[trial.Fault]()

    def seen(index: int, t: torch.Tensor) -> None:
        fault = trial.compare(*batched.results[index], t, tried.size)
        if fault is not None:
            faults.append(fault)

    memory = _slices(batched, tried) if slices else []
    try:
        outputs = _executed(found, tried, memory, seen)
    except Exception as error:  # it is raised again, or mended, call by call
        logger.info("a trial as a whole raised %s: %s", type(error).__name__, error)
        return False
    return not (faults or differences(program, batched, tried, list(outputs)))


def _slices(batched: BatchedProgram, tried: Trial) -> list[torch.Tensor]:
    """Memory for the outputs that chunks write to slices of the result."""
    sliced = [v for v in batched.outputs if v.mapped and v.index not in batched.summed]
    return [_filled((tried.size, *v.shape), v.dtype, tried.device) for v in sliced]


class _Attempt:
    """Lowers and tries a program until the outputs are those of the function."""

    def __init__(self, program: Program, options: LoweringOptions, lower: Lower, tried: Trial):
        self.program = program
        self.options = options
        self.lower = lower
        self.tried = tried
        self.outputs: list[torch.Tensor] = []
        self.fixes = Fixes()
        self.pair: tuple[BatchedProgram, Replay] | None = None
        self.loose: frozenset[int] = frozenset()

    @property
    def found(self) -> Verified:
        assert self.pair is not None
        return Verified(*self.pair, self.fixes, self.loose)

    def settle(self, fixes: Fixes, pair: tuple[BatchedProgram, Replay] | None) -> None:
        """Find the fixes with which the program gives the function's own results."""
        self.fixes = fixes
        self.pair = pair or self.lower(self.options, fixes)
        self._mend()
        if not self.tried.comparable or not self.program.inputs:
            return
        for _ in range(2 * len(self.program.equations) + 2):
            wrong = self._wrong_outputs(self.outputs)
            # Draws are given to the operators, so that a program which draws can be compared call
            # by
            # call; one draw for all samples is made once, and cannot be given.
            draws = self.tried.random and self.options.randomness == "different"
            if not wrong and not draws:
                return
            if not self._demote(wrong):
                return
            self._mend()
        raise AssertionError(f"{self.options.call}: the lowering of the program does not settle")

    def _mend(self) -> None:
        """Lower again until every result has the recorded shape, dtype and strides."""
        while True:
            assert self.pair is not None
            faults, self.outputs = trial.run(self.program, self.pair[0], self.fixes, self.tried)
            if not faults:
                return
            for number, fault in faults.items():
                self._answer(number, fault)
            self.pair = self.lower(self.options, self.fixes)

    def _answer(self, number: int, fault: trial.Fault) -> None:
        call = self.options.call
        if fault.restride:
            assert number not in self.fixes.restride, f"{call}: strides cannot be restored: {fault}"
            self.fixes = self.fixes.restrided([number])
            logger.info("%s: %s; restored by a copy", call, fault.text)
            return
        if fault.stale:
            raise other_shape(call, fault.text)
        if fault.raised:
            self._blame_the_data(number)
        self._next_tier(number, fault.text)
        logger.info("%s: %s; served by the next tier", call, fault.text)

    def _next_tier(self, number: int, reason: str) -> None:
        previous = self.fixes.tiers.get(number)
        if previous == "loop":
            name = self.program.equations[number].op.name()
            raise errors.MismatchError(
                f"{self.options.call}: {name} gives something else when it is called again with "
                "the "
                f"same arguments ({reason}); does it keep a state, or draw numbers by itself? Pass "
                "what it depends on as an argument, or use the plain loop"
            )
        tier = "loop" if previous == "functorch" else "functorch"
        self.fixes = self.fixes.demoted(number, tier, reason)

    def _blame_the_data(self, number: int) -> None:
        """Let an error pass that a loop over the samples raises too.

        `torch.func.vmap`, the next tier, may overlook it: it reads another sample's row, for
        example, where an index is out of bounds.
        """
        fixes = self.fixes.demoted(number, "loop", "")
        batched, _ = self.lower(self.options, fixes, quiet=True)
        trial.run(self.program, batched, fixes, self.tried)

    def _wrong_outputs(self, outputs: list[torch.Tensor]) -> dict[int, str]:
        """The outputs that are not the function's own results, each with a sample that shows it."""
        assert self.pair is not None
        if self.tried.random:
            return {}
        return differences(self.program, self.pair[0], self.tried, outputs)

    def _demote(self, wrong: dict[int, str]) -> bool:
        """Find the wrong operators and serve them by lower tiers; False if there are none."""
        assert self.pair is not None
        found = apart.compare(self.program, self.pair[0], self.tried)
        for number, text in found.wrong.items():
            logger.warning(
                "%s: %s from the function's own result; served by the next tier",
                self.options.call,
                text,
            )
            self._next_tier(number, text)
        if found.wrong:
            self.pair = self.lower(self.options, self.fixes)
            return True
        if not self.tried.random:
            self._refuse_other_samples(found, wrong)
            self.loose |= wrong.keys()
            logger.info(
                "%s: %s, but every operator by itself gives what the recorded call gave: rounding "
                "grows along the program",
                self.options.call,
                "; ".join(wrong.values()),
            )
        return False

    def _refuse_other_samples(self, found: apart.Apart, wrong: dict[int, str]) -> None:
        """Refuse a program that does not reproduce the function's own results.

        Raises:
            MismatchError: The recorded calls, one sample at a time, give other results; or an
                output is assembled wrongly.
        """
        assert self.pair is not None
        own = [torch.stack(column) for column in zip(*found.samples, strict=True)]
        mapped = [v.mapped for v in self.pair[0].outputs]
        own = [t if m else t[0] for t, m in zip(own, mapped, strict=True)]
        for outputs in (own, found.outputs):
            still = self._wrong_outputs(outputs)
            if still:
                raise errors.MismatchError(
                    f"{self.options.call}: replaying the recorded calls does not give what the "
                    f"function returned ({next(iter(still.values()))}); does it read memory that "
                    "changes meanwhile, or draw numbers by itself? Clone what it reads, or use the "
                    "plain loop"
                )


def differences(
    program: Program, batched: BatchedProgram, tried: Trial, outputs: list[torch.Tensor]
) -> dict[int, str]:
    """The outputs whose rows are not the function's own results for their samples."""
    empty = never_written(program)
    tensors = [t for row in tried.expected for t in row]
    entered = max([largest(t) for t in (*tensors, *tried.inputs)], default=0.0)
    found: dict[int, str] = {}
    for row, expected in enumerate(tried.expected):
        pairs = zip(program.outputs, batched.outputs, expected, outputs, strict=True)
        for number, (var, v, wanted, out) in enumerate(pairs):
            if var.group in empty or out.device.type == "meta":
                continue
            got = out[row] if v.mapped else out
            if not close(wanted, got.to(wanted.device), entered):
                sample = "first" if row == 0 else "last"
                found.setdefault(number, f"output {number} of the {sample} sample differs")
    return found


def _rewritten(
    program: Program, options: LoweringOptions, lower: Lower, tried: Trial, attempt: _Attempt
) -> tuple[Verified, list[torch.Tensor]]:
    """Compare results from factors, or summed ones, with the samples' values one by one."""
    plain = attempt.outputs
    for fixes in (replace(attempt.fixes, plain=False), attempt.fixes):
        batched, replay = lower(options, fixes)
        wanted = options.summed or [False] * len(plain)
        sums = [
            s and v.index in batched.summed for s, v in zip(wanted, batched.outputs, strict=True)
        ]
        expected = [t.sum(0) if s else t for t, s in zip(plain, sums, strict=True)]
        try:
            faults, outputs = trial.run(program, batched, fixes, tried)
        except errors.ShardmapError:
            raise
        except Exception as error:
            logger.info("%s: factors raised %s: %s", options.call, type(error).__name__, error)
            faults, outputs = {0: trial.Fault(False, str(error), True)}, []
        if not faults and _all_close(expected, outputs, tried):
            return Verified(batched, replay, fixes, attempt.loose), outputs
        if fixes.plain:
            break
        logger.warning(
            "%s: results from factors differ from those of samples one by one; factors are not "
            "used",
            options.call,
        )
    raise errors.MismatchError(
        f"{options.call}: sums over samples differ from the sum of the samples' own results; use "
        "reduce=None and sum the results, and report the function"
    )


def _all_close(expected: list[torch.Tensor], outputs: list[torch.Tensor], tried: Trial) -> bool:
    entered = max([largest(t) for t in (*expected, *tried.inputs)], default=0.0)
    return all(
        a.shape == b.shape and (a.device.type == "meta" or close(a, b, entered))
        for a, b in zip(expected, outputs, strict=True)
    )


def _as_executed(
    program: Program,
    options: LoweringOptions,
    lower: Lower,
    tried: Trial,
    found: Verified,
    outputs: list[torch.Tensor],
    slices: bool,
) -> Verified:
    """Try the function that executors call; make it plainer if its results differ.

    Calls are simplified no more, then results are copied into slices instead of computed there.
    """
    plainer = [found.fixes, replace(found.fixes, separate=True)]
    if slices:
        plainer.append(replace(found.fixes, separate=True, copied=True))
    never = never_written(program)
    kept = [var.group not in never for var in program.outputs]
    expected = [thinned(t) for t, k in zip(outputs, kept, strict=True) if k]
    for fixes in plainer:
        if fixes is not found.fixes:
            batched, replay = lower(options, fixes)
            found = replace(found, batched=batched, replay=replay, fixes=fixes)
        if not slices and found.batched.separate is None:
            return found
        memory = _slices(found.batched, tried) if slices else []
        if slices and not memory and found.batched.separate is None:
            return found
        try:
            got = _executed(found, tried, memory)
        except RuntimeError as error:
            if fixes is plainer[-1] or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning(
                "%s: the whole program raised %s where its calls one by one did not; it is made "
                "plainer",
                options.call,
                error,
            )
            continue
        computed = [thinned(t) for t, k in zip(got, kept, strict=True) if k]
        if _all_close(expected, computed, tried):
            return found
        logger.warning(
            "%s: results of the whole program differ from those of its calls one by one; it is "
            "made plainer",
            options.call,
        )
    raise errors.MismatchError(
        f"{options.call}: the batch's results depend on the memory that they are written to; use "
        "chunk_size=None, and report the function"
    )


def _executed(
    found: Verified,
    tried: Trial,
    slices: list[torch.Tensor],
    seen: Callable[[int, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The outputs of the generated function, computed into `slices` if there are any.

    `seen` is called with the tensors on the way.
    """
    replay = found.replay
    shared = tried.device, tried.seed, tried.scalars
    fixed = replay.fixed(*shared, list(tried.captured), tried.own_literals())
    given = [tried.size, 0, *shared, fixed, tried.own_inputs(), *([slices] if slices else [])]
    if seen is not None:
        return replay.checked(bool(slices))(*given, seen)
    return replay.chunk_into(*given) if slices else replay.chunk(*given)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Dense memory filled with values that no result has, as far as `thinned` looks at it."""
    memory = pages.whole(shape, dtype, device)
    if dtype.is_floating_point or dtype.is_complex:
        thinned(memory).fill_(float("nan"))
    else:
        thinned(memory).fill_(True if dtype is torch.bool else 77)
    return memory
