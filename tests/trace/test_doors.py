"""Doors by which a value leaves a recording without an operator: each right or refused."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from tests import oracle

to_dlpack: Any = torch._C._to_dlpack  # type: ignore[attr-defined]
set_: Any = torch.Tensor.set_
Door = Callable[[torch.Tensor], torch.Tensor]


def from_memory(t: torch.Tensor) -> torch.Tensor:
    values = (ctypes.c_float * t.numel()).from_address(t.data_ptr())
    return torch.tensor(list(values)) * 2


def saved_and_loaded(t: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file) * 2


def applied(t: torch.Tensor) -> torch.Tensor:
    return t.clone().apply_(lambda v: 2 * v)


def mapped(t: torch.Tensor) -> torch.Tensor:
    return t.clone().map_(t, lambda a, b: a + b)


def new_data(t: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(3)
    other.data = t * 2
    return other


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(bytes(t.untyped_storage())), dtype=t.dtype) * 2


def through_a_view_of_numpy(t: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3)
    out.numpy()[:] = 2 * np.asarray(t)
    return out


def by_branch(t: torch.Tensor) -> torch.Tensor:
    return t * 2 if t.sum() > 0 else t * 3


def aliased(t: torch.Tensor) -> torch.Tensor:
    return torch.from_dlpack(to_dlpack(t)) * 2


def written_by_dlpack(t: torch.Tensor) -> torch.Tensor:
    out = t.clone()
    torch.from_dlpack(to_dlpack(out)).mul_(2)
    return out


DOORS: dict[str, Door] = {
    "numpy": lambda t: torch.from_numpy(2 * t.numpy()),
    "numpy by force": lambda t: torch.from_numpy(2 * t.numpy(force=True)),
    "numpy of a part": lambda t: t * float(t[:1].numpy().sum()),
    "a numpy function": lambda t: torch.from_numpy(np.sin(t)),
    "numpy's asarray": lambda t: torch.from_numpy(2 * np.asarray(t)),
    "an alias by numpy": lambda t: torch.from_numpy(t.numpy()) * 2,
    "written by numpy": through_a_view_of_numpy,
    "tolist": lambda t: torch.tensor([2 * v for v in t.tolist()]),
    "item": lambda t: t * t[0].item(),
    "float": lambda t: t * float(t[0]),
    "int": lambda t: t * int(t[0] * 10),
    "math": lambda t: t * math.floor(t[0] * 10),
    "bool": by_branch,
    "index": lambda t: t * [1.0, 2.0, 3.0][int(t.argmax())],
    "torch.tensor of tensors": lambda t: torch.tensor([t[0], t[1], 1.0]) * 2,
    "as_tensor of tensors": lambda t: torch.as_tensor([t[0], t[1], 1.0]) * 2,
    "asarray of tensors": lambda t: torch.asarray([t[0], t[1], t[2]]) * 2,
    "new_tensor": lambda t: t.new_tensor([t[0], t[1], t[2]]) * 2,
    "to_dlpack": aliased,
    "written by to_dlpack": written_by_dlpack,
    "from_dlpack": lambda t: torch.from_dlpack(t) * 2,
    "numpy's from_dlpack": lambda t: torch.from_numpy(
        np.from_dlpack(t) + np.asarray(np.from_dlpack(t))
    ),
    "storage bytes": bytes_of,
    "a typed storage": lambda t: torch.tensor(t.storage().tolist()[:3]) * 2,
    "data_ptr": from_memory,
    "deepcopy": lambda t: copy.deepcopy(t) * 2,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)) * 2,
    "torch.save": saved_and_loaded,
    "apply_": applied,
    "map_": mapped,
    ".data =": new_data,
    ".data": lambda t: t.data.mul(2),
    "set_": lambda t: set_(torch.zeros(3), t) * 2,
    "share_memory_": lambda t: t.clone().share_memory_() * 2,
    "nonzero": lambda t: t * t.nonzero().shape[0],
    "equal": lambda t: t * (2 if torch.equal(t, t.abs()) else 3),
    "allclose": lambda t: t * (2 if torch.allclose(t, t.abs()) else 3),
    "iteration": lambda t: t * sum(float(v) for v in t),
}


def around(door: Door) -> type[torch.autograd.Function]:
    """A function whose forward and backward use the door."""

    class Through(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return door(x.detach()) + 0

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    return Through


def around_backward(door: Door) -> type[torch.autograd.Function]:
    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 3

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return door(grads[0].detach().contiguous()) + 0

    return Through


def plain(door: Door) -> Door:
    return lambda r: door(r * 1.5) + r


def func_grad(door: Door) -> Door:
    through = around(door)
    return torch.func.grad(lambda r: (through.apply(r * 1.5) * r).sum())


def func_vjp(door: Door) -> Door:
    through = around(door)

    def function(r: torch.Tensor) -> torch.Tensor:
        pull: Any = torch.func.vjp(lambda q: through.apply(q * 1.5) * q, r)[1]
        return pull(r)[0]

    return function


def func_jacrev(door: Door) -> Door:
    through = around(door)
    return torch.func.jacrev(lambda r: through.apply(r * 1.5) * r)


def autograd_grad(door: Door) -> Door:
    through = around_backward(door)

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        return torch.autograd.grad((through.apply(q) * q).sum(), q)[0]

    return function


def seeded_grad(door: Door) -> Door:
    """The gradient is given, so that nothing needs an operator before the backward is called."""
    through = around_backward(door)

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        return torch.autograd.grad(through.apply(q), q, r)[0]

    return function


def backward(door: Door) -> Door:
    through = around_backward(door)

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        (through.apply(q) * q).sum().backward()
        assert q.grad is not None
        return q.grad + 0

    return function


def tensor_hook(door: Door) -> Door:
    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = q * 2
        y.register_hook(lambda g: door(g.detach()) + 0)
        return torch.autograd.grad((y**2).sum(), q)[0]

    return function


def node_hook(door: Door) -> Door:
    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = (q * 2).sin()
        assert y.grad_fn is not None
        y.grad_fn.register_hook(lambda gs, _: (door(gs[0].detach()) + 0,))
        return torch.autograd.grad((y**2).sum(), q)[0]

    return function


def saved_tensors(door: Door) -> Door:
    """Tensors that are packed for the backward go through the door."""

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: door(t.detach()) + 0, lambda t: t):
            y = (q * 1.5).sin()
        return torch.autograd.grad(y.sum(), q)[0]

    return function


def unpacked_tensors(door: Door) -> Door:
    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: door(t.detach()) + 0):
            y = (q * 1.5).sin()
        return torch.autograd.grad(y.sum(), q)[0]

    return function


def recomputed(door: Door) -> Door:
    """A checkpointed function runs again in the backward."""

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = checkpoint(lambda t: t.sin() * door(t.detach()), q, use_reentrant=False)
        assert isinstance(y, torch.Tensor)
        return torch.autograd.grad(y.sum(), q)[0]

    return function


def given_to_torch(door: Door) -> Door:
    """A function of the user's that a function of torch's calls."""

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (door(a) - b).square().sum()

    return lambda r: F.triplet_margin_with_distance_loss(
        r * 1.5, r + 1, r - 1, distance_function=distance
    )


PLACES = [
    plain,
    func_grad,
    func_vjp,
    func_jacrev,
    autograd_grad,
    seeded_grad,
    backward,
    tensor_hook,
    node_hook,
    saved_tensors,
    unpacked_tensors,
    recomputed,
    given_to_torch,
]
WAYS: list[dict[str, Any]] = [{}, {"chunk_size": 2}, {"trace": "once"}]
x = torch.tensor([[0.5, 1.5, -0.25], [-1.0, 2.0, 3.0], [0.1, -0.2, -0.3], [4.0, 0.5, 0.25]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", DOORS)
def test_right_or_refused(name: str, place: Callable[[Door], Door]) -> None:
    function = place(DOORS[name])
    try:
        want = torch.stack([function(r) for r in x])
    except (RuntimeError, TypeError, BufferError):  # torch's own refusal, in the loop
        with pytest.raises((RuntimeError, TypeError, BufferError, errors.ShardmapError)):
            shardmap.vmap(function)(x)
        return
    for way in WAYS:
        try:
            got = shardmap.vmap(function, **way)(x)
        except errors.ShardmapError:
            continue
        torch.testing.assert_close(got, want, msg=f"{way}: another sample's value, in silence")
    assert torch._C._len_torch_function_stack() == 0


def test_printing_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = q * 2
        y.register_hook(lambda g: print("gradient", g))
        print(r, f"{r[0]:.3f}")
        return torch.autograd.grad(y.sin().sum(), q)[0]

    oracle.assert_same(shardmap.vmap(function)(x), torch.stack([function(r) for r in x]), "print")
    assert "gradient tensor" in capsys.readouterr().out


def test_hooks_without_doors_are_followed() -> None:
    """Hooks of every kind that use torch's operators give the loop's gradients."""
    twice: Door = lambda t: t.clamp(-1, 1) * 2
    for place in PLACES:
        function = place(twice)
        want = torch.stack([function(r) for r in x])
        for way in WAYS:
            oracle.assert_same(shardmap.vmap(function, **way)(x), want, place.__name__)
