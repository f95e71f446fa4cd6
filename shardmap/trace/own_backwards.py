"""Record the backward of each `torch.autograd.Function` that outer gradients reach.

Once the function has returned, the backward is run on the sample's saved tensors and a sample
cotangent, under the same recorder and the same watch: what it reads decides what replays do as much
as what the function reads. Its calls are taken out of the recording and become a program of their
own, in the equation of the Function's application.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch.amp import autocast_mode
from torch.utils.hooks import RemovableHandle

from shardmap import errors
from shardmap._torch import pytree
from shardmap.program.analysis import random_call, written
from shardmap.program.autocast import Modes, autocast_state, is_cast_free
from shardmap.program.ir import GRAD, NO_GRAD, Equation, Param, Program, Var
from shardmap.program.own_backward import NO_EFFECT, TOO_DEEP, Backward, backward_of
from shardmap.trace.backward_calls import Calls
from shardmap.trace.backward_states import Watched, same_calls
from shardmap.trace.cotangents import REMEDY, argument_vars, cotangents, missing
from shardmap.trace.escapes import Doors
from shardmap.trace.guarded_outputs import guard_outputs
from shardmap.trace.histories import Applied, HookNode, described, guard_of, is_function, is_torchs
from shardmap.trace.node_hooks import (
    hooks_before,
    nodes_before,
    refuse_changes_by_modes,
    refuse_hidden_backwards,
    refuse_node_hooks,
)
from shardmap.trace.recorder import Recorder
from shardmap.trace.surroundings import callers_functions_aside

DEPTH = 3
"""Derivatives of a higher order are refused where they need a Function's own backward: one that is
called by its own backward would be recorded for ever."""


def record_backwards(
    recorder: Recorder, doors: Doors, out: object, samples: list[torch.Tensor]
) -> bool:
    """Record the backwards that lead to an output; False if the recording must be made again.

    That is so if the function was expected to repeat its last recording, and has applied another
    Function.

    Args:
        recorder: The recorder, once the function has returned.
        doors: The mode that watched the doors.
        out: The function's result.
        samples: The samples, which the function may have written to.

    Raises:
        AutogradFunctionError: A backward cannot be recorded.
        EscapeError: A backward computes in numpy, say.
    """
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    inside = [t for t in outputs if t.requires_grad and not recorder.is_outer(t)]
    recorder.refuse_functions_behind_views(nodes_before([*inside, *samples], recorder), samples)
    if not (inside or recorder.applied or recorder.hooks or recorder.changed):
        return True
    found = nodes_before(inside, recorder)
    refuse_node_hooks(recorder, found)
    refuse_hidden_backwards(recorder, found)
    guard_outputs(recorder, doors.regions.values(), inside)
    functions = list(filter(is_function, found))
    if not (functions or recorder.applied or recorder.hooks or recorder.changed):
        return True
    for tensor in inside:
        recorder.encode(tensor, [], False)
    refuse_changes_by_modes(recorder, found)
    for node in functions:
        if id(node) in recorder.applied:
            continue
        if recorder.is_repeating:
            return False
        raise errors.AutogradFunctionError(
            f"{recorder.call}: {described(node)} lies between the inputs "
            "and an output that requires grad, and its result is not that of an operator in its "
            f"forward, so that its backward cannot be followed; {REMEDY}"
        )
    hooks = hooks_before(recorder, {id(node) for node in found})
    outer = {v.group for v in map(recorder.known, inside) if v is not None}
    reached: list[object] = [*found, *[recorder.put_hooks(of_one, outer) for of_one in hooks]]
    count = len(recorder.hooks)
    reached_nodes = {id(node) for node in reached}
    watched = {
        id(applied): Watched(recorder, applied)
        for applied in recorder.applied.values()
        if id(applied.node) in reached_nodes
    }
    for each in watched.values():
        each.look()
    try:
        with callers_functions_aside(), doors, recorder:
            _fill(recorder, reached, 0, 0, watched)
        for each in watched.values():
            each.look()
        if any(each.changed() for each in watched.values()):
            with callers_functions_aside(), doors, recorder:
                for each in watched.values():
                    _settle_state(recorder, each)
    except errors.EscapeError as error:
        raise errors.EscapeError(
            f"{error}; this happens in a backward that gradients from outside would call, where an "
            "operator of one's own needs register_autograd (under torch.no_grad() nothing calls it)"
        ).with_traceback(error.__traceback__) from error  # which tells what has left torch
    if len(recorder.hooks) > count:
        raise errors.AutogradFunctionError(
            f"{recorder.call}: register_hook in a backward that gradients from outside reach, "
            "which would not call the hook; change the gradient with torch operators"
        )
    for applied in recorder.applied.values():
        if isinstance(applied.node, HookNode):
            applied.node.close()
        if not is_torchs(applied.node):
            vars(applied.node).clear()  # python's references to the sample's tensors
    for hook in recorder.hooks:
        RemovableHandle.remove(hook.handle)
    recorder.applied.clear()
    recorder.hooks.clear()
    return True


_FREED = "pass retain_graph=True to the gradient inside, or detach what it is taken of at the end"


def _saves_its_result(recorder: Recorder, node: object) -> bool:
    """True if a node of autograd's graph may save its result, and differentiate by it."""
    if is_function(node):
        text = recorder.equations[recorder.applied[id(node)].position].args[4]
        return text in (NO_EFFECT, TOO_DEEP) or bool(backward_of(text).saved)
    names = [name for name in dir(type(node)) if name.startswith("_saved_result")]
    return bool(names) and type(node).__name__ != "ReluBackward0"


def _again(
    recorder: Recorder,
    watched: Watched,
    depth: int,
    differentiated: bool,
    modes: Modes | None = None,
) -> tuple[_Recorded, _Run]:
    """Run a backward again, in some modes or without autocast."""
    again = _Recorded(recorder, watched.applied, depth, watched)
    with (modes or Modes.now().plain()).entered():
        return again, again.run(argument_vars(recorder, watched.applied), differentiated)


def _settle_state(recorder: Recorder, watched: Watched) -> None:
    """Run a backward again if its first run may have changed what it reads."""
    changed, applied = watched.changed(), watched.applied
    if changed:
        changes = watched.settle(changed, lambda d: _again(recorder, watched, 0, d)[1].calls)
        eq = recorder.equations[applied.position]
        _amend(recorder, applied, eq, changes=changes)


def _settle_mode(recorder: Recorder, watched: Watched, depth: int) -> None:
    """Record a backward as for a plain gradient if it asks which one is taken."""
    if watched.same_again(lambda d: _again(recorder, watched, depth, d)[1].calls, False):
        return
    if watched.changes_itself():
        raise errors.AutogradFunctionError(
            f"{recorder.call}: the backward of {described(watched.applied.node)} asks "
            f"torch.is_grad_enabled() and changes what it reads, so that it is another one each "
            f"time; {REMEDY}"
        )
    plain, ran = _again(recorder, watched, depth, False)
    eq = plain.put_together(ran, None if is_cast_free(ran.calls.equations) else "")
    watched.calls = ran.calls
    _amend(recorder, watched.applied, eq, plain=True)


def _settle_modes(recorder: Recorder, watched: Watched, depth: int) -> None:
    """Note the modes that a backward was recorded in if it computes something else in others."""
    plain = Modes.now().plain()
    for modes in plain.others(watched.asks):
        if not watched.same_again(
            lambda d, m=modes: _again(recorder, watched, depth, d, m)[1].calls, True
        ):
            eq = recorder.equations[watched.applied.position]
            _amend(recorder, watched.applied, eq, asked=str(plain))
            return


def _amend(recorder: Recorder, applied: Applied, eq: Equation, **fields: object) -> None:
    """Put another equation in the place of an application's, with fields of its backward set."""
    text = backward_of(eq.args[4])._replace(**fields).dumps()
    recorder.equations[applied.position] = eq._replace(args=(*eq.args[:4], text))


def _fill(
    recorder: Recorder,
    reached: Iterable[object],
    start: int,
    depth: int,
    watched: Mapping[int, Watched],
) -> None:
    """Fill in the backwards of the Functions' equations from `start` on."""
    nodes = {id(node) for node in reached}
    for applied in list(recorder.applied.values()):
        if applied.position < start or id(applied.node) not in nodes:
            continue
        if depth == DEPTH:
            args = argument_vars(recorder, applied)
            eq = applied.without_effect()
            values = eq.args[1]
            given = tuple([v for v in args if v is not None])
            flags = (GRAD,) * len(given) + (NO_GRAD,) * len(values)
            recorder.equations[applied.position] = applied.equation(
                (given, values, (), (), TOO_DEEP), flags
            )
        else:
            each = watched.get(id(applied)) or Watched(recorder, applied)
            recorded = _Recorded(recorder, applied, depth, each)
            recorder.equations[applied.position] = recorded.equation()
            if each.asks_for_mode:
                _settle_mode(recorder, each, depth)
            if each.asks:
                _settle_modes(recorder, each, depth)


class _Run(NamedTuple):
    """One run of a backward."""

    calls: Calls
    wanted: list[Var]
    """The arguments that gradients were returned for."""
    once: str
    """Reason why the gradients must not be differentiated again; empty if they may."""
    materialised: bool
    """True if missing cotangents are zeros."""


class _Recorded:
    """The backward of one application of a Function, run and recorded."""

    def __init__(self, recorder: Recorder, applied: Applied, depth: int, watched: Watched):
        self.recorder = recorder
        self.watched = watched
        self.applied = applied
        self.node = applied.node
        self.depth = depth
        self.start = len(recorder.equations)

    def equation(self) -> Equation:
        """Make the equation of the application."""
        self.watched.look()
        ran, only = self._under_autocast(argument_vars(self.recorder, self.applied))
        self.watched.look()
        self.watched.calls = ran.calls
        return self.put_together(ran, only)

    def _under_autocast(self, inputs: list[Var | None]) -> tuple[_Run, str | None]:
        """Run the backward without autocast, as torch asks to take gradients.

        Returns:
            The run; the only autocast state in which the backward computes this, None if it does in
            any.
        """
        node = self.node
        kind = torch.device(next(iter(self.applied.pairs.values()))[0].spec.device).type
        state, raised = autocast_state(kind), self.recorder.raised
        try:
            with Modes.now().plain().entered():
                ran = self.run(inputs, True)
        except errors.AutogradFunctionError:
            if not state:
                raise
            self.recorder.raised = raised
            return self.run(inputs, True), state  # what its forward has cast meets what is not
        if is_cast_free(ran.calls.equations):
            return ran, None
        if state:
            same = same_calls(self.recorder, ran.calls, self.run(inputs, True).calls)
        else:
            backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
            code = getattr(backward, "__code__", None)
            same = getattr(code, "co_filename", "") == autocast_mode.__file__  # @custom_bwd
        return ran, None if same else ""

    def run(self, inputs: list[Var | None], differentiated: bool) -> _Run:
        """Run the backward, and take its calls out of the recording.

        Args:
            inputs: The variables of the Function's arguments.
            differentiated: True to run it as if its gradient were differentiated again.
        """
        recorder, node = self.recorder, self.node
        given, materialised = missing(recorder, self.applied)
        names = cotangents(recorder, self.applied, given)
        written_before = set(recorder.written_groups)
        expected, recorder.expected = recorder.expected, None
        try:
            with torch.set_grad_enabled(differentiated):
                with recorder.watch or contextlib.nullcontext(), self.watched.running():
                    returned = (cast(Callable, node) if is_torchs(node) else node.apply)(*given)
                wanted = self._wanted(returned, inputs)
                flags: list[int] = []
                once = "" if guard_of(node) else self._once([g for _, g in wanted])
                outs = tuple([recorder.encode(g, flags, False) for _, g in wanted])
            further = nodes_before([g for _, g in wanted], recorder)
            _fill(recorder, further, self.start, self.depth + 1, {})
        except errors.ShardmapError:
            raise
        except Exception as error:
            remedy = _FREED if "graph a second time" in str(error) else REMEDY
            raise errors.AutogradFunctionError(
                f"{recorder.call}: the backward of {described(node)}, which gradients from outside "
                f"reach, raised {type(error).__name__} for one sample ({error}); {remedy}"
            ) from error
        finally:
            recorder.written_groups = written_before
            recorder.expected = expected
            equations = recorder.equations[self.start :]
            del recorder.equations[self.start :]
            # Its questions are checked where it runs; they are none about the function's own path.
            recorder.asked[:] = [position for position in recorder.asked if position < self.start]
        out_flags = tuple([NO_GRAD if once else f for f in flags])
        found = Calls(equations, names, outs, out_flags)
        return _Run(found, [var for var, _ in wanted], once, materialised)

    def _once(self, grads: list[torch.Tensor]) -> str:
        """Reason why gradients must not be differentiated again; empty if they may."""
        if any(type(g.grad_fn).__name__ == "Error" for g in grads):
            return (
                f"{described(self.node)} is differentiated twice, and its backward is marked "
                "@once_differentiable"
            )
        if isinstance(self.node, HookNode) and self._keeps_what_is_beside(grads):
            return (
                "a tensor with a hook (register_hook) is differentiated twice, and it was used "
                "before the hook was registered by calls whose results the hook may keep; register "
                "the hook before, or take the gradients inside the mapped function "
                "(torch.autograd.grad)"
            )
        if isinstance(self.node, HookNode) and _saves_its_result(
            self.recorder, self.node.hooks[0].node
        ):
            return (
                "a tensor with a hook (register_hook) is differentiated twice, and the operator "
                "that made it saved it for its own backward, where the hook would not be called; "
                "register the hook on a view of the tensor (t.view_as(t)) that is used in its place"
            )
        return ""

    def _keeps_what_is_beside(self, grads: list[torch.Tensor]) -> bool:
        """True if a history that leads to a tensor with hooks, and not through them, is kept."""
        nodes = [applied.node for applied in self.recorder.applied.values()]
        beside = set[int]().union(*[n.beside for n in nodes if isinstance(n, HookNode)])
        read = {
            v.group
            for eq in self.recorder.equations[self.start :]
            for v, flag in zip(eq.inputs(), eq.flags, strict=True)
            if flag == GRAD
        }
        read |= {v.group for v in map(self.recorder.known, grads) if v is not None}
        return bool(beside & read)

    def _wanted(self, returned: object, inputs: list[Var | None]) -> list[tuple[Var, torch.Tensor]]:
        """The gradients that lead on, each with the variable that it is the gradient of.

        They are converted as autograd does: summed to the shape of the argument, in its dtype.
        """
        node = self.node
        edges = node.next_functions
        needs = [n is not None for n, _ in edges] if is_torchs(node) else node.needs_input_grad
        grads = returned if isinstance(returned, tuple) else (returned,)
        grads = (*grads, *[None] * (len(needs) - len(grads)))
        wanted = []
        given = [g for g, need in zip(grads, needs, strict=False) if need]
        for var, grad in zip(inputs, given, strict=True):
            if var is None or not isinstance(grad, torch.Tensor):
                continue
            if grad.is_complex() and not var.spec.dtype.is_complex:
                grad = grad.real
            if tuple(grad.shape) != var.spec.shape:
                grad = grad.sum_to_size(var.spec.shape)
            wanted.append((var, grad.to(var.spec.dtype)))
        return wanted

    def put_together(self, ran: _Run, only: str | None) -> Equation:
        """Make the equation of the application, with the program of its backward.

        Args:
            ran: What was recorded.
            only: The autocast state in which the backward computes this; None for any.
        """
        recorder, found, once = self.recorder, ran.calls, ran.once
        pairs, guard = [pair for _, pair in sorted(self.applied.pairs.items())], guard_of(self.node)
        hook = isinstance(self.node, HookNode)
        anchors = [(pairs[0][0], GRAD)] if once and hook else []
        anchors += [] if guard is None else [(var, NO_GRAD) for var in guard.tensors]
        literals = {var.index for var, _ in recorder.literals}
        program, saved, held, numbers = found.program([v for _, v in pairs], literals, anchors)
        self._refuse(program, held, {v.group for v in found.cotangents})
        recorder.asks_later |= any(eq.answer is not None for eq in program.equations)
        name = self.watched.keep()
        backward = Backward(
            program, len(found.cotangents), saved, once, hook, ran.materialised, name, "", only,
            guard="" if guard is None else guard.kind,
        )  # fmt: skip
        args = (
            tuple(ran.wanted),
            tuple([value for value, _ in pairs]),
            tuple([var for var, _ in held]),
            tuple(map(Param, numbers)),
            backward.dumps(),
        )
        flags = (
            *[GRAD] * len(ran.wanted),
            *[NO_GRAD] * len(pairs),
            *[GRAD if flag == GRAD else NO_GRAD for _, flag in held],
        )
        return self.applied.equation(args, flags)

    def _refuse(self, program: Program, held: list[tuple[Var, int]], own: set[int]) -> None:
        """Refuse a backward that cannot be run later for all samples."""
        recorder, name = self.recorder, described(self.node)
        before = f"{recorder.call}: the backward of {name}"
        later = {
            v.index for eq in recorder.equations[self.applied.position :] for v in eq.results()
        }
        if any(var.index in later for var, _ in held):
            raise errors.AutogradFunctionError(
                f"{before}, which gradients from outside reach, reads a tensor that is made after "
                f"the Function was applied; {REMEDY}"
            )
        literals = {var.group for var, _ in recorder.literals}
        outside = {var.group for var, _ in held} - literals - own
        if any(v.group in outside for eq in program.equations for v in written(eq)):
            raise errors.AutogradFunctionError(
                f"{before}, which gradients from outside reach, writes in place to a tensor that "
                "was made before; clone it first"
            )
        if any(map(random_call, program.equations)):
            raise errors.AutogradFunctionError(
                f"{before}, which gradients from outside reach, draws random numbers; draw them in "
                "its forward and save them"
            )
