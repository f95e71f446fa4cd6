"""Map the tensors of a recording to variables of the program."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch.nn.parameter import is_lazy as is_uninitialised

from shardmap import errors
from shardmap._torch import (
    FakeTensor,
    add_batch_dim,
    compiler,
    functorch,
    interpreters_aside,
    is_zero_tensor,
    storage_id,
    storage_of_weak_reference,
    weak_reference,
    wrap_for_grad,
)
from shardmap.program.ir import FRESH_LEAF, GRAD, NO_GRAD, SAMPLE_DEVICE, Packed, Param, Spec, Var
from shardmap.trace.exposed import Exposed
from shardmap.trace.given_generators import GivenGenerators
from shardmap.trace.kernels import is_lazy
from shardmap.trace.recording import device_name, element, is_own_leaf, user_line
from shardmap.trace.watch import PythonWatch


def spec_of(tensor: torch.Tensor) -> Spec:
    """The metadata of a tensor."""
    return Spec(
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        device_name(tensor.device),
        int(tensor.storage_offset()),
    )


class NotDense(errors.UnsupportedOperatorError):
    """A call takes or returns a tensor that is not strided."""


class Variables:
    """Table of tensors known by identity, held weakly.

    Intermediate results are freed when the function drops them.

    Memory is known by the address of its storage; a weak reference keeps the address from being
    used again.
    """

    def __init__(self, call: str, outer: Variables | None, once: bool):
        self.call = call
        """The user's call, for errors."""
        self.outer = outer
        """The recording around this one."""
        self.value_may_change = once or outer is not None
        self.watch: PythonWatch | None = None
        """The watch on a recording that is kept if nothing that python reads can change unseen."""
        self.depth = 0
        """Number of torch.func transforms active around the call; their wrappers are removed while
        recording."""
        self.wrappers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rewrapped: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Wrappers of transforms inside the function, by address, each with what replaces it."""
        self.paused = False
        self.entries: dict[int, tuple[weakref.ref, Var]] = {}
        self.groups: dict[int, int] = {}
        self.weak_storages: list[int] = []
        self.groups_of_zeros: set[int] = set()
        """Symbolic zeros of forward mode, whose storages have a size but no memory."""
        self.mapped_groups: set[int] = set()
        self.groups_with_grad: set[int] = set()
        """Memory of captured tensors that require grad."""
        self.groups_of_own_leaves: set[int] = set()
        """Memory of leaves that the function made (`captured.detach().requires_grad_()`); views of
        it are not taken for captured tensors."""
        self.captured_groups: set[int] = set()
        self.exposed = Exposed(call)
        """Memory that python code can write to without an operator."""
        self.input_groups: dict[int, int] = {}
        self.inputs: list[Var] = []
        self.captured: dict[int, tuple[Var, torch.Tensor]] = {}
        self.captured_grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.scalars: list[float] = []
        self.types: list[Any] = []
        self.count = 0
        self.device: torch.device | None = None
        self.given = GivenGenerators(call)
        self.lazy = False
        """True if a symbolic zero, a lazy conjugate or a lazy negative has been seen."""

    def _define(self, tensor: torch.Tensor) -> Var:
        if tensor.is_nested:
            raise errors.UnsupportedOperatorError(
                f"{self.call}: a nested tensor (torch.nested) takes part in the function, at "
                f"{user_line()}; pad its parts (torch.nn.utils.rnn.pad_sequence, or "
                "torch.nested.to_padded_tensor before the map), or compute with them one by one"
            )
        if tensor.layout is not torch.strided:
            raise NotDense(
                f"{self.call}: a tensor of layout {tensor.layout} takes part in the function; only "
                "dense (strided) tensors can be "
                "mapped: call .to_dense() on it first"
            )
        storage = tensor.untyped_storage()
        address = storage_id(storage)
        group = self.groups.get(address)
        if group is None:
            group = len(self.groups)
            self.groups[address] = group
            self.weak_storages.append(cast(int, weak_reference(storage)))
            if is_zero_tensor(tensor):
                self.groups_of_zeros.add(group)
        spec = spec_of(tensor) if type(tensor) is not FakeTensor else self._static_spec(tensor)
        var = Var(self.count, group, spec)
        self.count += 1
        self.entries[id(tensor)] = (weakref.ref(tensor), var)
        return var

    def _static_spec(self, tensor: torch.Tensor) -> Spec:
        """The metadata of a fake tensor, with the current values of symbolic sizes."""
        if compiler("sizes")(tensor):
            raise errors.DataDependentError(
                f"{self.call}: the shape of a result depends on values, which are not known while "
                "the call is traced (make_fx, torch.export); use torch.where or masks, or call the "
                "map outside of what is traced"
            )
        shape, strides, dtype, device, offset = spec_of(tensor)
        return Spec(tuple(map(int, shape)), tuple(map(int, strides)), dtype, device, offset)

    def known(self, tensor: torch.Tensor) -> Var | None:
        """The variable of a tensor that was recorded, or None."""
        entry = self.entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return None

    def add_input(self, sample: torch.Tensor) -> None:
        """Declare `sample` as the next mapped input."""
        var = self._define(sample)
        self.mapped_groups.add(var.group)
        self.input_groups[var.group] = len(self.inputs)
        self.inputs.append(var)
        if self.device is None:
            self.device = sample.device

    def add_cotangent(self, sample: torch.Tensor) -> Var:
        """Declare `sample` as an argument of a backward: it differs by sample."""
        var = self._define(sample)
        self.mapped_groups.add(var.group)
        return var

    def belongs(self, tensor: torch.Tensor) -> bool:
        """True if python must not read the value of `tensor`.

        The value differs by sample, or a change of it would not be noticed.
        """
        var = self.known(tensor)
        if var is not None and (
            var.group in self.mapped_groups
            or (self.value_may_change and var.index not in self.captured)
        ):
            return True
        if var is None and tensor.layout is torch.strided:
            # another object with the memory of a recorded tensor
            group = self.groups.get(storage_id(tensor.untyped_storage()))
            if group is not None and group in self.mapped_groups:
                return True
        return self.outer is not None and self.outer.belongs(tensor)

    def peeled(self, wrapper: torch.Tensor) -> torch.Tensor:
        """The plain tensor that replaces one of an outer `torch.func` transform while recording.

        The replay gets the tensor itself.
        """
        found = self.wrappers.get(id(wrapper))
        if found is None:
            allowed = functorch.get_inplace_requires_grad_allowed()
            self.paused = True
            with (
                interpreters_aside()
            ):  # a transform inside the function may be active: it must not see this
                plain = element(wrapper).detach()
                functorch.set_inplace_requires_grad_allowed(True)
                if plain.is_floating_point() or plain.is_complex():
                    plain.requires_grad_()
            self.paused = False
            functorch.set_inplace_requires_grad_allowed(allowed)
            found = self.wrappers[id(wrapper)] = (wrapper, plain)
        return found[1]

    def peeled_within(self, wrapper: torch.Tensor) -> torch.Tensor:
        """A wrapper of a transform inside the function, with what it holds peeled.

        `torch.func.grad` inside wraps a shared tensor of an outer transform as it finds it; the
        levels of outer transforms that take part in the recording know no such tensor.
        """
        known = self.rewrapped.get(id(wrapper))
        if known is not None:
            return known[1]
        inner, level = functorch.get_unwrapped(wrapper), functorch.maybe_get_level(wrapper)
        if self.is_outer(inner):
            held = self.peeled(inner)
        elif self.is_inner(inner):
            held = self.peeled_within(inner)
        else:
            return wrapper
        if held is inner:
            return wrapper
        if functorch.is_batchedtensor(wrapper):
            again = add_batch_dim(held, functorch.maybe_get_bdim(wrapper), level)
        else:
            again = wrap_for_grad(held, level)
        self.rewrapped[id(wrapper)] = (wrapper, again)
        return again

    def is_inner(self, tensor: torch.Tensor) -> bool:
        """True if `tensor` belongs to a `torch.func` transform inside the function.

        One that has ended has no level; its pullback (`torch.func.jacrev`) still holds wrappers.
        """
        return functorch.maybe_get_level(tensor) > self.depth or id(tensor) in self.rewrapped

    def is_outer(self, tensor: torch.Tensor) -> bool:
        """True if `tensor` belongs to a `torch.func` transform around the call."""
        return 0 < functorch.maybe_get_level(tensor) <= self.depth

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """True if the value of a tensor differs by sample."""
        var = self.known(tensor)
        return var is not None and var.group in self.mapped_groups

    def _capture(self, tensor: torch.Tensor) -> Var:
        if functorch.is_legacy_batchedtensor(tensor) and torch.is_inference_mode_enabled():
            raise errors.TransformError(
                f"{self.call}: torch.autograd.functional takes forward mode, vectorized, under "
                "torch.inference_mode(), where torch's tangents are zeros; call the map under "
                "torch.no_grad()"
            )
        self.lazy = self.lazy or is_lazy(tensor)
        address = storage_id(tensor.untyped_storage()) if tensor.layout is torch.strided else None
        group = self.groups.get(address) if address is not None else None
        if group is not None and group not in self.captured_groups:
            made = self.made_again(tensor, group)
            if made is None and is_zero_tensor(tensor):
                made = self.made_zero(tensor)
            if made is not None:
                return made
            raise errors.EscapeError(
                f"{self.call}: a tensor of shape {tuple(tensor.shape)} shares memory with one made "
                "inside the function but was "
                "not made by a "
                "recorded operator (`.data`, `set_`, numpy views and storages do that); use torch "
                "operators on the tensor itself"
            )
        if group is None and tensor.layout is torch.strided and self._is_alias(tensor):
            raise errors.EscapeError(
                f"{self.call}: a tensor of shape {tuple(tensor.shape)} lies in the memory of one "
                "made inside the function (torch.from_numpy, torch.from_dlpack); what numpy or "
                "another library did with it cannot be recorded: use torch operators"
            )
        if is_uninitialised(tensor):
            raise errors.CapturedWriteError(
                f"{self.call}: the function reads a parameter of a lazy module, which a first "
                "sample would give its shape and values for all samples; call the module once, on "
                "one sample, before it is mapped"
            )
        if tensor.dtype is torch.uint8:
            self.refuse_state(tensor)
        var = self._define(tensor)
        self.captured_groups.add(var.group)
        self.captured[var.index] = (var, tensor)
        if tensor.requires_grad:
            self.groups_with_grad.add(var.group)
        if tensor.requires_grad and tensor.is_leaf:
            self.captured_grads.append((tensor, tensor.grad))
        return var

    def encode(self, value: Any, flags: list[int], param: bool) -> Any:
        """Encode an argument for the program.

        The autograd flags of the tensors in it are added to `flags`.
        """
        kind = type(value)
        if kind is int or value is None or kind is str:
            return value
        if isinstance(value, torch.Tensor):
            entry = self.entries.get(id(value))
            if entry is not None and entry[0]() is value:
                var = entry[1]
            else:
                var = self._capture(value)
            if self.exposed and var.group in self.exposed:
                self.exposed.check(var.group, value)
            if value.requires_grad:
                if var.index not in self.captured and is_own_leaf(value):
                    flags.append(FRESH_LEAF)
                    self.groups_of_own_leaves.add(var.group)
                else:
                    if (
                        var.group in self.captured_groups
                        and var.index not in self.captured
                        and var.group not in self.groups_with_grad
                        and var.group not in self.groups_of_own_leaves
                    ):
                        # A view of captured memory that does not require grad, and itself does:
                        # what autograd saved, unpacked.
                        var = self._capture(value)
                    var = self.with_history(value, var)
                    flags.append(GRAD)
            else:
                flags.append(NO_GRAD)
            return var
        if kind is list or kind is tuple:
            return tuple([self.encode(v, flags, False) for v in value])
        if kind is bool:
            self.types.append(bool)
            return value
        if kind is float:
            if param:
                self.scalars.append(value)
                return Param(len(self.scalars) - 1)
            self.types.append(value.hex())
            return value
        if kind is complex:
            self.types.append((value.real.hex(), value.imag.hex()))
            return value
        if kind is torch.device:
            return SAMPLE_DEVICE if self._is_sample_device(value) else value
        if kind is torch.dtype or kind is torch.layout or kind is torch.memory_format:
            return value
        if isinstance(value, torch.SymInt):
            return int(value)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise errors.EscapeError(
                f"{self.call}: the function computes with symbolic sizes ({value}), which cannot "
                "be recorded"
            )
        if isinstance(value, torch.Generator):
            return self.given.encoded(value)
        if isinstance(value, torch.ScriptObject) and Packed.holds(value):
            return Packed(value)
        if isinstance(value, float | np.floating):
            return self.encode(float(value), flags, param)
        if isinstance(value, int | np.integer):
            return int(value)
        raise errors.EscapeError(
            f"{self.call}: an operator takes a {kind.__name__} argument ({value!r}), which cannot "
            "be recorded; make the part that calls it an operator (torch.library.custom_op)"
        )

    def _is_sample_device(self, device: torch.device) -> bool:
        mine = self.device
        return (
            mine is not None
            and device.type == mine.type
            and (device.index is None or mine.index is None or device.index == mine.index)
        )

    def _outputs(self, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return self.known(out) or self._define(out)
        if isinstance(out, tuple | list):
            return tuple([self._outputs(o) for o in out])
        return None

    def refuse_state(self, tensor: torch.Tensor) -> None:
        """Refuse a tensor of bytes that holds the state of a generator; `Refusals` knows those."""

    def made_again(self, tensor: torch.Tensor, group: int) -> Var | None:
        """The variable of another object with a recorded tensor's memory."""
        return None

    def with_history(self, tensor: torch.Tensor, var: Var) -> Var:
        """The variable of a tensor that requires grad, once autograd has given it a history."""
        return var

    def made_zero(self, tensor: torch.Tensor) -> Var | None:
        """The variable of a view of a symbolic zero."""
        return None

    def _is_alias(self, tensor: torch.Tensor) -> bool:
        """True if a foreign storage lies in recorded memory, as numpy's and DLPack's views do."""
        storage = tensor.untyped_storage()
        if storage.resizable() or not storage.nbytes() or storage.device.type == "meta":
            return False
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        others = {v.group for v, _ in self.captured.values()} | self.groups_of_zeros
        for address, weak in zip(self.groups, self.weak_storages, strict=False):
            known: Any = storage_of_weak_reference(weak)
            if known is None or self.groups[address] in others:
                continue
            first = known.data_ptr()
            if first < stop and start < first + known.nbytes():
                return True
        return False

    def expose(self, tensor: torch.Tensor, door: str) -> None:
        """Note that python code reaches the memory of a tensor that all samples share.

        Args:
            tensor: The tensor.
            door: The call by which it does.
        """
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        address = storage_id(tensor.untyped_storage())
        known = self.groups.get(address)
        group = -1 - address if known is None else known  # its own number if nothing used it yet
        captured = known is None or known in self.captured_groups
        if group not in self.groups_of_zeros:
            self.exposed.add(group, tensor, door, captured)

    def refuse_unseen_write(self, tensor: torch.Tensor, door: str, remedy: str) -> NoReturn:
        """Refuse that python writes to a tensor without an operator."""
        group = self.groups.get(storage_id(tensor.untyped_storage()))
        if group is None or group in self.captured_groups:
            raise errors.CapturedWriteError(
                f"{self.call}: {door} writes to a tensor of shape {tuple(tensor.shape)} that all "
                f"samples share, at {user_line()}; the loop would write to it once per sample: "
                "return the value instead, or clone the tensor inside the function"
            )
        raise errors.EscapeError(
            f"{self.call}: {door} writes to a tensor of shape {tuple(tensor.shape)} without an "
            f"operator, at {user_line()}; what it writes cannot be recorded: {remedy}"
        )

    def captured_var(self, tensor: torch.Tensor) -> Var:
        """The variable of a tensor that was not recorded; the tensor is captured from now on."""
        return self._capture(tensor)
