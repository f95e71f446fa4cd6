"""Ways to change what a function does between two calls: context, environment, files, imports and names."""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
import random
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

from torch import Tensor

from tests.call.changes import Way, way

SCALE = 2.0
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)
LOCAL = threading.local()
LOCAL.scale = 2.0


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
