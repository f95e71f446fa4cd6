"""Compare two recordings of a function on different samples: programs and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import FakeTensor, generator_id, pytree
from shardmap.program.analysis import written
from shardmap.program.ir import Equation, Program, Var
from shardmap.program.operators import op_info
from shardmap.program.schema import in_words, short_name
from shardmap.trace.recording import Recording
from shardmap.trace.repeat import alike
from shardmap.trace.unwritten import valued


def difference(first: Recording, second: Recording, shared: bool = True) -> str | None:
    """Sentence on the first difference between two recordings; None if there is none.

    All data that the function took from python count: operators and their arguments, shapes,
    numbers, tensors made of python data, and the values of tensors that were made where the
    recorder does not look (numpy, threads, files).

    Args:
        first: One recording.
        second: The other one.
        shared: True if both are of one call, so that captured tensors must be the same.
    """
    found = _taken_from_python(first, second)
    if found is not None:
        return found
    for var, a, b in zip(first.program.literals, first.literals, second.literals, strict=True):
        if not same_values(a, b) and _matters(first.program, var):
            return (
                f"a tensor of shape {tuple(a.shape)} made from python data holds "
                f"{_shown(a)} for one sample and {_shown(b)} for another"
            )
    if not shared:
        return None
    for var, a, b in zip(first.program.captured, first.captured, second.captured, strict=True):
        if a is not b and not same_values(a, b) and _matters(first.program, var):
            return (
                f"a tensor of shape {tuple(a.shape)} that is made outside torch's operators "
                f"(numpy, a thread, a file) holds {_shown(a)} for one sample and {_shown(b)} for "
                "another"
            )
    return None


def forks(first: Recording, second: Recording) -> bool:
    """True if two samples took different paths because they answered a question differently.

    Up to that question both did the same.
    """
    asked = set(first.asked)
    pairs = zip(first.program.equations, second.program.equations, strict=False)
    for number, (a, b) in enumerate(pairs):
        if a.op is not b.op:
            return False
        if number in asked and not alike(a.answer, b.answer):
            return alike(a.args, b.args) and alike(a.kwargs, b.kwargs)
        if not _same(a, b):
            return False
    return False


def rubbish_apart(first: Recording, again: Recording) -> bool:
    """True if two runs on one sample differ only in uninitialised memory.

    Torch's own code passes such memory on before it fills it (circular padding). The function's
    results are the same then.
    """
    if _taken_from_python(first, again) is not None or not first.sample:
        return False
    return all(map(same_values, first.sample, again.sample))


def _taken_from_python(first: Recording, second: Recording) -> str | None:
    """Sentence on a difference in the calls, or in numbers that they take from python."""
    found = _program_difference(first.program, second.program)
    if found is not None:
        return found
    if list(map(generator_id, first.generators)) != list(map(generator_id, second.generators)):
        return "it draws from another torch.Generator for one sample than for another"
    for number, (a, b) in enumerate(zip(first.scalars, second.scalars, strict=True)):
        if a.hex() != b.hex() and _number_matters(first.program, number):
            where = _where(first.program, number)
            return (
                f"a number that python computed is {a:g} for one sample and {b:g} for "
                f"another{where}"
            )
    return None


def _matters(program: Program, literal: Var) -> bool:
    """True if the values of a literal reach an output, or an answer that python was given.

    Values of memory that was never written often do not: only its shape is used.
    """
    return _reaches(program, {literal.group})


def _number_matters(program: Program, number: int) -> bool:
    """True if a number reaches one: a finalizer's own computations, for example, do not."""
    return _reaches(program, set(), number)


def _reaches(program: Program, reached: set[int], number: int | None = None) -> bool:
    for eq in program.equations:
        info = op_info(eq.op)
        given = number is not None and _takes(eq, number)
        if not given and not any(v.group in reached for v in valued(info, eq.args, eq.kwargs)):
            continue
        if eq.answer is not None or not list(eq.results()):
            return True
        reached.update(v.group for v in (*eq.results(), *written(eq)))
    return any(v.group in reached for v in program.outputs)


def _program_difference(first: Program, second: Program) -> str | None:
    if first is second:
        return None
    for a, b in zip(first.equations, second.equations, strict=False):
        if a.op is not b.op:
            return f"it calls {_name(a)} for one sample where it calls {_name(b)} for another"
        if not _same(a, b):
            return _calls_differ(a, b)
    if len(first.equations) != len(second.equations):
        longer = max(first.equations, second.equations, key=len)
        shorter = min(len(first.equations), len(second.equations))
        return f"it calls {_name(longer[shorter])} for one sample and stops before for another"
    for name in ("inputs", "captured", "literals", "outputs"):
        if getattr(first, name) != getattr(second, name):
            own, other = _specs(getattr(first, name)), _specs(getattr(second, name))
            return f"its {name} are {own} for one sample and {other} for another"
    if not alike(first.types, second.types) or first.scalars != second.scalars:
        return "it takes other numbers from python for one sample than for another"
    if first.output_flags != second.output_flags:
        return "other outputs require grad for one sample than for another"
    return None


def _same(a: Equation, b: Equation) -> bool:
    return (
        a[3:6] == b[3:6]
        and a.source == b.source
        and alike(a.args, b.args)
        and alike(a.kwargs, b.kwargs)
        and alike(a.answer, b.answer)
    )


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors hold the same bits, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.device.type == "meta" or isinstance(a, FakeTensor):  # no values
        return True
    a, b = a.detach(), b.detach()
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    if a.dtype is torch.complex32:  # has next to no kernels
        a, b = a.to(torch.complex64), b.to(torch.complex64)
    elif a.is_floating_point() and a.itemsize == 1:
        a, b = a.float(), b.float()
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    equal = (a == b) | (a.isnan() & b.isnan())
    return bool(equal.all())


def _name(eq: Equation) -> str:
    return in_words(eq.op)


_LONGEST = 160
"""Most characters of a call in a sentence: a list of tensors or a program goes on for lines."""


def _called(eq: Equation) -> str:
    """A call as a sentence shows it."""
    text = str(eq)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _calls_differ(a: Equation, b: Equation) -> str:
    """Sentence on two calls of one operator."""
    if in_words(a.op) != short_name(a.op):  # its arguments hold a program, or a Function
        return f"{_name(a)} computes something else for one sample than for another"
    if str(a) == str(b):
        return f"`{_called(a)}` takes other values from python for one sample than for another"
    if _called(a) == _called(b):
        return f"`{_called(a)}` has other arguments for one sample than for another"
    return (
        f"{_name(a)} is called as `{_called(a)}` for one sample and as `{_called(b)}` for another"
    )


def _takes(eq: Equation, number: int) -> bool:
    """True if a number is among the arguments of a call, in lists too."""
    leaves = pytree.tree_leaves((eq.args, eq.kwargs), is_leaf=lambda v: hasattr(v, "scalar"))
    return any(getattr(value, "scalar", None) == number for value in leaves)


def _where(program: Program, number: int) -> str:
    for eq in program.equations:
        if _takes(eq, number):
            return f", in a call of {_name(eq)}"
    return ""


def _specs(values: Sequence[Any]) -> str:
    return ", ".join(str(v.spec) for v in values) or "none"


def _shown(t: torch.Tensor) -> str:
    flat = t.detach().flatten()[:3].tolist()
    more = ", ..." if t.numel() > 3 else ""
    return f"[{', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in flat)}{more}]"
