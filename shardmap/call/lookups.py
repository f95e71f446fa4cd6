"""Functions that look up again what a function has read: entries, items, cells, attributes.

Each takes the parts of the call's function and arguments (`root.Root`).
"""

from __future__ import annotations

import contextvars
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence, Set

import numpy as np
import torch

from shardmap._torch import dict_version, is_view, missing
from shardmap.call.kinds import made_of
from shardmap.trace.recording import is_plain

ABSENT = object()
"""What a look-up returns if there is nothing."""
Getter = Callable[[Sequence[object]], object]


def entry(of: dict[object, object], name: object) -> Getter:
    """Look an entry of a dict up."""
    return lambda _: dict.get(of, name, ABSENT)


def item(of: Sequence[object], number: int) -> Getter:
    """Look an item of a list up."""
    return lambda _: of[number] if number < len(of) else ABSENT


def contents(cell: types.CellType) -> Getter:
    """Look up what a closure's cell holds."""

    def look(_: Sequence[object]) -> object:
        try:
            return cell.cell_contents
        except ValueError:  # not assigned
            return ABSENT

    return look


def part(number: int) -> Getter:
    """Look up a part of the call's function or arguments."""
    return lambda parts: parts[number]


def referent(reference: weakref.ref[object]) -> Getter:
    """Look up what a weak reference refers to."""
    return lambda _: reference()


def weakly(value: object) -> Callable[[], object]:
    """Look an object up without keeping it alive, if that is possible."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def attribute(look: Callable[[], object], name: str) -> Getter:
    """Look up an attribute of an object."""
    return lambda _: getattr(look(), name, None)


def member(look: Callable[[], object], slot: types.MemberDescriptorType) -> Getter:
    """Look up what a slot of an object holds."""

    def found(_: Sequence[object]) -> object:
        try:
            return slot.__get__(look())
        except AttributeError:  # it is empty
            return ABSENT

    return found


def made_part(value: object, number: int) -> Getter:
    """Look up one of the objects that a callable is made of (`kinds.made_of`)."""
    return lambda _: made_of(value)[number]


def attributes_of(value: object) -> dict[str, object] | None:
    """The attributes of an object, whatever its class does where one is missing; None without."""
    for each in type(value).__mro__:
        found = vars(each).get("__dict__")
        if isinstance(found, types.GetSetDescriptorType | types.MemberDescriptorType):
            return found.__get__(value)
        if found is not None:
            return None
    return None


def of_class(kind: type, name: str) -> Getter:
    """Look up an attribute in the dict of one class."""
    return lambda _: vars(kind).get(name)


def of_thread(local: threading.local) -> Getter:
    """Look up the dict of the attributes that an object has in the thread that asks."""
    return lambda _: threading.local.__getattribute__(local, "__dict__")


def bytes_of(array: np.ndarray) -> Getter:
    """Look up the contents of an array, and the flags that python can read."""
    return lambda _: (
        f"{array.shape}{array.strides}{array.dtype.str}{array.flags}".encode() + (array.tobytes())
    )


def is_limited(cached: object) -> bool:
    """True if a cache keeps a limited number of results, and has some."""
    held = gc.get_referents(cached)
    return len(held) > 1 and type(held[1]) is not dict


_Results = dict[int, tuple[object, object]]


def _results(cached: object, store: dict[object, object]) -> _Results | None:
    """The arguments and the result of each entry of a limited cache, by the arguments' address.

    C refers to the type of the cache, then to the arguments, the result and the type of each entry
    in turn, then to the dict of the entries. None if it does not.
    """
    held = gc.get_referents(cached)
    end = next(number for number, each in enumerate(held) if each is store)
    entries = {type(entry) for entry in store.values()}
    if end != 3 * len(store) + 1 or any({each} != entries for each in held[3:end:3]):
        return None
    pairs = zip(held[1:end:3], held[2:end:3], strict=True)
    return {id(arguments): (arguments, result) for arguments, result in pairs}


def kept_results(cached: object, store: dict[object, object]) -> Getter | None:
    """Look up whether a cache keeps the results that it keeps now; it may get others.

    An entry that is put out is used again for other arguments, and may come back to the same ones
    with another result: the dict's entries do not show it. None if python does not show them.
    """
    before = _results(cached, store)
    if before is None:
        return None

    def as_before() -> bool:
        now = _results(cached, store) or {}
        return all(key in now and now[key][1] is result for key, (_, result) in before.items())

    if "torch._C._dynamo.guards.dict_version" in missing():
        return lambda _: as_before()
    version = dict_version(store)

    def found(_: object) -> bool:
        nonlocal version
        now = dict_version(store)  # an entry that is used again is taken out and put in
        same = now == version or as_before()
        version = now if same else version
        return same

    return found


def module_named(name: str) -> Getter:
    """Look up an imported module."""
    return lambda _: sys.modules.get(name)


def answer_of(called: Callable[[], object]) -> Getter:
    """Look up a setting by the function that returns it."""
    return lambda _: called()


def variable(of: contextvars.ContextVar[object]) -> Getter:
    """Look up the value of a context variable."""
    return lambda _: of.get(None)


def grad_of(look: Getter) -> Getter:
    """Look up the grad of a leaf that is looked up itself."""

    def found(parts: Sequence[object]) -> object:
        tensor = look(parts)
        return tensor.grad if isinstance(tensor, torch.Tensor) and tensor.is_leaf else ABSENT

    return found


def _memory_of(tensor: torch.Tensor) -> tuple[int, bool]:
    """The size of a tensor's memory in bytes, and True if it can be resized."""
    if tensor.layout is not torch.strided:
        return 0, False
    storage = tensor.untyped_storage()
    return storage.nbytes(), storage.resizable()


STATES: dict[str, Callable[[torch.Tensor], object]] = {
    "is_conj": torch.Tensor.is_conj,
    "is_neg": torch.Tensor.is_neg,
    "is_inference": torch.Tensor.is_inference,
    "_is_view": is_view,
    "_base": is_view,
    "retains_grad": lambda t: t.retains_grad,
    "output_nr": lambda t: t.output_nr,
    "is_shared": lambda t: t.layout is torch.strided and t.is_shared(),
    "storage_offset": lambda t: t.storage_offset() if t.layout is torch.strided else 0,
    **dict.fromkeys(("untyped_storage", "storage", "_typed_storage", "_storage"), _memory_of),
}
"""What python may ask a tensor about itself that its form does not say, by attribute."""


def states_of(look: Getter, names: Set[str]) -> Getter:
    """Look up what a tensor, which is looked up itself, says of itself, as a text.

    Args:
        look: Looks up the tensor.
        names: The attributes that code names; of them those in `STATES` are looked up.
    """
    asked = [STATES[name] for name in sorted(names & STATES.keys())]

    def found(parts: Sequence[object]) -> object:
        tensor = look(parts)
        if not isinstance(tensor, torch.Tensor):
            return ABSENT
        if not is_plain(tensor):
            return object()  # equal to nothing: under a transform not all of them can be asked
        return " ".join([str(ask(tensor)) for ask in asked])

    return found
