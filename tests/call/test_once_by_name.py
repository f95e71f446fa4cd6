"""`trace="once"` records again when what the function reaches by name has changed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import shardmap

Case = tuple[Callable[[Tensor], Tensor], Callable[[], object]]


def an_attribute_of_a_tensor() -> Case:
    weight = nn.Parameter(torch.ones(3))
    weight.scale = 2.0
    return lambda x: x * weight.scale, lambda: setattr(weight, "scale", 5.0)


def a_hook_of_a_tensor() -> Case:
    weight = nn.Parameter(torch.ones(3))
    return (
        lambda x: torch.autograd.grad((x * weight).sum(), weight)[0],
        lambda: weight.register_hook(lambda grad: grad * 2),
    )


def a_value_of_a_module_made_by_hand() -> Case:
    module = types.ModuleType("settings_of_a_test")
    module.scale = 2.0
    return lambda x: x * module.scale, lambda: setattr(module, "scale", 5.0)


def the_code_of_a_helper() -> Case:
    def helper(x: Tensor) -> Tensor:
        return x * 2

    return lambda x: helper(x), lambda: setattr(helper, "__code__", (lambda x: x * 7).__code__)


def the_code_of_a_method() -> Case:
    class Held:
        def scaled(self, x: Tensor) -> Tensor:
            return x * 2

    held = Held()
    code = (lambda self, x: x * 7).__code__
    return lambda x: held.scaled(x), lambda: setattr(Held.scaled, "__code__", code)


def a_function_of_torch() -> Case:
    return lambda x: functional.relu(x), lambda: setattr(functional, "relu", lambda x: x * 7)


CASES = (
    an_attribute_of_a_tensor, a_hook_of_a_tensor, a_value_of_a_module_made_by_hand,
    the_code_of_a_helper, the_code_of_a_method, a_function_of_torch,
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=["whole", "chunks"])
@pytest.mark.parametrize("trace", ["once", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_change(case, trace, options, monkeypatch):
    monkeypatch.setattr(functional, "relu", functional.relu)  # put back afterwards
    f, change = case()
    mapped = shardmap.vmap(f, trace=trace, **options)
    for call in range(6):
        if call == 3:
            change()
        rows = torch.rand(5, 3)
        torch.testing.assert_close(mapped(rows), torch.stack([f(row) for row in rows]))


def test_nothing_is_recorded_while_nothing_changes():
    weight = nn.Parameter(torch.ones(3))
    weight.scale = 2.0
    runs = 0

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal runs
        runs += event == "call" and frame.f_code is f.__code__

    def f(x: Tensor) -> Tensor:
        return torch.sin(functional.relu(x) * weight) * weight.scale

    mapped = shardmap.vmap(f, trace="once")
    mapped(torch.rand(5, 3))
    sys.setprofile(profile)
    for _ in range(3):
        mapped(torch.rand(5, 3))
    sys.setprofile(None)
    assert runs == 0
