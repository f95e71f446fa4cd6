"""Each remedy that a refusal names leads out: taken, it gives what the loop gives.

A row holds a function that is refused, the error with the words that name the remedy, and the same
function with the remedy taken. Refusals of other families have such tests beside their own:
sparse matrices in `tests/rules/test_sparse.py`, Functions with a backward of their own and hooks in
`tests/trace/test_own_backwards.py`, seeds in `tests/trace/test_seeds.py`, what is traced in
`tests/call/test_traced.py`, ragged batches in `tests/call/test_ragged.py`, losses and models of
packages in `tests/test_model_remedies.py`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from shardmap.rules import registry
from tests import oracle
from tests.loop import loop

Function = Callable[..., Any]
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of one": {"chunk_size": 1},
    "chunks of three": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
}


@pytest.fixture(autouse=True)
def tables_are_put_back() -> Iterator[None]:
    """Rules of a test are gone after it, and functions are new."""
    rules = dict(registry._rules)
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


def batch(*shape: int, size: int = 7) -> Tensor:
    """Different samples."""
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


def made(module: Callable[[], nn.Module]) -> nn.Module:
    """A module with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return module()


@dataclass
class Row:
    """A function that is refused, and the remedy that its error names."""

    function: Function
    error: type[Exception]
    words: str
    """The pattern that the message matches: what names the remedy."""
    remedy: Function
    batch: Callable[[], tuple[Any, ...]] = lambda: (batch(3),)
    """Makes the batch of the refused call."""
    given: Callable[[], tuple[Any, ...]] | None = None
    """Makes the batch of the call with the remedy, where that is another."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the refused call."""


@torch.library.custom_op("shardmap_remedies::cumulated", mutates_args=())
def cumulated(x: Tensor) -> Tensor:
    """Numpy as an operator."""
    return torch.from_numpy(np.cumsum(x.detach().numpy()))


W = torch.tensor([0.5, -1.5, 2.0])
V = W.clone().requires_grad_()
norm = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
untracked = made(
    lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
)
grouped = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)))
kept: list[Tensor] = []


def accumulated(r: Tensor) -> Tensor:
    (r * V).sum().backward()
    return r


def stored(r: Tensor) -> Tensor:
    kept.append(r * 2)
    return kept[-1].sin()


def set_data(r: Tensor) -> Tensor:
    t = torch.zeros(3)
    part = t[:2]
    t.data = r
    return t * 2 + part.sum()


def copied(r: Tensor) -> Tensor:
    t = torch.zeros(3)
    with torch.no_grad():
        t.copy_(r)
    return t * 2


def filled(r: Tensor) -> Tensor:
    t = torch.empty(3)
    return t.copy_(r)


def wrote_shared(r: Tensor, w: Tensor) -> Tensor:
    return w.mul_(2) + r


ROWS: dict[str, Row] = {
    "numpy": Row(
        lambda r: torch.from_numpy(np.cumsum(r.numpy())),
        errors.EscapeError, r"torch's operators.*torch\.library\.custom_op", cumulated,
    ),
    "numpy, by torch's operators": Row(
        lambda r: torch.from_numpy(np.cumsum(r.numpy())),
        errors.EscapeError, "torch's operators", lambda r: r.cumsum(0),
    ),
    "a numpy function": Row(
        lambda r: torch.as_tensor(np.sin(r)),
        errors.EscapeError, r"torch\.sin for np\.sin", torch.sin,
    ),
    "tensor of tensors": Row(
        lambda r: torch.tensor([r[2], r[0]]),
        errors.EscapeError, r"torch\.stack", lambda r: torch.stack([r[2], r[0]]),
    ),
    "apply_": Row(
        lambda r: r.clone().apply_(lambda v: v + 1),
        errors.EscapeError, "torch's operators on the whole tensor", lambda r: r + 1,
    ),
    "storage": Row(
        lambda r: torch.empty(0).set_(r.untyped_storage(), 0, r.shape, r.stride()) * 2,
        errors.EscapeError, "use torch's operators", lambda r: r * 2,
    ),
    ".data =": Row(set_data, errors.EscapeError, r"copy_ under torch\.no_grad\(\)", copied),
    "memory that grows": Row(
        lambda r: torch.sin(r, out=torch.empty(0)),
        errors.EscapeError, "of the result's shape",
        lambda r: torch.sin(r, out=torch.empty(3)),
    ),
    "memory that nothing wrote": Row(
        lambda r: torch.empty(3) + r, errors.EscapeError, "fill it with torch operators", filled
    ),
    "memory that nothing wrote, zeros": Row(
        lambda r: torch.empty(3) + r,
        errors.EscapeError, r"torch\.zeros", lambda r: torch.zeros(3) + r,
    ),
    "a kept tensor": Row(
        stored, errors.EscapeError, "return the tensor instead",
        lambda r: ((r * 2).sin(), r * 2), lambda: (batch(3),),
    ),
    "a captured tensor is written": Row(
        lambda r: W.add_(r), errors.CapturedWriteError, "return the value instead", lambda r: W + r
    ),
    "a captured tensor is written, cloned": Row(
        lambda r: W.add_(r), errors.CapturedWriteError, "or clone the tensor inside",
        lambda r: W.clone().add_(r),
    ),
    "backward": Row(
        accumulated, errors.CapturedWriteError, r"torch\.autograd\.grad\(loss, parameters\)",
        lambda r: torch.autograd.grad((r * V).sum().sin(), V)[0],
    ),
    "a reentrant checkpoint, gradients from outside": Row(
        lambda r: checkpoint(lambda a: a * V, r.clone().requires_grad_(), use_reentrant=True).sum(),
        errors.CapturedWriteError, "use_reentrant=False for a checkpoint",
        lambda r: checkpoint(lambda a: a * V, r.clone().requires_grad_(), use_reentrant=False).sum(),
    ),
    "batch norm in training, untracked": Row(
        lambda r: norm(torch.stack([r, 2 * r])),
        errors.CapturedWriteError, "track_running_stats=False",
        lambda r: untracked(torch.stack([r, 2 * r])),
    ),
    "batch norm in training, another norm": Row(
        lambda r: norm(torch.stack([r, 2 * r])),
        errors.CapturedWriteError, "GroupNorm", lambda r: grouped(torch.stack([r, 2 * r])),
    ),
    "overlapping samples are written": Row(
        lambda r: r.add_(1).clone(), errors.CapturedWriteError, "pass a clone",
        lambda r: r.add_(1).clone(),
        lambda: (batch(3)[:1].expand(7, 3),), lambda: (batch(3)[:1].expand(7, 3).clone(),),
    ),
    "a lazy conjugate is written": Row(
        lambda r: r.mul_(2).imag, errors.CapturedWriteError, r"resolve_conj\(\)",
        lambda r: r.mul_(2).imag, lambda: (torch.complex(batch(3), batch(3).cos()).conj(),),
        lambda: (torch.complex(batch(3), batch(3).cos()).conj().resolve_conj(),),
    ),
    "a sparse batch": Row(
        lambda r: r * 2, errors.UnsupportedOperatorError, r"\.to_dense\(\)", lambda r: r * 2,
        lambda: (batch(3).to_sparse(),), lambda: (batch(3).to_sparse().to_dense(),),
    ),
    "text among the outputs": Row(
        lambda r: (r.sin(), "name"), errors.OutputError, "return tensors and numbers",
        lambda r: (r.sin(), r.cos()),
    ),
    "an array among the outputs": Row(
        lambda r: (r.sin(), np.arange(3)), errors.OutputError, r"torch\.as_tensor",
        lambda r: (r.sin(), torch.as_tensor(np.arange(3))),
    ),
    "another structure": Row(
        lambda r: r if r.sum() > 0 else (r, r), errors.VariesError, "one structure for all",
        lambda r: (r, r) if r.sum() > 0 else (r, -r),
    ),
    "one_hot without classes": Row(
        F.one_hot, errors.RaggedError, "pad them to one shape", lambda r: F.one_hot(r, 4),
        lambda: (torch.tensor([[0, 1], [2, 3], [1, 1], [0, 0], [2, 1], [0, 2], [3, 0]]),),
    ),
    "unequal results, padded": Row(
        lambda r: r[r > 0], errors.RaggedError, "pad them to one shape",
        lambda r: F.pad(r[r > 0], (0, 3 - len(r[r > 0]))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_refusal_names_its_remedy(name: str) -> None:
    row = ROWS[name]
    with pytest.raises(row.error, match=row.words):
        shardmap.vmap(row.function, **row.options)(*row.batch())
    kept.clear()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROWS)
def test_the_remedy_gives_what_the_loop_gives(name: str, way: str) -> None:
    row = ROWS[name]
    given = row.given or row.batch
    want = loop(row.remedy)(*given())
    mapped = shardmap.vmap(row.remedy, **WAYS[way])
    for _ in range(2):
        got = mapped(*given())
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        for mine, loops in pairs:
            oracle.assert_same(mine, loops, name)


def test_batch_norm_in_evaluation() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    function = lambda r: model(torch.stack([r, 2 * r]))
    with pytest.raises(errors.CapturedWriteError, match=r"\.eval\(\)"):
        shardmap.vmap(function)(batch(3))
    model.eval()
    oracle.assert_same(shardmap.vmap(function)(batch(3)), loop(function)(batch(3)), "eval")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "spectral", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_spectral_norm_in_evaluation(spectral: Function, way: str) -> None:
    model = made(lambda: nn.Sequential(spectral(nn.Linear(3, 4)), nn.Tanh()))
    with pytest.raises(errors.CapturedWriteError, match=r"spectral_norm.*\.eval\(\)"):
        shardmap.vmap(model, **WAYS[way])(batch(3))
    model(batch(3))  # updates the vectors once, for all samples
    model.eval()
    got = shardmap.vmap(model, **WAYS[way])(batch(3))
    oracle.assert_same(got, loop(model)(batch(3)), "eval")


def test_batch_norm_replaced_as_torch_does_it() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    function = lambda r: model(torch.stack([r, 2 * r]))
    with pytest.raises(errors.CapturedWriteError, match="replace_all_batch_norm_modules_"):
        shardmap.vmap(function)(batch(3))
    torch.func.replace_all_batch_norm_modules_(model)
    oracle.assert_same(shardmap.vmap(function)(batch(3)), loop(function)(batch(3)), "replaced")


def test_a_kept_tensor_that_nobody_reads() -> None:
    with pytest.raises(errors.EscapeError, match="pass check='off'"):
        shardmap.vmap(stored)(batch(3))
    got = shardmap.vmap(stored, check="off")(batch(3))
    oracle.assert_same(got, loop(stored)(batch(3)), "kept")
    kept.clear()


def test_unequal_results_come_back_as_they_are() -> None:
    x = torch.tensor([[0, 1], [2, 3], [1, 1], [0, 0]])
    with pytest.raises(errors.RaggedError, match="ragged='list' or ragged='nested'"):
        shardmap.vmap(F.one_hot)(x)
    listed = shardmap.vmap(F.one_hot, ragged="list")(x)
    nested = shardmap.vmap(F.one_hot, ragged="nested")(x)
    with pytest.raises(errors.RaggedError):
        shardmap.vmap(F.one_hot)(x)
    for k, row in enumerate(x):
        oracle.assert_same(listed[k], F.one_hot(row), f"sample {k}")
        assert torch.equal(nested[k], F.one_hot(row))


def test_a_nested_batch_is_ragged_or_padded() -> None:
    rows = [batch(n, 2)[0] for n in (3, 1, 3)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    function = lambda r: r.sin().sum(0)
    with pytest.raises(errors.UnsupportedOperatorError, match=r"Ragged.*to_padded_tensor"):
        shardmap.vmap(lambda tree: function(tree["rows"]))({"rows": nested})
    want = torch.stack([function(r) for r in rows])
    oracle.assert_same(shardmap.vmap(function)(nested), want, "nested")
    ragged = shardmap.Ragged(list(nested.unbind()))
    oracle.assert_same(shardmap.vmap(function)(ragged), want, "ragged")
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    oracle.assert_same(shardmap.vmap(function)(padded), want, "padded")


def test_more_ways_than_max_paths_with_strict() -> None:
    x = batch(3, size=150).repeat_interleave(5, 0)
    function = lambda r: r * r.sum().item()
    with pytest.raises(errors.DataDependentError, match="in a tensor.*larger max_paths.*strict"):
        shardmap.vmap(function, strict=True)(x)
    want = loop(function)(x)
    in_a_tensor = shardmap.vmap(lambda r: r * r.sum(), strict=True)(x)
    torch.testing.assert_close(in_a_tensor, want)
    more = shardmap.vmap(function, strict=True, max_paths=200)(x)
    oracle.assert_same(more, want, "more paths")
    oracle.assert_same(shardmap.vmap(function, strict=False)(x), want, "one by one")


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), torch.nn.RReLU()])
def test_draws_are_asked_for_or_switched_off(layer: nn.Module) -> None:
    x = torch.cat([batch(100), -batch(100)])
    layer.train()
    with pytest.raises(errors.RandomnessError, match=r"'different'.*'same'.*model\.eval\(\)"):
        shardmap.vmap(layer)(x)
    ones = torch.ones_like(x) * (-1 if isinstance(layer, nn.RReLU) else 1)
    different = shardmap.vmap(layer, randomness="different")(ones)
    assert len({tuple(row.tolist()) for row in different}) == len(x)
    same = shardmap.vmap(layer, randomness="same")(ones)
    assert torch.equal(same, same[:1].expand_as(same))
    assert len(same[0].unique()) > 1
    layer.eval()
    oracle.assert_same(shardmap.vmap(layer)(x), loop(layer)(x), "switched off")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy.random"])
def test_draws_of_python_are_torchs(draw: Callable[[], float]) -> None:
    x = torch.ones(500)
    with pytest.raises(errors.RandomnessError, match="torch's random functions with randomness"):
        shardmap.vmap(lambda r: r * draw(), randomness="different")(x)
    got = shardmap.vmap(lambda r: r * torch.rand(()), randomness="different")(x)
    assert len(got.unique()) > 490
    assert abs(float(got.mean()) - 0.5) < 0.06  # four standard errors


def test_a_counter_is_passed_as_an_argument() -> None:
    count = 0

    def counted(r: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return r * count

    x = batch(3)
    with pytest.raises(errors.EscapeError, match="as an argument, one for each sample"):
        shardmap.vmap(counted)(x)
    numbers, count = torch.arange(1.0, 8.0), 0
    got = shardmap.vmap(lambda r, n: r * n)(x, numbers)
    oracle.assert_same(got, loop(counted)(x), "counted")


def test_draws_of_several_ways_are_passed_in() -> None:
    def function(r: Tensor) -> Tensor:
        return r * 2 if torch.rand(()) > 0.5 else r

    x = batch(3, size=200)
    with pytest.raises(errors.ShardmapError, match="draws random numbers"):
        shardmap.vmap(function, randomness="different", strict=True)(x)
    given = lambda r, n: r * 2 if n > 0.5 else r
    numbers = torch.rand(200)
    got = shardmap.vmap(given, strict=True)(x, numbers)
    oracle.assert_same(got, loop(given)(x, numbers), "passed in")
