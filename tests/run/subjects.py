"""Functions that executors are tested with, and the calls that map them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tests import oracle

FLOATS = (torch.float64, torch.float32, torch.bfloat16)
SIZES = (0, 1, 2, 3, 7, 13)
DEVICES: tuple[Any, ...] = ("auto", "cpu", ["cpu", "cpu"], ["cpu"] * 3)
CHUNKS: tuple[Any, ...] = ("auto", None, 1, 2, 5, 1000, {"cpu": 2})


def values(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Different values everywhere, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 5, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Subject:
    """A function of one sample, and what it takes."""

    make: Callable[[torch.dtype], tuple[Callable[..., Any], list[torch.Tensor]]]
    """For a dtype: the function, and the tensors that it captures."""
    shapes: tuple[tuple[int, ...], ...]
    """One sample of each argument."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    argument: torch.dtype | None = None
    """Dtype of the arguments, if it differs from `dtype`."""
    outputs: int = 1
    order: int = 2
    """Number of times that it can be differentiated."""


SUBJECTS: dict[str, Subject] = {}


def differentiable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a leaf of the function's own if `t` needs no outer gradient."""
    return t if t.requires_grad else t.detach().requires_grad_()


def subject(*shapes: tuple[int, ...], **how: Any) -> Callable[[Any], Any]:
    """Register a subject under its maker's name."""

    def register(make: Any) -> Any:
        SUBJECTS[make.__name__] = Subject(make, shapes, **how)
        return make

    return register


@subject((4,), dtypes=(*FLOATS, torch.complex64))
def elementwise(dtype: torch.dtype) -> Any:
    return lambda x: (x * 2 + 1) * x, []


@subject((4,), dtypes=(torch.int64, torch.int32, torch.bool))
def whole_numbers(dtype: torch.dtype) -> Any:
    return lambda x: x.flip(0) | x, []


@subject((3, 2), dtypes=(*FLOATS, torch.complex64))
def captured_weight(dtype: torch.dtype) -> Any:
    w = values(1, 2, 5, dtype=dtype)
    return lambda x: (x @ w) @ w.t(), [w]


@subject((3,), (3,))
def gradient_inside(dtype: torch.dtype) -> Any:
    w = values(2, 3, 2, dtype=dtype)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = differentiable(x)
        loss = ((x @ w).sin() * (y @ w)).sum()
        return torch.autograd.grad(loss, x, create_graph=w.requires_grad)[0]

    return function, [w]


@subject((4,), (4,), outputs=3)
def tree_of_outputs(dtype: torch.dtype) -> Any:
    return lambda x, y: {"a": (x + y, x.dot(y)), "b": [y.outer(x)]}, []


@subject((2, 3), outputs=2)
def unchanged_by_samples(dtype: torch.dtype) -> Any:
    w = values(3, 3, 2, dtype=dtype)
    return lambda x: (w.exp() * 2, x @ w), [w]


@subject((2, 3), dtypes=(*FLOATS, torch.complex64, torch.int64))
def transposed(dtype: torch.dtype) -> Any:
    return lambda x: (x * 2).t(), []


@subject((2, 3), outputs=3, dtypes=(*FLOATS, torch.int64, torch.bool))
def an_input_itself(dtype: torch.dtype) -> Any:
    return lambda x: (x, x.t(), x[0]), []


@subject((3,))
def in_place_on_fresh(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(2, 3, dtype=dtype)
        out[0] = x * 3
        out[1].add_(x.sin())
        return out.mul_(2)

    return function, []


@subject((3,), outputs=3)
def one_memory_three_outputs(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> Any:
        y = x * 2
        return y, y.view(3, 1), y

    return function, []


@subject((3,), outputs=2)
def written_after_it_was_viewed(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor) -> Any:
        y = x * 2
        z = y[1:]
        y.add_(1)
        return z, y

    return function, []


@subject((4,), argument=torch.int64, dtypes=(torch.float64, torch.float32), order=1)
def embedding_gradient(dtype: torch.dtype) -> Any:
    table = values(4, 5, 3, dtype=dtype)
    weights = values(5, 4, 3, dtype=dtype)

    def function(index: torch.Tensor) -> torch.Tensor:
        rows = differentiable(table)
        loss = (F.embedding(index, rows) * weights).square().sum()
        return torch.autograd.grad(loss, rows, create_graph=table.requires_grad)[0]

    return function, [table]


@subject((2, 5, 5), dtypes=(torch.float64, torch.float32))
def conv_weight_gradient(dtype: torch.dtype) -> Any:
    weight = values(6, 3, 2, 3, 3, dtype=dtype)

    def function(x: torch.Tensor) -> torch.Tensor:
        kernel = differentiable(weight)
        loss = F.conv2d(x[None], kernel, padding=1).square().sum()
        return torch.autograd.grad(loss, kernel, create_graph=weight.requires_grad)[0]

    return function, [weight]


@subject((1, 2, 5, 5), (3, 2, 3, 3), dtypes=(torch.float64, torch.float32))
def conv_of_mapped_weights(dtype: torch.dtype) -> Any:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inside = differentiable(x)
        loss = F.conv2d(inside, weight, padding=1).square().sum()
        return torch.autograd.grad(loss, inside, create_graph=x.requires_grad)[0]

    return function, []


@subject((), dtypes=(*FLOATS, torch.int64))
def of_no_dimensions(dtype: torch.dtype) -> Any:
    return lambda x: x * 3 + x, []


@subject((0, 3), (2,), outputs=2)
def empty_samples(dtype: torch.dtype) -> Any:
    return lambda x, y: (x * 2, x.sum(0)), []


@st.composite
def calls(draw: Any, gradients: bool = False) -> dict[str, Any]:
    """A call: what is mapped, over what, and how it is computed."""
    name = draw(
        st.sampled_from(
            [n for n, s in SUBJECTS.items() if not gradients or any(map(differentiates, s.dtypes))]
        )
    )
    what = SUBJECTS[name]
    dtype = draw(st.sampled_from([d for d in what.dtypes if not gradients or differentiates(d)]))
    return {
        "name": name,
        "dtype": dtype,
        "samples": draw(st.sampled_from(SIZES)),
        "in_dims": tuple(draw(st.integers(-len(s) - 1, len(s))) for s in what.shapes),
        "out_dim": draw(st.sampled_from([0, 0, 0, -1])),
        "devices": draw(st.sampled_from(DEVICES)),
        "chunk_size": draw(st.sampled_from(CHUNKS)),
        "output_device": draw(st.sampled_from([None, "cpu"])),
        "remat": draw(st.booleans()) if gradients else False,
        "trace": draw(st.sampled_from(["each", "once"])),
    }


def differentiates(dtype: torch.dtype) -> bool:
    """True if tensors of that dtype have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def setting(call: dict[str, Any], grad: bool) -> Callable[[], oracle.Setting]:
    """The call, made afresh."""
    what = SUBJECTS[call["name"]]
    dtype = what.argument or call["dtype"]

    def build() -> oracle.Setting:
        function, captured = what.make(call["dtype"])
        inputs = []
        for i, (shape, d) in enumerate(zip(what.shapes, call["in_dims"], strict=True)):
            full = list(shape)
            full.insert(d if d >= 0 else len(full) + 1 + d, call["samples"])
            inputs.append(
                values(10 + i, *full, dtype=dtype).requires_grad_(grad and differentiates(dtype))
            )
        captured = [t.requires_grad_(grad and differentiates(t.dtype)) for t in captured]
        options = {k: call[k] for k in ("devices", "chunk_size", "output_device", "remat", "trace")}

        def run(vmap: oracle.Subject) -> Any:
            return vmap(function, call["in_dims"], call["out_dim"], **options)(*inputs)

        return oracle.Setting(run, inputs, captured)

    return build
