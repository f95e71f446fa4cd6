"""Find tensors of one sample that outlive its recording, kept by a side effect.

In the loop, `self.hidden = x`, a list that is appended to or a hook that collects leave something
of the last sample, or of all of them; a recording would leave the first sample's value.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.fx

from shardmap._torch import references_of_torch
from shardmap.program.ir import Var
from shardmap.program.schema import base_name

if TYPE_CHECKING:
    from shardmap.trace.recorder import Recorder


_emptied: weakref.WeakSet[torch.fx.Interpreter] = weakref.WeakSet()
"""Interpreters that were alive when a tensor seemed to be kept: usually none.

Others are not looked for in recordings that were expected: that walks over all of python's objects.
"""


class _Candidate(NamedTuple):
    """A tensor that may have been kept."""

    ref: weakref.ref
    var: Var
    argument: bool
    """True if it is an argument of the function."""
    own: int
    """Number of python's references to it that are the recording's own."""


def references_before(samples: Iterable[torch.Tensor]) -> dict[int, int]:
    """Number of python's references to each sample, by address, before the function is called."""
    return {id(sample): python_references(weakref.ref(sample)) - 1 for sample in samples}


def kept_tensors(recorder: Recorder, samples: Mapping[int, int]) -> tuple[str, ...]:
    """Describe the tensors that differ by sample and that python still holds, one text for each.

    Captured tensors do not count, nor tensors that only torch holds: autograd saves tensors for
    the backward of the outputs. Reference cycles are collected before a tensor is reported, and
    interpreters of fx are emptied.

    Args:
        recorder: The recorder, once the function has returned, and its outputs have been dropped:
            autograd's graph behind them holds tensors that its nodes keep.
        samples: The function's own arguments: `references_before` it was called.
    """
    held = list(_held(_candidates(recorder, samples)))
    for generation in (1, 2):  # objects made while recording are young, if nothing was collected
        if held:
            gc.collect(generation)  # reference cycles of the function
            held = list(_held(held))
    if held:
        objects = gc.get_objects()
        _emptied.update(o for o in objects if issubclass(type(o), torch.fx.Interpreter))
        del objects
        _empty_interpreters(held)
        held = list(_held(held))
    held.sort(key=lambda found: found.argument)
    return tuple([_text(recorder, found) for found in held])


def forget_interpreted(recorder: Recorder, samples: Mapping[int, int]) -> None:
    """Empty the interpreters of fx that an earlier recording emptied, as `kept_tensors` does."""
    if _emptied:
        _empty_interpreters(_candidates(recorder, samples))


def _candidates(recorder: Recorder, samples: Mapping[int, int]) -> list[_Candidate]:
    known = {id(t) for _, t in recorder.captured.values()}
    known |= {id(plain) for _, plain in recorder.wrappers.values()}
    indices = {id(pair.indices): pair.indices for pair in recorder.copies.pairs}
    indexed = Counter(id(index) for places in indices.values() for index in places)
    known -= samples.keys()
    return [
        _Candidate(ref, var, number in samples, samples.get(number, 0) + indexed[number])
        for number, (ref, var) in recorder.entries.items()
        if var.group in recorder.mapped_groups and number not in known
    ]


def _empty_interpreters(candidates: Iterable[_Candidate]) -> None:
    """Take the results of the last run out of each interpreter that holds one of the tensors.

    They are no state, as each run starts without any. Whoever reads them after the map finds
    nothing, rather than the first sample's. An interpreter that holds a tensor of the recording
    ran inside the function, and no longer does.
    """
    tensors = {id(tensor) for c in candidates if (tensor := c.ref()) is not None}
    for found in list(_emptied):
        pending: list[object] = [vars(found).get("env"), vars(found).get("args_iter")]
        seen = set()
        while pending:
            value = pending.pop()
            if id(value) in tensors:
                found.env = {}
                vars(found).pop("args_iter", None)
                break
            if id(value) not in seen and isinstance(value, dict | list | tuple | Iterator):
                seen.add(id(value))
                pending += gc.get_referents(value)


def _held(candidates: Iterable[_Candidate]) -> Iterator[_Candidate]:
    for candidate in candidates:
        if python_references(candidate.ref) > candidate.own:
            yield candidate


def python_references(ref: weakref.ref) -> int:
    """Number of references that python holds to a tensor, without torch's own.

    While torch holds the tensor, torch holds one reference to its python object.
    """
    tensor = ref()
    if tensor is None:
        return 0
    return sys.getrefcount(tensor) - 2 - (references_of_torch(tensor) > 1)


def _text(recorder: Recorder, found: _Candidate) -> str:
    var, holder = found.var, _holder(found.ref(), found.argument)
    if found.argument:
        return f"its own argument of shape {var.spec.shape}{holder}"
    made = next(
        (eq for eq in recorder.equations if any(v.index == var.index for v in eq.results())), None
    )
    name = "an operator" if made is None else base_name(made.op)
    return f"a tensor of shape {var.spec.shape} made by {name}{holder}"


def _holder(tensor: object, own: int) -> str:
    """Text on the user's dictionary or list that keeps a tensor; empty if there is none.

    Args:
        tensor: The tensor.
        own: Number of lists of the recording's own that hold it.
    """
    lists = 0
    for holder in gc.get_referrers(tensor):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if value is tensor:
                    return f", kept as {key!r}"
        elif isinstance(holder, list):
            lists += 1
    return ", kept in a list" if lists > own else ""
