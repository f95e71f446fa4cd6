"""Facts about a program: values that differ by sample, written tensors, calls that are needed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from shardmap._torch import aten
from shardmap.program.ir import FRESH_LEAF, GRAD, NO_GRAD, Equation, Program, Var, variables
from shardmap.program.operators import deciders, draws, op_info
from shardmap.program.own_backward import DATA, NO_EFFECT, OWN_BACKWARD, is_linear

DETACHES = frozenset((aten.detach.default, aten.detach_.default, DATA))
"""Calls whose result has neither a gradient nor a tangent."""
IDENTITIES = DETACHES | {aten.alias.default, aten.lift.default}
"""Calls that return their argument's value; each use's flags hold what autograd should see."""


def mapped_groups(program: Program, randomness: str, transformed: bool) -> set[int]:
    """The memory groups whose values differ by sample, by a fixed point over the calls.

    A tensor made unmapped into which a mapped value is written later is mapped from its creation.
    One made in the likeness of a mapped tensor is the same for all samples, but under an outer
    `torch.func.vmap` it must be made from that tensor: only so does it have the outer batch and can
    be written to.
    """
    mapped = {v.group for v in program.inputs}
    before = -1
    while len(mapped) != before:
        before = len(mapped)
        for eq in program.equations:
            if op_info(eq.op).shape_only and not transformed:
                continue
            shared_history = eq.op is OWN_BACKWARD and eq.args[4] != NO_EFFECT
            if shared_history and not is_linear(eq.args[4]):
                mapped.update(v.group for v in eq.results())
            if any(v.group in mapped for v in eq.inputs()) or (
                randomness == "different" and random_call(eq)
            ):
                mapped.update(v.group for v in eq.results())
                mapped.update(v.group for v in written(eq))
    return mapped


def random_call(eq: Equation) -> bool:
    """True if a recorded call draws random numbers."""
    return draws(eq.op, eq.args, dict(eq.kwargs))


def written(eq: Equation) -> list[Var]:
    """The tensors that a recorded call writes in place."""
    info = op_info(eq.op)
    if info.hidden_writes is not None:  # it writes only in training, which its schema does not tell
        first, second, training = info.hidden_writes
        trains = training < len(eq.args) and eq.args[training]
        return list(variables((eq.args[first], eq.args[second]))) if trains else []
    out = [v for i in info.writes if i < len(eq.args) for v in variables((eq.args[i],))]
    if info.writes_named:
        out += [v for k, a in eq.kwargs if k in info.writes_named for v in variables((a,))]
    return out


def asking_about(program: Program, groups: set[int]) -> list[int]:
    """The equations that ask about what is computed from some memory, by position."""
    reached, asking = set(groups), []
    for at, eq in enumerate(program.equations):
        if any(v.group in reached for v in eq.inputs()):
            reached.update(v.group for v in (*eq.results(), *written(eq)))
            if eq.answer is not None and (
                eq.answer[0] != "shape" or any(v.group in reached for v in deciders(eq.op, eq.args))
            ):
                asking.append(at)
    return asking


def asking_about_draws(program: Program) -> list[int]:
    """The equations that ask about what follows from random numbers, by position."""
    drawn = [eq for eq in program.equations if random_call(eq)]
    groups = {v.group for eq in drawn for v in (*eq.results(), *written(eq))}
    return asking_about(program, groups) if groups else []


def written_through(program: Program) -> set[int]:
    """The variables that are written in place, themselves or by a view that is made of them."""
    through: set[int] = set()
    for eq in reversed(program.equations):
        through.update(v.index for v in written(eq))
        inputs = {v.index: v.group for v in eq.inputs()}
        groups = {v.group for v in eq.results() if v.index in through and v.index not in inputs}
        through.update(index for index, group in inputs.items() if group in groups)
    return through


def is_identity(eq: Equation, through: set[int], transformed: bool) -> bool:
    """True if a call returns its argument's value, and each use tells what autograd should see.

    A view of everything (`x[..., :]`) that is written to and has a history is none: a write to it
    changes the history of its base too. Under outer transforms no view is one: it has the tangents
    of its base in every grad mode, and a use does not tell of tangents.

    Args:
        eq: The call.
        through: The variables that are written in place, of `written_through`.
        transformed: True if the program runs under outer transforms.
    """
    if transformed and eq.op not in DETACHES:
        return False
    if eq.op is aten.alias.default and eq.grad_mode and eq.flags[0] == GRAD:
        return not any(v.index in through for v in eq.results())
    return eq.op in IDENTITIES


def live_equations(program: Program, write_groups: set[int], kept_groups: set[int]) -> list[bool]:
    """For each call: True if it leads to an output or a caller's tensor, or has an effect."""
    groups = kept_groups | {v.group for v in program.outputs if v.group in write_groups}
    return _leading(
        program,
        write_groups,
        {v.index for v in program.outputs},
        groups,
        effect=is_effect,
    )


def is_effect(eq: Equation) -> bool:
    """True if a call matters although nothing uses its result.

    It returns nothing (an assertion), or python has relied on its answer or its shape: every sample
    must give the same, also where the tensor itself is not used (`x / len(x[x > 0])`).
    """
    return eq.answer is not None or not list(eq.results())


def grad_equations(program: Program, write_groups: set[int]) -> list[bool]:
    """For each call: True if it leads to an output that requires grad, under outer autograd.

    The others run without it.
    """
    required = [v for v, flag in zip(program.outputs, program.output_flags, strict=True) if flag]
    # A write gives the caller's tensor a history.
    groups = {v.group for v in (*required, *program.inputs) if v.group in write_groups}
    carries = [eq.grad_mode or eq.op in IDENTITIES for eq in program.equations]
    return _leading(program, write_groups, {v.index for v in required}, groups, carries)


def sources(program: Program, every: bool = False) -> list[frozenset[int]]:
    """For each output: the inputs and captured tensors that autograd finds behind it, by index.

    Args:
        program: The program.
        every: True for all that an output is computed from, whatever autograd knows of it.
    """
    # Autograd gives a write to all tensors of its memory.
    by_group: dict[int, list[int]] = {}
    found: dict[int, frozenset[int]] = {}

    def define(var: Var, behind: frozenset[int]) -> None:
        if var.index not in found:
            by_group.setdefault(var.group, []).append(var.index)
        found[var.index] = behind

    for var in (*program.inputs, *program.captured):
        tracked = var.spec.dtype.is_floating_point or var.spec.dtype.is_complex
        define(var, frozenset([var.index]) if tracked or every else frozenset())
    for var in program.literals:
        define(var, frozenset())
    for eq in program.equations:
        inputs, results, writes = list(eq.inputs()), list(eq.results()), written(eq)
        own = eq.op is OWN_BACKWARD and eq.args[4] != NO_EFFECT
        reaching = len(list(variables((eq.args[0],)))) if own else len(inputs)
        carried = frozenset[int]().union(
            *[
                found[var.index]
                for var, flag in zip(inputs[:reaching], eq.flags, strict=False)
                if every or (flag == GRAD and eq.grad_mode)
            ]
        )
        if eq.op in IDENTITIES and not every:  # each use tells what autograd should see
            carried = frozenset() if eq.flags[0] == FRESH_LEAF else found[inputs[0].index]
        for group in {var.group for var in writes}:
            for index in by_group[group]:
                found[index] |= carried
        known = {var.index for var in inputs}
        for n, var in enumerate(results):
            if var.index in known:
                continue
            if eq.op is OWN_BACKWARD and not own:
                define(var, found[list(variables((eq.args[1],)))[n].index])
            else:
                define(var, carried)
    flags = zip(program.outputs, program.output_flags, strict=True)
    return [
        frozenset() if flag == NO_GRAD and not every else found[var.index] for var, flag in flags
    ]


def _leading(
    program: Program,
    write_groups: set[int],
    live_vars: set[int],
    live_groups: set[int],
    candidates: list[bool] | None = None,
    effect: Callable[[Equation], bool] = lambda eq: False,
) -> list[bool]:
    """For each call: True if it leads to the given variables or groups, or has an effect.

    Calls that are no candidates are left out. One pass backwards is enough for tensors that are
    never written; written groups are live as a whole, so it is repeated until they settle.
    """
    live_vars, live_groups = set(live_vars), set(live_groups)
    live = [False] * len(program.equations)
    before = -1
    while len(live_groups) + sum(live) != before:
        before = len(live_groups) + sum(live)
        for i in range(len(program.equations) - 1, -1, -1):
            eq = program.equations[i]
            if candidates is not None and not candidates[i]:
                continue
            if effect(eq) or any(
                v.index in live_vars or v.group in live_groups
                for v in (*eq.results(), *written(eq))
            ):
                live[i] = True
                for v in eq.inputs():
                    live_vars.add(v.index)
                    if v.group in write_groups:
                        live_groups.add(v.group)
    return live


def leading_to(program: Program) -> Program:
    """The program without the calls that lead to none of its outputs, assertions among them."""
    groups = {v.group for eq in program.equations for v in written(eq)}
    outputs = {v.index for v in program.outputs}
    live = _leading(program, groups, outputs, {v.group for v in program.outputs} & groups)
    kept = [eq for eq, leads in zip(program.equations, live, strict=True) if leads]
    return program._replace(equations=tuple(kept))


def never_written(program: Program) -> set[int]:
    """The memory groups that `torch.empty` made and no call wrote to: they may hold anything."""
    made = {
        v.group for eq in program.equations if op_info(eq.op).uninitialised for v in eq.results()
    }
    writing = [
        eq for eq in program.equations if op_info(eq.op).writes or op_info(eq.op).writes_named
    ]
    return made - {v.group for eq in writing for v in eq.inputs()}


def recorded_bytes(program: Program) -> int:
    """Bytes of all recorded results of one sample."""
    results = [v.spec for eq in program.equations for v in eq.results()]
    return sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in results)


def least_precise(program: Program) -> torch.dtype | None:
    """The floating-point dtype, among those that a program computes in, that rounds most."""
    dtypes = {var.spec.dtype for eq in program.equations for var in eq.results()}
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return max(dtypes.intersection(usual), key=lambda d: torch.finfo(d).eps, default=None)
