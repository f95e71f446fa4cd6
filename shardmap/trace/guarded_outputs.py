"""Guard outputs behind what a gradient computes or unpacks again.

`torch.utils.checkpoint` runs a part of the function again when a gradient is taken, and
`saved_tensors_hooks` unpack what they have packed. Both read python state and tensors as they are
then; the map keeps what they were. So each output that needs such a part gets a hook that changes
nothing, and whose state is compared as that of any other hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from shardmap.program.analysis import written
from shardmap.program.ir import Equation, Var
from shardmap.trace.recomputed import CHECKPOINT, SAVED, Recomputed, Region, parts_of, reads
from shardmap.trace.recorder import Recorder


def guard_outputs(
    recorder: Recorder, regions: Iterable[Region], outputs: Iterable[torch.Tensor]
) -> None:
    """Hook each output whose gradient would compute or unpack something again.

    Args:
        recorder: The recorder, once the function has returned.
        regions: What it has recorded under hooks.
        outputs: The outputs that require grad.
    """
    known = [region for region in regions if reads(region)]
    if not known:
        return
    for tensor in outputs:
        if tensor.is_leaf:
            continue
        needed = _behind(recorder.equations, recorder.encode(tensor, [], False))
        for kind in (CHECKPOINT, SAVED):
            found = [
                region
                for region in known
                if region.is_checkpoint == (kind is CHECKPOINT) and region.positions() & needed
            ]
            if not found:
                continue
            tensors = _read_from_outside(recorder, found) if kind is CHECKPOINT else ()
            parts = [part for region in found for part in parts_of(region.unpack)]
            guard = Recomputed(kind, parts, tensors)
            recorder.add_hook(tensor, guard, tensor.register_hook(guard))


def _behind(equations: Sequence[Equation], output: Var) -> set[int]:
    """Positions of the calls that an output has been computed by."""
    needed, memory, found = {output.index}, {output.group}, set[int]()
    for position in range(len(equations) - 1, -1, -1):
        eq = equations[position]
        made = any(v.index in needed for v in eq.results())
        if made or any(v.group in memory for v in written(eq)):
            found.add(position)
            needed |= {v.index for v in eq.inputs()}
            memory |= {v.group for v in eq.inputs()}
    return found


def _read_from_outside(recorder: Recorder, regions: Iterable[Region]) -> tuple[Var, ...]:
    """The captured tensors and arguments whose memory the calls of some regions read."""
    outside = {v.group: v for v in recorder.inputs}
    outside |= {v.group: v for v, _ in recorder.captured.values()}
    read = [
        outside[v.group]
        for region in regions
        for position in sorted(region.positions())
        for v in recorder.equations[position].inputs()
        if v.group in outside
    ]
    return tuple(dict.fromkeys(read))
