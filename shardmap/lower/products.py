"""Sums of matrix products as one product, whose inner dimension is all of theirs in a row.

The gradient of a weight that is used at each step of a recurrence is a sum of one product for each
step. Each was written to memory of its own and added to the sum: 16 steps of 256 x 64, 32 samples,
took 8 ms; one product of the steps' factors takes 0.5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shardmap._torch import OpOverload, aten, kernel_of
from shardmap.lower.uses import makers, reads, uses, written_memory
from shardmap.rules import huge_pages as pages
from shardmap.rules.lowering import Call, V
from shardmap.rules.targets import fastest

_FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(slots=True)
class _Chain:
    """A sum that grows by one product at a time."""

    base: V | None
    """The first term if it is no product."""
    products: list[Call]
    adds: list[Call] = field(default_factory=list)
    """The sums; the last ones add the last products."""


def sums_of_products(
    calls: Sequence[Call], kept: Collection[int], device_type: str, indices: Iterator[int]
) -> list[Call]:
    """Compute sums of products by one product for as many of them as pay.

    Args:
        calls: The calls of a chunk.
        kept: Indices of the outputs.
        device_type: The kind of device of the chunk.
        indices: Numbers for new values.
    """
    dropped: set[int] = set()
    instead: dict[int, list[Call]] = {}
    for chain in _chains(calls, kept):
        done = 0
        total = chain.base
        shift = len(chain.products) - len(chain.adds)
        for part in _parts(chain.products):
            first, done = done, done + len(part)
            last = chain.adds[max(done - shift - 1, 0)]
            if len(part) > 1:
                sums = chain.adds[max(first - shift, 0) : done - shift]
                dropped.update(map(id, (*part, *sums)))
                instead[id(last)] = _together(part, total, last, device_type, indices)
            total = V(last.outs[0] or 0, True, (), reads(last)[0].dtype)
    found: list[Call] = []
    for call in calls:
        if id(call) in instead:
            found += instead[id(call)]
        elif id(call) not in dropped:
            found.append(call)
    return found


def _chains(calls: Sequence[Call], kept: Collection[int]) -> list[_Chain]:
    made, count = makers(calls), uses(calls)
    changing = written_memory(calls)

    def product(v: V) -> Call | None:
        maker = made.get(v.index)
        if maker is None or count[v.index] != 1 or v.index in kept or not _is_product(maker):
            return None
        return None if any(x.index in changing for x in reads(maker)) else maker

    growing: dict[int, _Chain] = {}
    found = []
    for call in calls:
        if call.op is not aten.add.Tensor or call.kwargs or len(call.args) != 2:
            continue
        x, y = call.args
        if type(x) is not V or type(y) is not V or not (x.mapped and y.mapped):
            continue
        term, other = product(y), x
        if term is None:
            term, other = product(x), y
        if term is None or x.index == y.index:
            continue
        chain = growing.pop(other.index, None)
        if chain is not None and _size(chain.products[0]) != _size(term):
            continue
        if chain is None:
            beside = product(other)
            if beside is not None and _size(beside) != _size(term):
                continue
            if beside is None and (other.shape != _size(term)[:2] or other.dtype != x.dtype):
                continue
            chain = _Chain(other, []) if beside is None else _Chain(None, [beside])
            found.append(chain)
        chain.products.append(term)
        chain.adds.append(call)
        out = call.outs[0]
        if out is not None and count[out] == 1 and out not in kept:
            growing[out] = chain
    return found


def _is_product(call: Call | None) -> bool:
    """True if a call multiplies two matrices of each sample."""
    if call is None or call.several or call.kwargs or len(call.args) != 2:
        return False
    x, y = call.args
    if type(x) is not V or type(y) is not V or not (x.mapped and y.mapped):
        return False
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[0]:
        return False
    if x.dtype != y.dtype or x.dtype not in _FLOATS:
        return False
    if call.target is pages.mul or call.op is aten.mul.Tensor:
        return x.shape[1] == 1
    return call.target is pages.bmm or call.op is aten.bmm.default or call.target is torch.matmul


def _size(product: Call) -> tuple[int, int, torch.dtype]:
    x, y = reads(product)
    return x.shape[0], y.shape[1], x.dtype


def _parts(products: Sequence[Call]) -> Iterator[list[Call]]:
    """Divide products so that the factors of each part are no larger than its result.

    So the factors, which stay until the last one is there, need no more memory than the sum.
    """
    part: list[Call] = []
    elements = 0
    for call in products:
        x, y = reads(call)
        if part and elements + x.numel + y.numel > x.shape[0] * y.shape[1]:
            yield part
            part, elements = [], 0
        part.append(call)
        elements += x.numel + y.numel
    yield part


def _together(
    products: Sequence[Call],
    total: V | None,
    last: Call,
    device_type: str,
    indices: Iterator[int],
) -> list[Call]:
    """The calls that add several products to `total`, in place of the sum `last`."""
    found: list[Call] = []
    m, n, dtype = _size(products[0])

    def call(
        op: OpOverload | None, shape: tuple[int, ...], *args: object, out: int | None = None
    ) -> V:
        v = V(next(indices) if out is None else out, True, shape, dtype)
        if op is None:
            target = pages.bmm
        else:
            target = fastest(op) if type(args[0]) is V else kernel_of(op)
        found.append(last._replace(target=target, args=args, kwargs=(), outs=(v.index,), op=op))
        return v

    pairs = [reads(p) for p in products]
    inner = sum(x.shape[1] for x, _ in pairs)
    rows = [call(aten.transpose.int, x.shape[::-1], x, 1, 2) for x, _ in pairs]
    left = call(aten.cat.default, (inner, m), rows, 1)
    left = call(aten.transpose.int, (m, inner), left, 1, 2)
    right = call(aten.cat.default, (inner, n), [y for _, y in pairs], 1)
    if total is not None:
        call(aten.baddbmm.default, (m, n), total, left, right, out=last.outs[0])
    elif device_type == "cpu" and m * n >= pages.WORTHWHILE_PER_SAMPLE:
        call(None, (m, n), left, right, out=last.outs[0])
    else:
        call(aten.bmm.default, (m, n), left, right, out=last.outs[0])
    return found
