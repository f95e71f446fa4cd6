"""Turn the program of one sample into a program for any number of samples.

It decides which values are mapped, drops dead calls, moves calls that do not depend on the sample
out of the chunk loop, and serves operators in four tiers: ours, PyTorch's decompositions (at
recording), functorch for one operator, a loop over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardmap.factors import sums
from shardmap.factors.builder import FactorBuilder
from shardmap.factors.rewrite import from_factors
from shardmap.lower.batched import TIERS, BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.dead_calls import drop_dead
from shardmap.lower.out_calls import out_rule
from shardmap.lower.own_backward import OwnBackward, refuse_tangents
from shardmap.lower.rematerialise import postponed
from shardmap.lower.replayed import (
    check_answer,
    check_shapes,
    copy,
    cut,
    data_of,
    followed,
    fresh_leaf,
    no_view,
    own_tangent,
    restride,
)
from shardmap.lower.saved_results import saved_results
from shardmap.lower.simplify import simplified
from shardmap.program.analysis import (
    grad_equations,
    is_identity,
    live_equations,
    mapped_groups,
    random_call,
    written,
    written_through,
)
from shardmap.program.ir import FRESH_LEAF, GRAD, NO_GRAD, Equation, Program, Var
from shardmap.program.operators import BELOW_AUTOGRAD, deciders, op_info
from shardmap.program.own_backward import DATA, NO_EFFECT, NO_TANGENTS, OWN_BACKWARD
from shardmap.program.schema import span
from shardmap.rules import registry  # importing the package registers the families
from shardmap.rules.counted import counted, refuse_traced
from shardmap.rules.fallback import functorch_rule, loop_rule
from shardmap.rules.lowering import B, Lowering, V, values
from shardmap.rules.random import seeded_loop
from shardmap.rules.results import bound
from shardmap.rules.view import refuse_offsets_of_inputs
from shardmap.rules.view_folding import views


class _Batcher:
    """One lowering of one program."""

    def __init__(
        self,
        program: Program,
        options: LoweringOptions,
        fixes: Fixes,
        to_loop: Callable[[int, Equation], None],
        lowered: Callable,
        drawn: int,
    ):
        self.program, self.options = program, options
        self.fixes = fixes
        self.to_loop = to_loop
        self.lowered = lowered
        self.b = Lowering(options.device_type, options.randomness)
        self.b.transformed, self.b.drawn = options.transformed, drawn
        self.b.sample_device = program.inputs[0].spec.device
        self.env: dict[int, V] = {}
        self.mapped = mapped_groups(program, options.randomness, options.transformed)
        self.last_write: dict[int, int] = {}
        for i, eq in enumerate(program.equations):
            for v in written(eq):
                self.last_write[v.group] = i
        self.write_groups = set(self.last_write)
        self.written_through = written_through(program)
        self.needs: set[int] = set()
        # results in each memory since a write last gave all of them a history
        self.sharing: dict[int, list[int]] = {}
        self.identities: set[int] = set()
        self.tiers: dict[str, str] = {}
        self.results: dict[int, tuple[Var, V]] = {}
        self.summed: set[int] = set()
        self.written: dict[int, tuple[tuple[Var, V], ...]] = {}
        self.writer: dict[int, int] = {}
        """For each memory group, the variable through which it was last written."""
        enabled = not (options.grad or options.transformed or fixes.plain)
        self.builder = FactorBuilder(
            program, self.b, self.env, self.write_groups, self.mapped, enabled
        )

    def run(self) -> BatchedProgram:
        program, b = self.program, self.b
        inputs = [self._declare(v, True) for v in program.inputs]
        captured = [self._declare(v, False) for v in program.captured]
        literals = [self._declare(v, False) for v in program.literals]
        for var, v in zip(program.literals, literals, strict=True):
            if var.group in self.mapped:
                self.env[var.index] = self._materialise(v, var)
            elif var.group in self.write_groups:
                self.env[var.index] = b.call(torch.clone, v)
        kept = {v.group for v in program.inputs if v.group in self.write_groups}
        live = live_equations(program, self.write_groups, kept)
        grads = (
            grad_equations(program, self.write_groups) if self.options.grad else [False] * len(live)
        )
        taken = (*program.inputs, *program.captured) if self.options.grad else ()
        self.needs.update(v.index for v in taken)
        if self.builder.enabled:
            known = [self.builder.factors.of(v) for v in self._kept_outputs()]
            self.builder.kept += [f for f in known if f is not None]
        for i, eq in enumerate(program.equations):
            if live[i]:
                b.equation, b.grad = i, grads[i]
                self._equation(i, eq)
            b.drawn += random_call(eq)
        b.equation, b.grad = len(program.equations), self.options.grad
        outputs = self._outputs()
        fixed, chunk = postponed(*drop_dead(b.calls, outputs), outputs)
        tracked, separate, count = self.options.grad or self.options.transformed, None, b.count
        if not (tracked or self.fixes.separate):
            given = chunk, outputs, self.results, b.device_type, count
            chunk, count, separate = simplified(*given)
        return BatchedProgram(
            fixed,
            chunk,
            tuple(inputs),
            tuple(captured),
            tuple(literals),
            outputs,
            self.tiers,
            count,
            self.results,
            frozenset(self.summed),
            self.written,
            self.builder.notes,
            saved_results(program) if tracked else (),
            separate,
        )

    def _kept_outputs(self) -> list[Var]:
        """The outputs that are needed for each sample."""
        outputs = self.program.outputs
        wanted = self.options.summed or [False] * len(outputs)
        return [v for v, only_sum in zip(outputs, wanted, strict=True) if not only_sum]

    def _declare(self, var: Var, mapped: bool) -> V:
        v = self.b.value(mapped, var.spec.shape, var.spec.dtype)
        self.env[var.index] = v
        return v

    def _materialise(self, v: V, var: Var, empty: bool = False) -> V:
        """Give each sample a copy of an unmapped value that samples will write to.

        Each has the sample's strides. Of an `empty` one, not yet written to, nothing is copied.
        """
        stride = var.spec.stride
        rows = (span(var.spec.shape, stride), *stride)

        def materialise(t: torch.Tensor, size: int) -> torch.Tensor:
            if not empty and t.is_contiguous() and t.stride() == stride:
                return t.expand(size, *t.shape).clone(memory_format=torch.contiguous_format)
            made = t.new_empty_strided((size, *t.shape), rows)
            return made if empty else made.copy_(t)

        return self.b.call(materialise, v, B, shape=v.shape, dtype=v.dtype, mapped=True)

    def _argument(self, value: Any, flags: Any, i: int, eq: Equation, mapped: bool) -> Any:
        kind = type(value)
        if kind is Var:
            v = self.env[value.index]
            flag = next(flags)
            if mapped and self.last_write.get(value.group, -1) > i:
                # Writes that come later: lifted ones must not be seen here, and a rule's own calls
                # may keep for their backward what the recorded call does not (`gather` for
                # `index_select`).
                if not v.mapped or self._may_be_kept(value, eq):
                    v = self.b.call(torch.clone, v)
            below = eq.op in BELOW_AUTOGRAD
            return self._cut(v) if below else self._as_consumed(v, value, flag)
        if kind is tuple:
            return [self._argument(a, flags, i, eq, mapped) for a in value]
        return value

    def _may_be_kept(self, var: Var, eq: Equation) -> bool:
        """True if autograd may keep `var` for the backward of calls other than the recorded one."""
        return (
            self.b.grad
            and torch.Tag.pointwise not in eq.op.tags
            and all(v.group != var.group for v in (*eq.results(), *written(eq)))
            and any(v.index in self.needs for v in eq.inputs())
        )

    def _as_consumed(self, v: V, var: Var, flag: int) -> V:
        """`v` with the autograd flag that the sample's tensor had when a call used it."""
        if flag == GRAD:
            return v
        if self.options.transformed:
            # Tangents of forward mode stop only at detach, in any grad mode.
            if var.index not in self.identities:
                return v
            # Only what is written must stay a view of its memory; what is read has no tangent.
            written_later = var.index in self.written_through
            return self._cut(v) if written_later else self.b.call(torch.Tensor.detach, v)
        if not self.b.grad:
            return v
        if flag == FRESH_LEAF:
            return self.b.call(fresh_leaf, v)
        # Below autograd, results are consumed that it does not know yet: only a detach ends it.
        return self._cut(v) if var.index in self.needs and var.index in self.identities else v

    def _cut(self, v: V) -> V:
        """`v` detached from autograd. Under outer transforms only detach stops tangents."""
        if self.options.transformed:
            return self.b.call(torch.Tensor.detach, v)
        return self.b.call(cut, v)

    def _equation(self, i: int, eq: Equation) -> None:
        b = self.b
        for v in eq.results():
            self.sharing.setdefault(v.group, []).append(v.index)
        if is_identity(eq, self.written_through, self.options.transformed):
            source = eq.args[0]
            for out in eq.results():
                v = self.env[source.index]
                self.env[out.index] = v
                history = self.options.grad or self.options.transformed
                if out.index in self.written_through and history:
                    # A write gives the detached tensor, and its views, a history of their own.
                    data = eq.op is DATA and not self.options.transformed
                    self.env[out.index] = b.call(data_of, v) if data else self._cut(v)
                    continue
                self.identities.add(out.index)
                if source.index in self.needs:
                    self.needs.add(out.index)
                if eq.flags[0] == FRESH_LEAF:
                    # `v.requires_grad_()` is known by how it is consumed, also by an alias alone.
                    self.env[out.index] = self._as_consumed(v, source, FRESH_LEAF)
                    if b.grad:
                        self.needs.add(out.index)
            return
        if eq.op is OWN_BACKWARD:
            self._own_backward(i, eq)
            return
        if eq.op is NO_TANGENTS:
            given = self._argument(eq.args[0], iter(eq.flags), i, eq, False)
            return b.effect(refuse_tangents, self.options.call, given)
        mapped = any(self.env[v.index].mapped for v in eq.inputs()) or (
            self.options.randomness == "different" and random_call(eq)
        )
        for v in written(eq):
            history = self.options.transformed or (b.grad and v.index in self.needs)
            if history and self.writer.get(v.group, v.index) != v.index:
                self.env[v.index] = b.call(followed, self.env[v.index])
            self.writer[v.group] = v.index
        flags = iter(eq.flags)
        args = tuple([self._argument(a, flags, i, eq, mapped) for a in eq.args])
        kwargs = {k: self._argument(a, flags, i, eq, mapped) for k, a in eq.kwargs}
        call = self.options.call
        if eq.answer is not None and eq.answer[0] == "value":
            differ = [v.mapped for v in values(args)]
            b.effect(check_answer, eq.op, eq.answer[1], differ, call, args)
            return
        first = len(b.calls)
        out = self._apply(i, eq, args, kwargs, mapped)
        self._mark_writes(i, eq, first)
        self._bind(i, eq, out, mapped)
        if eq.answer is not None:
            results = [self.env[v.index] for v in eq.results()]
            b.effect(check_shapes, eq.answer[1], call, [v.mapped for v in results], results)

    def _own_backward(self, i: int, eq: Equation) -> None:
        """Give results of a user-defined Function its backward, if gradients are recorded."""
        b = self.b
        if eq.args[4] == NO_EFFECT or not (b.grad or self.options.transformed):
            for out, value in zip(eq.results(), eq.args[1], strict=True):
                self.env[out.index] = self.env[value.index]
            return
        flags = iter(eq.flags)
        inputs, outputs, kept = (self._argument(a, flags, i, eq, False) for a in eq.args[:3])
        own = OwnBackward.of(eq, (inputs, outputs, kept), self.options, self.lowered)
        outs = own.emit(b, eq.args[3], inputs, outputs, kept)
        self._bind(i, eq, outs, own.mapped)
        self.needs.update(v.index for v in eq.results())

    def _mark_writes(self, number: int, eq: Equation, first: int) -> None:
        """Mark the emitted calls by which a recorded write reaches the written memory.

        An operator's schema says that it writes, that of our function in its place does not:
        unmarked, its write would not count as a use of the memory, and an output would be
        copied out before it.
        """
        pairs = tuple([(v, self.env[v.index]) for v in written(eq)])
        reach = {v.index for _, v in pairs}
        if not reach:
            return
        self.written[number] = pairs
        calls = self.b.calls
        for k in range(first, len(calls)):
            call = calls[k]
            if any(
                v.index in reach for v in values((call.args, tuple([a for _, a in call.kwargs])))
            ):
                reach.update(o for o in call.outs if o is not None)
                if call.op is None and not call.writes:
                    calls[k] = call._replace(writes=True)

    def _apply(
        self, i: int, eq: Equation, args: tuple, kwargs: dict[str, Any], mapped: bool
    ) -> Any:
        b, name = self.b, eq.op.name()
        fix = None if op_info(eq.op).shape_only else self.fixes.tiers.get(i)
        deciding = deciders(eq.op, eq.args) if eq.answer is not None else ()
        if any(self.env[v.index].mapped for v in deciding):
            if self.options.traced:
                refuse_traced(name, self.options.call)
            out = NotImplemented
            if fix is None:
                out = counted(b, eq, args, kwargs, self.options.call)
            if out is not NotImplemented:
                self._serve(name, "rule")
                return out
            fix = "loop"  # samples may have different shapes
        rule = registry.lookup(eq.op)
        if not mapped and not random_call(eq):
            return b.as_recorded(eq, eq.op, *args, named=kwargs)
        if fix is None and self.builder.enabled:
            out = from_factors(self.builder, eq)
            if out is not None:
                return out
        if fix != "loop":
            if rule is None and fix is None:
                rule = out_rule(eq)
            if rule is not None and fix != "functorch":
                out = rule(b, eq, args, kwargs)
                if out is not NotImplemented:
                    self._serve(name, "rule")
                    return out
            if registry.has_functorch_kernel(eq.op) and not random_call(eq):
                out = functorch_rule(b, eq, args, kwargs)
                if out is not NotImplemented:
                    self._serve(name, "functorch")
                    return out
        if random_call(eq) and not mapped:
            return seeded_loop(b, eq, args, kwargs, self.options.call)  # one draw for all samples
        self.to_loop(i, eq)
        self._serve(name, "loop")
        below = seeded_loop if random_call(eq) else loop_rule
        return below(b, eq, args, kwargs, self.options.call)

    def _serve(self, name: str, tier: str) -> None:
        """Note what serves a call; of an operator that is called several times, the slowest."""
        self.tiers[name] = max(self.tiers.get(name, tier), tier, key=TIERS.index)

    def _bind(self, i: int, eq: Equation, out: Any, mapped: bool) -> None:
        outs = list(eq.results())
        found = bound(eq, out)
        writes = written(eq)
        reads = self.b.grad and (
            FRESH_LEAF in eq.flags or any(v.index in self.needs for v in eq.inputs())
        )
        known = {v.index for v in eq.inputs()}
        read_groups = {v.group for v in eq.inputs()}
        for var, v in zip(outs, found, strict=True):
            if var.index in known or (var.index in self.env and v is None):
                continue  # in place: the result is the argument
            assert v is not None, f"{eq}: the rule returned nothing for {var}"
            v = V(v.index, v.mapped, var.spec.shape, var.spec.dtype)
            if i in self.fixes.restride and v.mapped:
                v = self.b.call(restride, v, var.spec.stride, shape=v.shape, dtype=v.dtype)
            if var.group in self.mapped and not v.mapped:
                v = self._materialise(v, var, op_info(eq.op).uninitialised)
            elif v.mapped and var.group in self.write_groups and var.group not in read_groups:
                v = self.b.call(no_view, v)
            self.env[var.index] = v
            if v.mapped:
                self.results[v.index] = (var, v)
            if reads:
                self.needs.add(var.index)
        if reads and writes:
            for group in {w.group for w in writes}:
                self.needs.update(self.sharing.pop(group, ()))

    def _outputs(self) -> tuple[V, ...]:
        program, b = self.program, self.b
        owned = {v.group for v in (*program.inputs, *program.captured, *program.literals)}
        outputs, seen = list[V](), set[V]()
        only_sum = self.options.summed or [False] * len(program.outputs)
        for var, flag, summed in zip(program.outputs, program.output_flags, only_sum, strict=True):
            v = self.env[var.index]
            if summed and v.mapped:
                v = sums.summed(self.builder, var)
                v = b.call(torch.clone, v, shape=v.shape, dtype=v.dtype) if v in seen else v
                self.summed.add(v.index)
                seen.add(v)
                outputs.append(v)
                continue
            v = self._as_consumed(v, var, flag)
            if flag == NO_GRAD and not self.options.transformed and (b.grad or not v.mapped):
                # A view made under no_grad of what requires grad claims to require it.
                v = b.call(cut, v)
            if v.mapped:
                # Under transforms a view made without grad must not be used itself: the loop
                # stacks it, which autograd records.
                bare = self.options.transformed and flag == FRESH_LEAF
                if var.group in owned or v in seen or bare:
                    v = b.call(copy, v, shape=v.shape, dtype=v.dtype)
                else:
                    v = views(b).contiguous(v)
                    if self.options.transformed:
                        v = b.call(own_tangent, v, shape=v.shape, dtype=v.dtype)
            owned.add(var.group)
            outputs.append(v)
            seen.add(v)
        return tuple(outputs)


def lower(
    program: Program,
    options: LoweringOptions,
    fixes: Fixes,
    to_loop: Callable[[int, Equation], None],
    lowered: Callable,
    drawn: int = 0,
) -> BatchedProgram:
    """Lower a program to a batched program.

    Args:
        program: The program of one sample.
        options: Device, randomness, strictness, outer autograd.
        fixes: Fixes that trials of the program have shown to be needed.
        to_loop: Called for each recorded call that only the loop serves; it may refuse.
        lowered: Lowers a program that is part of this one, and caches it (`cache.lowered`).
        drawn: Number of calls that have drawn before it.

    Raises:
        ShardmapError: `to_loop` refuses.
    """
    refuse_offsets_of_inputs(program, options.call)
    return _Batcher(program, options, fixes, to_loop, lowered, drawn).run()
