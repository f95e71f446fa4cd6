"""The program of one sample: a flat list of operator calls, as frozen data.

A `Program` is what recording a function once leaves behind (see `shardmap.trace.recorder`). It
knows nothing of batches, devices or rules. Equations are small named tuples, after JAX's autodidax;
`print(program)` reads like a jaxpr.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from shardmap._torch import OpOverload
from shardmap.program.schema import short_name

Named = tuple[tuple[str, Any], ...]
"""Keyword arguments of a recorded call."""


class Spec(NamedTuple):
    """The metadata of one sample's tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Strides in elements, as the sample had them: recorded views depend on them."""
    dtype: torch.dtype
    device: str
    offset: int
    """Storage offset in elements."""

    @property
    def ndim(self) -> int:
        """Number of dimensions of the sample's tensor."""
        return len(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"


class Var(NamedTuple):
    """A tensor of the recording. Two variables with the same `group` share memory."""

    index: int
    group: int
    spec: Spec

    def __str__(self) -> str:
        return f"%{self.index}"


class Param(NamedTuple):
    """A float that the recording took from python.

    An input of the program, so that its value can change.
    """

    scalar: int

    def __str__(self) -> str:
        return f"${self.scalar}"


class GivenGenerator(NamedTuple):
    """A `torch.Generator` of the user's that a call draws from.

    An input of the program: its state is read at each call of the map.
    """

    number: int
    """Index among the recording's generators."""
    draw: int
    """Number of earlier calls that drew from it. The draws follow from the generator and this
    number alone, so that two generators with one state give the same numbers in the same order."""

    def __str__(self) -> str:
        return f"generator{self.number}[{self.draw}]"


def generator_of(args: tuple[object, ...], kwargs: Named) -> GivenGenerator | None:
    """The generator of the user's that a recorded call draws from; None for torch's own."""
    given = (*args, *[value for _, value in kwargs])
    return next((value for value in given if type(value) is GivenGenerator), None)


class Packed:
    """The packed weights of a quantised layer, a constant of the program that is no tensor.

    Two are equal if they are the same object of C++, whose address torch gives as the hash of
    whatever stands for it in python.
    """

    __slots__ = ("value",)

    def __init__(self, value: torch.ScriptObject):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is Packed and hash(other.value) == hash(self.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return "packed"

    @staticmethod
    def holds(value: torch.ScriptObject) -> bool:
        """Tell if an object of torch's C++ is the packed weights of a quantised layer."""
        return "ParamsBase" in str(value)  # "ScriptObject <...quantized.LinearPackedParamsBase>"

    def text(self) -> str:
        """The object as text, for workers."""
        stream = io.BytesIO()
        torch.save(self.value, stream)
        return base64.b64encode(stream.getvalue()).decode()

    @staticmethod
    def of_text(text: str) -> Packed:
        """The object that `text` was written from."""
        stream = io.BytesIO(base64.b64decode(text))
        return Packed(torch.load(stream, weights_only=False))


class SampleDevice(NamedTuple):
    """A placeholder for the samples' device: a program recorded on one runs on another."""

    tag: str = "device"

    def __str__(self) -> str:
        return "device"


SAMPLE_DEVICE = SampleDevice()

NO_GRAD, GRAD, FRESH_LEAF = 0, 1, 2
"""Flags for autograd's knowledge of an argument when a call used it. `FRESH_LEAF`: a leaf made
inside the function, where outer gradients end."""


class Equation(NamedTuple):
    """One recorded call."""

    op: OpOverload
    args: tuple[Any, ...]
    """Positional arguments; tensors are `Var`, floats may be `Param`."""
    kwargs: Named
    outs: tuple[Any, ...]
    """A `Var`, `None` or a tuple of them for each result of the operator."""
    flags: tuple[int, ...]
    """For each tensor argument in order: `NO_GRAD`, `GRAD` or `FRESH_LEAF`."""
    grad_mode: bool
    answer: Any = None
    """The python value returned by a question about an unmapped tensor; checked again at replay."""
    source: str | None = None
    """The user's line, recorded only for operators without a rule of ours."""

    def inputs(self) -> Iterator[Var]:
        """The tensor arguments, in the order of `flags`."""
        yield from variables(self.args)
        for _, value in self.kwargs:
            yield from variables((value,))

    def results(self) -> Iterator[Var]:
        """The tensor results."""
        yield from variables(self.outs)

    def __str__(self) -> str:
        outs = ", ".join(f"{v}:{v.spec}" for v in self.results())
        parts = [show(a) for a in self.args] + [f"{k}={show(v)}" for k, v in self.kwargs]
        name = short_name(self.op)
        text = f"{name}({', '.join(parts)})"
        if self.answer is not None:
            text += f" -> {self.answer}"
        if not self.grad_mode:
            text += "  # no_grad"
        return f"{outs} = {text}" if outs else text


def variables(values: Any) -> Iterator[Var]:
    """Every `Var` in a nested argument, in order."""
    for value in values:
        kind = type(value)
        if kind is Var:
            yield value
        elif kind is tuple or kind is list:
            yield from variables(value)


def show(value: Any) -> str:
    """The text of an argument in the printed form of a program."""
    if type(value) in (tuple, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if type(value) is str and len(value) > 60:  # a whole program, as text
        return f"{value[:56]} ..."
    return str(value)


class Program(NamedTuple):
    """The recording of one sample. Hashable: equal programs lower to the same batched program."""

    inputs: tuple[Var, ...]
    """The mapped inputs, one sample each."""
    captured: tuple[Var, ...]
    """Tensors that all samples share, bound by identity at each call."""
    literals: tuple[Var, ...]
    """Tensors made from python data inside the function; each replay owns its copy."""
    scalars: int
    """Number of floats that are bound at each call."""
    equations: tuple[Equation, ...]
    outputs: tuple[Var, ...]
    output_flags: tuple[int, ...]
    """For each output: `NO_GRAD`, `GRAD` or `FRESH_LEAF`, as in `Equation.flags`."""
    types: tuple[Any, ...]
    """Types and bits of the python scalars in order: `1 == 1.0 == True` must not make two different
    programs equal."""

    def __str__(self) -> str:
        def declare(variables: tuple[Var, ...]) -> str:
            return ", ".join(f"{v}:{v.spec}" for v in variables)

        lines = [
            f"program(mapped {declare(self.inputs)}; captured {declare(self.captured)}; literals "
            f"{declare(self.literals)}):"
        ]
        lines += [f"  {equation}" for equation in self.equations]
        lines.append(f"  return {', '.join(map(str, self.outputs))}")
        return "\n".join(lines)

    def check(self) -> None:
        """Assert that every variable is defined once, before its use, with one spec.

        Raises:
            AssertionError: With the program's text around the fault.
        """
        known: dict[int, Var] = {}

        def define(var: Var, where: str) -> None:
            assert known.setdefault(var.index, var) == var, (
                f"{where}: {var} is defined twice, with different specs\n{self}"
            )

        for var in self.inputs + self.captured + self.literals:
            define(var, "inputs")
        for number, equation in enumerate(self.equations):
            for var in equation.inputs():
                assert var.index in known, (
                    f"equation {number} `{equation}` reads {var} before it is defined\n{self}"
                )
                assert known[var.index] == var, (
                    f"equation {number} `{equation}` reads {var}, which was defined with another "
                    f"spec\n{self}"
                )
            assert len(equation.flags) == sum(1 for _ in equation.inputs()), (
                f"equation {number} `{equation}`: one flag per tensor\n{self}"
            )
            for var in equation.results():
                define(var, f"equation {number} `{equation}`")
        for var in self.outputs:
            assert known.get(var.index) == var, f"the output {var} is never defined\n{self}"
        assert len(self.output_flags) == len(self.outputs), f"one flag per output\n{self}"

    def dumps(self) -> str:
        """The program as JSON text, with operators by name; sent to the workers in this form."""
        return json.dumps(_encode(self))

    @staticmethod
    def loads(text: str) -> Program:
        """The program that `dumps` wrote.

        Raises:
            AssertionError: The text does not hold a well-formed program.
        """
        program = _decode(json.loads(text))
        assert isinstance(program, Program)
        program.check()
        return program


_TUPLES = {
    kind.__name__: kind
    for kind in (Spec, Var, Param, GivenGenerator, SampleDevice, Equation, Program)
}


def _encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return ["float", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind.__name__ in _TUPLES:
        return [kind.__name__, *map(_encode, value)]
    if kind in (tuple, list):
        return ["tuple", *map(_encode, value)]
    if isinstance(value, OpOverload):
        return ["op", value.name()]
    if kind is type:
        return ["type", value.__name__]
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        return ["torch", str(value).removeprefix("torch.")]
    if kind is torch.device:
        return ["torch_device", str(value)]
    if kind is Packed:
        return ["packed", value.text()]
    raise AssertionError(f"a program holds a {kind.__name__}, which has no text form: {value!r}")


def _decode(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag in _TUPLES:
        return _TUPLES[tag](*map(_decode, rest))
    decoders = {
        "tuple": lambda *v: tuple(map(_decode, v)),
        "float": float.fromhex,
        "complex": lambda re, im: complex(float.fromhex(re), float.fromhex(im)),
        "op": operator,
        "type": {"int": int, "float": float, "bool": bool, "complex": complex}.__getitem__,
        "torch": functools.partial(getattr, torch),
        "torch_device": torch.device,
        "packed": Packed.of_text,
    }
    return decoders[tag](*rest)


@functools.cache
def operator(name: str) -> OpOverload:
    """The operator with this qualified name, such as `aten::add.Tensor`."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
