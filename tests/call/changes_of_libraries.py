"""Ways to change objects of python's library whose state C keeps."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import operator
import re
import threading
import types
import weakref
from typing import Any

import numpy as np
import torch

from tests.call.changes import state


class A:
    """A plain class."""


@state
def the_arguments_of_an_exception() -> Any:
    error = ValueError(2.0)
    return lambda: error.args[0], lambda: setattr(error, "args", (3.0,))


@state
def the_number_of_an_os_error() -> Any:
    error = OSError(2, "gone")
    return lambda: error.errno, lambda: setattr(error, "errno", 3)


@state
def the_value_of_a_stop_iteration() -> Any:
    error = StopIteration(2.0)
    return lambda: error.value, lambda: setattr(error, "value", 3.0)


@state
def the_cause_of_an_exception() -> Any:
    error = ValueError()
    error.__cause__ = KeyError(2.0)
    return lambda: error.__cause__.args[0], lambda: setattr(error, "__cause__", KeyError(3.0))


@state
def the_arguments_of_an_own_exception() -> Any:
    class Failed(Exception):
        pass

    error = Failed(2.0)
    return lambda: error.args[0], lambda: setattr(error, "args", (3.0,))


@state
def the_notes_of_an_exception() -> Any:
    error = ValueError()
    error.add_note("a")
    return lambda: len(error.__notes__) + 1.0, lambda: error.add_note("b")


@state
def the_state_of_a_partial() -> Any:
    part = functools.partial(max, 2.0)
    return lambda: part(1.0), lambda: part.__setstate__((max, (3.0,), {}, {}))


@state
def the_keywords_of_a_partial() -> Any:
    part = functools.partial(dict, a=2.0)
    return lambda: part()["a"], lambda: part.keywords.update(a=3.0)


@state
def the_factory_of_a_default_dict() -> Any:
    made = collections.defaultdict(lambda: 2.0, {"a": 1.0})
    return lambda: made.default_factory(), lambda: setattr(made, "default_factory", lambda: 3.0)


@state
def the_factory_of_an_empty_default_dict() -> Any:
    made = collections.defaultdict(lambda: 2.0)
    return lambda: made.default_factory(), lambda: setattr(made, "default_factory", lambda: 3.0)


@state
def the_factory_that_is_called_by_itself() -> Any:
    made = collections.defaultdict(lambda: 2.0)

    def change() -> None:
        made.clear()
        made.default_factory = lambda: 3.0

    return lambda: made["a"], change


@state
def a_mapping_proxy() -> Any:
    table = {"a": 2.0}
    proxy = types.MappingProxyType(table)
    return lambda: proxy["a"], lambda: table.update(a=3.0)


@state
def a_namespace() -> Any:
    made = types.SimpleNamespace(a=2.0)
    return lambda: made.a, lambda: setattr(made, "a", 3.0)


@state
def a_deque_that_turns() -> Any:
    made = collections.deque([2.0, 3.0])
    return lambda: made[0], lambda: made.rotate(1)


@state
def an_ordered_dict_that_turns() -> Any:
    made = collections.OrderedDict(a=2.0, b=3.0)
    return lambda: next(iter(made.values())), lambda: made.move_to_end("a")


@state
def a_chain_map() -> Any:
    first, second = {}, {"a": 2.0}
    made = collections.ChainMap(first, second)
    return lambda: made["a"], lambda: first.update(a=3.0)


@state
def the_maps_of_a_chain_map() -> Any:
    made = collections.ChainMap({"a": 2.0})
    return lambda: made["a"], lambda: setattr(made, "maps", [{"a": 3.0}])


@state
def a_user_dict() -> Any:
    made = collections.UserDict(a=2.0)
    return lambda: made["a"], lambda: made.update(a=3.0)


@state
def an_array_of_python() -> Any:
    made = array.array("d", [2.0])
    return lambda: made[0], lambda: made.__setitem__(0, 3.0)


@state
def a_byte_array() -> Any:
    made = bytearray(b"\x02")
    return lambda: made[0], lambda: made.__setitem__(0, 3)


@state
def a_memory_view() -> Any:
    memory = bytearray(b"\x02")
    made = memoryview(memory)
    return lambda: made[0], lambda: memory.__setitem__(0, 3)


@state
def a_memory_view_of_an_array() -> Any:
    memory = np.array([2.0, 5.0])
    made = memoryview(memory)
    return lambda: made[0], lambda: memory.__setitem__(0, 3.0)


@state
def a_weak_reference_to_an_object() -> Any:
    target = A()
    target.scale = 2.0
    reference = weakref.ref(target)
    return lambda: reference().scale, lambda: setattr(target, "scale", 3.0)


@state
def a_weak_proxy() -> Any:
    target = A()
    target.scale = 2.0
    proxy = weakref.proxy(target)
    return lambda: proxy.scale, lambda: setattr(target, "scale", 3.0)


@state
def a_weak_set() -> Any:
    targets = [A(), A()]
    held = weakref.WeakSet(targets[:1])
    return lambda: len(held) + 1.0, lambda: held.add(targets[1])


@state
def a_weak_value_dict() -> Any:
    targets = [A(), A()]
    targets[0].scale, targets[1].scale = 2.0, 3.0
    held = weakref.WeakValueDictionary(a=targets[0])
    return lambda: held["a"].scale, lambda: held.update(a=targets[1])


@state
def a_weak_method() -> Any:
    class Has:
        scale = 2.0

        def get(self) -> float:
            return self.scale

    has = Has()
    reference = weakref.WeakMethod(has.get)
    return lambda: reference()(), lambda: setattr(has, "scale", 3.0)


@state
def a_context_variable() -> Any:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("scale")
    variable.set(2.0)
    return lambda: variable.get(), lambda: variable.set(3.0)


@state
def a_context_copied() -> Any:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("scale")
    context = contextvars.copy_context()
    context.run(variable.set, 2.0)
    return lambda: context[variable], lambda: context.run(variable.set, 3.0)


@state
def a_thread_local() -> Any:
    local = threading.local()
    local.scale = 2.0
    return lambda: local.scale, lambda: setattr(local, "scale", 3.0)


@state
def a_pattern() -> Any:
    found = [re.compile("a+")]
    return lambda: float(len(found[0].match("aab")[0])), lambda: found.__setitem__(
        0, re.compile("a")
    )


@state
def a_lock() -> Any:
    lock = threading.Lock()
    return lambda: 3.0 if lock.locked() else 2.0, lambda: lock.acquire()


@state
def an_event() -> Any:
    event = threading.Event()
    return lambda: 3.0 if event.is_set() else 2.0, event.set


@state
def an_event_that_is_waited_for() -> Any:
    event = threading.Event()
    return lambda: 3.0 if event.wait(0.0) else 2.0, event.set


@state
def a_semaphore() -> Any:
    held = threading.Semaphore(3)
    return lambda: float(held._value), lambda: held.acquire()


@state
def the_doc_of_a_property() -> Any:
    held = property(lambda self: 1.0, doc="a")
    return lambda: 1.0 + len(held.__doc__ or ""), lambda: held.__init__(lambda self: 1.0, doc="ab")


@state
def a_property_made_again() -> Any:
    class Has:
        by = property(lambda self: 2.0)

    has = Has()
    return lambda: has.by, lambda: vars(Has)["by"].__init__(lambda self: 3.0)


@state
def a_static_method_made_again() -> Any:
    class Has:
        by = staticmethod(lambda: 2.0)

    return lambda: Has.by(), lambda: vars(Has)["by"].__init__(lambda: 3.0)


@state
def a_method_of_a_list() -> Any:
    held = [2.0]
    get = held.__getitem__
    return lambda: get(0), lambda: held.__setitem__(0, 3.0)


@state
def a_method_of_an_array() -> Any:
    held = np.array([2.0])
    get = held.item
    return lambda: get(0), lambda: held.__setitem__(0, 3.0)


@state
def a_method_of_a_tensor() -> Any:
    held = torch.tensor([2.0])
    get = held.sum
    return lambda: get(), lambda: held.add_(1.0)


@state
def an_attribute_getter() -> Any:
    has = A()
    has.scale = 2.0
    get = operator.attrgetter("scale")
    return lambda: get(has), lambda: setattr(has, "scale", 3.0)


@state
def a_method_caller() -> Any:
    held = [2.0]
    get = operator.methodcaller("__getitem__", 0)
    return lambda: get(held), lambda: held.__setitem__(0, 3.0)


@state
def the_argument_of_a_method_caller() -> Any:
    held = [2.0]
    get = operator.methodcaller("__add__", held)
    return lambda: get([1.0])[1], lambda: held.__setitem__(0, 3.0)


@state
def a_view_of_a_dict() -> Any:
    held = {"a": 2.0}
    values = held.values()
    return lambda: sum(values), lambda: held.update(a=3.0)


@state
def the_keys_of_a_dict() -> Any:
    held = {"a": 2.0}
    keys = held.keys()
    return lambda: len(keys) + 1.0, lambda: held.update(b=3.0)


@state
def a_slice_of_lists() -> Any:
    held = [2.0]
    part = slice(held, None)
    return lambda: part.start[0], lambda: held.__setitem__(0, 3.0)


@state
def a_cell() -> Any:
    cell = types.CellType(2.0)
    return lambda: cell.cell_contents, lambda: setattr(cell, "cell_contents", 3.0)


@state
def a_generic_alias() -> Any:
    class Own:
        k = 2.0

    made = list[Own]
    return lambda: made.__args__[0].k, lambda: setattr(Own, "k", 3.0)


@state
def getattr_of_a_module() -> Any:
    module = types.ModuleType("lazy_module_of_a_test")
    table = {"scale": 2.0}
    module.__getattr__ = lambda name: table[name]
    return lambda: module.scale, lambda: table.update(scale=3.0)


@state
def another_getattr_of_a_module() -> Any:
    module = types.ModuleType("lazy_module_of_a_test")
    module.__getattr__ = lambda name: 2.0
    return lambda: module.scale, lambda: setattr(module, "__getattr__", lambda name: 3.0)


@state
def the_class_of_a_module() -> Any:
    class One(types.ModuleType):
        scale = 2.0

    class Two(types.ModuleType):
        scale = 3.0

    module = One("module_of_a_test")
    return lambda: module.scale, lambda: setattr(module, "__class__", Two)
