"""Recognise results of `torch.autograd.Function`s by the history that autograd gave them.

No operator call shows that a Function was applied: the calls of its forward are recorded under
`no_grad`, and then one of their results requires grad. Its node in autograd's graph is the
Function's own. From the first use on it is a variable of its own, the result of `OWN_BACKWARD`,
whose arguments `own_backwards` finds once the function has returned.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch.autograd import graph
from torch.utils import module_tracker
from torch.utils.hooks import RemovableHandle

from shardmap._torch import OpOverload, TorchDispatchMode, aten, base_of, sequence_number
from shardmap.program.analysis import written
from shardmap.program.ir import GRAD, Equation, Program, Var
from shardmap.program.own_backward import DATA, NO_EFFECT, OWN_BACKWARD
from shardmap.program.python_state import NAMES, name_of, note_removal
from shardmap.trace.modes_inside import Passed
from shardmap.trace.recomputed import Recomputed
from shardmap.trace.tensor_table import Variables
from shardmap.trace.view_writes import ViewWrites


class Node(Protocol):
    """Protocol of a Function's node in autograd's graph, which is its `ctx`."""

    @property
    def next_functions(self) -> tuple[tuple[graph.Node | None, int], ...]:
        """For each tensor argument: the node that made it, and the index of the result."""
        ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """For each argument: True if it requires grad."""
        ...

    @property
    def _input_metadata(self) -> Sequence[object]: ...

    @property
    def apply(self) -> Callable[..., object]:
        """The Function's backward."""
        ...


@dataclass(slots=True)
class Applied:
    """One application of a Function."""

    node: Node
    position: int
    """Number of its equation."""
    pairs: dict[int, tuple[Var, Var]] = field(default_factory=dict)
    """For the index of a result that is used: the variable that its forward computed, and the
    variable with a history."""

    def equation(self, args: tuple[object, ...], flags: tuple[int, ...]) -> Equation:
        """Make the equation of this application."""
        outs = tuple([made for _, (_, made) in sorted(self.pairs.items())])
        return Equation(OWN_BACKWARD, args, (), outs, flags, True)

    def without_effect(self) -> Equation:
        """The equation if no outer gradient arrives."""
        values = tuple([value for _, (value, _) in sorted(self.pairs.items())])
        return self.equation(((), values, (), (), NO_EFFECT), (0,) * len(values))


@dataclass(slots=True)
class Hook:
    """A user-defined hook on a tensor."""

    var: Var
    node: graph.Node | None
    """The node of autograd's graph whose result the tensor was when the hook was registered."""
    number: int
    """Index of that result."""
    function: Callable[[torch.Tensor], torch.Tensor | None]
    handle: RemovableHandle
    position: int
    """Number of equations when it was registered."""

    @property
    def is_active(self) -> bool:
        """True if it has not been removed, and may do more than note names of modules.

        `FlopCounterMode` around the call, and what else uses `ModuleTracker`, registers such hooks
        on what every module is given and returns.
        """
        hooks = self.handle.hooks_dict_ref()
        if hooks is None or self.handle.id not in hooks:
            return False
        if getattr(self.function, "__globals__", None) is not vars(graph):
            return True
        called = [cell.cell_contents for cell in getattr(self.function, "__closure__", None) or ()]
        return all(getattr(f, "__module__", "") != module_tracker.__name__ for f in called)


class RecordedHandle(RemovableHandle):
    """The handle of a hook that a recorded backward calls, once the recording has ended.

    Removed after the gradient it removes nothing; before, the gradient is refused.
    """

    name = ""
    """The name by which what the hook reads is kept."""

    def remove(self) -> None:
        """Note that the hook must not be called any more."""
        if self.name:
            note_removal(self.name)
        self.name = ""
        super().remove()


class HookNode:
    """The hooks of one tensor, in the form of a Function with that backward."""

    def __init__(self, hooks: list[Hook]):
        self.hooks = hooks
        found = [h.function for h in hooks if isinstance(h.function, Recomputed)]
        self.guard = found[0] if len(found) == len(hooks) == 1 else None
        """The only hook, if it changes no gradient and guards what is computed again."""
        self.name = NAMES.join(self.guard.names) if self.guard else name_of(hooks[0].function)
        """The names by which what the hooks read is kept."""
        self.beside: set[int] = set()
        """Memory that is computed by uses before, which lead to no output: its history does not
        pass through the hooks."""
        self.next_functions = ((hooks[0].node, hooks[0].number),)
        self.needs_input_grad: tuple[bool, ...] = (True,)
        self._input_metadata: tuple[object, ...] = (None,)

    def close(self) -> None:
        """Remove the hooks from the sample's tensor, and watch their handles from now on."""
        for hook in self.hooks:
            handle, was_active = hook.handle, hook.is_active
            handle.remove()  # a hook that reads its own tensor would keep it for ever
            if was_active and type(handle) is RemovableHandle:
                handle.__class__ = RecordedHandle
                vars(handle)["name"] = self.name

    def apply(self, grad: torch.Tensor) -> torch.Tensor:
        """Pass a gradient through the hooks."""
        for hook in self.hooks:
            if hook.is_active:  # else it has removed itself
                changed = hook.function(grad)
                grad = grad if changed is None else changed
        return grad


def guard_of(node: object) -> Recomputed | None:
    """The guard of what is computed again, if a node stands for one."""
    return node.guard if isinstance(node, HookNode) else None


def is_function(node: object) -> bool:
    """True if a node of autograd's graph is that of a Function written in python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def described(node: object) -> str:
    """A node's name for messages."""
    if isinstance(node, HookNode):
        return "a hook (register_hook)"
    if is_torchs(node):
        name = re.sub(r"Backward\d*$", "", type(node).__name__)
        return f"{name}, whose result a TorchDispatchMode inside the function changes,"
    return f"the custom autograd.Function {type(node).__name__.removesuffix('Backward')}"


def is_torchs(node: object) -> bool:
    """True for a node of one of torch's own operators."""
    return not (is_function(node) or isinstance(node, HookNode))


class Histories(ViewWrites):
    """The recorded calls, and the Functions among them."""

    def __init__(self, call: str, outer: Variables | None, once: bool):
        super().__init__(call, outer, once)
        self.applied: dict[int, Applied] = {}
        """Applications by address of their node."""
        self.hooks: list[Hook] = []
        self.first_handle = RemovableHandle.next_id
        """Number of the first handle of a hook that the function may have registered."""
        self.edges: dict[tuple[type, int, int], Var | None] = {}
        """The variable for a node's kind and number, and the index of its result; None if several
        have been seen."""
        self.remembered: tuple[Program, ...] = ()
        """Programs recorded of the same code, the last one first."""
        self.before: Program | None = None
        """The last program recorded of the same code."""
        self.is_repeating = False
        """True if calls are, or were, recognised as those of the last recording."""
        self.above: Passed | None = None
        """The call of the function's that modes which it entered are answering."""
        self.changed: dict[int, bool] = {}
        """Variables whose value such a mode has changed; True if their history can be followed."""
        self.missed: dict[int, graph.Node] = {}
        """By address: the nodes whose histories cannot."""

    def expect(self, programs: tuple[Program, ...]) -> None:
        """Expect one of `programs`, which were recorded of the same code; the first one at first.

        The calls of a program with a Function are not recognised one by one: the tensors
        that it was applied to are found only when arguments are encoded.
        """
        self.remembered = programs
        self.alternatives = tuple([p for p in programs if not _has_own_backward(p)])
        self.before = programs[0] if programs else None
        same = bool(self.alternatives) and self.alternatives[0] is self.before
        self.expected = self.before if same else None
        self.is_repeating = self.expected is not None

    def with_history(self, tensor: torch.Tensor, var: Var) -> Var:
        """The variable of a tensor that requires grad: another one if a Function returned it."""
        try:
            node = tensor.grad_fn
        except RuntimeError:  # autograd forbids to read it of some views
            return var
        if node is None:
            return var
        base = base_of(tensor)
        if base is not None:
            self._follow_base(base)
            if (writer := self.older_views.get(var.index)) is not None:
                self.behind_views[id(writer)] = writer
        number = tensor.output_nr
        changed = self.changed.get(var.index)
        if changed is False or (changed and var.index in self.captured):
            self.missed[id(node)] = node
        elif var.index not in self.captured and (
            changed or id(node) in self.applied or is_function(node)
        ):
            var = self._returned(cast(Node, node), number, tensor, var)
        key = type(node), sequence_number(node)(), number
        known = self.edges.setdefault(key, var)
        if known is not None and known.group != var.group:
            self.edges[key] = None
        return var

    def _follow_base(self, base: torch.Tensor) -> None:
        """Note a Function that has given the base of a view its history."""
        node, var = base.grad_fn, self.known(base)
        if var is not None and is_function(node) and id(node) not in self.applied:
            self._returned(cast(Node, node), base.output_nr, base, var)

    def _returned(self, node: Node, number: int, tensor: torch.Tensor, var: Var) -> Var:
        applied = self.applied.get(id(node))
        if applied is None:
            applied = self.applied[id(node)] = Applied(node, len(self.equations))
            self.expected = None
            self.equations.append(applied.without_effect())
        pair = applied.pairs.get(number)
        if pair is None:
            pair = applied.pairs[number] = var, Var(self.count, var.group, var.spec)
            self.count += 1
            self.equations[applied.position] = applied.without_effect()
            self.note_older_views(tensor, cast(graph.Node, node), var)
        self.entries[id(tensor)] = weakref.ref(tensor), pair[1]
        return pair[1]

    def below_modes(
        self, func: OpOverload, types: object, args: tuple, kwargs: dict[str, object]
    ) -> object:
        """Run and record a call that has come through modes which the function entered."""
        above, self.above = self.above, None
        assert above is not None
        try:
            out = cast(TorchDispatchMode, self).__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.above = above
        above.arrived(func, args, kwargs, out)
        return out

    def change(self, tensor: torch.Tensor, count: int, returned: bool) -> None:
        """Note that a mode below autograd has changed the value of a tensor.

        Args:
            tensor: The tensor.
            count: Number of variables before the call that the mode answered.
            returned: True if the mode has returned it; else it has written to it.
        """
        var = self.known(tensor) or self.captured_var(tensor)
        if returned or var.index < count:
            self.changed[var.index] = returned and var.index >= count
            self.expected = None

    def cut_below(self, tensor: torch.Tensor, count: int) -> None:
        """Record that a tensor which was made below autograd has no history."""
        var = self.known(tensor)
        if var is not None and var.index >= count:
            self.cut_off(aten.detach.default, tensor, tensor)

    def add_hook(
        self,
        tensor: torch.Tensor,
        function: Callable[..., torch.Tensor | None],
        handle: RemovableHandle,
    ) -> None:
        """Record that a gradient of `tensor` passes through `function`."""
        var = self.encode(tensor, [], False)
        node, number = (None, 0) if tensor.is_leaf else (tensor.grad_fn, tensor.output_nr)
        self.hooks.append(Hook(var, node, number, function, handle, len(self.equations)))

    def put_hooks(self, hooks: list[Hook], outputs: set[int]) -> HookNode:
        """Put an equation for the hooks of one tensor before the first use that leads to an output.

        Later uses of the tensor use the result of that equation.

        Args:
            hooks: The hooks.
            outputs: The memory of outputs that require grad.
        """
        var = hooks[0].var
        made = max(
            (
                i
                for i, eq in enumerate(self.equations[: hooks[0].position])
                if any(v.index == var.index for v in eq.results())
                or any(v.group == var.group for v in written(eq))
            ),
            default=-1,
        )
        uses = [
            i
            for i, eq in enumerate(self.equations)
            if i > made and any(v.index == var.index for v in eq.inputs())
        ]
        own = {a.position for a in self.applied.values() if isinstance(a.node, HookNode)}
        leading = leading_on(self.equations, outputs, own)
        at = next((i for i in uses if leading is None or i in leading), len(self.equations))
        node, new = HookNode(hooks), Var(self.count, var.group, var.spec)
        for i, eq in enumerate(self.equations):
            read = [v for v, flag in zip(eq.inputs(), eq.flags, strict=True) if flag == GRAD]
            if eq.op not in CUTS and any(
                v.group in node.beside or (v == var and made < i < at) for v in read
            ):
                node.beside |= {v.group for v in (*eq.results(), *written(eq))}
        self.count += 1
        for applied in self.applied.values():
            applied.position += applied.position >= at
            applied.pairs = {
                k: (new if value == var else value, result)
                for k, (value, result) in applied.pairs.items()
            }
        self.equations[at:] = [_renamed(eq, var, new) for eq in self.equations[at:]]
        applied = self.applied[id(node)] = Applied(node, at, {0: (var, new)})
        self.equations.insert(at, applied.without_effect())
        self.edges = {key: new if v == var else v for key, v in self.edges.items()}
        for key, (ref, v) in self.entries.items():
            if v == var:
                self.entries[key] = ref, new
        for hook in self.hooks:
            hook.position += hook.position > at
            hook.var = new if hook.var == var else hook.var
        self.expected = None
        return node


def leading_on(
    equations: Sequence[Equation], outputs: set[int], hooked: set[int]
) -> set[int] | None:
    """Positions of the calls by which gradients of outputs may arrive at their arguments.

    Args:
        equations: The calls.
        outputs: The memory of outputs that require grad.
        hooked: Positions of the equations of hooks.

    Returns:
        The positions; None if a Function is among them, whose arguments are not known yet.
    """
    needed, found = set(outputs), set[int]()
    for i in range(len(equations) - 1, -1, -1):
        eq = equations[i]
        if eq.op in CUTS or not any(v.group in needed for v in (*eq.results(), *written(eq))):
            continue
        if eq.op is OWN_BACKWARD and i not in hooked:
            return None
        found.add(i)
        needed |= {v.group for v, flag in zip(eq.inputs(), eq.flags, strict=True) if flag == GRAD}
    return found


CUTS = {aten.detach.default, aten.detach_.default, DATA}
"""Operators whose results have no history."""


def _renamed(eq: Equation, old: Var, new: Var) -> Equation:
    def name(value: object) -> object:
        if type(value) is Var:
            return new if value == old else value
        return names(value) if type(value) is tuple else value

    def names(values: tuple[object, ...]) -> tuple:
        return tuple(map(name, values))

    return eq._replace(args=names(eq.args), kwargs=names(eq.kwargs), outs=names(eq.outs))


def _has_own_backward(program: Program) -> bool:
    return any(eq.op is OWN_BACKWARD for eq in program.equations)
