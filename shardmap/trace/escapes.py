"""Doors: calls by which a value can leave a recording without an operator, and their handling.

A dispatch mode sees operators only. Python code can also read a tensor's memory directly (`tolist`,
`numpy`), put tensors into python data that becomes a tensor again (`torch.tensor([x, 1.0])`) or
swap memory underneath (`.data = `). A function mode sees these doors and refuses them for tensors
that belong to the recording: values of other tensors are the same for all samples.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from shardmap import errors
from shardmap._torch import (
    HigherOrderOperator,
    OpOverload,
    aten,
    dispatch_depth,
    function_depth,
    functorch,
    left_aligned,
    pop_function_mode,
    push_function_mode,
    saved_hooks,
    set_grad,
    set_requires_grad,
    storage_id,
    unpack_dual,
)
from shardmap.program.own_backward import DATA
from shardmap.trace import control_flow, lifted, packed, recurrent, shallow_copies
from shardmap.trace import scalar_index as positions
from shardmap.trace.called_back import Watched, call_saving
from shardmap.trace.door_names import (
    CHANGES_GRAD,
    FROM_DATA,
    REACHES,
    READS,
    SET_DATA,
    VALUE_READS,
    WRITES,
)
from shardmap.trace.modes_inside import Above
from shardmap.trace.outside_graphs import differentiate, refuse_tangent
from shardmap.trace.padded_encoder import PaddedEncoder, padded_encoder
from shardmap.trace.recomputed import Region
from shardmap.trace.recording import element
from shardmap.trace.refusals import OF_KEYS, another_of_rows
from shardmap.trace.separate_views import returns_several_views, separated

if TYPE_CHECKING:
    from shardmap.trace.recorder import Recorder

Tensor = torch.Tensor

_CUTS: dict[object, OpOverload] = {
    cast(Any, Tensor.data).__get__: DATA, Tensor.detach_: aten.detach_.default,
    torch.detach_: aten.detach_.default,
}  # fmt: skip
"""Calls that take a tensor's history away, and the operators that stand for them."""

_MOST_NUMBERS = 64
"""Number of elements up to which `tolist()` becomes a question per element, like `item()`."""


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not functorch.is_functorch_wrapped_tensor(tensor)


def _numbers(tensor: torch.Tensor) -> list[Any] | Any:
    """The elements nested as by `tolist()`, each a question about a value."""
    if tensor.dim() == 0:
        return tensor.item()
    return [_numbers(part) for part in tensor.unbind(0)]


_PRINTS = {Tensor.__repr__, Tensor.__format__}


def _tensors_within(data: object) -> Iterator[torch.Tensor]:
    """Tensors inside python containers, at any depth."""
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _tensors_within(item)


_CALLS_BACK = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
"""Functions that run a backward pass, and so may call user-defined hooks and backwards."""

_FREEZES: set[object] = {Tensor.requires_grad_, set_requires_grad}

_NN_FUNCTIONAL = torch.nn.functional.__name__

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, torch.nn.Module)

_saved_tensors_hooks = functools.partial(saved_hooks, False)

_SPECIAL = {
    *READS, *FROM_DATA, *CHANGES_GRAD, *_PRINTS, *OF_KEYS, *recurrent.CUDNN_FLAGS, *_CALLS_BACK,
    *_FREEZES, *recurrent.CELLS, *_CUTS, packed.PADS, left_aligned, unpack_dual, Tensor.__getitem__,
    Tensor.__setitem__, Tensor.register_hook, *positions.BY_VALUES, set_grad,
    torch.nn.functional.multi_head_attention_forward,
}  # fmt: skip
_C_KINDS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
_ordinary: dict[object, bool] = {}
"""The results of `_is_ordinary` for torch's own functions."""


def _is_ordinary(func: object) -> bool:
    """True if a call is a plain operator: no door, and without user-defined callbacks.

    It is called for each call of each recording, so results are cached for functions that live for
    ever.
    """
    if not isinstance(func, _C_KINDS):
        return False
    owner = getattr(func, "__self__", None)
    if isinstance(owner, torch.Tensor) or getattr(func, "__module__", "") == _NN_FUNCTIONAL:
        return False
    found = func not in _SPECIAL
    if owner is None or isinstance(owner, types.ModuleType | type):
        _ordinary[func] = found
    return found


class Doors(TorchFunctionMode):
    """Function mode that refuses the doors for recorded tensors.

    Printing a tensor prints the sample and records nothing.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self.saved_changed = self.saved_copied = False
        """True if a user-defined `saved_tensors_hooks` unpacks another value than was packed, and a
        copy for a gradient that may be differentiated again."""
        self.regions: dict[int, Region] = {}
        """What was recorded under such hooks, by the address of the one that unpacks."""
        self.depth = 0
        """Number of dispatch modes that are on without those that the function enters."""
        self.encoder: PaddedEncoder | None = None
        """An encoder with padding whose last layer is running."""

    def __torch_function__(
        self, func: Any, kinds: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle one call of torch's python interface."""
        if dispatch_depth() > self.depth > 0:
            return self._above(func, kinds, args, kwargs)
        self.recorder.serial += 1
        if self.recorder.lifted is not None and func in lifted.QUESTIONS:
            return self.recorder.lifted.answer(func, args[0])
        if kwargs and type(kwargs.get("generator")) is torch.Generator:
            self.recorder.given.seen(kwargs["generator"])
        ordinary = _ordinary.get(func)
        if ordinary is None:
            ordinary = _is_ordinary(func)
        if not ordinary and func is set_grad:
            self.recorder.optimizers.note(sys._getframe(1))
        if ordinary and self.encoder is None and not self.recorder.depth:
            hooks = _saved_tensors_hooks()
            if hooks is None or isinstance(hooks[0], Watched):
                return func(*args, **kwargs) if kwargs else func(*args)
        if func is left_aligned:
            return True  # `nn.TransformerEncoder` asks and does not pack: see `padded_encoder`
        if self.encoder is not None and self.encoder.is_last_call(func, args, kwargs or {}):
            encoder, self.encoder = self.encoder, None
            return encoder.zeroed(func(*args, **(kwargs or {})))
        if self.recorder.depth:
            args, kwargs = self._peel((args, kwargs or {}))
            if self.recorder.separate_views:
                return self._forward_only(func, args, kwargs or {})
        return self._seen(func, args, kwargs)

    def _above(self, func: object, kinds: object, args: tuple, kwargs: dict | None) -> object:
        """Handle a call that dispatch modes which the function has entered will answer."""
        depth, self.depth = self.depth, 0
        try:
            with Above(self.recorder):
                return self.__torch_function__(func, kinds, args, kwargs)
        finally:
            self.depth = depth

    def _forward_only(self, func: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Run a call whose views autograd might forbid to write."""
        if func is set_grad:
            return func(*args, **kwargs)
        self.recorder.grad_lifted |= not torch.is_grad_enabled()
        with torch.enable_grad():
            if returns_several_views(func):
                return self._separated(func, args, kwargs)
            return self._seen(func, args, kwargs)

    def _seen(self, func: Callable[..., object], args: tuple, kwargs: dict | None) -> object:
        """Run a call that may be a door."""
        sizes = packed.sizes_of(func, args, kwargs or {})
        if isinstance(sizes, torch.Tensor) and _is_plain(sizes):
            values = cast(list[int], self.unrecorded(sizes.tolist, (), {}))
            packed.ask(sizes, values, self.recorder.is_mapped(sizes))
            if func is packed.PADS:
                padded, _ = cast(tuple[Tensor, Tensor], func(*args, **(kwargs or {})))
                return padded, packed.lengths_of(sizes, values[0])
        if recurrent.served(func, args):
            return recurrent.recurrent(func, args, kwargs or {})
        if func in recurrent.CUDNN_FLAGS and args:
            args = recurrent.without_cudnn(func, args)
        if func is Tensor.__deepcopy__ and type(args[0]) is Tensor and args[0].is_leaf:
            copied = self._deepcopy(args[0], args[1])
            if copied is not None:
                return copied
        elif (
            func is Tensor.__deepcopy__ and type(args[0]) is Tensor and self.recorder.lifted is None
        ):
            return func(*args)  # torch refuses what is no leaf, as in the loop
        if func in shallow_copies.STEPS:
            done = shallow_copies.step(self.recorder, func, args, self.unrecorded)
            if done is not None:
                return done
        if func is Tensor.__format__ and args[0].dim() == 0 and _is_plain(args[0]):
            return args[0].item().__format__(*args[1:])
        if func is Tensor.tolist and args[0].numel() <= _MOST_NUMBERS and _is_plain(args[0]):
            return _numbers(args[0])
        if func in OF_KEYS and self.recorder.lazily and self.recorder.belongs(element(args[0])):
            raise another_of_rows(self.recorder.call, func.__name__, self.recorder.lazily)
        if func == SET_DATA and _is_plain(args[0]) and isinstance(args[1], Tensor):
            return self.recorder.set_data(element(args[0]), element(args[1]))
        if func in CHANGES_GRAD:
            self.recorder.note_grad(args[0])
        elif func in READS:
            for tensor in _tensors_within(args):
                self._refuse(tensor, *READS[func], func in VALUE_READS)
            if func in REACHES and _is_plain(args[0]):
                self.unrecorded(self.recorder.expose, (args[0], READS[func][0]), {})
            elif func in WRITES:
                self.recorder.refuse_unseen_write(element(args[0]), *READS[func])
        elif func in FROM_DATA:
            data = args[FROM_DATA[func] :][:1]
            if data and not isinstance(data[0], torch.Tensor):
                for tensor in _tensors_within(data):
                    self._refuse(
                        tensor,
                        f"torch.{func.__name__} of python data that holds tensors",
                        "use torch.stack",
                        True,
                    )
        elif func is Tensor.__getitem__ or func is Tensor.__setitem__:
            done, result = self._index(func, args)
            if done:
                return result
        elif func is torch.nn.functional.multi_head_attention_forward:
            self.encoder = padded_encoder(self.recorder.call) or self.encoder
        elif func in positions.BY_VALUES:
            return positions.BY_VALUES[func](*args, **(kwargs or {}))
        elif func is Tensor.register_hook and not functorch.is_functorch_wrapped_tensor(args[0]):
            return self._register_hook(args, kwargs or {})
        elif func in _CUTS and _is_plain(args[0]):
            return self.recorder.cut_off(_CUTS[func], args[0], cast(torch.Tensor, func(*args)))
        elif func in _FREEZES and _is_plain(args[0]):
            before = args[0].requires_grad
            result = func(*args, **(kwargs or {}))
            self.recorder.freeze(args[0], before)
            if self.recorder.lifted is not None and args[0].requires_grad:
                self.recorder.lifted.note_set(args[0])
            return result
        elif func is unpack_dual:
            refuse_tangent(self.recorder, args[0])
        elif func in _PRINTS:
            if self.recorder.watch is not None:
                self.recorder.watch.accuse("it writes a tensor's values as text")
            return self.unrecorded(func, args, kwargs or {})
        return self._call(func, args, kwargs or {})

    def unrecorded(self, func: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Run a call that is not recorded."""
        paused = self.recorder.paused
        self.recorder.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.paused = paused

    def _separated(self, func: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """The views that a call returns, recorded one by one."""
        # Of `iter(tensor)` the views are made one by one: all of them here.
        views = self.unrecorded(lambda: list(cast(Iterable, func(*args, **kwargs))), (), {})
        found = tuple(separated(func, cast(list[torch.Tensor], views), args, kwargs))
        return iter(found) if func is Tensor.__iter__ else found

    def _call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a call with the doors watched in python code that it calls back.

        While a function mode handles a call, torch has switched the mode off.
        """
        if isinstance(func, HigherOrderOperator):
            with self:
                return control_flow.run(func, args, kwargs, self.recorder.depth)
        if func in _CALLS_BACK:
            return self._call_back(func, args, kwargs)
        if getattr(func, "__module__", "") == _NN_FUNCTIONAL:
            args = tuple([self._watched(a) for a in args])
            kwargs = {k: self._watched(v) for k, v in kwargs.items()}
        hooks = _saved_tensors_hooks()
        if hooks is None or isinstance(hooks[0], Watched):
            return func(*args, **kwargs)
        name, given = getattr(func, "__name__", ""), (*args, *kwargs.values())
        return call_saving(self, hooks, lambda: func(*args, **kwargs), name, given)

    def _register_hook(self, args: tuple, kwargs: dict[str, Any]) -> RemovableHandle:
        """Run `tensor.register_hook(hook)`: outer gradients must pass through it too."""
        handle = self._call(Tensor.register_hook, args, kwargs)
        self.recorder.add_hook(args[0], (*args, *kwargs.values())[1], handle)
        return handle

    def _call_back(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a backward pass, in which user-defined hooks and backwards run.

        `func` itself looks for function modes before it starts, so that this one is entered at the
        first operator inside, which `func` calls before user-defined code.
        """
        recorder, before = self.recorder, function_depth()
        differentiate(recorder, func, args, kwargs)

        def enter() -> None:
            recorder.enter_doors = None
            push_function_mode(self)

        recorder.enter_doors = enter
        try:
            return func(*args, **kwargs)
        finally:
            recorder.enter_doors = None
            if function_depth() > before:
                self._leave()

    def _leave(self) -> None:
        """Leave this mode, which may have been entered below one of the caller's."""
        above = []
        while (mode := pop_function_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            push_function_mode(mode)

    def _watched(self, value: Any) -> Any:
        """Wrap a user-defined function so that it is called with the doors watched."""
        return Watched(self, value) if isinstance(value, _FUNCTIONS) else value

    def _deepcopy(self, tensor: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor | None:
        """Serve `copy.deepcopy(tensor)` by a clone; None if a clone is not the same.

        That is so if the clone has other strides, or if another tensor of the same memory has
        been copied: the copies would share memory as well.
        """
        if id(tensor) in memo:
            return memo[id(tensor)]
        with torch.no_grad():
            clone = tensor.clone()
        memory = f"memory {storage_id(element(tensor).untyped_storage())}"
        if clone.stride() != tensor.stride() or memory in memo:
            return None
        memo[id(tensor)] = memo[memory] = clone.requires_grad_(tensor.requires_grad)
        if tensor.grad is not None:
            clone.grad = self._deepcopy(tensor.grad, memo)
        return clone

    def _index(self, func: Any, args: tuple) -> tuple[bool, Any]:
        """Serve indices without dimensions that differ by sample; return True if it did."""
        source, indices = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if self.recorder.places_asked or not any(
            isinstance(i, Tensor) and i.dim() == 0 for i in indices
        ):
            return False, None
        at = positions.places(source, indices, self._differs)
        if not at:
            return False, None
        if func is Tensor.__getitem__:
            copy = positions.taken(source, indices, at)
            self.recorder.copied(element(source), element(copy), indices)
            return True, copy
        value = args[2]
        if isinstance(value, Tensor):
            self.recorder.put_back(
                source,
                value,
                indices,
                at,
                lambda copy: positions.put(source, indices, at, value.clone() if copy else value),
            )
        else:
            positions.put(source, indices, at, value)
        return True, None

    def _differs(self, index: torch.Tensor) -> bool:
        return not functorch.is_batchedtensor(index) and self.recorder.belongs(element(index))

    def _peel(self, value: Any) -> Any:
        """Replace tensors of outer `torch.func` transforms in arguments.

        Their plain tensors take their places while recording.
        """
        if isinstance(value, torch.Tensor):
            if self.recorder.is_outer(value):
                return self.recorder.peeled(value)
            return self.recorder.peeled_within(value) if self.recorder.is_inner(value) else value
        if isinstance(value, dict):
            return {k: self._peel(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._peel(v) for v in value])
        return value

    def _is_remembered(self, door: str) -> bool:
        """True if the outermost recording is kept for later calls; one that is watched is not."""
        outermost = self.recorder
        while outermost.outer is not None:
            outermost = outermost.outer
        if outermost.watch is not None:
            outermost.watch.accuse(f"it reads the value of a tensor by {door}")
        return outermost.value_may_change

    def _refuse(self, tensor: torch.Tensor, door: str, remedy: str, reads_value: bool) -> None:
        plain = element(tensor)
        if plain.dtype is torch.uint8:
            self.recorder.refuse_state(plain)
        if reads_value and self._is_remembered(door) and not self.recorder.belongs(plain):
            raise errors.EscapeError(
                f"{self.recorder.call}: python reads the value of a captured tensor of shape "
                f"{tuple(plain.shape)} by {door}, and nothing "
                f"would notice if it changed later: {remedy}, or pass trace='each'"
            )
        if self.recorder.belongs(plain):
            raise errors.EscapeError(
                f"{self.recorder.call}: the value of a tensor of shape {tuple(plain.shape)} that "
                "is computed inside the function leaves it through "
                f"{door}; what becomes of it cannot be recorded: {remedy}"
            )
