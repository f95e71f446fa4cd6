"""Maps that are traced (make_fx, torch.export) or run on fake tensors, without values.

The function is recorded on samples that may hold no values, and its replay is traced: the
same calls on whole batches as without a trace. Sizes of samples are those of this call; the number
of samples may stay a symbol.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

from shardmap import errors
from shardmap._torch import (
    FakeTensor,
    FakeTensorMode,
    aten,
    before_dispatch_depth,
    current_proxy_mode,
    dispatch_depth,
    dispatch_modes,
    function_depth,
    function_modes,
    functorch,
    has_proxy,
    pop_function_mode,
    pre_dispatch_functions,
    proxies_aside,
    proxy_mode,
    push_function_mode,
    storage_id,
)
from shardmap.trace.recording import Recording, element


def is_traced(leaves: Iterable[object]) -> bool:
    """True if a call with these arguments is traced, or made of fake tensors."""
    if any(type(leaf) is FakeTensor for leaf in leaves) or before_dispatch_depth():
        return True
    if not dispatch_depth():
        return False
    return any(isinstance(mode, FakeTensorMode | proxy_mode) for mode in dispatch_modes())


def is_graph_made() -> bool:
    """True if a graph is being traced; fake tensors alone only have shapes."""
    return bool(before_dispatch_depth()) or any(
        isinstance(mode, proxy_mode) for mode in dispatch_modes()
    )


def refuse_transforms(call: str) -> None:
    """Refuse a call inside a `torch.func` transform that is traced before it is dispatched.

    Torch's graph of the transform is wrong then, whatever is inside of it: `make_fx(f,
    pre_dispatch=True)` of `torch.func.grad` keeps the gradient of the traced input.

    Raises:
        TransformError: The call is inside such a transform.
    """
    if before_dispatch_depth() and functorch.peek_interpreter_stack() is not None:
        raise errors.TransformError(
            f"{call}: the call stands inside a torch.func transform that is traced before dispatch "
            "(torch.export, make_fx(pre_dispatch=True)), and torch's graph of it would be wrong; "
            "take the derivative inside the map (shardmap.per_sample_grad, shardmap.jacobian), or "
            "trace with make_fx(pre_dispatch=False)"
        )


@contextlib.contextmanager
def tracing_aside() -> Iterator[None]:
    """Hide from the trace the calls that find out what to trace."""
    modes = list(function_modes())
    for _ in modes:
        pop_function_mode()
    for mode in modes:
        if not isinstance(mode, pre_dispatch_functions):
            push_function_mode(mode)
    try:
        with proxies_aside():
            yield
    finally:
        while function_depth():
            pop_function_mode()
        for mode in modes:
            push_function_mode(mode)


def traced_recording(recording: Recording, call: str) -> Recording:
    """The recording for a trace: its literals become constants of the graph.

    Raises:
        EscapeError: It reads memory that the graph computes through a tensor that the graph has not
            seen, which would be a constant of the graph.
    """
    tracing = current_proxy_mode()
    if tracing is not None:
        known = [has_proxy(t, tracing.tracer) for t in recording.captured]
        memory = [storage_id(element(t).untyped_storage()) for t in recording.captured]
        computed = {at for at, seen in zip(memory, known, strict=True) if seen}
        for tensor, at, seen in zip(recording.captured, memory, known, strict=True):
            if not seen and at in computed:
                raise errors.EscapeError(
                    f"{call}: a tensor of shape {tuple(tensor.shape)} shares memory with one that "
                    "is traced but was not made by a traced operator (`.data`, `detach_`, what "
                    "autograd saved); use torch operators on the tensor itself, or call the map "
                    "outside of what is traced"
                )
    literals = tuple([aten.lift_fresh_copy.default(t) for t in recording.literals])
    return dataclasses.replace(recording, literals=literals)
