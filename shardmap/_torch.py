"""Every private name of torch that shardmap uses, in one place, each with its purpose.

Private names move between versions. One that this torch lacks is bound to a stand-in that raises
an error when it is used, and `missing()` lists it; an operator that it lacks is left out of the
tables that name it, and `absent_operators()` lists it. So `import shardmap` goes through with any
torch, and only the use of a missing name fails.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad

from shardmap.errors import TorchVersionError

_missing: dict[str, str] = {}


def missing() -> dict[str, str]:
    """The private names that this torch lacks, each with what does not work without it."""
    return dict(_missing)


def _stand_in(path: str, purpose: str) -> Any:
    """A class that can be tested against and derived from, and that refuses to be called."""
    _missing[path] = purpose

    def refuse(*_: object, **__: object) -> NoReturn:
        raise TorchVersionError(
            f"torch {torch.__version__} has no {path}, which shardmap needs for this: {purpose}; "
            "install a version of torch that pyproject.toml allows"
        )

    return type(path.rpartition(".")[2], (), {"__new__": refuse})


def _private(path: str, purpose: str) -> Any:
    """Find `torch.<path>`, importing the modules on the way."""
    found: Any = torch
    module = "torch"
    for part in path.split("."):
        module = f"{module}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(module)
            except ImportError:
                return _stand_in(f"torch.{path}", purpose)
    return found


def _attribute(of: object, kind: str, name: str, purpose: str) -> Callable[[Any], Any]:
    """The function that reads attribute `name`, which `of` must have, of objects of this kind."""
    if hasattr(of, name):
        return operator.attrgetter(name)
    return _stand_in(f"{kind}.{name}", purpose)


# -- classes and modules, known to the type checker

if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    HigherOrderOperator = _private(
        "_ops.HigherOrderOperator", "checkpoints and other operators that call functions"
    )
    OpOverload = _private("_ops.OpOverload", "telling operators from other functions")
    FakeTensor = _private("_subclasses.fake_tensor.FakeTensor", "maps inside torch.compile")
    FakeTensorMode = _private("_subclasses.fake_tensor.FakeTensorMode", "shapes without computing")
    pytree = _private("utils._pytree", "arguments and results that are nested containers")
    TorchDispatchMode = _private("utils._python_dispatch.TorchDispatchMode", "recording a function")

_private(
    "utils._python_dispatch.TorchDispatchMode._should_skip_dynamo",
    "recording without importing torch._dynamo (seconds)",
)

# -- operators

_example = torch.ops.aten.add.Tensor
schema_of = _attribute(_example, "OpOverload", "_schema", "binding an operator's arguments")
kernel_of = _attribute(_example, "OpOverload", "_op", "calling an operator without its wrapper")
kernel_under = _attribute(_example, "OpOverload", "_op_dk", "calls that a kernel makes")
packet_of = _attribute(_example, "OpOverload", "_overloadpacket", "an operator's other overloads")
overload_name = _attribute(_example, "OpOverload", "_overloadname", "forms that write in place")
kernels_of = _attribute(
    torch.ops.higher_order.cond,
    "HigherOrderOperator",
    "py_kernels",
    "operators that call functions",
)
dense_key = _private("_C.DispatchKey.CompositeExplicitAutograd", "operators that call functions")
has_kernel = _private("_C._dispatch_has_kernel_for_dispatch_key", "which operators are composite")
operator_names = _private("_C._dispatch_get_all_op_names", "finding pointwise operators by tag")
python_kernels = _private("library._impls", "running torch's own kernels in several threads")
custom_operators = _private("_library.custom_ops.OPDEFS", "loops over operators of the user's")
below_autograd = _private("_C._AutoDispatchBelowAutograd", "loops that autograd does not record")
compute_keyset = _private("_ops._compute_keyset", "checkpoints and operators that call functions")

global_hooks = [_private(f"nn.modules.module._global_{kind}_hooks", "hooks of all modules")
                for kind in ("forward", "forward_pre", "backward", "backward_pre")]  # fmt: skip
attention_kernels = [_private(f"_C._get_{kind}_sdp_enabled", "which kernels attention may take")
                     for kind in ("flash", "mem_efficient", "math", "cudnn")]  # fmt: skip
NormBase = _private("nn.modules.batchnorm._NormBase", "batch norm in training mode")
backward_hooks = _attribute(torch.Tensor, "Tensor", "_backward_hooks", "hooks of weights")
base_of = _attribute(torch.Tensor, "Tensor", "_base", "views of tensors whose data is set")
dict_version = _private("_C._dynamo.guards.dict_version", "comparing fast what a function reads")

# -- modes and settings of the thread

_PROXIES = "maps inside make_fx and torch.export"
_OFF = "maps called where modes are switched off"
_SAVED = "hooks on what autograd saves"

dispatch_modes = _private(
    "utils._python_dispatch._get_current_dispatch_mode_stack", "maps inside other recordings"
)
push_dispatch_mode = _private(
    "utils._python_dispatch._push_mode", "putting back the modes around a map"
)
pop_dispatch_mode = _private(
    "utils._python_dispatch._pop_mode", "setting the modes around a map aside"
)
before_dispatch_depth = _private("_ops._len_torch_dispatch_stack_pre_dispatch", _PROXIES)
proxies_aside = _private(
    "fx.experimental.proxy_tensor.disable_proxy_modes_tracing",
    _PROXIES,
)
current_proxy_mode = _private("fx.experimental.proxy_tensor.get_proxy_mode", _PROXIES)
has_proxy = _private("fx.experimental.proxy_tensor.has_proxy_slot", _PROXIES)
pre_dispatch_functions = _private(
    "fx.experimental.proxy_tensor.PreDispatchTorchFunctionMode",
    _PROXIES,
)
proxy_mode = _private("fx.experimental.proxy_tensor.ProxyTorchDispatchMode", _PROXIES)
dispatch_depth = _private(
    "_C._len_torch_dispatch_stack", "asking quickly whether a recording is going on"
)
function_modes = _private("overrides._get_current_function_mode_stack", "maps inside modes")
device_mode = _private("utils._device.DeviceContext", "telling default devices from other modes")
push_function_mode = _private("overrides._push_mode", "putting back function modes around a map")
pop_function_mode = _private("overrides._pop_mode", "setting function modes around a map aside")
function_depth = _private(
    "_C._len_torch_function_stack", "restoring function modes after an interrupt"
)
function_mode_on = _private(
    "_C._is_torch_function_mode_enabled", "operators that torch calls in a backward pass"
)
without_functions = _private(
    "_C.DisableTorchFunction", "asking about a tensor unseen by the modes of a recording"
)
function_state = _private("_C._get_torch_function_state", _OFF)
set_function_state = _private("_C._set_torch_function_state", _OFF)
function_states = _private("_C._TorchFunctionState", _OFF)
for _name in "ALL_DISABLED SUBCLASSES_DISABLED".split():
    _private(f"_C._TorchFunctionState.{_name}", _OFF)
is_key_excluded = _private("_C._dispatch_tls_is_dispatch_key_excluded", _OFF)
exclude_key = _private("_C._dispatch_tls_set_dispatch_key_excluded", _OFF)
without_dispatch = _private(
    "_C._DisableTorchDispatch", "copying a tensor unseen by an outer recording"
)
modes_aside = _private(
    "utils._python_dispatch._disable_current_modes", "trying a kernel's precision on its own"
)
without_functorch = _private("_C._DisableFuncTorch", "trying a kernel's precision on its own")
set_grad = _private("_C._set_grad_enabled", "switching gradients within a replay without a context")
is_forward_on = _private(
    "_C._is_fwd_grad_enabled", "restoring forward mode's switch after an interrupt"
)
set_forward = _private(
    "_C._set_fwd_grad_enabled", "restoring forward mode's switch after an interrupt"
)
is_multithreading_on = _private(
    "_C._is_multithreading_enabled", "restoring the backward's threads after an interrupt"
)
set_multithreading = _private(
    "_C._set_multithreading_enabled", "restoring the backward's threads after an interrupt"
)
inference_guard = _private("_C._InferenceMode", "restoring inference mode after an interrupt")
saved_hooks = _private("_C._autograd._top_saved_tensors_default_hooks", _SAVED)
push_saved_hooks = _private("_C._autograd._push_saved_tensors_default_hooks", _SAVED)
pop_saved_hooks = _private("_C._autograd._pop_saved_tensors_default_hooks", _SAVED)
why_saved_hooks_are_refused = _private(
    "_C._autograd._saved_tensors_hooks_get_disabled_error_message",
    "restoring hooks on what autograd saves after an interrupt",
)
allow_saved_hooks = _private(
    "_C._autograd._saved_tensors_hooks_enable",
    "restoring hooks on what autograd saves after an interrupt",
)
refuse_saved_hooks = _private(
    "_C._autograd._saved_tensors_hooks_disable",
    "restoring hooks on what autograd saves after an interrupt",
)
is_dispatch_mode_on = _private(
    "utils._python_dispatch.is_in_torch_dispatch_mode", "torch.compile after maps in threads"
)
_dispatch_notes = _private("utils._python_dispatch", "torch.compile after maps in threads")
_note_modes_that_compile_sees = _private(
    "utils._python_dispatch.set_is_in_mode_without_ignore_compile_internals",
    "torch.compile after maps in threads",
)
for _name in (
    "_is_in_torch_dispatch_mode _is_in_non_infra_torch_dispatch_mode "
    "_is_in_any_mode_without_ignore_compile_internals"
).split():
    _private(f"utils._python_dispatch.{_name}", "torch.compile after maps in threads")


def note_that_no_dispatch_mode_is_on() -> None:
    """Clear torch's per-process notes that a dispatch mode is on."""
    _dispatch_notes._is_in_torch_dispatch_mode = False
    _dispatch_notes._is_in_non_infra_torch_dispatch_mode = False
    _dispatch_notes._is_in_any_mode_without_ignore_compile_internals = False
    _note_modes_that_compile_sees(False)


TracingContext = _private("_guards.TracingContext", "compiled functions inside a map")
_of_thread = _private("_guards._TLS", "compiled functions inside a map, which run eagerly there")
are_scripts_optimized = _private("_C._get_graph_executor_optimize", "scripted code in a map")
optimize_scripts = _private("_C._set_graph_executor_optimize", "scripted code inside a map")


def tracing_context() -> object:
    """The tracing context of this thread, which `torch.compile` reads; None if there is none."""
    return getattr(_of_thread, "tracing_context", None)


def set_tracing_context(context: object) -> None:
    """Set what `tracing_context` returns."""
    _of_thread.tracing_context = context


_set_strategy = _private(
    "_C._dynamo.eval_frame.set_code_exec_strategy", "maps inside compiled functions"
)
_strategy = _private("_C._dynamo.eval_frame._FrameExecStrategy", "maps inside compiled functions")
_skip = _private("_C._dynamo.eval_frame._FrameAction.SKIP", "maps inside compiled functions")
_Function = TypeVar("_Function", bound=Callable[..., object])


def not_compiled(function: _Function) -> _Function:
    """Mark a function that `torch.compile` must call as it is, with all that it calls.

    This is what `torch.compiler.disable` does, which would import torch._dynamo for seconds.
    """
    _set_strategy(function.__code__, _strategy(_skip, _skip))
    vars(function)["_torchdynamo_disable"] = True
    vars(function)["_torchdynamo_disable_msg"] = (
        "shardmap records the function on a sample, which cannot be compiled; call the map outside "
        "of the compiled function, compile without fullgraph=True, or export with strict=False"
    )
    return function


_LEAF, _LAZY = "asking for a leaf's gradient node", "showing lazy tensors to kernels"
included_keys = _private("_C._dispatch_tls_local_include_set", _LEAF)
excluded_keys = _private("_C._dispatch_tls_local_exclude_set", _LAZY)
dispatch_key = _private("_C.DispatchKey", _LAZY)
key_set = _private("_C.DispatchKeySet", _LEAF)
undefined_key = _private("_C.DispatchKey.Undefined", _LEAF)
force_keys = _private("_C._ForceDispatchKeyGuard", _LEAF)

# -- torch.func

functorch = _private("_C._functorch", "maps inside torch.func transforms")
enter_vmap_level = _private(
    "_C._functorch._vmap_increment_nesting", "numbering the levels of transforms inside a map"
)
add_batch_dim = _private(
    "_C._functorch._add_batch_dim", "containers with a batch dimension of their own (TensorDict)"
)
wrap_for_grad = _private(
    "_C._functorch._wrap_for_grad", "transforms inside a map of an outer transform's tensors"
)
leave_vmap_level = _private(
    "_C._functorch._vmap_decrement_nesting", "numbering the levels of transforms inside a map"
)
current_level = _private(
    "_C._functorch.maybe_current_level", "rules that are called inside torch.func transforms"
)
interpreters_aside = _private(
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "setting the torch.func transforms around a map aside",
)
for _name in (
    "TransformType get_dynamic_layer_stack_depth get_inplace_requires_grad_allowed "
    "get_interpreter_stack get_single_level_autograd_function_allowed get_unwrapped "
    "is_batchedtensor is_functorch_wrapped_tensor is_legacy_batchedtensor maybe_get_bdim "
    "maybe_get_level peek_interpreter_stack pop_dynamic_layer_stack push_dynamic_layer_stack "
    "set_inplace_requires_grad_allowed set_single_level_autograd_function_allowed"
).split():
    _private(f"_C._functorch.{_name}", "maps inside torch.func transforms")
eager_transforms = _private(
    "_functorch.eager_transforms", "restoring the count of jvp levels after an interrupt"
)
"""The module, for its `JVP_NESTING` is read and written."""
_private(
    "_functorch.eager_transforms.JVP_NESTING",
    "restoring the count of jvp levels after an interrupt",
)

# -- tensors and their memory

_storage, _tensor = torch.UntypedStorage, torch.Tensor
storage_id = _attribute(_storage, "UntypedStorage", "_cdata", "telling which tensors share memory")
generator_id = _attribute(
    torch.Generator, "Generator", "_cdata", "telling generators apart: operators are given copies"
)
indices_of = _private("Tensor._indices", "products of a captured sparse matrix")
values_of = _private("Tensor._values", "products of a captured sparse matrix")
weak_reference = _private(
    "UntypedStorage._weak_ref", "keeping a storage's address from being used again"
)
free_weak_reference = _private(
    "UntypedStorage._free_weak_ref", "letting a storage's address be used again"
)
storage_of_weak_reference = _private(
    "UntypedStorage._new_with_weak_ptr", "seeing that foreign memory is a recorded tensor's"
)
references_of_torch = _private("Tensor._use_count", "telling what a function keeps of a sample")
version_of = _attribute(_tensor, "Tensor", "_version", "seeing that a batch was written to")
is_view = _private("Tensor._is_view", "results that share memory with a captured tensor")
sequence_number = operator.attrgetter("_sequence_nr")  # of a node: later ones have larger
is_zero_tensor = _private("Tensor._is_zerotensor", "the zeros of forward mode")
typed_storage = _private("Tensor._typed_storage", "refusing what reads a recorded tensor's memory")
LinAlgError: type[RuntimeError] = _private("_C._LinAlgError", "errors of torch.linalg")
_base = vars(_private("_C.TensorBase", "refusing writes to attributes of tensors"))
set_data, set_requires_grad = (_base[name].__set__ for name in ("data", "requires_grad"))
has_internal_overlap = _private(
    "_debug_has_internal_overlap", "telling whether elements share memory (1: two do)"
)
run_backward = _private(
    "autograd.graph._engine_run_backward", "anomaly detection around gradients inside a map"
)
forward_level = _attribute(
    forward_ad, "torch.autograd.forward_ad", "_current_level", "forward mode around a map"
)
unpack_dual = _private("_VF._unpack_dual", "tangents that are read inside a map")
leave_forward_level = _private("_C._exit_dual_level", "forward mode's level after an interrupt")


def set_forward_level(level: int) -> None:
    """Set the level of forward mode that `forward_level` reads."""
    forward_ad._current_level = level


left_aligned = _private("_nested_tensor_from_mask_left_aligned", "padding masks of encoders")
pad_packed_sequence = _private("_VF._pad_packed_sequence", "packed sequences")
node_type = _private("utils._pytree._get_node_type", "arguments that are nested containers")

# -- operators that a version may lack

_absent: set[str] = set()


class AbsentOperator:
    """Stands in for an operator that this torch lacks: no recorded one equals it, no call works."""

    def __init__(self, name: str):
        self.missing_name = name
        _absent.add(name)

    def __getattr__(self, form: str) -> AbsentOperator:
        """Return itself for any overload; names of python's own (`__x__`) raise AttributeError."""
        if form.startswith("__"):
            raise AttributeError(form)
        return self

    def overloads(self) -> list[str]:
        """No overloads."""
        return []

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise TorchVersionError(
            f"torch {torch.__version__} has no operator aten.{self.missing_name}"
        )

    def __repr__(self) -> str:
        return f"<no aten.{self.missing_name} in torch {torch.__version__}>"


class _Aten:
    """`torch.ops.aten`, with an `AbsentOperator` in the place of what this torch lacks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = packet(name)
        if found is None:
            return AbsentOperator(name)  # not kept: an operator may be registered later
        setattr(self, name, found)  # found by python itself from now on
        return found


aten: Any = _Aten()


def packet(name: str) -> Any:
    """The overloads of `aten.<name>`, or None where this torch has no such operator."""
    return getattr(torch.ops.aten, name, None)


def overload(name: str) -> OpOverload | None:
    """The operator `aten.<name>` (the default overload) or `aten.<name.Overload>`, or None."""
    base, _, form = name.partition(".")
    return getattr(packet(base), form or "default", None)


def overloads(*names: str) -> Iterator[OpOverload]:
    """The operators `aten.<name>`, each written `name` (its default overload) or `name.Overload`.

    One that this torch lacks is left out, and `absent_operators` lists it.
    """
    for name in names:
        found = overload(name)
        if found is None:
            _absent.add(name)
        else:
            yield found


def absent_operators() -> list[str]:
    """The operators that shardmap knows and this torch lacks."""
    return sorted(_absent)


# -- the compiler, whose import takes seconds

_COMPILER = {
    "trace": "fx.experimental.proxy_tensor.make_fx",
    "compile": "_inductor.aot_compile",
    "cpu": "_C._aoti.AOTIModelContainerRunnerCpu",
    "cuda": "_C._aoti.AOTIModelContainerRunnerCuda",
    "sizes": "fx.experimental.symbolic_shapes.has_free_unbacked_symbols",
}


def compiler(part: str) -> Any:
    """A part of torch's compiler, imported when it is needed."""
    return _private(_COMPILER[part], f"compile=True, and {_PROXIES}")
