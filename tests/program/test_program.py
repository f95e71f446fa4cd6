"""The recorded program: its text, its checker, and its way through JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardmap.call.arguments import collect
from shardmap.program.ir import SAMPLE_DEVICE, Equation, Param, Program, Spec, Var, show
from shardmap.trace.record import record


def recorded(function: Callable[..., Any], *batch: torch.Tensor) -> Program:
    return record(function, collect(batch, {}, 0, None, "test"), "same", False, "test")[0].program


def writes(r: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, 2)
    out[0] = r * 0.5
    with torch.no_grad():
        h = out @ r
    return h.sum(0, dtype=torch.float64)


TEXT = """\
program(mapped %0:float32[2]; captured ; literals ):
  %1:float32[2,2] = zeros([2, 2], device=device, pin_memory=False)
  %2:float32[2] = mul.Tensor(%0, $0)
  %3:float32[2] = select.int(%1, 0, 0)
  %3:float32[2] = copy_(%3, %2)
  %4:float32[2] = mv(%1, %0)  # no_grad
  %5:float64[] = sum.dim_IntList(%4, [0], dtype=float64)
  return %5"""


def test_text() -> None:
    """Reads like a jaxpr: shapes, dtypes, open scalars, views and writes."""
    assert str(recorded(writes, torch.ones(3, 2))) == TEXT


def test_views_share_a_group() -> None:
    program = recorded(writes, torch.ones(3, 2))
    zeros, _, view = [next(e.results()) for e in program.equations[:3]]
    assert view.group == zeros.group
    assert len({v.group for e in program.equations for v in e.results()}) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [([1, (2, None)], "[1, [2, None]]"), (torch.int8, "int8"), (Param(3), "$3"), (True, "True")],
)
def test_arguments_as_text(value: Any, text: str) -> None:
    assert show(value) == text


# -- the checker -----------------------------------------------------------------------------------

SPEC = Spec((2,), (1,), torch.float32, "cpu", 0)
A, B, C = (Var(i, i, SPEC) for i in range(3))
ADD = torch.ops.aten.add.Tensor


def program(*equations: Equation, outputs: tuple[Var, ...] = (B,)) -> Program:
    return Program((A,), (), (), 0, equations, outputs, (0,) * len(outputs), ())


def equation(args: tuple[Any, ...], out: Var, flags: tuple[int, ...]) -> Equation:
    return Equation(ADD, args, (), (out,), flags, True)


GOOD = equation((A, A), B, (0, 0))
FAULTS = {
    "undefined": (program(equation((A, C), B, (0, 0))), "%2"),
    "undefined among keywords": (program(GOOD._replace(args=(A,), kwargs=(("other", C),))), "%2"),
    "used before its definition": (
        program(equation((A, C), B, (0, 0)), equation((A, A), C, (0, 0))),
        "%2",
    ),
    "defined twice": (program(GOOD, equation((A, A), B._replace(group=7), (0, 0))), "%1"),
    "another spec": (
        program(equation((A, A._replace(spec=SPEC._replace(shape=(3,)))), B, (0, 0))),
        "%0",
    ),
    "too few flags": (program(equation((A, A), B, (0,))), "one flag per tensor"),
    "too many flags": (program(equation((A, A), B, (0, 0, 0))), "one flag per tensor"),
    "too few output flags": (program(GOOD)._replace(output_flags=()), "one flag per output"),
    "output undefined": (program(GOOD, outputs=(C,)), "%2"),
}


def test_a_good_program_passes() -> None:
    program(GOOD, equation((B, A), C, (0, 0)), outputs=(C, B)).check()
    program(GOOD, equation((B, A), B, (0, 0))).check()  # in place: the result is the argument


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    """Each fault alone; the message names the variable or what is wrong."""
    faulty, mention = FAULTS[name]
    with pytest.raises(AssertionError, match=mention):
        faulty.check()
    with pytest.raises(AssertionError):
        Program.loads(faulty.dumps())


# -- JSON ------------------------------------------------------------------------------------------


def _gradient(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    parameters = tuple(model.parameters())
    return lambda r: torch.autograd.grad(model(r).square().sum(), parameters)


def _special(r: torch.Tensor) -> torch.Tensor:
    for value in (math.nan, math.inf, -math.inf, -0.0, 1e-45):
        r = r + torch.full((2,), value).masked_fill(r > 0, value) * value
    return r.double().clamp(-math.inf, 1e300)


def _attention(r: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(r, r, r, is_causal=True)


def _complex(r: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(
        r.to(torch.complex128) * (1 - 2j) + torch.full((2,), complex(math.nan, -0.0))
    ).real.to(torch.bfloat16)


def _dtypes(r: torch.Tensor) -> torch.Tensor:
    like = torch.zeros_like(r, dtype=torch.int8, memory_format=torch.preserve_format)
    return (
        like
        + torch.arange(2, dtype=torch.uint8, device=r.device)
        + torch.empty((2,), device="meta").shape[0]
        + torch.tensor([True, False])
    )


PROGRAMS: dict[str, Callable[[], Program]] = {
    "mlp gradient": lambda: recorded(
        _gradient(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.ones(2, 3)
    ),
    "cnn gradient": lambda: recorded(
        _gradient(nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.Sigmoid(), nn.ReLU(), nn.MaxPool2d(2))),
        torch.ones(2, 1, 9, 9),
    ),
    "attention": lambda: recorded(_attention, torch.ones(2, 2, 4, 8, requires_grad=True)),
    "writes": lambda: recorded(writes, torch.ones(3, 2, requires_grad=True)),
    "special floats": lambda: recorded(_special, torch.ones(3, 2)),
    "complex": lambda: recorded(_complex, torch.ones(3, 2)),
    "dtypes": lambda: recorded(_dtypes, torch.ones(3, 2)),
    "several results": lambda: recorded(
        lambda r: torch.linalg.slogdet(r)[1] + sum(r.unbind())[0], torch.eye(2).expand(3, 2, 2)
    ),
    "random": lambda: recorded(lambda r: F.dropout(r, 0.25), torch.ones(3, 2)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_through_json_and_back(name: str) -> None:
    """The copy is equal, types included, and its JSON is what other readers accept (no NaN)."""
    before = PROGRAMS[name]()
    before.check()
    text = before.dumps()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"bare {constant}"))
    after = Program.loads(text)
    assert repr(after) == repr(before)
    assert after.dumps() == text
    if "nan" not in repr(before):
        assert after == before
        assert hash(after) == hash(before)


def test_the_sample_device_stays_symbolic() -> None:
    after = Program.loads(recorded(writes, torch.ones(3, 2)).dumps())
    assert dict(after.equations[0].kwargs)["device"] == SAMPLE_DEVICE
    assert type(dict(after.equations[0].kwargs)["device"]) is type(SAMPLE_DEVICE)


def test_what_has_no_text_form_is_named() -> None:
    with pytest.raises(AssertionError, match="object"):
        program(GOOD._replace(args=(A, A, object()))).dumps()
