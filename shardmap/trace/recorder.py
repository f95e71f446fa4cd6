"""Run a function once on one real sample and record each ATen call that it makes.

The recorder is a dispatch mode below autograd: plain tensors, no wrapper class, so that whatever
autograd does inside the function (`autograd.grad`, `torch.func`, checkpointing) just runs, and its
backward calls are recorded like any others. Measured: 11-15 microseconds per operator, against
760-890 for `make_fx` and 90 for meta tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from shardmap import errors
from shardmap._torch import (
    OpOverload,
    TorchDispatchMode,
    assert_async,
    aten,
    free_weak_reference,
    is_zero_tensor,
    kernel_of,
    run_backward,
    schema_of,
    storage_id,
    weak_reference,
    without_dispatch,
)
from shardmap.program.ir import NO_GRAD, Equation, Program, Var, variables
from shardmap.program.operators import OpInfo, deciders, draws, op_info, shape_depends_on_values
from shardmap.program.private_generators import PrivateGenerators
from shardmap.trace import repeat as follow
from shardmap.trace.kernels import MAKES_LAZY, is_lazy, lazy_tensors_resolved
from shardmap.trace.recording import Recording, flat_tensors, is_own_leaf, user_line
from shardmap.trace.scalar_index import Copies
from shardmap.trace.tensor_table import Variables, spec_of
from shardmap.trace.unwritten import Unwritten, python_place


class Recorder(Variables, TorchDispatchMode):
    """Records the calls made while it is active. `call` names the user's call in errors."""

    def __init__(
        self,
        call: str,
        randomness: str,
        has_rule: Callable[[Any], bool],
        decompose: Callable[[Any], Any],
        outer: Recorder | None,
        once: bool,
        zeros_have_memory: bool = False,
    ):
        TorchDispatchMode.__init__(self)
        Variables.__init__(self, call, outer, once)
        self.randomness = randomness
        self.has_rule = has_rule
        self.decompose = decompose
        self.equations: list[Equation] = []
        self.written_groups: set[int] = set()
        self.groups_of_leaves: set[int] = set()
        """Memory of samples whose batch is a leaf: autograd forbids to write to its rows while
        it records."""
        self.literals: list[tuple[Var, torch.Tensor]] = []
        self.served: dict[int, tuple[bool, Any]] = {}
        """By address of the operator: whether it has a rule, and its decomposition."""
        if zeros_have_memory:
            self.served[id(aten._efficientzerotensor.default)] = True, aten.zeros.default
        self.default_dtype = torch.get_default_dtype()
        self.random = False
        self.generators = PrivateGenerators()
        self.unwritten = Unwritten()
        self.serial = 0
        """How many calls of torch's python interface have been seen."""
        self.copies = Copies()
        self.taken_for_all = ""
        """What replay must refuse where a sample differs in a shape or an answer: says what it
        was."""
        self.sources: dict[str, str] = {}
        self.expected: Program | None = None
        """What was recorded of the same code the last time, as long as nothing has differed from
        it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that skipping adds costs a third of the recording

    def _refuse_write(self, op: OpOverload, tensor: torch.Tensor) -> None:
        var = self.known(tensor) or self._capture(tensor)
        if var.group not in self.captured_groups:
            self.written_groups.add(var.group)
            if var.group in self.groups_of_leaves and torch.is_grad_enabled():
                raise RuntimeError(
                    "a view of a leaf Variable that requires grad is being used in an in-place "
                    "operation."
                )
            return
        name = schema_of(op).name.partition("::")[2]
        if "norm" in name:
            raise errors.CapturedWriteError(
                f"{self.call}: {name} in training mode would update running statistics of shape "
                f"{tuple(tensor.shape)} that all "
                "samples share; "
                "call .eval() on the model, or use track_running_stats=False, or GroupNorm "
                "(torch.func.replace_all_batch_norm_modules_)"
            )
        raise errors.CapturedWriteError(
            f"{self.call}: {name} would write in place to a tensor of shape {tuple(tensor.shape)} "
            "that all samples share "
            "(captured, or an argument "
            "with in_dim None); the loop would write to it once per sample: return the value "
            "instead, or clone the tensor inside "
            "the function"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call and record it."""
        kwargs = kwargs or {}
        if self.paused:
            return self.kernel(func, args, kwargs)
        if self.lazy and func is aten.expand.default and not isinstance(args[0], torch.Tensor):
            # A symbolic zero and a number: torch gives modes a number where a kernel has a tensor.
            dtype = {float: torch.float64, complex: torch.complex128}.get(type(args[0]))
            with self:
                return torch.full(args[1], args[0], dtype=dtype, device=self.device)
        info = op_info(func)
        served = self.served.get(id(func))
        if served is None:
            served = self.served[id(func)] = (self.has_rule(func), self.decompose(func))
        if info.plain and served[1] is None:
            if self.expected is not None and not self.copies.stale:
                out = self._repeat(func, args, kwargs)
                if out is not follow.DIFFERENT:
                    return out
            return self._record(func, info, args, kwargs, ())
        if info.composite:
            out = self._taken_apart(func.decompose, args, kwargs)
            if out is not NotImplemented:
                return out
        if info.metadata:
            return self.kernel(func, args, kwargs)
        if func is aten.lift_fresh.default:
            return self._literal(args[0])
        hidden = info.hidden_writes
        evaluating = (
            hidden is not None and len(args) > hidden[2] and not args[hidden[2]]
        )  # the schema says writes, the kernel only reads
        for i in info.writes if not evaluating else ():
            if i < len(args):
                self._check_writes(func, args[i])
        for name in info.writes_named:
            if name in kwargs:
                self._check_writes(func, kwargs[name])
        writes = tuple(args[i] for i in info.writes if i < len(args) and not evaluating)
        writes += tuple(kwargs[n] for n in info.writes_named if n in kwargs)
        if hidden is not None and len(args) > hidden[2] and args[hidden[2]]:
            stats = [args[i] for i in hidden[:2] if isinstance(args[i], torch.Tensor)]
            for tensor in stats:
                self._refuse_write(func, tensor)
            writes += tuple(stats)
        if info.random and draws(func, args, kwargs):
            self._check_random(func)
        if served[1] is not None:
            return self._taken_apart(served[1], args, kwargs)
        if info.resizes:
            done = self._record_resize(func, args)
            if done is not None:
                return done
            raise errors.EscapeError(
                f"{self.call}: {schema_of(func).name.partition('::')[2]} changes the memory of a "
                f"tensor, at {user_line()}; make a "
                "new tensor instead"
            )
        if info.view_in_place is not None:
            return self._record_view_in_place(func, info.view_in_place, args, kwargs)
        return self._record(func, info, args, kwargs, writes)

    def kernel(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator below the recording."""
        if self.lazy:
            with lazy_tensors_resolved():
                return kernel_of(func)(*args, **kwargs)
        self.lazy = id(func) in MAKES_LAZY
        return kernel_of(func)(*args, **kwargs)

    def _taken_apart(
        self, decomposition: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Record what `decomposition` calls in place of one composite call."""
        lazy = self.lazy or any(map(is_lazy, flat_tensors((*args, *kwargs.values()))))
        with lazy_tensors_resolved() if lazy else contextlib.nullcontext(), self:
            return decomposition(*args, **kwargs)

    def _repeat(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        assert self.expected is not None
        number = len(self.equations)
        if (
            number >= len(self.expected.equations)
            or self.copies.stale
            or torch.get_default_dtype() is not self.default_dtype
        ):
            return follow.DIFFERENT
        return follow.repeat(self, self.expected.equations[number], func, args, kwargs, is_own_leaf)

    def adopt(self, out: Any, eq: Equation, mapped: bool) -> None:
        """Take `eq`, which was expected, as what has just been recorded with the result `out`."""
        outs = eq.outs
        single = out is None or isinstance(out, torch.Tensor)
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
        """Whether a result is what `var` says.

        The next variable, of this shape and dtype, in new memory or known memory.
        """
        if type(var) is not Var or var.index != self.count:
            return False
        spec = var.spec
        if (
            tensor.shape != spec.shape
            or tensor.dtype is not spec.dtype
            or self.known(tensor) is not None
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
        elif group != var.group or tensor.stride() != spec.stride:
            return False
        self.entries[id(tensor)] = (weakref.ref(tensor), var)
        self.count += 1
        return True

    def _append(self, eq: Equation) -> None:
        """Note what was recorded, and whether it was expected."""
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
            ):
                eq = wanted
            else:
                self.expected = None
        self.equations.append(eq)

    def _record_resize(self, func: Any, args: tuple) -> Any:
        """A resized tensor that needs no more memory than it has is another view of it.

        None for anything else.
        """
        tensor = args[0]
        if func is aten.resize_.default:
            size = list(args[1])
        elif func is aten.resize_as_.default and len(args) == 2:
            size = list(args[1].shape)
        else:
            return None
        offset = int(tensor.storage_offset())
        if (
            offset + math.prod(size) > tensor.untyped_storage().nbytes() // tensor.element_size()
            or math.prod(size) > tensor.numel()
        ):
            return None
        var = self.known(tensor)
        if var is None or var.group in self.captured_groups:
            return None
        self.kernel(func, args, {})
        view = (var, tuple(size), tuple(tensor.stride()), offset)
        out = self._define(tensor)
        self._append(
            Equation(aten.as_strided.default, view, (), (out,), (NO_GRAD,), torch.is_grad_enabled())
        )
        return tensor

    def _record_view_in_place(
        self, func: Any, functional: Any, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """`t_`, `squeeze_` and their kin change how a tensor looks at its memory.

        From now on it is the variable of the view.
        """
        flags: list[int] = []
        encoded = tuple([self.encode(a, flags, False) for a in args])
        named = tuple([(k, self.encode(v, flags, False)) for k, v in kwargs.items()])
        out = func(*args, **kwargs)
        mapped = self.is_mapped(args[0])
        var = self._define(args[0])
        assert not mapped or var.group in self.mapped_groups, (
            f"{func} left the memory of its argument"
        )
        self._append(
            Equation(functional, encoded, named, (var,), tuple(flags), torch.is_grad_enabled())
        )
        return out

    def _record(
        self, func: Any, info: OpInfo, args: tuple, kwargs: dict[str, Any], writes: tuple
    ) -> Any:
        flags: list[int] = []
        encoded = tuple([self.encode(a, flags, info.open_scalars) for a in args])
        named = (
            tuple([(k, self.encode(v, flags, info.open_scalars)) for k, v in kwargs.items()])
            if kwargs
            else ()
        )
        read = list(variables((encoded, named)))
        if self.copies.stale:
            now_written = {v.group for v in map(self.known, flat_tensors(writes)) if v is not None}
            self._check_stale(v for v in read if v.group not in now_written)
        unwritten, overwritten = self._unwritten(info, args, kwargs, encoded, named, writes)
        groups = self.mapped_groups
        mapped = False
        for var in read:
            if var.group in groups:
                mapped = True
        dynamic = info.dynamic and shape_depends_on_values(func, args)
        varies = dynamic and any(v.group in groups for v in deciders(func, encoded))
        if mapped and info.question and _looks_for_anomalies():
            return self._anomaly(func, args)
        if (mapped and info.question) or varies:
            # One sample's shape or truth stands for all until replay finds a sample where it is
            # another.
            if not (varies or func is aten.equal.default) or self.outer is not None or self.depth:
                raise errors.DataDependentError(self._data_dependent(func))
            self.taken_for_all = self._data_dependent(func)
        if info.random and draws(func, args, kwargs):
            out = self.generators.run(func, args, kwargs)
            self.random = True
            mapped = mapped or self.randomness == "different"
        else:
            out = self.kernel(func, args, kwargs)
        if info.question:
            self.types.append((type(out), repr(out)))
            self._append(
                Equation(
                    func, encoded, named, (), tuple(flags), torch.is_grad_enabled(), ("value", out)
                )
            )
            return out
        if torch.get_default_dtype() is not self.default_dtype:
            encoded, named = self._pin_dtype(func, encoded, named, out)
        if isinstance(out, torch.Tensor):
            outs: Any = (self.known(out) or self._define(out),)
            results: Any = outs
        else:
            outs = self._outputs(out) if isinstance(out, tuple | list) else (self._outputs(out),)
            results = list(variables(outs))
        if mapped and not info.shape_only:
            groups.update([v.group for v in results])
        if writes:
            self._refuse_growth(func, writes)
        if writes and mapped:
            self.mapped_groups |= overwritten
        if unwritten or overwritten:
            self.unwritten.follow(info, encoded, outs, unwritten, overwritten)
        if info.uninitialised:
            self.unwritten.make(results, python_place(self.serial, 3))
        answer = ("shape", tuple([v.spec.shape for v in results])) if dynamic else None
        source = None
        if varies or not self.served[id(func)][0]:
            name = func.name()
            if name not in self.sources:
                self.sources[name] = user_line()
        self._append(
            Equation(
                func, encoded, named, outs, tuple(flags), torch.is_grad_enabled(), answer, source
            )
        )
        return out

    def _anomaly(self, func: Any, args: tuple) -> Any:
        """Autograd asks whether a gradient holds NaN: the other samples' are asked at replay."""
        found = self.kernel(func, args, {})
        if not found:
            with self:
                assert_async(
                    args[0].logical_not(),
                    "autograd's anomaly detection: a gradient of some sample holds nan values",
                )
        return found

    def _pin_dtype(self, func: Any, encoded: tuple, named: tuple, out: Any) -> tuple[tuple, tuple]:
        """Arguments that give the recorded dtype although the default dtype, changed inside the function, is not what replay will see."""
        dtype = torch.get_default_dtype()
        made = isinstance(out, torch.Tensor) and out.dtype == dtype and "dtype" not in dict(named)
        if not made or any(v.spec.dtype.is_floating_point for v in variables((encoded, named))):
            return encoded, named
        if any(a.name == "dtype" for a in schema_of(func).arguments):
            return encoded, (*named, ("dtype", dtype))

        def cast(value: Any) -> Any:
            if type(value) is not Var or schema_of(func).is_mutable:
                return value
            spec = value.spec._replace(dtype=dtype)
            self.groups[-self.count - 1] = len(self.groups)
            var = Var(self.count, len(self.groups) - 1, spec)
            self.count += 1
            if value.group in self.mapped_groups:
                self.mapped_groups.add(var.group)
            grad_mode = torch.is_grad_enabled()
            self._append(
                Equation(
                    aten._to_copy.default,
                    (value,),
                    (("dtype", dtype),),
                    (var,),
                    (NO_GRAD,),
                    grad_mode,
                )
            )
            return var

        return tuple([cast(v) for v in encoded]), named

    def _refuse_growth(self, func: Any, writes: tuple) -> None:
        for tensor in flat_tensors(writes):
            var = self.known(tensor)
            if var is not None and tensor.shape != var.spec.shape:
                raise errors.EscapeError(
                    f"{self.call}: {schema_of(func).name.partition('::')[2]} gave its output, of "
                    f"shape {tuple(var.spec.shape)}, the shape "
                    f"{tuple(tensor.shape)}, at {user_line()}; pass an `out` of the result's "
                    "shape, or none"
                )

    def made_again(self, tensor: torch.Tensor, group: int) -> Var | None:
        """The variable of another object with the memory and the metadata of a recorded tensor.

        `nn.Parameter(x)`, `x.as_subclass(...)` and `x.data` make one without an operator call, and
        autograd does where a backward unpacks its own result, saved without its history. The object
        of `x` itself may be gone: what was recorded is searched, latest first.
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
        """A view of a symbolic zero of forward-mode AD, which no operator call shows, is another such zero."""
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

    def _check_writes(self, func: Any, value: Any) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor):
                self._refuse_write(func, tensor)
                if self.copies.pairs:
                    self._written_beside_copies(tensor)

    def copied(self, source: torch.Tensor, copy: torch.Tensor, indices: tuple[Any, ...]) -> None:
        """Note that `copy` stands for the view `source[indices]`, whose place differs by sample."""
        of, own = self.known(source) or self._capture(source), self.known(copy)
        assert own is not None
        self.copies.add(of.group, own.group, indices)

    def put_back(
        self,
        source: torch.Tensor,
        value: torch.Tensor,
        indices: tuple[Any, ...],
        put: Callable[[], None],
    ) -> None:
        """Run `put`, which is `source[indices] = value`, where `value` may be a copy that was taken there."""
        of, own = self.known(source), self.known(value)
        if of is None or own is None:
            put()
        else:
            self.copies.put_back(of.group, own.group, indices, put)

    def _written_beside_copies(self, tensor: torch.Tensor) -> None:
        var = self.known(tensor)
        if var is not None and any(
            group in self.captured_groups for group in self.copies.written(var.group)
        ):
            raise errors.CapturedWriteError(
                f"{self.call}: an in-place write to `tensor[index]` would reach a tensor that all "
                "samples share, at "
                f"{user_line()}; clone what "
                "was indexed first"
            )

    def _check_stale(self, read: Iterable[Var]) -> None:
        for var in read:
            if var.group in self.copies.stale:
                raise errors.DataDependentError(
                    f"{self.call}: a tensor was indexed with a tensor that differs by sample, then "
                    "one of the two was written in place and "
                    f"the other is used, at {user_line()}; clone what was indexed, or write with "
                    "tensor[index] = value"
                )

    def _unwritten(
        self,
        info: OpInfo,
        args: tuple,
        kwargs: dict[str, Any],
        encoded: Any,
        named: Any,
        writes: Any,
    ) -> tuple[list[Var], set[int]]:
        """The variables that a call reads and nothing recorded has written, and what it writes."""
        overwritten = {v.group for v in map(self.known, flat_tensors(writes)) if v is not None}
        if not self.unwritten.groups:
            return [], overwritten
        read = self.unwritten.read(info, encoded, named, overwritten)
        for var in self.unwritten.constants(read, python_place(self.serial, 4)) if read else ():
            tensor = next(
                t for t in flat_tensors((*args, *kwargs.values())) if self.known(t) is var
            )
            if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
                literal = self._constant(tensor)
                write = (var, literal)
                flags = (NO_GRAD, NO_GRAD)
                self._append(Equation(aten.copy_.default, write, (), (var,), flags, False))
                self.unwritten.written((var.group,))
        read = [v for v in read if v.group in self.unwritten.groups]
        if read and (info.question or not schema_of(info.op).returns):
            raise errors.EscapeError(self._unwritten_text(schema_of(info.op).name))
        return read, overwritten

    def _unwritten_text(self, name: str) -> str:
        return (
            f"{self.call}: {name.partition('::')[2]} reads memory that torch.empty made and that no "
            f"recorded operator has written, at {user_line()}; fill it with torch operators (numpy "
            "and data_ptr writes cannot be followed), or use torch.zeros"
        )

    def _constant(self, tensor: torch.Tensor) -> Var:
        """The variable of what torch's C++ code has written into new memory."""
        with without_dispatch():
            copy = tensor.detach().clone()
        var = self._define(copy)
        self.literals.append((var, copy))
        return var

    def _literal(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made from python data inside the function: owned by the program."""
        with without_dispatch():  # an outer recording must not see the copy
            copy = tensor.clone()
        var = self._define(tensor)
        self.literals.append((var, copy))
        return tensor

    def _check_random(self, func: Any) -> None:
        name = schema_of(func).name.partition("::")[2]
        if self.randomness == "error":
            raise errors.RandomnessError(
                f"{self.call}: {name} draws random numbers and randomness is 'error'; pass "
                "randomness='different' (each sample "
                "its own draw) or "
                "'same' (one draw for all), or switch the random layer off (model.eval())"
            )

    def _data_dependent(self, func: Any) -> str:
        name = schema_of(func).name.partition("::")[2]
        what = {
            "_local_scalar_dense": "python asks for the value of a tensor that differs by sample "
            "(`if x > 0`, `float(x)`, "
            "`.item()`, a tensor as index)",
            "equal": "torch.equal compares tensors that differ by sample",
        }.get(name, f"the shape of {name}'s result depends on values that differ by sample")
        return f"{self.call}: {what}, at {user_line()}; use torch.where, masks or comparisons that return tensors"

    # -- the end
    # -----------------------------------------------------------------------------------------------------

    def finish(self, outputs: list[torch.Tensor], real: bool) -> Recording:
        """The recording, once the function has returned `outputs`."""
        flags: list[int] = []
        if self.lazy:
            with self:  # the loop stacks what it returns: its zeros have memory
                outputs = [o.clone() if is_zero_tensor(o) else o for o in outputs]
        wrappers = {id(plain): wrapper for wrapper, plain in self.wrappers.values()}
        out_vars = tuple([self.encode(o, flags, False) for o in outputs])
        self._check_stale((*out_vars, *self.inputs))
        self._refuse_unwritten(out_vars)
        if self.taken_for_all and not self.written_groups.isdisjoint(self.input_groups):
            raise errors.DataDependentError(
                self.taken_for_all
            )  # a later sample would be refused after earlier ones were written
        program = Program(
            inputs=tuple(self.inputs),
            captured=tuple(var for var, _ in self.captured.values()),
            literals=tuple(var for var, _ in self.literals),
            scalars=len(self.scalars),
            equations=tuple(self.equations),
            outputs=out_vars,
            output_flags=tuple(flags),
            types=tuple(self.types),
        )
        if (
            self.expected is not None
            and len(self.equations) == len(self.expected.equations)
            and program == self.expected
        ):
            program = self.expected  # its lowering is found without comparing
        return Recording(
            program,
            tuple(wrappers.get(id(t), t) for _, t in self.captured.values()),
            tuple(t for _, t in self.literals),
            tuple(self.scalars),
            frozenset(self.input_groups[g] for g in self.written_groups if g in self.input_groups),
            self.random,
            self.sources,
            tuple(o.detach() for o in outputs) if real else (),
        )

    def _refuse_unwritten(self, outputs: tuple[Var, ...]) -> None:
        kept = {v.group for v in (*outputs, *self.inputs) if 0 not in v.spec.shape}
        for group in kept & self.unwritten.groups.keys():
            by = self.unwritten.groups[group]
            raise errors.EscapeError(
                f"{self.call}: a result depends on memory that torch.empty made and that no "
                f"recorded operator has written{f' (read by {by})' if by else ''}; fill it with "
                "torch operators (numpy and data_ptr writes cannot be followed), or use "
                "torch.zeros"
            )

    def release(self) -> None:
        """Let go of the storages' addresses."""
        for address in self.weak_storages:
            free_weak_reference(address)
        self.weak_storages.clear()
        self.entries.clear()


def _looks_for_anomalies() -> bool:
    """Whether autograd's engine itself, and not python, is asking for a value."""
    if not (torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()):
        return False
    caller = sys._getframe(3)  # above this function, `_record` and `__torch_dispatch__`
    return caller.f_code is run_backward.__code__
