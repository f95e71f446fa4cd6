"""The recorded calls, and variables for tensors that no operator call produces."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, cast

import torch

from shardmap import errors
from shardmap._torch import (
    OpOverload,
    aten,
    base_of,
    dispatch_depth,
    free_weak_reference,
    is_zero_tensor,
    kernel_of,
    set_data,
    storage_id,
    weak_reference,
    without_dispatch,
)
from shardmap.program.ir import NO_GRAD, Equation, Program, Var, variables
from shardmap.program.operators import op_info
from shardmap.program.own_backward import DATA
from shardmap.trace import repeat as follow
from shardmap.trace.kernels import is_lazy
from shardmap.trace.recording import user_line
from shardmap.trace.tensor_table import Variables, spec_of

_SET_MEMORY = aten.set_.source_Storage_storage_offset


class Equations(Variables):
    """The recorded calls and the variables; calls expected from the last recording are reused."""

    def __init__(self, call: str, outer: Variables | None, once: bool):
        super().__init__(call, outer, once)
        self.equations: list[Equation] = []
        self.literals: list[tuple[Var, torch.Tensor]] = []
        self.expected: Program | None = None
        """The last program recorded of the same code, until a call differs from it."""
        self.alternatives: tuple[Program, ...] = ()
        """Other programs recorded of the same code."""
        self.being_copied: tuple[torch.UntypedStorage, torch.Tensor] | None = None
        """The storage that `copy.copy` is making a tensor of, and the tensor that it copies."""

    def adopt(self, out: Any, eq: Equation, mapped: bool) -> None:
        """Add the expected equation `eq` for the call that has just returned `out`."""
        outs = eq.outs
        single = out is None or isinstance(out, torch.Tensor)
        if single and out is not None and len(outs) == 1 and self._adopted(out, outs[0]):
            if mapped and not op_info(eq.op).shape_only:
                self.mapped_groups.add(outs[0].group)
            self.equations.append(eq)
            return
        results: Any = (out,) if single else out
        for tensor, var in zip(results, outs, strict=True):
            if tensor is None and var is None:
                continue
            if not isinstance(tensor, torch.Tensor) or not self._adopted(tensor, var):
                self.expected = None
                eq = eq._replace(outs=(self._outputs(out),) if single else self._outputs(out))
                break
        if mapped and not op_info(eq.op).shape_only:
            self.mapped_groups.update([v.group for v in variables(eq.outs)])
        self.equations.append(eq)

    def _adopted(self, tensor: torch.Tensor, var: Any) -> bool:
        """True if a result matches the expected variable `var`.

        It must be the next variable, of the same shape and dtype, in new memory or in the same
        known memory.
        """
        if type(var) is not Var or var.index != self.count:
            return False
        spec = var.spec
        if (
            tensor.shape != spec.shape
            or tensor.dtype is not spec.dtype
            or ((entry := self.entries.get(id(tensor))) is not None and entry[0]() is tensor)
        ):
            return False
        storage = tensor.untyped_storage()
        address = storage_id(storage)
        group = self.groups.get(address)
        if group is None:
            if var.group != len(self.groups):
                return False
            self.groups[address] = var.group
            self.weak_storages.append(cast(int, weak_reference(storage)))
            if is_zero_tensor(tensor):
                self.groups_of_zeros.add(var.group)
        elif group != var.group or tensor.stride() != spec.stride:
            return False
        self.entries[id(tensor)] = (weakref.ref(tensor), var)
        self.count += 1
        return True

    def _append(self, eq: Equation) -> None:
        """Add an equation, and note if it was expected."""
        if self.expected is not None:
            number = len(self.equations)
            wanted = (
                self.expected.equations[number] if number < len(self.expected.equations) else None
            )
            if (
                wanted is not None
                and wanted == eq
                and follow.alike(wanted.args, eq.args)
                and follow.alike(wanted.kwargs, eq.kwargs)
                and follow.alike(wanted.answer, eq.answer)
            ):
                eq = wanted
            elif eq.answer is not None:  # another answer: it may go another known way from here
                self.expected = follow.turn(self.alternatives, self.equations, eq)
                eq = eq if self.expected is None else self.expected.equations[number]
            else:
                self.expected = None
        self.equations.append(eq)

    def cut_off(self, op: OpOverload, tensor: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
        """Record that `bare` is `tensor` without its history, which no operator call shows.

        Args:
            op: `DATA` for `tensor.data`, or torch's operator for `tensor.detach_()`.
            tensor: The tensor; after `detach_()` it is `bare` itself.
            bare: The result, which is returned.

        Raises:
            TransformError: Several transforms are around, of which torch cuts only the innermost.
        """
        if op is DATA and self.depth > 1:
            raise errors.TransformError(
                f"{self.call}: `.data`, inside of several transforms of torch.func around the map, "
                "leaves out the history of the innermost only; use .detach(), which leaves out all"
            )
        source = self.known(tensor)
        if source is not None and source.group not in self.captured_groups:
            grad_mode = torch.is_grad_enabled()
            var = self._define(bare)
            self._append(Equation(op, (source,), (), (var,), (NO_GRAD,), grad_mode))
        return bare

    def shallow_copy(self, func: OpOverload, args: tuple) -> torch.Tensor | None:
        """Record the last step of `copy.copy(tensor)`; None for other calls.

        It gives the memory of the tensor to an empty one.
        """
        if func is not _SET_MEMORY or self.being_copied is None:
            return None
        storage, tensor = self.being_copied
        if storage_id(storage) != storage_id(args[1]):
            return None
        self.being_copied = None
        kernel_of(func)(*args)
        return self.cut_off(DATA, tensor, args[0])

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Run `tensor.data = value`, and record that the tensor is the value without its history.

        Raises:
            CapturedWriteError: The tensor is from outside of the function.
            EscapeError: The tensor has a history, which would be that of another value, or a view,
                whose gradients would follow the tensor while its values do not.
        """
        address = storage_id(tensor.untyped_storage())
        if address == storage_id(value.untyped_storage()) and spec_of(tensor) == spec_of(value):
            set_data(tensor, value)  # `module.to(device)`, where it is already
            return
        group = self.groups.get(address)
        if group is None or group in self.captured_groups:
            self.refuse_unseen_write(tensor, ".data = ", "")
        known = [ref() for ref, var in self.entries.values() if var.group == group]
        if any(t is not None and t is not tensor and base_of(t) is tensor for t in known):
            raise errors.EscapeError(
                f"{self.call}: `.data = ` gives other memory to a tensor of shape "
                f"{tuple(tensor.shape)}, at {user_line()}, of which a view is still in use; use "
                "copy_ under torch.no_grad()"
            )
        if tensor.grad_fn is not None:
            raise errors.EscapeError(
                f"{self.call}: `.data = ` gives another value to a tensor of shape "
                f"{tuple(tensor.shape)} that was computed from others that require grad, at "
                f"{user_line()}; its gradients would be those of the value before: use copy_ "
                "under torch.no_grad()"
            )
        source = self.known(value) or self.captured_var(value)
        set_data(tensor, value)
        var = self._define(tensor)
        grad_mode = torch.is_grad_enabled()
        self._append(Equation(DATA, (source,), (), (var,), (NO_GRAD,), grad_mode))

    def made_again(self, tensor: torch.Tensor, group: int) -> Var | None:
        """The variable of a new tensor object with the memory and metadata of a recorded one.

        `nn.Parameter(x)`, `x.as_subclass(...)` and `x.data` make one without an operator call, and
        autograd does where a backward unpacks its own result, saved without its history. The object
        of `x` itself may be gone: the recorded results are searched, latest first.
        """
        spec = spec_of(tensor)
        recorded = (eq.results() for eq in reversed(self.equations))
        given = (*self.inputs, *[var for var, _ in self.literals])
        source = next(
            (
                var
                for var in itertools.chain(itertools.chain.from_iterable(recorded), given)
                if var.group == group and var.spec == spec
            ),
            None,
        )
        if source is None or (self.lazy and (tensor.is_complex() or is_lazy(tensor))):
            return None
        var = self._define(tensor)
        self._append(
            Equation(
                aten.detach.default, (source,), (), (var,), (NO_GRAD,), torch.is_grad_enabled()
            )
        )
        return var

    def made_zero(self, tensor: torch.Tensor) -> Var:
        """The variable of a view of a symbolic zero of forward-mode AD: another such zero.

        No operator call shows the view.
        """
        var, flags = self._define(tensor), []
        options = {"dtype": tensor.dtype, "layout": tensor.layout, "device": tensor.device}
        named = tuple([(k, self.encode(v, flags, False)) for k, v in options.items()])
        self._append(
            Equation(
                aten._efficientzerotensor.default,
                (tuple(tensor.shape),),
                named,
                (var,),
                (),
                torch.is_grad_enabled(),
            )
        )
        return var

    def _constant(self, tensor: torch.Tensor) -> Var:
        """The variable of a constant that torch's C++ code has written into new memory."""
        with without_dispatch():
            copy = tensor.detach().clone()
        var = self._define(copy)
        self.literals.append((var, copy))
        return var

    def _literal(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made from python data inside the function: owned by the program."""
        with without_dispatch():  # an outer recording must not see the copy
            copy = tensor.clone()
        if dispatch_depth():  # fake tensors around the recording: this becomes one of them
            tensor = kernel_of(aten.lift_fresh.default)(tensor)
        var = self._define(tensor)
        self.literals.append((var, copy))
        return tensor

    def release(self) -> None:
        """Release the storages' addresses."""
        for address in self.weak_storages:
            free_weak_reference(address)
        self.weak_storages.clear()
        self.entries.clear()
