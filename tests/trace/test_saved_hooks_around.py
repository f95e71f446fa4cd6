"""Hooks on what autograd saves, checkpoints among them, around the call of a map."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors

OPTIONS: list[dict[str, object]] = [
    {},
    {"chunk_size": 3},
    {"trace": "once"},
    {"remat": True},
    {"remat": True, "chunk_size": 3},
    {"check": "always"},
    {"devices": ["cpu", "cpu"], "chunk_size": 2},
]
Map = Callable[[torch.Tensor], torch.Tensor]


def tensors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


def mapped(f: Map, options: dict[str, object]) -> Map:
    return cast("Callable[..., Map]", shardmap.vmap)(f, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 11, 2003])
def test_the_first_use_of_a_map_may_be_checkpointed(size: int, options: dict[str, object]) -> None:
    x, weight = tensors(size)

    def f(r: torch.Tensor) -> torch.Tensor:
        return (r * weight).sin() * r

    want = torch.stack([f(r) for r in x])
    expected = torch.autograd.grad(want.square().sum(), [x, weight])
    m = mapped(f, options)
    for _ in range(2):  # its first use, and another
        got = checkpoint(m, x, use_reentrant=False)
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got.square().sum(), [x, weight])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 11, 61, 2003])
def test_a_map_whose_samples_branch_may_be_checkpointed(
    size: int, options: dict[str, object]
) -> None:
    x, weight = tensors(size)

    def f(r: torch.Tensor) -> torch.Tensor:
        return (r * weight).sin() if r[0] > 0 else (r * weight).exp() * r

    want = torch.stack([f(r) for r in x])
    expected = torch.autograd.grad(want.sum(), [x, weight])
    m = mapped(f, options)
    for _ in range(3):
        got = checkpoint(m, x, use_reentrant=False)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), [x, weight]), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dropout_in_a_checkpointed_map(options: dict[str, object]) -> None:
    x, weight = tensors(11)

    def f(r: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout((r * weight).sin(), 0.5) * r

    m = mapped(f, {**options, "randomness": "different"})
    torch.manual_seed(3)
    got = checkpoint(m, x, use_reentrant=False)
    kept = (got != 0).double() * 2
    want = torch.stack([(r * weight).sin() * k * r for r, k in zip(x, kept, strict=True)])
    assert 0 < int((got == 0).sum()) < got.numel()
    torch.testing.assert_close(got, want)
    found = torch.autograd.grad(got.sum(), [x, weight])
    torch.testing.assert_close(found, torch.autograd.grad(want.sum(), [x, weight]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["bfloat16", "numpy", "disk"])
def test_hooks_around_the_call_may_change_what_is_saved(
    how: str, options: dict[str, object], tmp_path: Path
) -> None:
    x, weight = tensors(11)
    packed = []

    def to_disk(t: torch.Tensor) -> Path:
        name = tmp_path / str(uuid.uuid4())
        torch.save(t, name)
        return name

    pack, unpack = {
        "bfloat16": (lambda t: t.bfloat16(), lambda t: t.double()),
        "numpy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
        "disk": (to_disk, torch.load),
    }[how]

    def counted(t: torch.Tensor) -> object:
        packed.append(t.shape)
        return pack(t)

    def f(r: torch.Tensor) -> torch.Tensor:
        return r.sin() * weight

    def gradients(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(counted, unpack):
            out = run()
        return torch.autograd.grad(out.sum(), [x, weight])

    want = gradients(lambda: torch.stack([f(r) for r in x]))
    packed.clear()
    m = mapped(f, options)
    for _ in range(2):
        torch.testing.assert_close(gradients(lambda: m(x)), want)
        assert packed, "what the map saves goes through the hooks"
        packed.clear()
    exact = torch.autograd.grad(torch.stack([f(r) for r in x]).sum(), [x, weight])
    changed = float((want[0] - exact[0]).abs().max())
    assert (changed > 1e-4) is (how == "bfloat16")


def test_hooks_around_the_call_are_there_again_when_the_function_raises() -> None:
    x, _ = tensors(3)
    seen = []

    def raises(r: torch.Tensor) -> torch.Tensor:
        r.exp()
        raise KeyError("as a test")

    outer = torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append("outer") or t, lambda t: t
    )
    inner = torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append("inner") or t, lambda t: t
    )
    with outer:
        with inner:
            with pytest.raises(KeyError, match="as a test"):
                shardmap.vmap(raises)(x)
            assert seen == []
            x.exp()
        x.exp()
    assert seen == ["inner", "outer"]


def written_after_use(x: torch.Tensor, cloned: bool = False) -> torch.Tensor:
    y = x * 1
    z = y.sin()
    y = y.clone() if cloned else y
    return y.mul_(2) * z.sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_tensors_that_may_be_written(options: dict[str, object]) -> None:
    """Inside a map that is refused, and the remedies of the message are the loop's."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        with graph.allow_mutation_on_saved_tensors():
            return written_after_use(x)

    def by_clone(x: torch.Tensor) -> torch.Tensor:
        return written_after_use(x, True)

    refused, around, clone = (mapped(f, options) for f in (inside, written_after_use, by_clone))
    for size in (5, 5, 3, 11):
        x, _ = tensors(size)
        with pytest.raises(errors.EscapeError, match="allow_mutation_on_saved_tensors.*clone"):
            refused(x)
        with graph.allow_mutation_on_saved_tensors():
            want = torch.stack([written_after_use(row) for row in x])
            if "remat" in options and "chunk_size" in options and size > 3:  # several chunks
                with pytest.raises(errors.TransformError, match="checkpoint.*remat=False"):
                    around(x)
                continue
            got = around(x)
            first, second = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (got, want))
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(clone(x).sin().sum(), x)[0], second)
