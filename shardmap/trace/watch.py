"""Watch what python runs while a function is recorded: its code, and its calls into C.

A recording may be replayed while all that the function has read is unchanged. What it can read
follows from the code that ran (library code too) and from the C functions that it called. Most of
those compute from their arguments alone; one that reads anything else (a clock, a file, the
interpreter itself) is the reason why the function must be recorded at each call.
"""

from __future__ import annotations

import abc
import builtins
import collections
import contextlib
import contextvars
import functools
import gc
import importlib
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable

import numpy as np
import psutil
import torch
from torch.utils import checkpoint

from shardmap.program.backend_flags import precisions

_OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_PACKAGES = tuple(
    os.path.join(path, "")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if path
)
_HANDING_ON = tuple(
    os.path.join(_OWN, part)
    for part in ("transforms", "reduce", "call/batch_norms", "trace/histories")
)
_IMPORTS = "<frozen importlib._bootstrap>"
PROGRAM = "<shardmap program>"
"""The file name of replayed programs: an inner map sets seeds of its own while it draws."""
_STDLIB = os.path.join(sysconfig.get_path("stdlib"), "")
_TRUSTED = tuple(os.path.join(os.path.dirname(str(m.__file__)), "") for m in (torch, np, psutil))


@functools.lru_cache(maxsize=65536)
def is_own(filename: str) -> bool:
    """True if a file of code is a part of shardmap, or a replay that it has generated."""
    return filename.startswith(_OWN) or filename == PROGRAM


@functools.lru_cache(maxsize=65536)
def _hands_on(filename: str) -> bool:
    """True if a file of shardmap's calls the user's functions as a part of what is recorded."""
    return filename.startswith(_HANDING_ON)


@functools.lru_cache(maxsize=65536)
def is_trusted(filename: str) -> bool:
    """True if a file of code belongs to python's own library, to torch or to numpy."""
    if filename.startswith(("<frozen", *_TRUSTED)):
        return True
    return filename.startswith(_STDLIB) and not filename.startswith(_PACKAGES)


class PythonWatch:
    """The code that ran while it was active in this thread, and the calls into C that it made.

    It may be entered again. It is a profile function (`sys.setprofile`), and hands on what it
    sees to one that was set before. Where a profiler written in C is active, nothing is seen, and
    `blame` says so.
    """

    def __init__(self) -> None:
        self.codes: dict[types.CodeType, dict[str, object]] = {}
        """The code objects that ran, without shardmap's own, each with its globals."""
        self.apart: set[types.CodeType] = set()
        """Code whose globals are no module's (made from text): they may die with the call."""
        self.variables: dict[int, contextvars.ContextVar[object]] = {}
        """Context variables that were read."""
        self.states: dict[Callable[[], object], object] = {}
        """Functions of torch without arguments that were asked for a setting, with its value."""
        self.asked: set[str] = set()
        """Names of C functions that asked tensors for what they say of themselves."""
        self.blame = ""
        """What was read that cannot be compared between calls; empty if all can be."""
        self._settings: dict[Callable[[], object], object] = {}
        """Questions for the settings of torch that were changed, with the answers before."""
        self._seen: set[object] = set()
        self._turns: list[tuple[types.FrameType, bool]] = []
        """Frames at which the code turned from the user's to shardmap's (True), or back."""
        self._ours = False
        self._collecting: types.FrameType | None = None
        """The frame of a garbage collection, a finaliser or an import, which is not watched."""
        self._outer: Callable[..., object] | None = None
        self._active = False

    def __enter__(self) -> PythonWatch:
        self._outer = sys.getprofile()
        if self._outer is not None and not callable(self._outer):
            self.accuse("a profiler is active, which hides what it reads")
        else:
            sys.setprofile(self)
            self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            if sys.getprofile() is not self:
                self.accuse("it sets a profiler of its own")
            sys.setprofile(self._outer)
            self._turns.clear()  # the call of this method is noted, and its return is not
            self._ours = False

    def __call__(self, frame: types.FrameType, event: str, arg: types.BuiltinFunctionType) -> None:
        """Note one event; called by python.

        What shardmap's own code calls to record is left out, unless it is the user's code again.
        """
        if self._outer is not None:
            self._outer(frame, event, arg)
        if self._collecting is not None:
            if event == "return" and frame is self._collecting:
                self._collecting = None
            return
        if event == "call":
            code = frame.f_code
            if (gc.callbacks and _is_collectors(frame)) or _is_finaliser(frame):
                self._collecting = frame
                return
            if self._ours:
                if not (_is_users(code.co_filename) or _is_users_text(frame)):
                    return
                self._turns.append((frame, False))
                self._ours = False
            elif is_own(code.co_filename):
                if _hands_on(code.co_filename):
                    return
                self._turns.append((frame, True))
                self._ours = True
                return
            if code not in self.codes:
                if code.co_name == "_find_and_load" and code.co_filename == _IMPORTS:
                    self._collecting = frame  # runs once: what it leaves is read by name
                    return
                if code.co_filename == "<string>" and _is_of_ours(frame):
                    return
                self.codes[code] = frame.f_globals
                if not _is_of_a_module(frame):
                    self.codes[code] = {}
                    if not _is_of_a_tuple(frame):
                        self.apart.add(code)
                called, by_any = _READING.get((code.co_filename, code.co_name), ("", False))
                caller = frame.f_back and frame.f_back.f_code.co_filename
                if called and (by_any or not is_trusted(caller or "")):
                    self.accuse(f"it calls {called}")
        elif event == "return":
            if self._turns and self._turns[-1][0] is frame:
                self._turns.pop()
                self._ours = bool(self._turns) and self._turns[-1][1]
        elif event == "c_call" and not self._ours:
            code, owner = frame.f_code, arg.__self__
            if is_own(code.co_filename):
                return
            key = code, arg.__name__, id(owner) if _is_module(owner) else type(owner)
            if key not in self._seen:
                if arg.__name__ == "get_state" and _is_checkpoints(frame):
                    return
                self._seen.add(key)
                self._judge(arg, code)
            elif type(owner) is contextvars.ContextVar:
                self.variables[id(owner)] = owner

    def accuse(self, what: str) -> None:
        """Note why the function must be recorded at each call."""
        self.blame = self.blame or what

    def left_set(self) -> str:
        """The question for a setting of torch that was changed and not set back, or empty."""
        now = ((getter, before) for getter, before in self._settings.items() if getter() != before)
        return next((getter.__name__ for getter, _ in now), "")

    def _judge(self, called: types.BuiltinFunctionType, code: types.CodeType) -> None:
        """Find out if a C function reads anything but its arguments."""
        name, owner = called.__name__, called.__self__
        trusted = is_trusted(code.co_filename)
        if _is_module(owner):
            home = owner.__name__ if isinstance(owner, types.ModuleType) else called.__module__
            home = str(home or "")
            if home == "builtins":
                if name in _BUILTINS or (trusted and name in _BUILTINS_OF_LIBRARIES):
                    return
            elif home == "torch" or home.startswith("torch."):
                self._judge_torch(called, name, asked=True)
                return
            elif home == "_abc":
                self.states[abc.get_cache_token] = abc.get_cache_token()
                return
            elif home in _PURE or (home.partition(".")[0] == "numpy" and name not in _OF_FILES):
                return
            elif name in _NAMED.get(home, ()) or (trusted and home in _OF_LIBRARIES):
                return
        elif isinstance(owner, contextvars.ContextVar):
            self.variables[id(owner)] = owner
            return
        elif isinstance(owner, torch.Tensor) or _is_of_torch(owner):
            if name == "data_ptr" and not trusted:
                self.accuse("it calls data_ptr")
            self._judge_torch(called, name, asked=False)
            return
        elif isinstance(owner, _PURE_TYPES) or (
            isinstance(owner, type) and issubclass(owner, _PURE_TYPES)
        ):
            return
        elif isinstance(owner, type) and name in ("__new__", "__subclasshook__", "mro"):
            return
        elif trusted:
            return  # locks, patterns, weak references: of python's library or torch
        elif name in _OF_ANY:
            return
        module = getattr(called, "__module__", None) or type(owner).__name__
        where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        self.accuse(f"it calls {module}.{name} in {code.co_name} ({where})")

    def _judge_torch(self, called: types.BuiltinFunctionType, name: str, asked: bool) -> None:
        """Refuse what answers differently each time; keep the answers of questions for settings."""
        if name in _OF_TENSORS:
            self.asked.add(name)
        if name == _PRECISION:
            self.states[precisions] = precisions()
        elif name in _STATES_OF_TORCH:
            self.accuse(f"it calls torch's {name}")
        elif asked and name.startswith(_ORDERS):
            getter = _getter(called.__self__, name)
            if getter is not None:
                self._settings.setdefault(getter, getter())
        elif asked and name.startswith(_QUESTIONS) and name not in _ABOUT_THE_CALL:
            try:
                value = called()
            except (TypeError, RuntimeError, AssertionError):
                return  # it takes arguments, and answers about them
            if _is_setting(value):
                self.states[called] = value


def _is_setting(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, _SETTINGS) or hasattr(type(value), "__members__")  # an enum of C


def _getter(module: object, setter: str) -> Callable[[], object] | None:
    """The function that answers what `setter` sets, if it answers without arguments."""
    stem = setter.lstrip("_").removeprefix("set_")
    names = [f"get_{stem}", f"_get_{stem}", f"is_{stem}", f"_is_{stem}"]
    found = next((f for f in (getattr(module, n, None) for n in names) if callable(f)), None)
    if found is None or found.__name__ in _ABOUT_THE_CALL:
        return None
    try:
        found()
    except (TypeError, RuntimeError, AssertionError):
        return None
    return found


@functools.lru_cache(maxsize=65536)
def _is_users(filename: str) -> bool:
    """True if a file of code is neither shardmap's nor one that shardmap itself calls."""
    return not (is_own(filename) or is_trusted(filename) or filename == "<string>")


def _is_of_ours(frame: types.FrameType) -> bool:
    """True if generated code, such as a dataclass's `__init__`, belongs to shardmap."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "shardmap"


def _is_users_text(frame: types.FrameType) -> bool:
    """True if code that was made from text is the user's, called by shardmap's own code."""
    if frame.f_code.co_filename != "<string>" or _is_of_ours(frame) or _is_of_a_tuple(frame):
        return False
    return not is_trusted(str(frame.f_globals.get("__file__") or ""))


def _is_collectors(frame: types.FrameType) -> bool:
    """True if the garbage collector has called a function of `gc.callbacks`, of its own accord."""
    code = frame.f_code
    for function in gc.callbacks:
        called = function if hasattr(function, "__code__") else type(function).__call__
        if getattr(called, "__code__", None) is code:
            given = list(frame.f_locals.values())[:3]
            return any(isinstance(v, dict) and v.keys() == _COLLECTED for v in given)
    return False


def _is_finaliser(frame: types.FrameType) -> bool:
    """True if an object that the function does not know was finalised: at any moment, as garbage.

    It is a library's, or nothing but shardmap's own code ran when it died.
    """
    code, before = frame.f_code, frame.f_back
    if code.co_name != "__del__":
        return False
    file = code.co_filename
    installed = "site-packages" in file or "dist-packages" in file or file.startswith(_STDLIB)
    return installed or (before is not None and is_own(before.f_code.co_filename))


def _is_checkpoints(frame: types.FrameType) -> bool:
    """True if a checkpoint reads the state of torch's generator, to give it back before it ends."""
    caller: types.FrameType | None = frame
    while caller is not None and caller.f_code.co_filename in _AROUND_STATES:
        caller = caller.f_back
    return caller is not None and caller.f_code.co_filename == checkpoint.__file__


def _is_of_a_module(frame: types.FrameType) -> bool:
    """True if the globals of code are a module's, which live as long as the process.

    Those of python's own library and torch are, though some go by another name than their own.
    """
    if is_trusted(frame.f_code.co_filename):
        return True
    module = sys.modules.get(str(frame.f_globals.get("__name__")))
    return module is not None and vars(module) is frame.f_globals


def _is_of_a_tuple(frame: types.FrameType) -> bool:
    """True if code was generated for a named tuple, which reads `tuple.__new__` alone."""
    return str(frame.f_globals.get("__name__")).startswith("namedtuple_")


def _is_module(owner: object) -> bool:
    return owner is None or isinstance(owner, types.ModuleType) or _is_of_pybind(owner)


def reads_more(function: object) -> bool:
    """True for a built-in function of python that reads more than its arguments' values.

    Handed to another function, as in `sorted(objects, key=id)`, it is called unseen.
    """
    if type(function) is not types.BuiltinFunctionType or function.__module__ != "builtins":
        return False
    return function is hash or function.__name__ not in _BUILTINS


def _is_of_pybind(owner: object) -> bool:
    return type(owner).__name__.startswith("pybind11_detail_function_record")


def _is_of_torch(owner: object) -> bool:
    kind = owner if isinstance(owner, type) else type(owner)
    return str(kind.__module__).partition(".")[0] == "torch" or kind.__name__ in (
        "_VariableFunctionsClass",
        "_EngineBase",
        "TensorBase",
    )


_COLLECTED = {"generation", "collected", "uncollectable"}
"""What the garbage collector tells a function of `gc.callbacks`."""
_AROUND_STATES = torch.random.__file__, contextlib.__file__
"""Files through which a checkpoint asks for the state of torch's generator."""
_READING = {
    (importlib.__file__, "import_module"): ("importlib.import_module", True),
    (logging.__file__, "getLogger"): ("logging.getLogger", False),
}
"""Functions that find what no name leads to: by file and name, what they are, and True if it
matters even where python's library or torch calls them."""
_PURE_TYPES = (
    str, bytes, bytearray, int, float, complex, dict, list, tuple, set, frozenset, slice, range,
    memoryview, types.MappingProxyType, types.GenericAlias, types.CodeType, types.FunctionType,
    types.MethodType, types.GeneratorType, types.CellType, type(None), type(Ellipsis),
    BaseException, collections.deque, property, functools.partial, enumerate, zip, map, filter,
    reversed, type({}.keys()), type({}.values()), type({}.items()), np.ndarray, np.generic,
    re.Pattern, re.Match,
)  # fmt: skip
"""Types whose methods compute from the object and their arguments."""
_BUILTINS = frozenset(
    "abs aiter all any anext ascii bin bool bytes callable chr complex delattr dict divmod "
    "enumerate filter float format frozenset getattr hasattr hash hex int isinstance issubclass "
    "iter len list map max min next object oct ord pow property range repr reversed round set "
    "setattr slice sorted staticmethod str sum super tuple type vars dir zip "
    "__build_class__".split()
)
_BUILTINS_OF_LIBRARIES = frozenset(
    {"id", "__import__", "globals", "locals", "exec", "eval", "compile"}
)
"""Built-in functions that torch and python's own library call with what they know."""
_PURE = frozenset(
    "math cmath operator _operator itertools functools _functools _collections _bisect _heapq "
    "_struct re _sre copy _typing _stat _string _json binascii zlib _statistics _weakref "
    "_contextvars unicodedata scipy.special".split()
)
"""Modules of C functions that read nothing but their arguments."""
_NAMED: dict[str, frozenset[str]] = {
    "sys": frozenset({"intern", "exc_info"}),
    "_thread": frozenset({"allocate_lock", "RLock"}),
}
_OF_LIBRARIES = frozenset({"sys", "_thread", "_imp", "gc", "atexit", "_warnings"})
"""Modules whose functions torch and python's library may call."""
_OF_ANY = frozenset(
    "__init__ __new__ __init_subclass__ __setattr__ __getattribute__ __delattr__ __eq__ __ne__ "
    "__hash__ __reduce__ __reduce_ex__ __format__ __sizeof__ __dir__ __subclasshook__ "
    "__getstate__".split()
)
"""Methods that an object inherits from `object`."""
_OF_FILES = frozenset({"fromfile", "memmap", "_get_extobj_dict", "_make_extobj", "geterr"})
"""Functions of numpy that read files or settings."""
_SETTINGS = bool | int | float | str | torch.dtype | torch.device | None
_PRECISION = "_get_fp32_precision_getter"
"""Torch's function that takes the name of a backend and returns a setting of it."""
_QUESTIONS = ("is_", "_is_", "get_", "_get_", "_cuda_get_cudnn")
"""Beginnings of the names of functions that return a setting."""
_ORDERS = ("set_", "_set_")
"""And of those that change one."""
_OF_TENSORS = frozenset(
    "is_conj is_neg is_inference _is_view storage_offset untyped_storage _storage".split()
)
_STATES_OF_TORCH = frozenset(
    "initial_seed seed get_state get_rng_state memory_stats _cuda_memoryStats cudart "
    "_cuda_getCurrentStream _cuda_getCurrentRawStream from_file load _cuda_mem_get_info".split()
)
"""Functions of torch that answer differently at each call."""
_ABOUT_THE_CALL = frozenset(
    "is_grad_enabled is_inference_mode_enabled _is_torch_function_enabled get_grad_fn "
    "_is_torch_function_mode_enabled _get_tracing_state get_autocast_dtype is_autocast_enabled "
    "get_inplace_requires_grad_allowed _is_functorch_wrapped_tensor "
    "_is_tracing get_default_dtype get_interpreter_stack "
    "_get_function_stack_at _get_dispatch_stack_at _get_dispatch_mode is_inference "
    "_get_constant_bool_symnode is_leaf _is_alias_of get_unwrapped is_batchedtensor".split()
)
"""Questions whose answers belong to the recording, or that every recording's signature holds."""


BUILTINS: dict[str, object] = builtins.__dict__
"""The namespace of python's built-in functions."""
