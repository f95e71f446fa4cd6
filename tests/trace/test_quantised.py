"""Dynamically quantised modules: their operators run sample by sample, as the loop calls them.

A sample's scale follows from all of its values, so that no product over the batch is the loop's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmap
from shardmap import errors
from shardmap.call import arguments as edges
from shardmap.program.ir import Program
from shardmap.trace.record import record
from tests import oracle
from tests.loop import loop as plain_loop

quantisation: Any = torch.ao.quantization
"""Not public to the type checker."""


class Recurrent(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0])


def quantised(model: nn.Module, kinds: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantisation.quantize_dynamic(model.eval(), kinds, **options)


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _bags() -> nn.Module:
    qconfig = quantisation.float_qparams_weight_only_qconfig
    return quantised(nn.Sequential(nn.EmbeddingBag(10, 8, mode="sum")), {nn.EmbeddingBag: qconfig})


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (
        lambda: quantised(_linear(), {nn.Linear}, dtype=torch.qint8), (5, 3), "linear_dynamic",
    ),
    "linear, float16": (
        lambda: quantised(_linear(), {nn.Linear}, dtype=torch.float16), (5, 3),
        "linear_dynamic_fp16",
    ),
    "LSTM": (
        lambda: quantised(Recurrent(nn.LSTM(3, 4)), {nn.LSTM, nn.Linear}, dtype=torch.qint8),
        (5, 2, 3), "quantized_lstm",
    ),
    "LSTM of two layers, both ways": (
        lambda: quantised(
            Recurrent(nn.LSTM(3, 2, 2, bidirectional=True)), {nn.LSTM}, dtype=torch.qint8
        ),
        (5, 2, 3), "quantized_lstm",
    ),
    "GRU": (
        lambda: quantised(Recurrent(nn.GRU(3, 4)), {nn.GRU}, dtype=torch.qint8),
        (5, 2, 3), "quantized_gru",
    ),
    "embedding bag": (_bags, (2, 3), "embedding_bag_byte"),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 1": {"chunk_size": 1},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "always": {"check": "always"},
}


@functools.cache
def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MODELS[name][0]()


def batch(name: str) -> Tensor:
    shape = (7, *MODELS[name][1])
    generator = torch.Generator().manual_seed(1)
    if name == "embedding bag":
        return torch.randint(10, shape, generator=generator)
    return torch.randn(shape, generator=generator) * torch.arange(1, 8).view(
        7, *[1] * len(shape[1:])
    )


def loop(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(r) for r in x])


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_loop(name: str, way: str, tmp_path: Path) -> None:
    model, x = made(name), batch(name)
    want = loop(model, x)
    mapped = shardmap.vmap(model, **WAYS[way])
    with torch.no_grad():
        for _ in range(2):
            oracle.assert_same(mapped(x), want, name)
        if way == "plain":
            out = shardmap.MemmapSink(tmp_path / "store")
            store = shardmap.vmap(model, out=out, chunk_size=2)(x)
            oracle.assert_same(store.read(0, 0, 7), want, "stored")
            total = shardmap.vmap(model, reduce="sum", chunk_size=3)(x)
            torch.testing.assert_close(total, want.sum(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_warning_names_the_operator(name: str) -> None:
    model, x = made(name), batch(name)
    with pytest.warns(shardmap.SlowLoopWarning, match=f"{MODELS[name][2]}.*sample by sample"):
        shardmap.vmap(lambda r: model(r) * 2)(x)
    with pytest.raises(errors.UnsupportedOperatorError, match=f"{MODELS[name][2]}.*strict"):
        shardmap.vmap(model, strict=True)(x)


def test_a_quantised_layer_of_what_all_samples_share_runs_once() -> None:
    model, x, shared = made("linear"), batch("linear"), torch.tensor([[0.5, -1.0, 2.0]])
    function = lambda r: model(shared)[0, 0] * r
    got = shardmap.vmap(function, strict=True)(x)
    oracle.assert_same(got.detach(), loop(function, x), "shared")


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
def test_weights_that_change_between_calls() -> None:
    model: Any = MODELS["linear"][0]()
    x = batch("linear")
    for trace in ("each", "once"):
        mapped = shardmap.vmap(model, trace=trace)
        for seed in range(3):
            weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            packed = torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8)
            model[0].set_weight_bias(packed, None)
            oracle.assert_same(mapped(x).detach(), loop(model, x), "changed")


@pytest.mark.parametrize("name", MODELS)
def test_a_program_with_packed_weights_travels(name: str) -> None:
    model, x = made(name), batch(name)
    samples = edges.collect((x,), {}, 0, None, "here")
    program = record(model, samples, "error", False, "here")[0].program
    there = Program.loads(program.dumps())
    assert str(there) == str(program)
    assert there.dumps() == program.dumps()
    calls = [eq for eq in there.equations if "packed" in str(eq)]
    assert calls
    if name == "linear":  # the packed weights are those of the layer
        eq = calls[0]
        with torch.no_grad():
            got = eq.op(x[2], eq.args[1].value, True)
        oracle.assert_same(got, model.get_submodule("0")(x[2]), "there")


def prepared(version: int) -> nn.Module:
    """A model of torch's eager quantisation-aware training that has observed, and observes no more."""
    torch.manual_seed(0)
    model = nn.Sequential(
        quantisation.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
    ).train()
    model.qconfig = quantisation.get_default_qat_qconfig(version=version)  # pyright: ignore
    quantisation.prepare_qat(model, inplace=True)
    for _ in range(3):
        model(torch.randn(8, 6))
    return model.apply(quantisation.disable_observer)


def per_sample(model: nn.Module) -> Callable[..., Any]:
    def gradient(row: torch.Tensor) -> Any:
        return torch.autograd.grad(model(row[None]).square().sum(), tuple(model.parameters()))

    return gradient


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}], ids=str)
def test_quantisation_aware_training_with_frozen_observers(
    trace: str, options: dict[str, Any]
) -> None:
    gradient = per_sample(prepared(version=0))
    rows = torch.randn(5, 6)
    want = plain_loop(gradient)(rows)
    mapped = shardmap.vmap(gradient, trace=trace, strict=True, **options)
    for _ in range(4):
        for got, own in zip(mapped(rows), want, strict=True):
            torch.testing.assert_close(got, own)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_fused_form_is_refused_with_a_remedy() -> None:
    """By torch it computes its scales again in each call; the remedy is the test above."""
    with pytest.raises(errors.CapturedWriteError, match=r"get_default_qat_qconfig\(version=0\)"):
        shardmap.vmap(per_sample(prepared(version=1)))(torch.randn(5, 6))
