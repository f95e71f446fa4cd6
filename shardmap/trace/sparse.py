"""Sparse tensors that a recorded function captures: products with dense operands, and refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn, cast

import torch

from shardmap import errors
from shardmap._torch import OpOverload, aten, schema_of, without_functions
from shardmap.program.ir import NO_GRAD, Equation, Var
from shardmap.program.operators import op_info
from shardmap.program.schema import base_name
from shardmap.rules import sparse
from shardmap.rules.sparse import Form
from shardmap.trace.recording import flat_tensors, user_line
from shardmap.trace.refusals import Refusals
from shardmap.trace.tensor_table import Variables

_PRODUCTS = (aten.mm.default, aten.mv.default)
_SUMS = (aten.addmm.default, aten.addmv.default, aten._sparse_addmm.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int)
_SAME = (aten.detach.default, aten.alias.default)
_METADATA = {"_nnz", "is_coalesced", "sparse_dim", "dense_dim", "_dimI", "_dimV"}
"""Operators on metadata, whose answers do not depend on values."""


class SparseTensors(Refusals):
    """The part of a recording for calls that take or return a sparse tensor."""

    kernel: Callable[[OpOverload, tuple, dict[str, object]], object]
    """The recorder's method that runs an operator below the recording."""

    def __init__(self, call: str, outer: Variables | None, once: bool, randomness: str):
        super().__init__(call, outer, once, randomness)
        self.sparse: dict[int, tuple[torch.Tensor, tuple[Var, ...], Form]] = {}
        """For a sparse tensor's address: the tensor, the variables of its parts, and its form."""

    def with_sparse(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object], marks: tuple[int, int]
    ) -> object:
        """Run a call that takes or returns a sparse tensor, and record it if necessary.

        Args:
            func: The operator.
            args: Its arguments.
            kwargs: Its keyword arguments.
            marks: Numbers of types and scalars before the call was first encoded.

        Raises:
            UnsupportedOperatorError: It makes a sparse tensor that differs by sample, or is no
                product.
        """
        del self.types[marks[0] :], self.scalars[marks[1] :]
        with without_functions():
            try:
                return self._with_sparse(func, args, kwargs)
            except errors.ShardmapError:
                raise
            except Exception as error:
                self.raised = self.raised or f"{schema_of(func).name} raised {type(error).__name__}"
                raise

    def _with_sparse(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        info = op_info(func)
        tensors = flat_tensors((*args, *kwargs.values()))
        matrices = [t for t in tensors if t.layout is not torch.strided]
        dense = [t for t in tensors if t.layout is torch.strided]
        name = base_name(func)
        for matrix in matrices:
            if matrix.layout not in sparse.LAYOUTS:
                self.refuse_sparse(
                    f"{name} takes a tensor of layout {matrix.layout}", "call .to_dense() on it"
                )
            if matrix.requires_grad and torch.is_grad_enabled() and func not in _SAME:
                self.refuse_sparse(
                    f"{name} takes a sparse tensor that requires grad",
                    "pass its .detach(), or .to_dense() of it made before the call",
                )
        if info.writes or info.writes_named or info.random:
            self.refuse_sparse(f"{name} writes with a sparse tensor", "call .to_dense() on it")
        products = len(matrices) == 1
        if products and func in _PRODUCTS:
            return self._product(func, args)
        if products and func in _SUMS and args[0] is not matrices[0]:
            return self._sum(*args, **kwargs)
        if any(self.is_mapped(t) for t in dense):
            if matrices:
                self.refuse_sparse(
                    f"{name} of a sparse tensor and one that differs by sample",
                    "call .to_dense() on the sparse one: only its products with dense matrices "
                    "and vectors (@, torch.mm, mv, addmm, torch.sparse.mm) are batched",
                )
            self.refuse_sparse(
                f"{name} makes a sparse tensor that differs by sample",
                "write the values into a dense one: torch.zeros(shape).index_put((rows, "
                "columns), values, accumulate=True)",
            )
        if not all(self._is_captured(t) for t in dense) or (
            info.question and name not in _METADATA
        ):
            self.refuse_sparse(
                f"{name} of sparse tensors depends on what the function computes",
                "call it before the map, and capture its result",
            )
        out = self.kernel(func, args, kwargs)
        if isinstance(out, torch.Tensor) and out.layout is not torch.strided and products:
            if func in _SAME:
                _, parts, form = self._taken_apart_once(matrices[0])
                self.sparse[id(out)] = out, parts, form
            elif func in _TRANSPOSES and _exchanges(args):
                _, parts, form = self._taken_apart_once(matrices[0])
                turned = form._replace(transposed=not form.transposed)
                self.sparse[id(out)] = out, parts, turned
        return out

    def _is_captured(self, tensor: torch.Tensor) -> bool:
        var = self.known(tensor) or self._capture(tensor)
        return var.index in self.captured

    def _taken_apart_once(self, matrix: torch.Tensor) -> tuple[torch.Tensor, tuple[Var, ...], Form]:
        found = self.sparse.get(id(matrix))
        if found is None:
            parts = tuple([self.known(p) or self._capture(p) for p in sparse.parts_of(matrix)])
            found = self.sparse[id(matrix)] = matrix, parts, sparse.form_of(matrix)
        return found

    def _product(self, func: OpOverload, args: tuple) -> torch.Tensor:
        left = args[0].layout is not torch.strided
        matrix, dense = args if left else reversed(args)
        _, parts, form = self._taken_apart_once(matrix)
        flags: list[int] = []
        var = self.encode(dense, flags, False)
        self._check_stale([var])
        read, overwritten = self._unwritten(op_info(func), (dense,), {}, (var,), (), ())
        out = self.kernel(func, args, {})
        assert isinstance(out, torch.Tensor)
        outs = (self._define(out),)
        if var.group in self.mapped_groups:
            self.mapped_groups.add(outs[0].group)
        if read:
            self.unwritten.follow(op_info(func), (var,), outs, read, overwritten)
        encoded = (var, parts, form.size, form.layout, form.coalesced, form.transposed, left)
        every = (*flags, *[NO_GRAD] * len(parts))
        grad_mode = torch.is_grad_enabled()
        self._append(Equation(sparse.OPERATOR, encoded, (), outs, every, grad_mode))
        return out

    def _sum(
        self,
        added: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> torch.Tensor:
        """Compute `beta * added + alpha * first @ second`."""
        product = aten.mv.default if second.dim() == 1 else aten.mm.default
        with cast(contextlib.AbstractContextManager[object], self):
            out = product(first, second)
            out = out if alpha == 1 else out * alpha
            if beta == 0:  # then `added` may be NaN and does not count
                return out
            return out + (added if beta == 1 else added * beta)

    def refuse_zeros_of(
        self, func: OpOverload, kwargs: dict[str, object], error: Exception
    ) -> None:
        """Refuse forward mode through a sparse tensor, whose tangent torch cannot make.

        Raises:
            UnsupportedOperatorError: `error` is of that kind.
        """
        if func is aten._efficientzerotensor.default and isinstance(error, NotImplementedError):
            self.refuse_sparse(
                "forward-mode derivatives through a sparse tensor, for which torch has no kernels",
                "use reverse mode: shardmap.jacrev, also of a gradient for a Hessian",
            )

    def refuse_sparse(self, what: str, remedy: str) -> NoReturn:
        """Raise an error with the call, the user's line and the remedy.

        Raises:
            UnsupportedOperatorError: Always.
        """
        raise errors.UnsupportedOperatorError(f"{self.call}: {what}, at {user_line()}; {remedy}")


def _exchanges(args: tuple) -> bool:
    """True if a transpose of a matrix exchanges its two dimensions."""
    return len(args) == 1 or (args[0].dim() == 2 and {d % 2 for d in args[1:]} == {0, 1})
