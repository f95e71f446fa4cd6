"""Passes over a chunk's calls that make the same values with less work.

A rule lowers one recorded call and knows nothing of the next. What follows from two of them is done
here: calls that repeat an earlier one or change nothing are dropped, sums of products become one
product, signs move into differences, and results are computed into operands that are read for the
last time. Values are equal to the bit, but for sums of products, whose terms are added in another
order. The passes are for programs whose gradients nobody asks for, and that no transform surrounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch

from shardmap._torch import aten
from shardmap.lower.in_place import in_place
from shardmap.lower.products import sums_of_products
from shardmap.lower.replayed import no_view
from shardmap.lower.uses import Results, fresh, makers, reads, renamed, uses
from shardmap.program.operators import op_info
from shardmap.rules.lowering import BatchSize, Call, V

_SAME_ORDER = (
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.view.default,
    aten._unsafe_view.default,
)
"""Operators whose result has the elements of its argument in their order, without gaps if that has
none."""


def simplified(
    calls: Sequence[Call], outputs: Sequence[V], results: Results, device_type: str, count: int
) -> tuple[tuple[Call, ...], int, tuple[Call, ...] | None]:
    """The calls of a chunk, with what can be saved between them.

    Args:
        calls: The calls as the rules emitted them.
        outputs: The outputs of the program.
        results: For a value's index: the recorded tensor that it is the batch of.
        device_type: The kind of device of the chunk.
        count: Number of values so far.

    Returns:
        The calls, the number of values, and the calls before if they were others.
    """
    indices = itertools.count(count)
    kept = {v.index for v in outputs}
    found = _without_identities(calls, kept, results)
    found = _without_copies_of_views(found, kept)
    if not any(call.writes for call in found):
        found = _without_repetitions(found, kept)
        found = _signs_in_differences(found, kept, results)
    found = _sums_without_squeeze(found, kept)
    found = sums_of_products(found, kept, device_type, indices)
    found = _live(found, kept)
    if device_type == "cpu":
        found = in_place(found, kept, results)
    if len(found) == len(calls) and all(a is b for a, b in zip(found, calls, strict=True)):
        return tuple(calls), count, None
    return tuple(found), next(indices), tuple(calls)


def _live(calls: Sequence[Call], kept: Collection[int]) -> list[Call]:
    """The calls that lead to an output or have an effect."""
    used, found = set(kept), []
    for call in reversed(calls):
        if not call.outs or call.writes or any(o in used for o in call.outs):
            found.append(call)
            used.update(v.index for v in reads(call))
    return found[::-1]


def _without_identities(
    calls: Sequence[Call], kept: Collection[int], results: Results
) -> list[Call]:
    """Drop views of a value with its own shape, and let their readers read the value."""
    names: dict[int, V] = {}
    found = []
    for call in calls:
        call = renamed(call, names)
        source = call.args[0] if call.args else None
        if (call.target is torch.Tensor.expand or call.op is aten._unsafe_view.default) and type(
            source
        ) is V:
            _, first, *rest = call.args
            sizes = (first, *rest) if rest else tuple(first)
            known = results.get(source.index)
            same = (
                known is not None
                and source.mapped
                and type(sizes[0]) is BatchSize
                and tuple(sizes[1:]) == known[0].spec.shape
            )
            if same and call.outs[0] not in kept and call.outs[0] is not None:
                names[call.outs[0]] = source
                continue
        found.append(call)
    return found


def _without_copies_of_views(calls: Sequence[Call], kept: Collection[int]) -> list[Call]:
    """Drop copies, made for writing, of views whose memory nothing else refers to."""
    made, count = makers(calls), uses(calls)
    names: dict[int, V] = {}
    found = []
    for call in calls:
        call = renamed(call, names)
        if call.target is no_view and call.outs[0] not in kept and call.outs[0] is not None:
            (source,) = reads(call)
            at: V | None = source
            while at is not None and count[at.index] == 1 and at.index not in kept:
                maker = made.get(at.index)
                if maker is None or maker.writes or not maker.mapped:
                    break
                if fresh(maker):
                    names[call.outs[0]] = source
                    break
                in_order = maker.op in _SAME_ORDER or maker.target is torch.Tensor.view
                at = reads(maker)[0] if in_order else None
            if call.outs[0] in names:
                continue
        found.append(call)
    return found


def _without_repetitions(calls: Sequence[Call], kept: Collection[int]) -> list[Call]:
    """Drop calls that repeat an earlier one whose result is still there.

    What was let go and is computed again, as by `torch.utils.checkpoint`, stays so: it saves
    memory.
    """
    last = {v.index: i for i, call in enumerate(calls) for v in reads(call)}
    names: dict[int, V] = {}
    seen: dict[object, V] = {}
    found = []
    returned = _reach_outputs(calls, kept)
    for i, call in enumerate(calls):
        call = renamed(call, names)
        out = call.outs[0] if len(call.outs) == 1 and not call.several else None
        if call.op is None or out is None or op_info(call.op).random or not call.mapped:
            found.append(call)
            continue
        try:
            key = call.op, _frozen(call.args), _frozen(call.kwargs)
            earlier = seen.get(key)
        except TypeError:  # an argument that has no hash
            found.append(call)
            continue
        # Two outputs must not share memory.
        both = earlier is not None and out in returned and earlier.index in returned
        there = earlier is not None and (
            last.get(earlier.index, -1) > i or earlier.index in returned
        )
        if earlier is not None and there and out not in kept and not both:
            names[out] = earlier
            last[earlier.index] = max(last.get(earlier.index, -1), last.get(out, -1))
            returned.update([earlier.index] if out in returned else [])
            continue
        seen[key] = V(out, True, (), torch.float32)
        found.append(call)
    return found


def _reach_outputs(calls: Sequence[Call], kept: Collection[int]) -> set[int]:
    """The values whose memory an output may be, as a view or as it is."""
    found = set(kept)
    for call in reversed(calls):
        if not fresh(call) and any(o in found for o in call.outs):
            found.update(v.index for v in reads(call))
    return found


def _frozen(value: object) -> object:
    if isinstance(value, list | tuple) and type(value) is not V:
        return tuple([_frozen(v) for v in value])
    if type(value) is V:
        return V, value.index
    if type(value) is float:
        return float, value.hex()
    return type(value), value


def _signs_in_differences(
    calls: Sequence[Call], kept: Collection[int], results: Results
) -> list[Call]:
    """Replace `x + -y` by `x - y`, also where `y` is rolled after it has changed its sign.

    So is `-y + x`, if `x` has the result's layout: a result takes that of its first operand.
    """
    count = uses(calls)
    signs: dict[int, tuple[Call, Call | None]] = {}
    """For a value that is only used once: the call that changed the sign, and the roll."""
    position = {id(call): i for i, call in enumerate(calls)}
    found: list[Call | None] = list(calls)
    for i, call in enumerate(calls):
        out = call.outs[0] if len(call.outs) == 1 else None
        if out is None or call.several or not call.mapped:
            continue
        single = count[out] == 1 and out not in kept
        if call.op is aten.neg.default and single and reads(call)[0].dtype.is_floating_point:
            signs[out] = call, None
        elif call.op is aten.roll.default and single and reads(call)[0].index in signs:
            sign, roll = signs[reads(call)[0].index]
            if roll is None:
                signs[out] = sign, call
        elif call.op is aten.add.Tensor and not call.kwargs and len(call.args) == 2:
            x, y = call.args
            if type(x) is not V or type(y) is not V or x.dtype != y.dtype:
                continue
            if y.index not in signs:
                x, y = y, x
                if not _same_layout(x.index, out, results):
                    continue
            if y.index not in signs or x.index == y.index:
                continue
            sign, roll = signs.pop(y.index)
            source = reads(sign)[0]
            found[position[id(sign)]] = None
            if roll is not None:
                found[position[id(roll)]] = roll._replace(args=(source, *roll.args[1:]))
                source = y
            found[i] = call._replace(target=torch.Tensor.sub, op=aten.sub.Tensor, args=(x, source))
    return [call for call in found if call is not None]


def _same_layout(index: int, out: int, results: Results) -> bool:
    if index not in results or out not in results:
        return False
    a, b = results[index][0].spec, results[out][0].spec
    return a.shape == b.shape and a.stride == b.stride


def _sums_without_squeeze(calls: Sequence[Call], kept: Collection[int]) -> list[Call]:
    """Let sums drop the dimensions that are squeezed right after them."""
    made, count = makers(calls), uses(calls)
    replaced: dict[int, Call | None] = {}
    for call in calls:
        if call.op is not aten.squeeze.dims or call.several or call.outs[0] is None:
            continue
        source = reads(call)[0]
        total = made.get(source.index)
        if (
            total is None
            or total.op is not aten.sum.dim_IntList
            or len(total.args) != 3
            or total.args[2] is not True
            or count[source.index] != 1
            or source.index in kept
            or sorted(total.args[1]) != sorted(call.args[1])
        ):
            continue
        x, dims, _ = total.args
        replaced[id(total)] = None
        replaced[id(call)] = total._replace(args=(x, dims), outs=call.outs)
    moved = {id(c): replaced.get(id(c), c) for c in calls}
    # The sum stays where it was: its operand may die there.
    by_total = {
        id(made[reads(c)[0].index]): replaced[id(c)]
        for c in calls
        if replaced.get(id(c)) is not None
    }
    found = []
    for call in calls:
        if id(call) in by_total:
            found.append(by_total[id(call)])
        elif id(call) in replaced:
            continue
        else:
            found.append(moved[id(call)])
    return [call for call in found if call is not None]
