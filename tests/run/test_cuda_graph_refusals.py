"""What runs without a graph under cuda_graphs=True: one warning, and the loop's values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from shardmap.program.ir import Equation, Spec, Var
from shardmap.run import lanes
from shardmap.run.capturable import crosses_devices
from tests.run.pretended_graphs import Pretended, W, function
from tests.run.rows import assert_close, batch, loop


def dropped(row: Tensor) -> Tensor:
    """Draw for each sample."""
    return torch.nn.functional.dropout(row @ W, 0.5)


def in_place(row: Tensor) -> Tensor:
    """Write to an argument."""
    return row.mul_(2).sin()


def masked(row: Tensor) -> Tensor:
    """Read by a mask: the host counts its entries."""
    return row[torch.tensor([True, False, True, True, False])] * 2


def asks(row: Tensor) -> Tensor:
    """Ask all samples the same question."""
    return row * 2 if bool(row.isfinite().all()) else row


def adaptive(row: Tensor) -> Tensor:
    """Ask each sample for a float of its own: the function itself is run on each."""
    return row * float(row.sum())


REFUSED = {
    "draws": (dropped, {"randomness": "different"}, "draws random numbers for each chunk"),
    "writes": (in_place, {}, "writes in place to an argument"),
    "mask": (masked, {}, "the host waits for"),
    "by sample": (adaptive, {"max_paths": 1}, "the function itself is run on each sample"),
    "question": (asks, {}, "the host waits for"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_run_without(name: str, graphs: Pretended) -> None:
    f, options, why = REFUSED[name]
    mapped = shardmap.vmap(f, chunk_size=3, cuda_graphs=True, **options)
    plain = shardmap.vmap(f, chunk_size=3, **options)
    torch.manual_seed(3)
    expected = plain(batch(7))
    torch.manual_seed(3)
    with pytest.warns(errors.CompileWarning, match=why) as said:
        torch.testing.assert_close(mapped(batch(7)), expected)
    assert len(said) == 1
    if not options:
        torch.testing.assert_close(mapped(batch(7)), torch.stack([f(r) for r in batch(7)]))
    assert not graphs.captures
    text = shardmap.plan(f, chunk_size=3, cuda_graphs=True, **options)(batch(7)).explain()
    assert why in " ".join(text.split())


@pytest.mark.parametrize("devices", ["cuda:0 cuda:0 cuda:0", "cuda:0 cpu cuda:0", "cpu cpu cuda:0"])
def test_calls_that_cross_devices(devices: str) -> None:
    found = [
        Var(k, k, Spec((3,), (1,), torch.float32, device, 0))
        for k, device in enumerate(devices.split())
    ]
    eq = Equation(torch.ops.aten.add.Tensor, tuple(found[:2]), (), (found[2],), (0, 0), True)
    assert crosses_devices(eq) == (len(set(devices.split())) > 1)


def test_gradients_and_transforms_outside(graphs: Pretended) -> None:
    x = batch(5).requires_grad_()
    mapped = shardmap.vmap(function, cuda_graphs=True)
    with pytest.warns(errors.CompileWarning, match="gradients are recorded from outside"):
        found = mapped(x)[0].sum()
    loop_sum = torch.stack([function(row)[0] for row in x]).sum()
    expected = torch.autograd.grad(loop_sum, x)
    torch.testing.assert_close(torch.autograd.grad(found, x), expected)
    other = shardmap.vmap(lambda row: row.cos() * 3, cuda_graphs=True)
    with pytest.warns(errors.CompileWarning, match=r"inside a transform of torch\.func"):
        found = torch.func.jvp(other, (batch(5),), (torch.ones(5, 5),))[1]
    torch.testing.assert_close(found, -3 * batch(5).sin())
    assert not graphs.captures
    inside = shardmap.per_sample_grad(lambda w, row: (row @ w).sin().sum(), cuda_graphs=True)
    found = inside(W, batch(5))
    one = torch.func.grad(lambda w, row: (row @ w).sin().sum())
    torch.testing.assert_close(found, torch.stack([one(W, row) for row in batch(5)]))
    assert graphs.captures == [5]


def test_draws_outside_are_arguments(graphs: Pretended) -> None:
    keep = torch.rand(7, 5, generator=torch.Generator().manual_seed(5)) > 0.5
    mapped = shardmap.vmap(lambda row, kept: row.sin() * kept, cuda_graphs=True, chunk_size=3)
    torch.testing.assert_close(mapped(batch(7), keep), batch(7).sin() * keep)
    assert graphs.captures == [3]


def test_draws_that_all_samples_share_come_before_the_graph(graphs: Pretended) -> None:
    def shared(row: Tensor) -> Tensor:
        return row + torch.rand(5)

    mapped = shardmap.vmap(shared, randomness="same", cuda_graphs=True, chunk_size=3)
    plain = shardmap.vmap(shared, randomness="same", chunk_size=3)
    for seed in range(3):
        torch.manual_seed(seed)
        found = mapped(batch(7))
        torch.manual_seed(seed)
        assert torch.equal(found, plain(batch(7)))
    assert graphs.captures == [3]


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_an_error_while_capturing_is_a_warning(kind: Any, graphs: Pretended) -> None:
    graphs.fails = kind("operation not permitted when stream is capturing")
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=3)
    with pytest.warns(errors.CompileWarning, match="not permitted when stream") as said:
        assert_close(mapped(batch(7)), loop(function, batch(7)))
    assert len(said) == 1
    graphs.fails = None
    assert_close(mapped(batch(7)), loop(function, batch(7)))
    assert not graphs.captures, "it is not tried again"


@pytest.mark.parametrize(("wrong_from", "size"), [(1, 3), (1, 9), (3, 9), (3, 6)])
def test_a_graph_that_gives_other_values_is_dropped(
    wrong_from: int, size: int, graphs: Pretended
) -> None:
    """It is compared when it is captured, and on the next chunk, which has other samples."""
    graphs.wrong_from = wrong_from
    mapped = shardmap.vmap(lambda row: row.sin(), cuda_graphs=True, chunk_size=3)
    with pytest.warns(errors.CompileWarning, match="output 0 differs"):
        torch.testing.assert_close(mapped(batch(size)), batch(size).sin())
    assert graphs.replays == wrong_from
    torch.testing.assert_close(mapped(batch(size)), batch(size).sin())
    assert graphs.replays == wrong_from


def test_the_programs_own_error_is_the_calls(graphs: Pretended) -> None:
    mapped = shardmap.vmap(lambda t: torch.linalg.cholesky(t), cuda_graphs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.CompileWarning)
        with pytest.raises(RuntimeError, match="cholesky"):
            mapped(-torch.eye(3).expand(4, 3, 3))


def test_a_map_inside_a_graph_of_the_callers_is_part_of_it(graphs: Pretended) -> None:
    graphs.of_the_caller = True
    mapped = shardmap.vmap(function, cuda_graphs=True, chunk_size=3)
    assert_close(mapped(batch(7)), loop(function, batch(7)))
    assert not graphs.captures


def test_a_compiled_chunk_is_what_is_captured(
    graphs: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Compiled:
        """Stands for a compiled program."""

        def __init__(self, eager: Any):
            self.eager = eager

        def chunk(self, *arguments: Any) -> Any:
            """The chunk, by the program as it is."""
            sizes.append(arguments[0])
            return self.eager.chunk(*arguments)

    kept: dict[Any, Compiled] = {}

    def chosen(job: Any, ready: Any, *_: Any) -> Compiled:
        return kept.setdefault(ready.low.replay, Compiled(ready.low.replay))

    monkeypatch.setattr(lanes.compiled, "chosen", chosen)
    mapped = shardmap.vmap(function, compile=True, cuda_graphs=True, chunk_size=3)
    for _ in range(2):
        assert_close(mapped(batch(7)), loop(function, batch(7)))
    assert graphs.captures == [3]
    assert set(sizes) == {3}
