"""Programs for the fuzzer: python source with its inputs, grown line by line from a seed."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from tests import (
    fuzz_steps,  # noqa: F401  (registers steps)
    fuzz_writes,  # noqa: F401  (registers steps)
    oracle,
)
from tests.fuzz_scope import FLOATS, STEPS, Scope

Refusals = tuple[type[BaseException], ...]


LARGEST_MAGNITUDE = 40.0
"""Lines whose result exceeds it are taken back, so that rounding cannot grow without bound."""


LARGEST_TENSOR = 400


REBOUND = 2
"""Number of the call of one map that finds other captured tensors than the calls before."""


NOT_RUNNABLE = (
    RuntimeError,
    IndexError,
    TypeError,
    ValueError,
    NotImplementedError,
    AttributeError,
    NameError,
    AssertionError,
    KeyError,
    ZeroDivisionError,
    SyntaxError,
)
"""Errors that a line may raise in the loop if it does not fit its operands; it is dropped."""


CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_float64": lambda: default_dtype(torch.float64),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor that a program is given."""

    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: torch.dtype
    in_dim: int | None
    """None: unmapped (captured tensors always are)."""
    layout: str
    """Layout of the batch in memory: contiguous, permuted, sliced."""
    requires_grad: bool

    def make(self, size: int, seed: int, perturbed: bool) -> torch.Tensor:
        """The values, and on request the same with rounding errors of a few units."""
        generator = torch.Generator().manual_seed(seed)
        shape = list(self.shape)
        if self.in_dim is not None:
            shape.insert(self.in_dim if self.in_dim >= 0 else len(shape) + 1 + self.in_dim, size)
        if self.dtype.is_floating_point:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 1.5
            if perturbed:
                values = values * (
                    1
                    + 4
                    * torch.finfo(self.dtype).eps
                    * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)
                )
        else:
            values = torch.randint(
                0, 2 if self.dtype == torch.bool else 5, shape, generator=generator
            )
        values = values.to(self.dtype)
        if self.layout == "permuted" and values.dim() > 1:
            order = list(range(values.dim()))
            random.Random(seed).shuffle(order)
            back = [order.index(i) for i in range(len(order))]
            values = values.permute(order).contiguous().permute(back)
        elif self.layout == "sliced" and values.dim():
            values = torch.stack([values, torch.full_like(values, 1)], -1)[..., 0]
        return values.detach().requires_grad_(self.requires_grad)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function as source text, its inputs, and how it is mapped."""

    seed: int
    size: int
    inputs: tuple[Input, ...]
    captured: tuple[Input, ...]
    steps: tuple[str, ...]
    returns: tuple[str, ...]
    out_dims: int | tuple[int, ...] = 0
    chunk_size: int | None = None
    devices: tuple[str, ...] | None = None
    second_order: bool = False
    context: str = "plain"
    outer: str = "none"
    """A `torch.func` transform around the map: none, vjp, jvp, vmap."""
    precision: torch.dtype | None = None

    def source(self) -> str:
        """The mapped function."""
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        body = "\n".join(self.steps).splitlines()
        value = self.returns[0] if len(self.returns) == 1 else f"({', '.join(self.returns)},)"
        return (
            f"def fn({names}):\n"
            + "".join(f"    {line}\n" for line in body)
            + f"    return {value}\n"
        )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the map that say how to compute."""
        options: dict[str, Any] = {"chunk_size": self.chunk_size} if self.chunk_size else {}
        return options | ({"devices": list(self.devices)} if self.devices else {})

    def text(self) -> str:
        """All that is needed to see what is mapped over what."""
        lines = [
            f"# seed {self.seed}, batch of {self.size}, context {self.context}, outer "
            f"{self.outer}, second order {self.second_order}"
        ]
        for prefix, group in (("x", self.inputs), ("c", self.captured)):
            lines += [f"# {prefix}{i}: {dataclasses.asdict(spec)}" for i, spec in enumerate(group)]
        call = (
            f"vmap(fn, {tuple(s.in_dim for s in self.inputs)}, {self.out_dims}, **{self.options()})"
        )
        return "\n".join(
            [
                *lines,
                self.source() + f"# {call}({', '.join(f'x{i}' for i in range(len(self.inputs)))})",
            ]
        )

    def tensors(
        self, perturbed: bool = False, data: int = 0
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Inputs and captured tensors: the same each time for the same `data`.

        Inputs are others for each number, captured tensors from `REBOUND` on.
        """
        first, step = 1000 * self.seed, 7_000_000_000
        inputs = [
            spec.make(self.size, first + i + step * data, perturbed)
            for i, spec in enumerate(self.inputs)
        ]
        first += 500 + step * (data >= REBOUND)
        captured = [spec.make(0, first + i, perturbed) for i, spec in enumerate(self.captured)]
        return inputs, captured

    def setting(self, perturbed: bool = False, data: int = 0) -> oracle.Setting:
        """A fresh copy of the inputs and the function over them."""
        inputs, captured = self.tensors(perturbed, data)

        def run(vmap: oracle.Subject) -> Any:
            return self.called(self.mapped(vmap, captured), inputs)

        return oracle.Setting(run, inputs, captured)

    def mapped(self, vmap: oracle.Subject, captured: list[torch.Tensor]) -> Callable[..., Any]:
        """The map of the function."""
        function = compiled(self.source(), captured, vmap)
        return self.map_of(function, vmap)

    def map_of(self, function: Callable[..., Any], vmap: oracle.Subject) -> Callable[..., Any]:
        """The map of a function that was compiled before."""
        in_dims = tuple(s.in_dim for s in self.inputs)
        return vmap(function, in_dims, self.out_dims, **self.options())

    def called(self, mapped: Callable[..., Any], inputs: list[torch.Tensor]) -> Any:
        """What the map returns, in the program's context or under its transform."""
        if self.outer != "none":
            return self.transformed(mapped, inputs)
        with CONTEXTS[self.context]():
            return mapped(*inputs)

    def transformed(self, mapped: Callable[..., Any], inputs: list[torch.Tensor]) -> Any:
        """The map under an outer transform, by its floating-point inputs and outputs."""
        at = [i for i, t in enumerate(inputs) if t.is_floating_point()]

        def by_floats(*floats: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(at, floats, strict=True))
            outputs = mapped(*(given.get(i, t) for i, t in enumerate(inputs)))
            return tuple(
                o
                for o in (outputs if isinstance(outputs, tuple) else (outputs,))
                if o.is_floating_point()
            )

        floats = tuple(inputs[i].detach() for i in at)
        if not at:
            raise TypeError("nothing to transform by")
        if self.outer == "jvp":
            values, tangents = torch.func.jvp(by_floats, floats, tuple(t.cos() for t in floats))
            # Torch's own are float64 where a 0-dimensional float32 was multiplied by a number.
            return values, tuple(t.to(v.dtype) for t, v in zip(tangents, values, strict=True))
        if self.outer == "vmap":
            return torch.func.vmap(by_floats)(*(torch.stack([t, t * 0.5]) for t in floats))
        outputs, pull = torch.func.vjp(by_floats, *floats)[:2]
        return outputs, pull(tuple(o.detach().cos() for o in outputs))


def namespace(captured: list[torch.Tensor], vmap: oracle.Subject) -> dict[str, Any]:
    """The globals of a program."""
    return {"torch": torch, "F": F, "vmap": vmap} | {f"c{i}": t for i, t in enumerate(captured)}


def compiled(source: str, captured: list[torch.Tensor], vmap: oracle.Subject) -> Callable[..., Any]:
    """The function of a source, whose lines show in tracebacks."""
    filename = f"<fuzz {hash(source)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = namespace(captured, vmap)
    exec(compile(source, filename, "exec"), scope)
    return scope["fn"]


class Growth:
    """A program on its way: the rows it runs on, and the lines accepted so far."""

    def __init__(self, program: Program, rng: random.Random) -> None:
        self.program, self.rng, self.steps, self.serial = program, rng, list[str](), 0
        self.restart()

    def restart(self) -> None:
        """Runs the accepted lines on fresh rows."""
        setting = self.program.setting()
        size, row = oracle.rows(tuple(setting.inputs), tuple(s.in_dim for s in self.program.inputs))
        self.shared = {t.untyped_storage().data_ptr() for t in setting.inputs + setting.captured}
        self.names = [f"x{i}" for i in range(len(setting.inputs))] + [
            f"c{i}" for i in range(len(setting.captured))
        ]
        self.envs = [
            namespace(setting.captured, oracle.loop) | {f"x{i}": t for i, t in enumerate(row(j))}
            for j in range(size)
        ]
        for line in self.steps:
            for env in self.envs:
                exec(line, env)
        self.names += sorted(
            (n for n in self.envs[0] if re.fullmatch(r"v\d+", n)), key=lambda n: int(n[1:])
        )

    def owned(self, name: str) -> bool:
        """True if the program made the tensor itself; one in fifty mapped inputs passes too."""
        own = self.envs[0][name].untyped_storage().data_ptr() not in self.shared
        return own or (
            name.startswith("x")
            and self.program.inputs[int(name[1:])].in_dim is not None
            and self.rng.random() < 0.02
        )

    def bare(self, name: str) -> bool:
        """True if a tensor claims to require grad but leads nowhere: a view made under no_grad.

        Or one of several views made at once, whose base was written: autograd has given up on it.
        """
        t = self.envs[0].get(name)
        try:
            return t is not None and t._is_view() and t.requires_grad and t.is_leaf
        except RuntimeError:
            return True

    def try_line(self) -> None:
        """Adds one random line, if it runs on every row and leaves everything tame."""
        weights, steps = zip(*STEPS, strict=True)
        scope = Scope(self.rng, self.envs[0], self.names, self.owned, self.serial)
        try:
            line = self.rng.choices(steps, weights)[0](scope)
        except RuntimeError:  # autograd has given up on a view after a write to its base
            return
        if (
            line is not None
            and "nextafter" in line
            and any(map(self.bare, re.findall(r"\b[xcv]\d+\b", line)))
        ):
            # its derivative keeps both arguments, and whether torch notices later writes to them
            # depends on such a view
            return
        if line is None or re.search(
            r"\bNone\b(?!\])", line.replace("[None", "[").replace("(0, None)", "")
        ):
            return
        if self.rng.random() < 0.05:
            line = f"with torch.no_grad():\n    {line}"
        try:
            code = compile(line, "<line>", "exec")
            for env in self.envs:
                exec(code, env)
            self.check(scope.new_names)
        except NOT_RUNNABLE:
            self.restart()
            return
        self.steps.append(line)
        self.names += scope.new_names
        self.serial += len(scope.new_names)

    def check(self, new: list[str]) -> None:
        """Raise ValueError unless tensors are small, finite, of one shape and dtype in all rows."""
        for name in self.names + new:
            values = [env[name] for env in self.envs]
            if (
                not all(isinstance(t, torch.Tensor) for t in values)
                or len({(t.shape, t.dtype) for t in values}) > 1
                or values[0].numel() > LARGEST_TENSOR
            ):
                raise ValueError(name)
            if (
                values[0].dtype not in (*FLOATS, torch.int64, torch.int32, torch.bool)
                or values[0].layout != torch.strided
            ):
                raise ValueError(name)
            for t in values:
                if t.numel() and not (t.detach().double().abs().max() <= LARGEST_MAGNITUDE):
                    raise ValueError(name)


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    grad = rng.random() < 0.6
    size = rng.choice((1, 2, 3, 3, 5, 7))

    def spec(mapped: bool) -> Input:
        dtype = rng.choices(
            (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool),
            (55, 18, 4, 14, 4, 5),
        )[0]
        shape = tuple(
            rng.choices((1, 2, 3, 4), (1, 2, 5, 3))[0]
            for _ in range(rng.choices((0, 1, 2, 3), (2, 4, 5, 2))[0])
        )
        in_dim = (
            rng.choice((0, 0, 0, rng.randrange(-len(shape) - 1, len(shape) + 1)))
            if mapped
            else None
        )
        layout = rng.choices(("contiguous", "permuted", "sliced"), (6, 2, 1))[0]
        return Input(
            shape, dtype, in_dim, layout, grad and dtype.is_floating_point and rng.random() < 0.85
        )

    inputs = tuple(spec(i == 0 or rng.random() < 0.8) for i in range(rng.randrange(1, 4)))
    captured = tuple(
        dataclasses.replace(
            spec(False),
            dtype=rng.choice((torch.float32, torch.float32, torch.float64)),
            requires_grad=grad and rng.random() < 0.8,
        )
        for _ in range(rng.randrange(3))
    )
    context = rng.choices(tuple(CONTEXTS), (84, 5, 3, 4, 4))[0]
    program = Program(
        seed, size, inputs, captured, (), ("x0",),
        chunk_size=rng.choice((None, None, None, 1, 2, 3, 100)),
        devices=rng.choice((None, None, None, ("cpu", "cpu"), ("cpu", "cpu", "cpu"))),
        second_order=grad and rng.random() < 0.25,
        context=context,
    )  # fmt: skip
    with CONTEXTS[context](), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        growth = Growth(program, rng)
        for _ in range(rng.randrange(3, 22)):
            growth.try_line()
        env = growth.envs[0]
        weights = [(1 + i) * (4 if env[n].requires_grad else 1) for i, n in enumerate(growth.names)]
        returns = tuple(
            rng.choices(growth.names, weights)[0] for _ in range(rng.choice((1, 2, 2, 3, 4)))
        )
        dims = tuple(
            rng.choice((0, 0, 0, rng.randrange(-env[n].dim() - 1, env[n].dim() + 1)))
            for n in returns
        )
        low = [
            t.dtype for t in env.values() if isinstance(t, torch.Tensor) and t.is_floating_point()
        ] + [torch.bfloat16] * (context == "autocast")
    outer = (
        rng.choices(("none", "vjp", "jvp", "vmap"), (94, 3, 2, 1))[0]
        if context == "plain"
        else "none"
    )
    order = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if outer != "none" and any("no_grad" in line for line in growth.steps):
        # torch.func's levels have a grad mode of their own: no_grad inside does not stop what
        # autograd records below them.
        program = dataclasses.replace(
            program,
            captured=tuple(dataclasses.replace(c, requires_grad=False) for c in program.captured),
        )
    return dataclasses.replace(
        program,
        outer=outer,
        steps=tuple(growth.steps),
        returns=returns,
        out_dims=dims[0] if len(dims) == 1 else dims,
        precision=min(low, key=order.index, default=None),
    )
