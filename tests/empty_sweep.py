"""The sweep over PyTorch's operator database with batches of no samples.

The results of no samples have the shapes and dtypes of those of a sample of zeros, and gradients of
zeros, inside the map and from outside, and for a map inside a map.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import shardmap
from tests import sweep

Tensors = list[torch.Tensor]
Mapped = Callable[..., Tensors]


def cases(op: Any, count: int = 2) -> Iterator[tuple[Callable[..., Tensors], Tensors, list[int]]]:
    """Functions of an operator: itself, and its gradient taken inside.

    Yields:
        The function, one sample of each tensor, and the tensors that are mapped.
    """
    for supported, inside in (
        (op.supported_dtypes("cpu"), False),
        (op.supported_backward_dtypes("cpu") if op.supports_autograd else (), True),
    ):
        dtype = next((d for d in sweep.PREFERRED if d in supported), None)
        for leaves, spec, at in sweep.batches(op, dtype, count) if dtype is not None else ():
            rest = [None if i in at else leaf for i, leaf in enumerate(leaves)]
            function = sweep.forward(op, spec, rest, at)
            rows = [leaves[i][0].clone() for i in at]
            for mapped in ([*range(len(at))], [0])[: min(len(at), 2)]:
                if not inside:
                    yield function, rows, mapped
                    continue
                wrt = [k for k in mapped if is_exact(rows[k])]
                if wrt:
                    yield sweep.gradient(function, wrt, False), rows, mapped


def is_exact(t: torch.Tensor) -> bool:
    """True if a tensor can have a gradient."""
    return t.is_floating_point() or t.is_complex()


def given(rows: Tensors, mapped: list[int], sizes: tuple[int, ...], grad: bool) -> Tensors:
    """Batches of such sizes of the mapped tensors, and the others as they are."""
    tensors = [
        t.new_zeros((*sizes, *t.shape)) if k in mapped else t.clone() for k, t in enumerate(rows)
    ]
    return [t.requires_grad_(grad and is_exact(t)) for t in tensors]


def complaint(
    function: Callable[..., Tensors],
    rows: Tensors,
    mapped: list[int],
    grads: tuple[bool, ...] = (False, True),
) -> str:
    """The first fault of a map of no samples, without and with gradients; empty if there is none."""
    dims = tuple(0 if k in mapped else None for k in range(len(rows)))
    for grad in grads:
        sample = given(rows, mapped, (), grad)
        try:
            with sweep.RandomCalls() as watch:
                want = function(*[t.view_as(t) for t in sample])
        except Exception as error:  # torch's own, of any kind: the shapes cannot be inferred
            none = given(rows, mapped, (0,), grad)
            return "" if error_of(shardmap.vmap(function, in_dims=dims), none) else str(error)
        if watch.found or not all(r.layout == torch.strided for r in want):
            return ""
        several = grad and len(mapped) == len(rows)
        for sizes in ((0,), (0, 2), (2, 0)) if several else ((0,),):
            mapping: Mapped = function
            for _ in sizes:
                mapping = shardmap.vmap(mapping, in_dims=dims)
            tensors = given(rows, mapped, sizes, grad)
            try:
                found = mapping(*tensors)
            except Exception as error:  # what is not refused for one sample either is a fault
                one = given(rows, mapped, (1,) * len(sizes), grad)
                row = [t[(0,) * len(sizes)] if k in mapped else t for k, t in enumerate(one)]
                known = error_of(function, row)  # the loop's own, of a row of a leaf
                if type(error_of(mapping, one)) in (type(error), type(known)) and (
                    known is not None or isinstance(error, shardmap.errors.ShardmapError)
                ):
                    continue
                return f"sizes {sizes}, gradients {grad}: {type(error).__name__}: {error}"
            text = difference(found, want, sizes) or (grad and gradient_fault(found, tensors))
            if text:
                return f"sizes {sizes}, gradients {grad}: {text}"
    return ""


def error_of(function: Mapped, tensors: Tensors) -> Exception | None:
    """The error that a function raises, or None."""
    try:
        function(*tensors)
    except Exception as error:
        return error
    return None


def difference(found: Tensors, want: Tensors, sizes: tuple[int, ...]) -> str:
    """In which form the results are not the sample's; empty if they are."""
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        if a.shape != (*sizes, *b.shape) or a.dtype != b.dtype:
            return f"output {k} is {a.dtype} {tuple(a.shape)}, of zeros {b.dtype} {tuple(b.shape)}"
        if a.requires_grad != b.requires_grad:
            return f"output {k}: requires_grad is {a.requires_grad}, of zeros {b.requires_grad}"
    return ""


def gradient_fault(found: Tensors, tensors: Tensors) -> str:
    """Which gradient from outside is not of zeros; empty if all are."""
    wanted = [r for r in found if r.requires_grad]
    by = [t for t in tensors if t.requires_grad]
    if not wanted:
        return ""
    total = torch.stack([r.abs().sum().double() for r in wanted]).sum()
    for k, g in enumerate(torch.autograd.grad(total, by, materialize_grads=True)):
        if g.shape != by[k].shape or g.dtype != by[k].dtype or g.ne(0).any():
            return f"the gradient by tensor {k} is {g.dtype} {tuple(g.shape)}, or not of zeros"
    return ""


def judge(name: str) -> list[str]:
    """The faults of one operator."""
    op = sweep.operators()[name]
    grads = (False, True) if op.supports_autograd else (False,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [complaint(*case, grads) for case in cases(op)]
    return [f"{name}: {text}" for text in dict.fromkeys(found) if text]
