"""Notes on what a function reads, taken one object at a time by a walk that follows them."""

from __future__ import annotations

import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import backward_hooks
from shardmap.call.guards import Fact, Found, Place
from shardmap.call.lookups import (
    STATES,
    Getter,
    attribute,
    entry,
    grad_of,
    item,
    member,
    states_of,
    weakly,
)
from shardmap.trace.names import reflection, spelled_out
from shardmap.trace.watch import PythonWatch


class Notes(ABC):
    """What the code that ran can read, as far as a walk over it has come.

    Args:
        watch: The code that ran, and its calls into C.
        gone: Called when an object dies whose attributes are compared.
    """

    def __init__(self, watch: PythonWatch, gone: Callable[[object], None]):
        self.found = Found(gone)
        looks = reflection(watch.codes)
        self.hidden = looks.blame
        """What it reads that cannot be listed at all; empty if there is nothing."""
        self.blame = watch.blame or looks.blame
        self.unknown: list[object] = []
        """Objects that it can read, whose state cannot be compared."""
        self._seen: dict[int, object] = {}
        self._shallow: set[tuple[int, object]] = set()
        self._dynamic, self._whole = looks.dynamic, looks.whole
        self._trusted = False
        self._names, self._of_modules = spelled_out(watch.codes, watch.asked)
        """Names of modules' attributes; those that torch and python read are found by chains."""
        self._of_module = self._of_modules | {"__getattr__"}  # which answers for what is missing

    @abstractmethod
    def _walk(self, value: object) -> None:
        """Follow what is read through an object."""

    @abstractmethod
    def _object(self, value: object) -> None:
        """Follow an object with attributes."""

    def _accuse(self, what: str) -> None:
        self.blame = self.blame or what

    def _unknown(self, value: object, what: str) -> None:
        if not self._trusted:
            self.unknown.append(value)
            self._accuse(
                f"it can read {what} ({type(value).__name__}), whose state cannot be compared"
            )

    def _read(self, value: object, where: str, look: Getter) -> None:
        if type(value) in weakref.ProxyTypes:  # its object may be gone: then it answers nothing
            self._unknown(value, "a weak proxy")
        elif isinstance(value, torch.Tensor) and value.is_nested:  # it has no shape and strides
            self._unknown(value, "a nested tensor")
        elif isinstance(value, torch.Tensor):
            self._tensor(value, where, look)
        else:
            self.found.facts.append(Fact(where, look, self.found.held(value)))
            self._walk(value)

    def _hold(self, of: dict[Any, Any], name: object, where: str) -> None:
        """Note that an entry of a dict is read."""
        entries = self.found.entries_of(of, where)
        shallow = (id(of), name) in self._shallow  # seen from a library alone
        if name in entries.values and (self._trusted or not shallow):
            return
        (self._shallow.add if self._trusted else self._shallow.discard)((id(of), name))
        value = dict.__getitem__(of, name)
        if issubclass(type(value), torch.Tensor):
            entries.values.pop(name, None)
            places, name_there = self.found.places.get(id(value), ()), (id(of), name)
            if not any(p.name == name_there for p in places):
                self._tensor(value, where, entry(of, name), name_there)
            return
        entries.values[name] = self.found.held(value)
        self._walk(value)

    def _namespace(
        self,
        of: dict[str, object],
        where: str,
        names: frozenset[str],
        without: frozenset[str] = frozenset(),
        dynamic: bool = False,
    ) -> None:
        """Note the attributes of an object or function that are read: these, or all.

        Args:
            of: The attributes.
            where: Description of them.
            names: The names that are read, of which others may be put in.
            without: Names that do not matter.
            dynamic: True if names are read that nothing spells out.
        """
        entries = self.found.entries_of(of, where)
        if dynamic or (self._dynamic and not self._trusted):
            entries.keys = tuple(of)
            read = of.keys() - without
        else:
            read = entries.present = names & of.keys()
            entries.among = names
        for name in read:
            self._hold(of, name, where)

    def _tensor(self, tensor: torch.Tensor, where: str, look: Getter, name: object = None) -> None:
        self.found.place(tensor, Place(where, look, name))
        if id(tensor) in self._seen:
            return
        self._seen[id(tensor)] = tensor
        self._walk(backward_hooks(tensor))
        attributes = tensor.__dict__
        if attributes or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            self._object(tensor)
        if self._names & STATES.keys():
            states = states_of(look, self._names), states_of(lambda _: tensor, self._names)(())
            self.found.facts.append(Fact("what a tensor says of itself", *states))
        if "grad" in self._names and tensor.is_leaf:
            look, where = grad_of(look), "the grad of a tensor"
            if tensor.grad is None:
                self.found.facts.append(Fact(where, look, None))
            else:
                self._tensor(tensor.grad, where, look)

    def _item(self, of: Sequence[object] | None, number: int, value: object, where: str) -> None:
        if isinstance(value, torch.Tensor):
            assert of is not None
            self._tensor(value, where, item(of, number))
        else:
            self._walk(value)

    def _named(self, value: object, name: str) -> None:
        """Note the names of a function or class, if the user's own code asks for them."""
        for read in self._of_modules & {"__name__", "__qualname__", "__module__"}:
            look = attribute(lambda: value, read)
            self.found.facts.append(Fact(f"{read} of {name}", look, look(())))

    def _slot(self, value: object, of: types.MemberDescriptorType, where: str) -> None:
        look, slot = member(weakly(value), of), of.__name__
        now = look(())
        if isinstance(now, torch.Tensor):
            self._tensor(now, where, look, slot)
        else:
            self.found.facts.append(Fact(f"{slot!r} in {where}", look, self.found.held(now)))
            self._walk(now)
