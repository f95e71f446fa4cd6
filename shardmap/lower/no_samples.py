"""The batched program for a batch of no samples.

Its results have no elements, so no kernel runs for them: many refuse an empty batch (Fourier
transforms), or answer with another shape (`pixel_shuffle`). Shapes and dtypes are those of the
recording. Behind the results autograd finds the tensors that it would find behind the results of
samples, and gives them gradients of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardmap.lower.batched import BatchedProgram, LoweringOptions
from shardmap.lower.replayed import fresh_leaf
from shardmap.lower.uses import reads
from shardmap.program.analysis import sources
from shardmap.program.ir import FRESH_LEAF, GRAD, NO_GRAD, SAMPLE_DEVICE, Program
from shardmap.rules.lowering import B, Call, V


def without_samples(
    program: Program, batched: BatchedProgram, options: LoweringOptions
) -> BatchedProgram:
    """The batched program without the calls on samples.

    Outputs that are the same for all samples are computed. What python has asked about captured
    tensors is asked again: the recorded shapes may depend on the answers.

    Args:
        program: The program of one sample.
        batched: The same for any number of samples.
        options: The options that it was lowered with.
    """
    given = zip(
        (*program.inputs, *program.captured), (*batched.inputs, *batched.captured), strict=True
    )
    values = {var.index: v for var, v in given}
    # Transforms give histories in every grad mode, and write to a result only if it has their
    # batch dimensions: all that a result is computed from stands behind it.
    behind = sources(program, every=options.transformed)
    made, outputs, summed = list[Call](), list[V](), set[int]()
    for k, (var, v) in enumerate(zip(program.outputs, batched.outputs, strict=True)):
        if not v.mapped:
            outputs.append(v)
            continue
        out = V(batched.values + k, True, v.shape, v.dtype)
        shape = [*var.spec.shape] if v.index in batched.summed else [B, *var.spec.shape]
        if v.index in batched.summed:
            summed.add(out.index)
        away = var.spec.device != program.inputs[0].spec.device
        device = torch.device(var.spec.device) if away else SAMPLE_DEVICE
        tracked = options.grad or options.transformed
        flag = program.output_flags[k] if tracked else NO_GRAD
        found = [values[i] for i in sorted(behind[k])] if flag or options.transformed else []
        args = shape, var.spec.dtype, device, flag, found
        number, grad = len(program.equations), options.grad and flag != NO_GRAD
        made.append(Call(no_rows, args, (), (out.index,), False, grad, number, True, False))
        outputs.append(out)
    fixed, chunk = _of_all_samples(batched)
    return BatchedProgram(
        fixed,
        (*chunk, *made),
        batched.inputs,
        batched.captured,
        batched.literals,
        tuple(outputs),
        batched.tiers,
        batched.values + len(outputs),
        {},
        frozenset(summed),
    )


def _of_all_samples(batched: BatchedProgram) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """The calls, fixed ones and a chunk's, for outputs that are the same for all samples.

    Effects that do not depend on the sample are among them.
    """
    used = {v.index for v in batched.outputs if not v.mapped}
    parts = []
    for calls in (batched.chunk, batched.fixed):
        kept = []
        for call in reversed(calls):
            effect = (not call.outs or call.writes) and not call.mapped
            if effect or not used.isdisjoint(o for o in call.outs if o is not None):
                kept.append(call)
                used.update(v.index for v in reads(call))
        parts.append(tuple(kept[::-1]))
    chunk, fixed = parts
    return fixed, chunk


def no_rows(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    flag: int,
    behind: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The result for no samples.

    Args:
        shape: Its shape, `[N, *shape]`, or `shape` for a sum over the samples.
        dtype: Its dtype.
        device: Its device.
        flag: `NO_GRAD`, `GRAD` or `FRESH_LEAF`, as in `Program.output_flags`.
        behind: The tensors that it has a history of; they get gradients of zeros.
    """
    if flag == FRESH_LEAF:
        return fresh_leaf(torch.zeros(shape, dtype=dtype, device=device))
    if not behind and flag == GRAD:  # the function has made the leaves that a gradient would reach
        behind = [fresh_leaf(torch.zeros((), device=device))]
    if not behind:
        return torch.zeros(shape, dtype=dtype, device=device)
    total = torch.cat([_nothing(t).to(device) for t in behind]).sum(0, keepdim=True)
    # Derivatives of every order have a history too, as those of most functions have. It has one
    # dimension: `torch.func.vmap` multiplies no empty batches of numbers.
    return total.expm1().to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)


def _nothing(t: torch.Tensor) -> torch.Tensor:
    """The sum of none of a tensor's elements, `[1]`: zero, with a gradient of zeros."""
    none = t.unsqueeze(0).narrow(0, 0, 0).sum().unsqueeze(0)
    return (none.real if none.is_complex() else none).to(torch.float32)
