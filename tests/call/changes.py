"""Ways to change what a function does between two calls of its map.

Each way is a generator: it makes the function, yields it, changes something, and yields it again
(the same function object, unless python's own semantics make another one).
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import itertools
import math
import os
import random
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Way = Iterator[Callable[[Tensor], Tensor]]
WAYS: dict[str, Callable[[], Way]] = {}


def way(make: Callable[[], Way]) -> Callable[[], Way]:
    """Register a way by its name."""
    assert make.__name__ not in WAYS
    WAYS[make.__name__] = make
    return make


SCALE = 2.0
WEIGHT = torch.arange(3.0)
TABLE = {"scale": 2.0, "shift": [1.0, 2.0]}
NUMBERS = [1.0, 2.0]
ARRAY = np.array([1.0, 2.0, 3.0])
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)
LOCAL = threading.local()
LOCAL.scale = 2.0
FLAGS = {"a"}


def helper(x: Tensor) -> Tensor:
    return x * 2


def scaled(x: Tensor, by: float = 2.0, *, shift: float = 1.0) -> Tensor:
    return x * by + shift


@way
def global_number() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return x * SCALE

    SCALE = 2.0
    yield f
    SCALE = 5.0
    yield f


@way
def global_number_to_int() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return (x.long() * SCALE).to(torch.get_default_dtype()) if type(SCALE) is int else x * SCALE

    SCALE = 2.0
    yield f
    SCALE = 2
    yield f


@way
def global_tensor_rebound() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = WEIGHT + 1
    yield f


@way
def global_tensor_of_another_shape() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT.sum() + WEIGHT.shape[0]

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = torch.arange(5.0)
    yield f


@way
def global_tensor_of_another_dtype() -> Way:
    global WEIGHT

    def f(x: Tensor) -> Tensor:
        return x * WEIGHT

    WEIGHT = torch.arange(3.0)
    yield f
    WEIGHT = torch.arange(3.0).double()
    yield f


@way
def global_function_rebound() -> Way:
    global helper
    kept = helper

    def f(x: Tensor) -> Tensor:
        return helper(x)

    yield f
    helper = lambda x: x * 7  # noqa: E731
    yield f
    helper = kept


@way
def global_function_code() -> Way:
    def one(x: Tensor) -> Tensor:
        return x + 1

    def two(x: Tensor) -> Tensor:
        return x + 2

    def f(x: Tensor) -> Tensor:
        return one(x)

    yield f
    one.__code__ = two.__code__
    yield f


@way
def own_code() -> Way:
    def two(x: Tensor) -> Tensor:
        return x + 2

    def f(x: Tensor) -> Tensor:
        return x + 1

    yield f
    f.__code__ = two.__code__
    yield f


@way
def defaults_of_a_helper() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    scaled.__defaults__ = (9.0,)
    yield f
    scaled.__defaults__ = (2.0,)


@way
def keyword_defaults_of_a_helper() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    scaled.__kwdefaults__ = {"shift": 4.0}
    yield f
    scaled.__kwdefaults__ = {"shift": 1.0}


@way
def keyword_defaults_in_place() -> Way:
    def f(x: Tensor) -> Tensor:
        return scaled(x)

    yield f
    assert scaled.__kwdefaults__ is not None
    scaled.__kwdefaults__["shift"] = 6.0
    yield f
    scaled.__kwdefaults__["shift"] = 1.0


@way
def own_defaults() -> Way:
    def f(x: Tensor, by: float = 2.0) -> Tensor:
        return x * by

    yield f
    f.__defaults__ = (3.0,)
    yield f


@way
def closure_number() -> Way:
    scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * scale

    yield f
    scale = 3.0
    yield f


@way
def closure_tensor() -> Way:
    weight = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * weight

    yield f
    weight = torch.arange(3.0)
    yield f


@way
def closure_of_a_helper() -> Way:
    scale = 2.0

    def inner(x: Tensor) -> Tensor:
        return x * scale

    def f(x: Tensor) -> Tensor:
        return inner(x) + 1

    yield f
    scale = 4.0
    yield f


@way
def closure_function() -> Way:
    act = torch.sin

    def f(x: Tensor) -> Tensor:
        return act(x)

    yield f
    act = torch.cos
    yield f


@way
def closure_list_in_place() -> Way:
    shifts = [1.0, 2.0]

    def f(x: Tensor) -> Tensor:
        return x + sum(shifts)

    yield f
    shifts.append(3.0)
    yield f


@way
def closure_list_of_tensors() -> Way:
    weights = [torch.ones(3), torch.ones(3)]

    def f(x: Tensor) -> Tensor:
        return x * weights[0] + weights[1]

    yield f
    weights[1] = torch.arange(3.0)
    yield f


@way
def closure_list_of_layers() -> Way:
    layers = [nn.Linear(3, 3), nn.Tanh()]

    def f(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    yield f
    layers.append(nn.ReLU())
    yield f


@way
def tensors_that_become_one() -> Way:
    weights = [torch.ones(3), torch.arange(3.0)]

    def f(x: Tensor) -> Tensor:
        return x * weights[0] + (0.0 if weights[0] is weights[1] else weights[1])

    yield f
    weights[1] = weights[0]
    yield f


@way
def dict_entry() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * TABLE["scale"]

    TABLE["scale"] = 2.0
    yield f
    TABLE["scale"] = 3.0
    yield f


@way
def nested_list_in_a_dict() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * sum(TABLE["shift"])

    yield f
    TABLE["shift"][0] += 5.0
    yield f


@way
def dict_that_gets_a_key() -> Way:
    table: dict[str, float] = {"a": 1.0}

    def f(x: Tensor) -> Tensor:
        for value in table.values():
            x = x + value
        return x

    yield f
    table["b"] = 5.0
    yield f


@way
def dict_in_another_order() -> Way:
    table = {"a": 1.0, "b": 3.0}

    def f(x: Tensor) -> Tensor:
        for value in table.values():
            x = x * value + 1
        return x

    yield f
    table["a"] = table.pop("a")
    yield f


@way
def a_set() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if "a" in FLAGS else x * 3

    FLAGS.add("a")
    yield f
    FLAGS.discard("a")
    yield f
    FLAGS.add("a")


@way
def an_empty_dict_that_is_filled() -> Way:
    table: dict[str, float] = {}

    def f(x: Tensor) -> Tensor:
        return x * table.get("scale", 1.0)

    yield f
    table["scale"] = 4.0
    yield f


class Settings:
    kind = "sin"
    by = 2.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.unread = 0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    @property
    def twice(self) -> float:
        return 2 * self.scale

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.by

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return x * 3


@way
def attribute() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.scale

    yield f
    settings.scale = 7.0
    yield f


@way
def attribute_of_a_bound_method() -> Way:
    settings = Settings()
    yield settings.apply
    settings.scale = 7.0
    yield settings.apply


@way
def class_attribute() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.by

    yield f
    Settings.by = 5.0
    yield f
    Settings.by = 2.0


@way
def class_attribute_by_class() -> Way:
    def f(x: Tensor) -> Tensor:
        return torch.sin(x) if Settings.kind == "sin" else torch.cos(x)

    yield f
    Settings.kind = "cos"
    yield f
    Settings.kind = "sin"


@way
def class_attribute_shadowed() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.by

    yield f
    settings.by = 9.0
    yield f


@way
def method_replaced() -> Way:
    settings = Settings()
    kept = Settings.apply

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    Settings.apply = lambda self, x: x - self.scale
    yield f
    Settings.apply = kept


@way
def method_shadowed_by_the_object() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    settings.apply = lambda x: x - 1
    yield f


@way
def method_added_to_a_subclass() -> Way:
    class Sub(Settings):
        pass

    settings = Sub()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    Sub.apply = lambda self, x: x - 1
    yield f


@way
def property_replaced() -> Way:
    settings = Settings()
    kept = Settings.twice

    def f(x: Tensor) -> Tensor:
        return x * settings.twice

    yield f
    Settings.twice = property(lambda self: 100.0)
    yield f
    Settings.twice = kept


@way
def classmethod_reads_the_class() -> Way:
    def f(x: Tensor) -> Tensor:
        return Settings.of_class(x)

    yield f
    Settings.by = 4.0
    yield f
    Settings.by = 2.0


@way
def staticmethod_replaced() -> Way:
    kept = Settings.__dict__["plain"]

    def f(x: Tensor) -> Tensor:
        return Settings.plain(x)

    yield f
    Settings.plain = staticmethod(lambda x: x + 3)
    yield f
    Settings.plain = kept


@way
def the_class_of_an_object() -> Way:
    class Other(Settings):
        def apply(self, x: Tensor) -> Tensor:
            return x + self.scale

    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    settings.__class__ = Other
    yield f


@way
def getattr_of_a_class() -> Way:
    class Lazy:
        def __init__(self) -> None:
            self.values = {"scale": 2.0}

        def __getattr__(self, name: str) -> Any:
            return self.__dict__["values"][name]

    lazy = Lazy()

    def f(x: Tensor) -> Tensor:
        return x * lazy.scale

    yield f
    lazy.values["scale"] = 3.0
    yield f


@way
def getattr_by_a_computed_name() -> Way:
    settings = Settings()
    names = ["sc", "ale"]

    def f(x: Tensor) -> Tensor:
        return x * getattr(settings, "".join(names))

    yield f
    settings.scale = 8.0
    yield f


@way
def vars_of_an_object() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * sum(vars(settings).values())

    yield f
    settings.extra = 8.0
    yield f


@way
def slots() -> Way:
    class Slotted:
        __slots__ = ("scale",)

    slotted = Slotted()
    slotted.scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * slotted.scale

    yield f
    slotted.scale = 3.0
    yield f


@way
def tensor_in_a_slot() -> Way:
    class Slotted:
        __slots__ = ("weight",)

    slotted = Slotted()
    slotted.weight = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * slotted.weight

    yield f
    slotted.weight = torch.arange(3.0)
    yield f


@way
def a_descriptor() -> Way:
    class Reads:
        value = 2.0

        def __get__(self, of: Any, kind: Any) -> float:
            return self.value

    class Has:
        scale = Reads()

    has = Has()

    def f(x: Tensor) -> Tensor:
        return x * has.scale

    yield f
    Has.__dict__["scale"].value = 6.0
    yield f


@way
def a_metaclass() -> Way:
    class Meta(type):
        scale = 2.0

    class Has(metaclass=Meta):
        pass

    def f(x: Tensor) -> Tensor:
        return x * Has.scale

    yield f
    Meta.scale = 5.0
    yield f


@way
def a_cached_property() -> Way:
    class Has:
        @functools.cached_property
        def scale(self) -> float:
            return 2.0

    has = Has()

    def f(x: Tensor) -> Tensor:
        return x * has.scale

    yield f
    has.__dict__["scale"] = 5.0
    yield f


@way
def a_partial() -> Way:
    weight = torch.ones(3)
    part = functools.partial(torch.mul, weight)

    def f(x: Tensor) -> Tensor:
        return part(x)

    yield f
    part = functools.partial(torch.mul, torch.arange(3.0))
    yield f


@way
def a_weak_reference() -> Way:
    class Box:
        scale = 2.0

    boxes = [Box()]
    reference = weakref.ref(boxes[0])

    def f(x: Tensor) -> Tensor:
        box = reference()
        return x * (1.0 if box is None else box.scale)

    yield f
    boxes.clear()
    yield f


@way
def through_a_weak_reference() -> Way:
    class Box:
        def __init__(self) -> None:
            self.scale = 2.0

    box = Box()
    reference = weakref.ref(box)

    def f(x: Tensor) -> Tensor:
        found = reference()
        assert found is not None
        return x * found.scale

    yield f
    box.scale = 3.0
    yield f


@way
def a_weak_dict() -> Way:
    class Key:
        pass

    key = Key()
    table = weakref.WeakKeyDictionary({key: 2.0})

    def f(x: Tensor) -> Tensor:
        return x * table[key]

    yield f
    table[key] = 3.0
    yield f


@way
def a_context_variable() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * VARIABLE.get()

    yield f
    token = VARIABLE.set(6.0)
    yield f
    VARIABLE.reset(token)


@way
def a_thread_local() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * LOCAL.scale

    LOCAL.scale = 2.0
    yield f
    LOCAL.scale = 5.0
    yield f


@way
def an_environment_variable() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * float(os.environ.get("SHARDMAP_TEST_SCALE", "2"))

    yield f
    os.environ["SHARDMAP_TEST_SCALE"] = "4"
    yield f
    del os.environ["SHARDMAP_TEST_SCALE"]


@way
def getenv() -> Way:
    os.environ["SHARDMAP_TEST_SCALE"] = "2"

    def f(x: Tensor) -> Tensor:
        return x * float(os.getenv("SHARDMAP_TEST_SCALE", "1"))

    yield f
    os.environ["SHARDMAP_TEST_SCALE"] = "5"
    yield f
    del os.environ["SHARDMAP_TEST_SCALE"]


@way
def a_file() -> Way:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scale"
        path.write_text("2")

        def f(x: Tensor) -> Tensor:
            return x * float(path.read_text())

        yield f
        path.write_text("5")
        yield f


@way
def whether_a_file_exists() -> Way:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flag")

        def f(x: Tensor) -> Tensor:
            return x * 2 if os.path.exists(path) else x * 3

        yield f
        Path(path).write_text("")
        yield f


@way
def the_clock() -> Way:
    kept = time.time
    now = [1.0]
    time.time = lambda: now[0]

    def f(x: Tensor) -> Tensor:
        return x * time.time()

    yield f
    now[0] = 5.0
    yield f
    time.time = kept


@way
def a_random_generator_of_ones_own() -> Way:
    rng = random.Random(3)
    state = rng.getstate()

    def f(x: Tensor) -> Tensor:
        rng.setstate(state)
        return x * rng.random()

    yield f
    state = random.Random(4).getstate()
    yield f


@way
def lru_cache_cleared() -> Way:
    value = [2.0]

    @functools.lru_cache
    def cached() -> float:
        return value[0]

    def f(x: Tensor) -> Tensor:
        return x * cached()

    yield f
    value[0] = 3.0
    cached.cache_clear()
    yield f


@way
def a_dynamic_import() -> Way:
    module = types.ModuleType("tests.shardmap_plugin")
    module.scale = 2.0
    sys.modules["tests.shardmap_plugin"] = module

    def f(x: Tensor) -> Tensor:
        return x * importlib.import_module("tests.shardmap_plugin").scale

    yield f
    other = types.ModuleType("tests.shardmap_plugin")
    other.scale = 5.0
    sys.modules["tests.shardmap_plugin"] = other
    yield f
    del sys.modules["tests.shardmap_plugin"]


@way
def an_import_inside() -> Way:
    module = types.ModuleType("tests.shardmap_plugin")
    module.scale = 2.0
    sys.modules["tests.shardmap_plugin"] = module

    def f(x: Tensor) -> Tensor:
        import tests.shardmap_plugin as plugin

        return x * plugin.scale

    yield f
    module.scale = 5.0
    yield f
    del sys.modules["tests.shardmap_plugin"]


@way
def by_globals() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return x * globals()["SCA" + "LE"]

    SCALE = 2.0
    yield f
    SCALE = 3.0
    yield f


@way
def by_sys_modules() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return x * sys.modules[__name__].SCALE

    SCALE = 2.0
    yield f
    SCALE = 3.0
    yield f


@way
def by_eval() -> Way:
    global SCALE

    def f(x: Tensor) -> Tensor:
        return x * eval("SCALE")

    SCALE = 2.0
    yield f
    SCALE = 3.0
    yield f


@way
def a_built_in_function_shadowed() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * abs(-2.0)

    yield f
    globals()["abs"] = lambda value: 9.0
    yield f
    del globals()["abs"]


@way
def torch_function_patched() -> Way:
    kept = torch.sin

    def f(x: Tensor) -> Tensor:
        return torch.sin(x)

    yield f
    torch.sin = torch.cos
    yield f
    torch.sin = kept


@way
def functional_patched_below_a_module() -> Way:
    kept, layer = F.relu, nn.ReLU()

    def f(x: Tensor) -> Tensor:
        return layer(x - 1)

    yield f
    F.relu = lambda x, inplace=False: x * 3
    yield f
    F.relu = kept


@way
def module_class_patched() -> Way:
    kept, layer = nn.Linear.forward, nn.Linear(3, 3)

    def f(x: Tensor) -> Tensor:
        return layer(x)

    yield f
    nn.Linear.forward = lambda self, x: x @ self.weight
    yield f
    nn.Linear.forward = kept


@way
def standard_library_patched() -> Way:
    kept = math.sqrt

    def f(x: Tensor) -> Tensor:
        return x * math.sqrt(4.0)

    yield f
    math.sqrt = lambda value: 7.0
    yield f
    math.sqrt = kept


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(2))
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.training:
            x = x * self.scale
        return self.second(x) + self.shift


def of_net(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        return net(x)

    return f


@way
def training_flag() -> Way:
    net = Net()
    yield of_net(net)
    net.eval()
    yield of_net(net)


@way
def training_flag_of_a_child() -> Way:
    net = nn.Sequential(Net(), nn.Tanh())
    f = of_net(net)
    yield f
    net[0].training = False
    yield f


@way
def parameter_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.weight = nn.Parameter(torch.ones(4, 3))
    yield f


@way
def parameter_data() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.weight.data = torch.ones(4, 3)
    yield f


@way
def parameter_data_of_another_dtype() -> Way:
    net = Net()
    f = of_net(net)

    def g(x: Tensor) -> Tensor:
        return f(x.to(net.first.weight.dtype))

    yield g
    net.double()
    yield g


@way
def parameter_in_place() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    with torch.no_grad():
        net.first.weight.add_(1)
    yield f


@way
def load_state_dict() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.load_state_dict(Net().state_dict())
    yield f


@way
def load_state_dict_assigned() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.load_state_dict(Net().state_dict(), assign=True)
    yield f


@way
def buffer_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.shift = torch.ones(2)
    yield f


@way
def submodule_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second = nn.Linear(4, 2)
    yield f


@way
def submodule_of_another_kind() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    yield f


@way
def submodule_appended() -> Way:
    net = nn.Sequential(nn.Linear(3, 3))
    f = of_net(net)
    yield f
    net.append(nn.ReLU())
    yield f


@way
def module_number() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.scale = 5.0
    yield f


@way
def forward_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.register_forward_hook(lambda module, args, out: out + 1)
    yield f


@way
def forward_hook_removed() -> Way:
    net = Net()
    f = of_net(net)
    handle = net.first.register_forward_hook(lambda module, args, out: out + 1)
    yield f
    handle.remove()
    yield f


@way
def forward_pre_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    yield f


@way
def global_forward_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    yield f
    handle.remove()


@way
def what_a_hook_closes_over() -> Way:
    net, shift = Net(), [1.0]
    net.first.register_forward_hook(lambda module, args, out: out + shift[0])
    f = of_net(net)
    yield f
    shift[0] = 4.0
    yield f


@way
def backward_hook_on_a_module() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x).sum(), x)[0]

    yield f
    net.first.register_full_backward_hook(lambda module, gin, gout: (gin[0] * 3,))
    yield f


@way
def hook_on_a_parameter() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(net(x).sum(), net.first.weight)[0]

    yield f
    net.first.weight.register_hook(lambda grad: grad * 3)
    yield f


@way
def requires_grad_of_a_parameter() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        loss = net(x).sum()
        wanted = [p for p in net.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])

    yield f
    net.first.weight.requires_grad_(False)
    yield f


@way
def a_parametrization() -> Way:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    net = Net()
    f = of_net(net)
    yield f
    parametrize.register_parametrization(net.first, "weight", Twice())
    yield f


@way
def a_parametrization_that_is_removed() -> Way:
    net = Net()
    parametrizations.weight_norm(net.first)
    f = of_net(net)
    yield f
    parametrize.remove_parametrizations(net.first, "weight", leave_parametrized=True)
    yield f


@way
def forward_of_one_module() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.forward = lambda x: torch.ones(4) * x.sum()
    yield f


@way
def dropout_probability() -> Way:
    drop = nn.Dropout(1.0)

    def f(x: Tensor) -> Tensor:
        return F.dropout(x, drop.p, training=drop.p == 1.0)

    yield f
    drop.p = 0.5
    yield f


@way
def numpy_in_place() -> Way:
    ARRAY[:] = [1.0, 2.0, 3.0]

    def f(x: Tensor) -> Tensor:
        return x * float(ARRAY.sum())

    yield f
    ARRAY[1] = 7.0
    yield f


@way
def numpy_shared_with_a_tensor() -> Way:
    array = np.ones(3, dtype=np.float32)

    def f(x: Tensor) -> Tensor:
        return x * torch.from_numpy(array)

    yield f
    array[1] = 7.0
    yield f


@way
def a_bytearray() -> Way:
    data = bytearray([1, 2])

    def f(x: Tensor) -> Tensor:
        return x * data[0]

    yield f
    data[0] = 9
    yield f


@way
def default_dtype() -> Way:
    def f(x: Tensor) -> Tensor:
        return x.sum() + torch.ones(2)

    yield f
    torch.set_default_dtype(torch.float64)
    yield f
    torch.set_default_dtype(torch.float32)


@way
def grad_mode_asked() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3

    yield f
    with torch.no_grad():
        yield f


@way
def autocast() -> Way:
    weight = torch.randn(3, 3)

    def f(x: Tensor) -> Tensor:
        return x @ weight

    yield f
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield f


@way
def a_flag_of_torch() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.are_deterministic_algorithms_enabled() else x * 3

    yield f
    torch.use_deterministic_algorithms(True)
    yield f
    torch.use_deterministic_algorithms(False)


@way
def matmul_precision_asked() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.get_float32_matmul_precision() == "highest" else x * 3

    yield f
    torch.set_float32_matmul_precision("high")
    yield f
    torch.set_float32_matmul_precision("highest")


@way
def cudnn_flag() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * 2 if torch.backends.cudnn.benchmark else x * 3

    yield f
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield f


@way
def number_of_threads() -> Way:
    kept = torch.get_num_threads()

    def f(x: Tensor) -> Tensor:
        return x * torch.get_num_threads()

    yield f
    torch.set_num_threads(kept + 1)
    yield f
    torch.set_num_threads(kept)


@way
def an_attribute_of_a_tensor() -> Way:
    weight = torch.ones(3)
    weight.scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * weight * weight.scale

    yield f
    weight.scale = 5.0
    yield f


@way
def the_grad_of_a_captured_tensor() -> Way:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * weight.grad

    yield f
    weight.grad = torch.arange(3.0)
    yield f


@way
def the_value_of_a_captured_flag() -> Way:
    flag = torch.tensor(True)

    def f(x: Tensor) -> Tensor:
        return x * 2 if flag else x * 3

    yield f
    flag.fill_(False)
    yield f


@way
def the_item_of_a_captured_number() -> Way:
    rate = torch.tensor(2.0)

    def f(x: Tensor) -> Tensor:
        return x * rate.item()

    yield f
    rate.fill_(4.0)
    yield f


@way
def a_counter_that_is_written() -> Way:
    settings = Settings()
    settings.calls = 0

    def f(x: Tensor) -> Tensor:
        settings.scale = 2.0 if settings.unread < 3 else 3.0
        return x * settings.scale

    yield f
    settings.unread = 5
    yield f


@way
def an_iterator_over_numbers() -> Way:
    numbers = itertools.cycle([2.0])

    def f(x: Tensor) -> Tensor:
        return x * next(numbers)

    yield f
    numbers = itertools.cycle([5.0])
    yield f


@way
def a_generator_function() -> Way:
    def values() -> Iterator[float]:
        yield from NUMBERS

    def f(x: Tensor) -> Tensor:
        return x * sum(values())

    NUMBERS[:] = [1.0, 2.0]
    yield f
    NUMBERS[0] = 6.0
    yield f


@way
def a_comprehension() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * sum([n * 2 for n in NUMBERS])

    NUMBERS[:] = [1.0, 2.0]
    yield f
    NUMBERS[1] = 6.0
    yield f


@way
def a_lambda_in_a_table() -> Way:
    table = {"act": lambda x: x + 1}

    def f(x: Tensor) -> Tensor:
        return table["act"](x)

    yield f
    table["act"] = lambda x: x * 5
    yield f


@way
def a_callable_object() -> Way:
    class Scale:
        def __init__(self) -> None:
            self.by = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.by

    scale = Scale()
    yield scale
    scale.by = 5.0
    yield scale


@way
def call_of_a_class_replaced() -> Way:
    class Scale:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    scale = Scale()

    def f(x: Tensor) -> Tensor:
        return scale(x)

    yield f
    Scale.__call__ = lambda self, x: x * 6
    yield f


@way
def a_module_as_the_function() -> Way:
    net = Net()
    yield net
    net.scale = 6.0
    yield net


@way
def a_custom_function() -> Way:
    class Scaled(torch.autograd.Function):
        factor = 2.0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * Scaled.factor

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * Scaled.factor

    def f(x: Tensor) -> Tensor:
        return Scaled.apply(x)

    yield f
    Scaled.factor = 7.0
    yield f


@way
def under_torch_func() -> Way:
    scale = [2.0]

    def loss(x: Tensor) -> Tensor:
        return (x * x).sum() * scale[0]

    yield torch.func.grad(loss)
    scale[0] = 5.0
    yield torch.func.grad(loss)


@way
def functional_call() -> Way:
    net = Net()
    params = dict(net.named_parameters())

    def f(x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (x,))

    yield f
    params = {name: p.detach() + 1 for name, p in params.items()}
    yield f


@way
def a_module_passed_as_default() -> Way:
    def f(x: Tensor, net: Net = Net()) -> Tensor:  # noqa: B008
        return net(x)

    yield f
    assert f.__defaults__ is not None
    f.__defaults__[0].scale = 9.0
    yield f


@way
def ordering_of_a_list() -> Way:
    acts = [torch.sin, torch.exp]

    def f(x: Tensor) -> Tensor:
        for act in acts:
            x = act(x)
        return x

    yield f
    acts.reverse()
    yield f


@way
def an_attribute_deleted() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * (settings.scale if hasattr(settings, "scale") else 11.0)

    yield f
    del settings.scale
    yield f


@way
def a_global_deleted() -> Way:
    globals()["OPTIONAL"] = 3.0

    def f(x: Tensor) -> Tensor:
        try:
            return x * OPTIONAL  # type: ignore[name-defined]  # noqa: F821
        except NameError:
            return x * 12

    yield f
    del globals()["OPTIONAL"]
    yield f


@way
def another_module_reached_by_alias() -> Way:
    holder = types.SimpleNamespace(lib=torch.nn.functional)
    kept = F.silu

    def f(x: Tensor) -> Tensor:
        lib = holder.lib
        return lib.silu(x)

    yield f
    F.silu = lambda x, inplace=False: x * 3
    yield f
    F.silu = kept


@way
def a_namespace() -> Way:
    args = types.SimpleNamespace(scale=2.0)

    def f(x: Tensor) -> Tensor:
        return x * args.scale

    yield f
    args.scale = 3.0
    yield f
