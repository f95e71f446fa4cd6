"""Find tensors of one sample that outlive its recording, kept by a side effect.

In the loop, `self.hidden = x`, a list that is appended to or a hook that collects leave something
of the last sample, or of all of them; a recording would leave the first sample's value.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from shardmap._torch import references_of_torch, schema_of
from shardmap.program.ir import Var

if TYPE_CHECKING:
    from shardmap.trace.recorder import Recorder


def kept_tensors(recorder: Recorder, outputs: Iterable[int]) -> tuple[str, ...]:
    """Describe the tensors that differ by sample and that python still holds, one text for each.

    Inputs, captured tensors and outputs do not count, nor tensors that only torch holds: autograd
    saves tensors for the backward of the outputs. Reference cycles are collected before a tensor is
    reported.

    Args:
        recorder: The recorder, once the function has returned.
        outputs: The addresses of the tensors that it returned. The tensors themselves are dropped
            before: autograd's graph behind them holds tensors that its nodes keep.
    """
    known = set(outputs) | {id(t) for _, t in recorder.captured.values()}
    known |= {id(plain) for _, plain in recorder.wrappers.values()}
    known |= {id(index) for pair in recorder.copies.pairs for index in pair.indices}
    inputs = {var.index for var in recorder.inputs}
    candidates = [
        (ref, var)
        for number, (ref, var) in recorder.entries.items()
        if var.group in recorder.mapped_groups and var.index not in inputs and number not in known
    ]
    held = list(_held(candidates))
    if held:
        gc.collect(1)  # reference cycles of the function: objects made while recording are young
        held = list(_held(held))
    return tuple([_text(recorder, ref, var) for ref, var in held])


def _held(
    candidates: Iterable[tuple[weakref.ref, Var]],
) -> Iterator[tuple[weakref.ref, Var]]:
    for ref, var in candidates:
        if python_references(ref) > 0:
            yield ref, var


def python_references(ref: weakref.ref) -> int:
    """Number of references that python holds to a tensor, without torch's own.

    While torch holds the tensor, torch holds one reference to its python object.
    """
    tensor = ref()
    if tensor is None:
        return 0
    return sys.getrefcount(tensor) - 2 - (references_of_torch(tensor) > 1)


def _text(recorder: Recorder, ref: weakref.ref, var: Var) -> str:
    made = next(
        (eq for eq in recorder.equations if any(v.index == var.index for v in eq.results())), None
    )
    name = "an operator" if made is None else schema_of(made.op).name.partition("::")[2]
    return f"a tensor of shape {var.spec.shape} made by {name}{_holder(ref())}"


def _holder(tensor: object) -> str:
    """Text on the user's dictionary or list that keeps a tensor; empty if there is none."""
    for holder in gc.get_referrers(tensor):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if value is tensor:
                    return f", kept as {key!r}"
        elif isinstance(holder, list):
            return ", kept in a list"
    return ""
