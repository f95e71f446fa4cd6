"""A map under `torch.func.vmap` whose samples go different ways: both batches become one.

`torch.func.vmap` holds all outer samples in one tensor, which python cannot ask. Here the samples
of the map and those of every vmap around it are laid one behind the other, so that each goes its
own way, and afterwards the results are given back to the vmaps. Derivatives pass through both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx

from shardmap import errors
from shardmap._torch import functorch, pytree
from shardmap.call.memo import Prepared
from shardmap.call.nested import unasked
from shardmap.call.options import Options
from shardmap.call.paths import merged
from shardmap.call.routes import Path, Router, Seen, rows_of
from shardmap.program.analysis import asking_about
from shardmap.trace.batch import Batch
from shardmap.trace.recording import is_mapped_outside, picked_elements

Tensor = torch.Tensor
Run = Callable[[Prepared, Batch], Sequence[Tensor]]


def asks_outside(prepared: Prepared, batch: Batch) -> bool:
    """True if python asks about what a `torch.func.vmap` around a call maps."""
    recording = prepared.recording
    program = recording.program
    pairs = [*zip(program.inputs, batch.tensors(), strict=True)]
    pairs += zip(program.captured, recording.captured, strict=True)
    return bool(asking_about(program, {v.group for v, t in pairs if is_mapped_outside(t)}))


class _Vmap(Protocol):
    """Torch's description of a vmap that meets a Function."""

    batch_size: int


class _Layout(torch.autograd.Function):
    """A copy outside of vmaps: the layout is changed by the vmap rules of its two kinds."""

    @staticmethod
    def forward(t: Tensor, ref: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])


class _Laid(_Layout):
    """`[n, ...]` in every outer sample to `[outer * n, ...]` in none: `apply(t, ref)`.

    `ref` is mapped by all vmaps that are meant.
    """

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor, None]:
        return _GivenBack.apply(grads[0], ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: BackwardCFunction, *tangents: Tensor) -> Tensor:
        return _Laid.apply(tangents[0], ctx.saved_tensors[0])

    @staticmethod
    def vmap(
        info: _Vmap, in_dims: tuple[int | None, ...], t: Tensor, ref: Tensor
    ) -> tuple[Tensor, int | None]:
        if in_dims[1] is None:  # a vmap of other things, such as cotangents
            return _Laid.apply(t.movedim(in_dims[0] or 0, 1), ref), 1
        t = t.expand(info.batch_size, *t.shape) if in_dims[0] is None else t.movedim(in_dims[0], 0)
        return _Laid.apply(t.flatten(0, 1), ref.select(in_dims[1], 0)), None


class _GivenBack(_Layout):
    """The inverse of `_Laid`."""

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor, None]:
        return _Laid.apply(grads[0], ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: BackwardCFunction, *tangents: Tensor) -> Tensor:
        return _GivenBack.apply(tangents[0], ctx.saved_tensors[0])

    @staticmethod
    def vmap(
        info: _Vmap, in_dims: tuple[int | None, ...], t: Tensor, ref: Tensor
    ) -> tuple[Tensor, int | None]:
        if in_dims[1] is None:
            return _GivenBack.apply(t.movedim(in_dims[0] or 0, 1), ref), 1
        if in_dims[0] is not None:  # of this vmap's samples each wants its own part only
            t = t.movedim(in_dims[0], 0)
            parts = [_GivenBack.apply(row, ref.select(in_dims[1], 0)) for row in t.unbind(0)]
            own = [p.unflatten(0, (info.batch_size, -1))[i] for i, p in enumerate(parts)]
            return torch.stack(own), 0
        given = _GivenBack.apply(t, ref.select(in_dims[1], 0))
        return given.unflatten(0, (info.batch_size, -1)), 0


def _marker(tensors: Sequence[Tensor]) -> Tensor:
    """A number that is mapped by every vmap that maps one of the tensors."""
    found = torch.zeros((), dtype=torch.bool)
    for t in tensors:
        found = found | torch.zeros_like(t.detach(), dtype=torch.bool).any()
    return found


def _levels(ref: Tensor) -> list[tuple[int, int]]:
    """Each vmap that maps `ref`, the innermost first: its level, and how many samples it has."""
    found = []
    while functorch.is_functorch_wrapped_tensor(ref):
        level, inner = functorch.maybe_get_level(ref), functorch.get_unwrapped(ref)
        if functorch.is_batchedtensor(ref):
            found.append((level, inner.shape[functorch.maybe_get_bdim(ref)]))
        ref = inner
    return found


class Flattened:
    """One call under `torch.func.vmap`.

    Args:
        prepared: The recording of the first sample.
        batch: The call's arguments.
        record: Records the function on a sample, by its number.
        run: Computes a recording for a batch.
        options: The call's.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch: Batch,
        record: Callable[[int], Prepared],
        run: Run,
        options: Options,
    ):
        self.prepared = prepared
        self.batch = batch
        self.record = record
        self.run = run
        self.options = dataclasses.replace(options, strict=True)
        captured = [t for t in prepared.recording.captured if is_mapped_outside(t)]
        self.ref = _marker([*batch.tensors(), *captured])
        self.levels = _levels(self.ref)
        self.inputs = [_Laid.apply(t, self.ref) for t in batch.tensors()]
        self.grad = torch.is_grad_enabled()
        self._laid: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity of captured tensors, which the values hold."""
        self._moved: dict[int, tuple[dict[str, str], list[Tensor]]] = {}
        """By identity of a recording's `sources`, which no other recording has: the captured
        tensors that are among its inputs."""

    def outputs(self) -> tuple[list[Tensor], pytree.TreeSpec]:
        """The results, each with the map's samples first, and the structure of one sample's."""
        size = self.batch.size
        for _, outer in self.levels:
            size *= outer
        numbers = torch.arange(size)
        spec = pytree.tree_flatten(((0,), {}))[1]
        whole = Batch([numbers], spec, ((0, 0),), size)
        first = Path.of(self._of_all(self.prepared), 0)
        routes = Router(whole, self.options, [first], self._on, self._compute, Seen()).run()
        paths = [path for path in routes.paths if len(path.rows)]
        outputs = merged(paths, self.options.call)
        found = []
        for path in paths:
            leaves = self.run(unasked(path.prepared), self._part(path.prepared, path.rows))
            specs = [v.spec for v in outputs.recording.program.outputs]
            found.append([t.to(spec.dtype) for t, spec in zip(leaves, specs, strict=True)])
        back = torch.cat([path.rows for path in paths]).argsort()
        columns = [torch.cat(c).index_select(0, back) for c in zip(*found, strict=True)]
        return [_GivenBack.apply(t, self.ref) for t in columns], outputs.structure

    def _on(self, number: int) -> Prepared:
        left, picked = number, {}
        left, inner = divmod(left, self.batch.size)
        for level, size in self.levels:
            left, picked[level] = divmod(left, size)
        with picked_elements(picked):
            return self._of_all(self.record(inner))

    def _of_all(self, prepared: Prepared) -> Prepared:
        """The recording with what the vmaps map among its inputs."""
        recording, program = prepared.recording, prepared.recording.program
        if recording.random or recording.written_inputs:
            raise errors.DataDependentError(
                f"{self.options.call}: samples go different ways under torch.func.vmap, and draw "
                "random numbers or write to an argument; draw outside and pass the numbers in, "
                "clone the argument, or use shardmap.vmap around it"
            )
        pairs = [*zip(program.captured, recording.captured, strict=True)]
        moved = [pair for pair in pairs if is_mapped_outside(pair[1])]
        kept = [pair for pair in pairs if not is_mapped_outside(pair[1])]
        asked = asking_about(program, {v.group for v, _ in moved})
        program = program._replace(
            inputs=(*program.inputs, *[v for v, _ in moved]),
            captured=tuple([v for v, _ in kept]),
        )
        recording = dataclasses.replace(
            recording, program=program, captured=tuple([t for _, t in kept]), sample=(),
            asked=tuple(sorted({*recording.asked, *asked})), sources=dict(recording.sources),
        )  # fmt: skip
        self._moved[id(recording.sources)] = recording.sources, [t for _, t in moved]
        return Prepared(recording, prepared.structure)

    def _compute(self, prepared: Prepared, part: Batch) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.run(prepared, self._part(prepared, part.leaves[0]))

    def _part(self, prepared: Prepared, rows: Tensor) -> Batch:
        """The samples of these numbers, as a recording takes them."""
        _, moved = self._moved[id(prepared.recording.sources)]
        inputs = [*self.inputs, *[self._spread(t) for t in moved]]
        leaves = [rows_of(t, rows) for t in inputs]
        spec = pytree.tree_flatten((tuple([0] * len(leaves)), {}))[1]
        return Batch(leaves, spec, tuple([(i, 0) for i in range(len(leaves))]), len(rows))

    def _spread(self, captured: Tensor) -> Tensor:
        """A captured tensor that a vmap maps, for each sample."""
        found = self._laid.get(id(captured))
        if found is None:
            with torch.set_grad_enabled(self.grad):  # questions are computed without
                each = captured.expand(self.batch.size, *captured.shape)
                found = self._laid[id(captured)] = captured, _Laid.apply(each, self.ref)
        return found[1]
