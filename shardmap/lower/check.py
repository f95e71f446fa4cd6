"""Check a lowered program before its first run.

On at most two samples, call by call, against the recording.

Kernels choose the strides of their results by their inputs, so that no rule can promise them for
every layout, and a rule may be wrong. What differs is mended: other strides are put right by a copy
after the call; another shape or dtype, or an output that is not what the function itself returned
for the sample that was recorded, moves calls one tier down.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from shardmap import errors
from shardmap._torch import default_generator_states, restore_default_generators
from shardmap.lower import cache as engine
from shardmap.lower.batched import Fixes
from shardmap.lower.cache import Lowered
from shardmap.lower.replayed import restride
from shardmap.program.operators import op_info
from shardmap.rules.lowering import V, values
from shardmap.trace.recording import Recording

logger = logging.getLogger("shardmap")

_TOLERANCE = {
    torch.float64: 1e-6,
    torch.complex128: 1e-6,
    torch.float32: 1e-2,
    torch.complex64: 1e-2,
}
"""Of the largest entry of an output. Wide: batched kernels round differently, and what is looked
for is wrong altogether."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a program is tried on."""

    device: torch.device
    seed: int
    size: int
    """1 or 2 samples."""
    inputs: list[torch.Tensor]
    captured: list[torch.Tensor]
    literals: list[torch.Tensor]


def check(low: Lowered, recording: Recording, trial: Trial) -> None:
    """Try `low` and mend what differs from the recording.

    Raises:
        MismatchError: Even a loop over the samples does not give what the function returned: it is
            not a function of its arguments.
    """
    options, rewritten = low.options, bool(low.batched.summed or low.batched.ghosts)
    # first as each sample's values would be computed one by one: those can be compared with the
    # recording
    if rewritten:
        low.fixes.plain, low.options = True, replace(options, summed=())
        _lower_again(low, recording)
    try:
        _check_samples(low, recording, trial)
    except Exception:
        if rewritten:  # whoever catches it calls again, and meets the lowering as it was
            low.options, low.fixes.plain = options, False
            _lower_again(low, recording)
        raise
    if rewritten:
        low.options = options
        _check_rewritten(low, recording, trial)
    low.checked.add(trial.size > 1)


def _check_rewritten(low: Lowered, recording: Recording, trial: Trial) -> None:
    """Compare what is computed from factors, or summed over samples, with the values of samples one by one; else use no factors."""
    wanted = low.options.summed
    states = default_generator_states(trial.device)
    _, plain = _try(low, recording, trial)
    low.fixes.plain = False
    _lower_again(low, recording)
    sums = [
        only_sum and v.index in low.batched.summed
        for only_sum, v in zip(wanted or [False] * len(plain), low.batched.outputs, strict=True)
    ]
    expected = tuple([t.sum(0) if s else t for t, s in zip(plain, sums, strict=True)])
    restore_default_generators(states)
    try:
        _, outputs = _try(low, recording, trial)
        entered = max([_largest(t) for t in (*expected, *trial.inputs)], default=0.0)
        pairs = zip(expected, outputs, strict=True)
        agree = all(
            a.shape == b.shape
            and (a.device.type == "meta" or not a.numel() or _close(a, b, entered))
            for a, b in pairs
        )
    except errors.ShardmapError:
        raise
    except Exception as error:
        logger.info(
            "%s: computing from factors raised %s: %s",
            low.options.call,
            type(error).__name__,
            error,
        )
        agree = False
    if not agree:
        logger.warning(
            "%s: results from factors differ from those of samples one by one; factors are not "
            "used",
            low.options.call,
        )
        low.fixes.plain = True
        _lower_again(low, recording)


def _check_samples(low: Lowered, recording: Recording, trial: Trial) -> None:
    try:
        outputs = _mend(low, recording, trial)
    except Exception:
        # A sample that no tier can compute (a singular matrix, an index out of bounds) says nothing
        # about the rules.
        low.fixes = Fixes(plain=low.fixes.plain)
        _lower_again(low, recording)
        raise
    expected = recording.sample
    if (
        expected
        and not any(isinstance(t, FakeTensor) for t in expected)
        and not recording.random
        and low.program.inputs
    ):
        for tier in ("functorch", "loop"):
            wrong = _first_wrong(low, expected, outputs, trial)
            if wrong is None:
                break
            logger.warning(
                "%s: the batched result of the first sample differs from the function's own (%s); "
                "using slower rules",
                low.options.call,
                wrong,
            )
            low.fixes.tiers = {i: tier for i, eq in enumerate(low.program.equations) if eq.outs}
            _lower_again(low, recording)
            outputs = _mend(low, recording, trial)
        else:
            wrong = _first_wrong(low, expected, outputs, trial)
        if wrong is not None:
            low.fixes = Fixes(plain=low.fixes.plain)
            _lower_again(low, recording)
            raise errors.MismatchError(
                f"{low.options.call}: replaying the recorded calls does not give what the function "
                "returned for the first sample "
                f"({wrong}); "
                "does it read memory that changes meanwhile? Clone what it reads, or use the plain "
                "loop"
            )


def _lower_again(low: Lowered, recording: Recording) -> None:
    low.batched, low.replay = engine.lower_with(
        low.program, low.options, low.fixes, recording.sources
    )


def _mend(low: Lowered, recording: Recording, trial: Trial) -> list[torch.Tensor]:
    """Try until every result has the recorded shape, dtype and strides; returns the outputs."""
    while True:
        found, outputs = _try(low, recording, trial)
        if not found:
            return outputs
        for number, fault in found.items():
            if fault.tier is None:
                assert number not in low.fixes.restride, (
                    f"{low.options.call}: strides cannot be restored: {fault.text}"
                )
                low.fixes.restride.add(number)
            else:
                previous = low.fixes.tiers.get(number)
                assert previous != "loop", (
                    f"{low.options.call}: a loop over samples gave a wrong result: {fault.text}"
                )
                if fault.raised:
                    _blame_the_data(low, recording, trial, number)
                low.fixes.tiers[number] = "loop" if previous == "functorch" else "functorch"
            logger.info(
                "%s: %s; %s",
                low.options.call,
                fault.text,
                "restored by a copy" if fault.tier is None else "served by the next tier",
            )
        _lower_again(low, recording)


def _blame_the_data(low: Lowered, recording: Recording, trial: Trial, number: int) -> None:
    """Let an error pass that the loop over the samples raises too.

    `torch.func.vmap`, the next tier, may overlook it.

    It reads another sample's row, for example, where an index is out of bounds.
    """
    before = low.fixes.tiers.get(number)
    low.fixes.tiers[number] = "loop"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", engine.SlowLoopWarning)
        lenient = replace(low.options, strict=False)
        low.batched, low.replay = engine.lower_with(
            low.program, lenient, low.fixes, recording.sources
        )
    _try(low, recording, trial)
    if before is None:
        del low.fixes.tiers[number]
    else:
        low.fixes.tiers[number] = before


@dataclass(frozen=True, slots=True)
class _Fault:
    tier: str | None
    """None: only the strides differ."""
    text: str
    raised: bool = False
    """Whether the call raised an error."""


def _try(
    low: Lowered, recording: Recording, trial: Trial
) -> tuple[dict[int, _Fault], list[torch.Tensor]]:
    """Run the calls one by one.

    What differs from the recording, by number of the recorded call, and the outputs.
    """
    batched = low.batched
    env: dict[int, Any] = {}
    literals = [t.clone() for t in trial.literals]
    inputs = [
        _private(t) if i in recording.written_inputs else t for i, t in enumerate(trial.inputs)
    ]
    for v, t in zip(
        (*batched.inputs, *batched.captured, *batched.literals),
        (*inputs, *trial.captured, *literals),
        strict=True,
    ):
        env[v.index] = t
    symbols = {
        "BatchSize": trial.size,
        "ChunkStart": 0,
        "Seed": trial.seed,
        "SampleDevice": trial.device,
    }

    def value(arg: Any) -> Any:
        kind = type(arg)
        if kind is V:
            return env[arg.index]
        if kind is list or kind is tuple:
            return [value(a) for a in arg]
        if kind.__name__ in symbols:
            return symbols[kind.__name__]
        return recording.scalars[arg.scalar] if kind.__name__ == "Param" else arg

    calls = (*batched.fixed, *batched.chunk)
    last: dict[int, int] = {v.index: len(calls) for v in batched.outputs}
    for i, call in enumerate(calls):
        for v in values((call.args, tuple(v for _, v in call.kwargs))):
            last[v.index] = max(i, last.get(v.index, 0))
    found: dict[int, _Fault] = {}
    for i, call in enumerate(calls):
        number = call.equation
        try:
            out = call.target(
                *[value(a) for a in call.args], **{k: value(v) for k, v in call.kwargs}
            )
        except errors.ShardmapError:
            raise
        except Exception as error:
            if (
                low.fixes.tiers.get(number) == "loop"
                or number >= len(low.program.equations)
                or not call.mapped
            ):
                raise
            return found | {
                number: _Fault(
                    "next",
                    f"{low.program.equations[number]} raised {type(error).__name__}: {error}",
                    True,
                )
            }, []
        if call.outs:
            for index, t in zip(call.outs, out if call.several else (out,), strict=True):
                if index is None:
                    continue
                env[index] = t
                fault = (
                    _compare(batched.results[index], t, trial.size)
                    if index in batched.results
                    else None
                )
                if fault is not None:
                    found[number] = fault
                    if fault.tier is not None:
                        return found, []
                    env[index] = restride(t, batched.results[index][0].spec.stride)
        for v in values((call.args, tuple(v for _, v in call.kwargs))):
            if last.get(v.index) == i:
                env.pop(v.index, None)
    return found, [env[v.index] for v in batched.outputs]


def _private(rows: torch.Tensor) -> torch.Tensor:
    """A copy of rows that the program writes to."""
    return torch.empty_strided(
        rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device
    ).copy_(rows)


def _compare(expected: tuple[Any, V], t: torch.Tensor, size: int) -> _Fault | None:
    var, v = expected
    wanted = f"{var} should be {var.spec} for each of {size} samples, strides {var.spec.stride}"
    text = f"{wanted}; got {tuple(t.shape)} {t.dtype} strides {t.stride()}"
    if tuple(t.shape) != ((size, *v.shape) if v.mapped else v.shape) or t.dtype != var.spec.dtype:
        return _Fault("next", text)
    if v.mapped and t.numel():
        if any(
            n > 1 and a != s
            for n, a, s in zip(var.spec.shape, t.stride()[1:], var.spec.stride, strict=True)
        ):
            return _Fault(None, text)
    return None


def _first_wrong(
    low: Lowered, expected: tuple[torch.Tensor, ...], outputs: list[torch.Tensor], trial: Trial
) -> str | None:
    """The first output whose row for the recorded sample is not what the function returned for it."""
    never_written = _never_written(low)
    entered = max([_largest(t) for t in (*expected, *trial.inputs)], default=0.0)
    for number, (var, v, sample, out) in enumerate(
        zip(low.program.outputs, low.batched.outputs, expected, outputs, strict=True)
    ):
        row = out[0] if v.mapped else out
        if var.group in never_written or sample.numel() == 0 or row.device.type == "meta":
            continue
        if not _close(sample.detach(), row.detach().to(sample.device), entered):
            return f"output {number}"
    return None


def _never_written(low: Lowered) -> set[int]:
    """Memory that `torch.empty` made and nobody wrote to: it may hold anything."""
    made = {
        v.group
        for eq in low.program.equations
        if op_info(eq.op).uninitialised
        for v in eq.results()
    }
    writing = [
        eq for eq in low.program.equations if op_info(eq.op).writes or op_info(eq.op).writes_named
    ]
    return made - {v.group for eq in writing for v in eq.inputs()}


def _largest(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.device.type == "meta":
        return 0.0
    magnitudes = tensor.detach().abs()
    return float(magnitudes.where(magnitudes.isfinite(), 0).max())


def _close(a: torch.Tensor, b: torch.Tensor, entered: float) -> bool:
    """Whether two results agree.

    Where everything cancels (the gradient of a bias before a normalisation, of a key's bias before
    a softmax), what is left is rounding of the magnitudes that `entered`, not of the result.
    """
    if a.is_conj() or b.is_conj() or a.is_neg() or b.is_neg():
        a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.dtype not in _TOLERANCE:
        a, b, tolerance = a.float(), b.float(), 0.1
    else:
        tolerance = _TOLERANCE[a.dtype]
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    return bool(
        (a - b).abs().max() <= tolerance * a.abs().max() + 100 * torch.finfo(a.dtype).eps * entered
    )
