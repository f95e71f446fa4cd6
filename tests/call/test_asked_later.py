"""A backward that asks for the value of a shared tensor, which is written between the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.call import asked_later, execute

SCALE = torch.tensor(1.0)
MATRIX = torch.ones(3, 3)
WAYS: list[dict[str, Any]] = [{}, {"trace": "each"}, {"trace": "once"}, {"chunk_size": 2}]
WAYS += [{"trace": "once", "chunk_size": 2}]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    shardmap.clear_caches()
    SCALE.fill_(1.0)
    MATRIX.fill_(1.0)
    yield
    SCALE.fill_(1.0)
    MATRIX.fill_(1.0)


class Asks(torch.autograd.Function):
    """Its backward reads a number out of a global tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * SCALE.item()


class AsksOfResults(torch.autograd.Function):
    """Its backward reads a number out of what its forward has computed from a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward((MATRIX @ MATRIX).sum())
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (total,) = ctx.saved_tensors
        return g.sin() if total.sqrt().item() > 6 else g.cos()


class Decides(torch.autograd.Function):
    """Its backward goes two ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if MATRIX[0].sum() * SCALE > 3:
            return g * 10
        return g


def hooked(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * SCALE.item())
    return y.sin()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": Asks.apply,
    "a number and a product": lambda x: Asks.apply(x.sin() * SCALE) * MATRIX[0],
    "of its forward": AsksOfResults.apply,
    "a condition": Decides.apply,
    "twice": lambda x: Decides.apply(Asks.apply(x)),
    "a hook": hooked,
}


def gradient(mapped: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(mapped(x).sum(), x)[0]


def loop_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([function(row) for row in x])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_function_is_recorded_again(name: str, options: dict[str, Any]) -> None:
    """Calls like the last one, after one write and after several, and back."""
    function, x = FUNCTIONS[name], torch.linspace(-1, 1, 15).view(5, 3)
    mapped = shardmap.vmap(function, **options)
    for value in (1, 1, 1, 2, 2, 3, 1, 1, 4, 5, 5, 5, 1):
        SCALE.fill_(value)
        MATRIX.fill_(value)
        torch.testing.assert_close(
            gradient(mapped, x), gradient(loop_of(function), x), msg=f"{name} at {value}"
        )


@pytest.mark.parametrize("options", [{}, {"trace": "once"}], ids=str)
def test_unchanged_tensors_are_replayed(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function is not recorded again, and questions are put where a backward may ask."""
    recordings, looked = [0], [0]
    record, look = execute.recorded, asked_later._has_changed

    def counted(*given: Any) -> Any:
        recordings[0] += 1
        return record(*given)

    def looks(recording: Any) -> bool:
        looked[0] += 1
        return look(recording)

    monkeypatch.setattr(execute, "recorded", counted)
    monkeypatch.setattr(asked_later, "_has_changed", looks)
    x = torch.ones(5, 3)
    for function, asks in ((Asks.apply, True), (lambda x: x.sin() * SCALE, False)):
        mapped = shardmap.vmap(function, **options)
        for _ in range(6):
            gradient(mapped, x)
        before, looked[0] = recordings[0], 0
        for _ in range(3):
            gradient(mapped, x)
        assert recordings[0] - before <= 1  # now and then one is made to be compared
        assert (looked[0] > 1) is asks


@pytest.mark.parametrize("options", [{}, {"trace": "each"}, {"trace": "once"}], ids=str)
def test_a_write_between_a_call_and_its_backward(options: dict[str, Any]) -> None:
    """It is refused, and later calls are served: written before the call, it is the loop's."""
    mapped = shardmap.vmap(Asks.apply, **options)
    for turn in range(4):
        x = torch.ones(5, 3, requires_grad=True)
        y = mapped(x).sum()
        SCALE.add_(1)
        with pytest.raises(errors.AutogradFunctionError, match="take the gradient before"):
            torch.autograd.grad(y, x)
        assert torch.equal(gradient(mapped, x.detach()), torch.full((5, 3), 2.0 + turn))
