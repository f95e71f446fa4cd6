"""Results with a user-defined backward: the replay of an `autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from shardmap import errors
from shardmap._torch import functorch
from shardmap.lower.apart import by_recorded_calls
from shardmap.lower.batched import LoweringOptions
from shardmap.lower.own_refusals import (
    refuse_a_second,
    refuse_changes,
    refuse_modes,
    refuse_recomputation,
)
from shardmap.lower.replayed import restride
from shardmap.lower.trial import Trial
from shardmap.program.analysis import written
from shardmap.program.autocast import plain_numerics
from shardmap.program.ir import GRAD, Equation, Param, Program, Var
from shardmap.program.own_backward import TOO_DEEP, Backward, backward_of, is_linear
from shardmap.program.python_state import State
from shardmap.rules.lowering import B, Lowering, V
from shardmap.trace.recording import element
from shardmap.trace.surroundings import outer_recordings_suspended, transforms_set_aside


@dataclass(frozen=True)
class OwnBackward:
    """Gives batched results the history that a user-defined Function gave one sample's."""

    text: str
    """The recorded backward: see `shardmap.program.own_backward`."""
    options: LoweringOptions
    mapped: bool
    """True if the results, and with them the cotangents, have the mapped dimension."""
    inputs: tuple[bool, ...]
    """For each of the Function's arguments: True if it has the mapped dimension."""
    kept: tuple[bool, ...]
    """For each tensor that the backward keeps: True if it has the mapped dimension."""
    differentiable: tuple[bool, ...]
    """For each of those: True if the backward may be differentiated by it."""
    lowered: Callable
    """The function `shardmap.lower.cache.lowered`."""

    @staticmethod
    def of(
        eq: Equation,
        given: tuple[list[V], list[V], list[V]],
        options: LoweringOptions,
        lowered: Callable,
    ) -> OwnBackward:
        """The replay of a Function applied to `given`: its arguments, outputs, kept tensors."""
        inputs, outputs, kept = given
        text = eq.args[4]
        mapped = any(v.mapped for v in (*inputs, *outputs, *kept)) or not is_linear(text)
        return OwnBackward(
            text,
            options,
            mapped,
            tuple([v.mapped for v in inputs]),
            tuple([v.mapped for v in kept]),
            tuple([f == GRAD for f in eq.flags[len(inputs) + len(outputs) :]]),
            lowered,
        )

    def emit(
        self,
        b: Lowering,
        numbers: Sequence[Param],
        inputs: list[V],
        outputs: list[V],
        kept: list[V],
    ) -> tuple[V, ...]:
        """Emit the call that gives `outputs` their history."""
        if self.mapped:
            outputs = [b.batch(v) for v in outputs]
        size = B if self.mapped else 1
        return b.calls_several(
            self, len(outputs), size, list(numbers), inputs, outputs, kept, mapped=self.mapped
        )

    def __call__(
        self,
        size: int,
        numbers: Sequence[float],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        kept: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs, with a history.

        Args:
            size: Number of samples.
            numbers: The numbers that the backward takes from python.
            inputs: The Function's arguments that require grad.
            outputs: The outputs of its forward.
            kept: The tensors that the backward keeps beside its outputs.
        """
        if self.text != TOO_DEEP and backward_of(self.text).hook and not self.guards:
            self._refuse_hooks_of_several(inputs)
        outputs = [t.detach() for t in outputs]
        kept = [t if d else t.detach() for t, d in zip(kept, self.differentiable, strict=True)]
        # In a tuple, where autograd does not look: a gradient does not reach what is kept, and the
        # hooks of a captured parameter would be called with None.
        return _Given.apply(self, size, tuple(numbers), tuple(kept), *inputs, *outputs)

    @property
    def guards(self) -> bool:
        """True if it leaves the gradient as it is, and only compares a state."""
        return self.text != TOO_DEEP and bool(backward_of(self.text).guard)

    def _refuse_hooks_of_several(self, inputs: Sequence[torch.Tensor]) -> None:
        """Refuse a hook on a tensor that several derivatives around the call differentiate.

        A Function is differentiated by each; the loop's hook is called by the innermost alone.

        Raises:
            TransformError: `torch.func.grad` around the call is itself differentiated.
        """
        levels = functorch.get_interpreter_stack() or []
        count = sum(level.key() == functorch.TransformType.Grad for level in levels)
        if count and count + any(element(t).requires_grad for t in inputs) > 1:
            raise errors.TransformError(
                f"{self.options.call}: a hook (register_hook) inside the function, and several "
                "derivatives around the call, by torch.func and by autograd: each would call the "
                "hook, where the loop's is called by the innermost alone; take one of them only "
                "(torch.no_grad() around torch.func.grad, or weights that do not require grad), or "
                "write the hook as the backward of a torch.autograd.Function"
            )

    def gradients(
        self,
        size: int,
        numbers: tuple[float, ...],
        cotangents: Sequence[torch.Tensor | None],
        kept: Sequence[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """The gradient of each input, from the cotangents.

        Args:
            size: Number of samples.
            numbers: The numbers that the backward takes from python.
            cotangents: One for each output.
            kept: The outputs that the backward reads, then the tensors it keeps beside them.
        """
        if self.text == TOO_DEEP:
            raise errors.AutogradFunctionError(
                f"{self.options.call}: a derivative of an order higher than three needs the "
                "backward of a custom autograd.Function that its own backward applies; write it "
                "with torch operators"
            )
        if self.guards:
            return list(cotangents)
        backward = backward_of(self.text)
        given = [t for t in cotangents if t is not None]
        if len(given) < len(cotangents):
            return [None] * len(self.inputs)
        program = self._program(backward)
        count = len(backward.saved)
        batches = [*given, *kept[:count]]
        rest = list(kept[count:])
        if not self.mapped:
            size, batches = 1, [t.unsqueeze(0) for t in batches]
        elif self.kept:
            batches += [t for t, m in zip(rest, self.kept, strict=True) if m]
            rest = [t for t, m in zip(rest, self.kept, strict=True) if not m]
        inputs = [_with_rows(t, v) for t, v in zip(batches, program.inputs, strict=True)]
        captured, literals = rest[: len(program.captured)], rest[len(program.captured) :]
        return self._run(program, size, numbers, inputs, captured, literals)

    def _program(self, backward: Backward) -> Program:
        """The backward's program with unmapped values among its captured tensors."""
        program = backward.program
        first = backward.cotangents + len(backward.saved)
        own, kept = program.inputs[:first], program.inputs[first:]
        flags = self.kept[: len(kept)] if self.mapped else (False,) * len(kept)
        mapped = tuple([v for v, m in zip(kept, flags, strict=True) if m])
        shared = tuple([v for v, m in zip(kept, flags, strict=True) if not m])
        return program._replace(inputs=own + mapped, captured=shared)

    def _run(
        self,
        program: Program,
        size: int,
        numbers: tuple[float, ...],
        inputs: list[torch.Tensor],
        captured: list[torch.Tensor],
        literals: list[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        device = inputs[0].device
        options = replace(
            self.options, grad=torch.is_grad_enabled(), summed=(), device_type=device.type
        )

        def tried() -> Trial:
            return _trial(program, numbers, inputs, captured, literals)

        with (
            outer_recordings_suspended(),
            transforms_set_aside(),
            plain_numerics(),
            torch.no_grad(),
        ):
            low = self.lowered(
                program,
                options,
                tuple([t.is_contiguous() for t in inputs]),
                min(size, 2),
                {},
                tried,
                False,
            )
        seeds = (0,)  # a backward that draws is refused
        fixed = low.replay.fixed(device, seeds, numbers, captured, literals)
        with plain_numerics():
            outs = low.replay.chunk(size, 0, device, seeds, numbers, fixed, inputs)
        grads: list[torch.Tensor | None] = []
        for out, v, mapped in zip(outs, low.batched.outputs, self.inputs, strict=True):
            if not self.mapped:
                grads.append(out.squeeze(0) if v.mapped else out)
            elif mapped:
                grads.append(out if v.mapped else out.expand(size, *out.shape))
            else:
                grads.append(out.sum(0) if v.mapped else out * size)
        return grads


def _with_rows(t: torch.Tensor, var: Var) -> torch.Tensor:
    """A batch whose rows have the recorded strides, each in memory of its own."""
    if t.shape[0] > 1 and t.stride(0) == 0:
        t = t.contiguous()
    return restride(t, var.spec.stride)


def _trial(
    program: Program,
    numbers: tuple[float, ...],
    inputs: list[torch.Tensor],
    captured: list[torch.Tensor],
    literals: list[torch.Tensor],
) -> Trial:
    """The trial of a backward on two samples, with the results of the recorded calls."""
    rows = [_plain(t, v) for t, v in zip(inputs, program.inputs, strict=True)]
    size = min(rows[0].shape[0], 2)
    step = max(rows[0].shape[0] - 1, 1)
    groups = {v.group for eq in program.equations for v in written(eq)}
    trial = Trial(
        device=rows[0].device,
        seed=(0,),
        size=size,
        inputs=tuple([t[::step][:size] for t in rows]),
        captured=tuple([element(t).detach() for t in captured]),
        literals=tuple([element(t).detach() for t in literals]),
        scalars=numbers,
        written_inputs=frozenset([i for i, v in enumerate(program.inputs) if v.group in groups]),
        expected=(),
        random=False,
    )
    expected = tuple([tuple(by_recorded_calls(program, trial, row)) for row in range(size)])
    return replace(trial, expected=expected)


def _plain(t: torch.Tensor, var: Var) -> torch.Tensor:
    """The values of a batch without wrappers and history.

    Of what `is_grads_batched=True` wraps, which has no `detach`, a stand-in.
    """
    if not functorch.is_legacy_batchedtensor(t):
        return element(t).detach()
    values = torch.linspace(0.5, 1.5, t.numel(), device=t.device)
    return restride(values.view(t.shape).to(t.dtype), var.spec.stride)


class _Context(Protocol):
    """The object in which autograd keeps data of one call."""

    own: OwnBackward
    size: int
    numbers: tuple[float, ...]
    count: int
    call: str
    why: str
    state: State | None
    taken: bool
    saved_tensors: tuple[torch.Tensor, ...]

    def set_materialize_grads(self, value: bool) -> None:
        """Set whether missing cotangents are passed as zeros."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Keep tensors for the backward."""


class _Given(torch.autograd.Function):
    """Autograd node for outputs of a user-defined Function, with its backward for all samples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        own: OwnBackward,
        size: int,
        numbers: tuple[float, ...],
        kept: tuple[torch.Tensor, ...],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        return tuple([t.detach() for t in tensors[len(own.inputs) :]])

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        own, size, numbers, kept, *tensors = inputs
        ctx.own, ctx.size, ctx.numbers, ctx.count = own, size, numbers, len(tensors)
        backward = backward_of(own.text) if own.text != TOO_DEEP else None
        saved = backward.saved if backward is not None else ()
        ctx.set_materialize_grads(backward is None or backward.materialised)
        ctx.taken = False
        ctx.state = None if backward is None else State(backward.function)
        ctx.save_for_backward(*[output[k] for k in saved], *kept)

    @staticmethod
    def backward(ctx: _Context, *cotangents: torch.Tensor | None) -> tuple:
        own = ctx.own
        if own.text != TOO_DEEP:
            call, kept = own.options.call, backward_of(own.text)
            refuse_changes(call, kept, ctx.state)
            refuse_a_second(call, kept, ctx.taken)
            refuse_modes(call, kept, [t.device.type for t in cotangents if t is not None])
            ctx.taken = True
        saved = _saved(ctx)
        once = backward_of(own.text).once if own.text != TOO_DEEP else ""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not once):
            grads = own.gradients(ctx.size, ctx.numbers, cotangents, saved)
        if once and torch.is_grad_enabled():
            given = [g for g in grads if g is not None]
            held = saved if backward_of(own.text).hook else ()
            given = iter(
                _GivenOnce.apply(own.options.call, once, len(given), *given, *cotangents, *held)
            )
            grads = [g if g is None else next(given) for g in grads]
        return (*[None] * 4, *grads, *[None] * (ctx.count - len(grads)))

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> tuple:
        own = ctx.own
        if own.text != TOO_DEEP and backward_of(own.text).hook:
            return (tangents[4],)
        raise _forward_mode(own.options.call)


def _forward_mode(call: str) -> errors.AutogradFunctionError:
    return errors.AutogradFunctionError(
        f"{call}: forward-mode AD around the call differentiates through a custom "
        "autograd.Function, whose own jvp a map does not follow, or through a result that a "
        "TorchDispatchMode changes; take the derivative inside the mapped function "
        "(torch.func.jvp), or write it with torch operators"
    )


def refuse_tangents(call: str, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse that forward mode differentiates by `tensors`, also under `torch.no_grad()`.

    Raises:
        AutogradFunctionError: One of them has a tangent.
    """
    _WithoutTangents.apply(call, *tensors)


class _WithoutTangents(torch.autograd.Function):
    """A question of forward mode: torch calls `jvp` if an argument has a tangent, and only then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: str, *tensors: torch.Tensor) -> torch.Tensor:
        return tensors[0].detach()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple, output: torch.Tensor) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> torch.Tensor:
        raise _forward_mode(ctx.call)


def _saved(ctx: _Context) -> tuple[torch.Tensor, ...]:
    """What the backward keeps.

    Raises:
        AutogradFunctionError: It has been written to since the map ran.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        what = str(error).partition("inplace operation: ")[2].partition(" is at version")[0]
        if ctx.own.guards:
            backward = backward_of(ctx.own.text)
            refuse_recomputation(ctx.own.options.call, backward, f"a tensor {what}")
        raise errors.AutogradFunctionError(
            f"{ctx.own.options.call}: a hook or the backward of a custom autograd.Function reads a "
            f"tensor ({what}) that was written in place between the map and its gradient; take the "
            "gradient before the write, or clone the tensor inside the mapped function and let the "
            "hook or the backward read the clone"
        ) from error


class _GivenOnce(torch.autograd.Function):
    """Gradients that must not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        call: str, why: str, count: int, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        return tuple([t.detach() for t in tensors[:count] if t is not None])

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        ctx.call, ctx.why = inputs[:2]

    @staticmethod
    def backward(ctx: _Context, *cotangents: torch.Tensor) -> tuple:
        raise errors.AutogradFunctionError(f"{ctx.call}: {ctx.why}")
