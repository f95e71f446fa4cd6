"""Guess the seconds of a recorded program from its operations and bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from shardmap._torch import packet_of, pytree
from shardmap.planning.cost import machine
from shardmap.program.analysis import live_equations, mapped_groups, written
from shardmap.program.ir import Equation, Program, Var


def seconds(program: Program, samples: int, device_type: str) -> float:
    """Guess the seconds of a program for some samples.

    An operation that depends on the sample counts for each of them, any other once.

    Args:
        program: The program of one sample.
        samples: Number of samples.
        device_type: Kind of device, such as "cuda".
    """
    m = machine(device_type)
    mapped = mapped_groups(program, "error", False)
    live = live_equations(
        program, {v.group for eq in program.equations for v in written(eq)}, set()
    )
    total = 0.0
    for eq in itertools.compress(program.equations, live):
        read, made = list(eq.inputs()), list(eq.results())
        if {v.group for v in made} <= {v.group for v in read}:
            continue  # a view, or a call that returns nothing
        moved = sum(math.prod(v.spec.shape) * v.spec.dtype.itemsize for v in (*read, *made))
        times = samples if any(v.group in mapped for v in (*read, *made)) else 1
        total += times * max(_flops(eq, made) / m.flops, moved / m.bandwidth)
    return total


def _flops(eq: Equation, made: list[Var]) -> float:
    formula = flop_registry.get(packet_of(eq.op))
    if formula is None:
        return sum(math.prod(v.spec.shape) for v in made)

    def real(value: Any) -> Any:
        if type(value) is Var:
            return torch.empty(value.spec.shape, device="meta")
        return [real(v) for v in value] if type(value) is tuple else value

    outs = [real(v) for v in eq.outs]
    return formula(
        *[real(a) for a in eq.args],
        **{k: real(v) for k, v in eq.kwargs},
        out_val=outs[0] if len(outs) == 1 else outs,
    )


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[Hashable, ...]]:
    """The part of a sample that decides its cost: shapes, dtypes, and all other values."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    described = [
        (tuple(t.shape), str(t.dtype)) if isinstance(t, torch.Tensor) else repr(t) for t in leaves
    ]
    return str(structure), tuple(described)


def tensors_of(found: tuple[str, tuple[Hashable, ...]]) -> Hashable:
    """The part of a signature that tells of tensors: their shapes and dtypes."""
    return tuple([d for d in found[1] if not isinstance(d, str)])
