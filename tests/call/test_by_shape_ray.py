"""Samples of unequal shapes on the workers of a Ray cluster, against the loop."""

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import Ragged, errors

pytestmark = [pytest.mark.ray, pytest.mark.rotating]
LENGTHS = (5, 2, 5, 7, 1, 2, 3, 5, 2, 3, 7)


def words():
    torch.manual_seed(1)
    return [torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS]


def summary(x, number):
    return {"sum": x.sum(0).sin() * number, "square": x.T @ x}


@pytest.fixture(scope="module")
def two():
    return shardmap.Ray(workers=2, num_cpus=1)


def expected():
    rows = [summary(x, float(i)) for i, x in enumerate(words())]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_results_and_reductions(two):
    numbers = torch.arange(float(len(LENGTHS))).double()
    found = shardmap.vmap(summary, devices=two)(Ragged(words()), numbers)
    torch.testing.assert_close(found, expected())
    total = shardmap.vmap(summary, devices=two, reduce="sum")(words(), numbers)
    torch.testing.assert_close(total, {key: t.sum(0) for key, t in expected().items()})
    rows = shardmap.vmap(torch.sin, devices=two)(Ragged(words()))
    for a, b in zip(rows, words(), strict=True):
        torch.testing.assert_close(a, b.sin())
    model = nn.Linear(3, 2).double()
    gradients = shardmap.per_sample_grad(model, lambda out: out.square().sum(), flat=True)
    kernel = shardmap.per_sample_grad(
        model, lambda out: out.square().sum(), flat=True, reduce="gram", devices=two
    )(words())
    each = gradients(words())
    torch.testing.assert_close(kernel, each @ each.T)


@pytest.mark.parametrize("sink", ["MemmapSink", "ZarrSink"])
@pytest.mark.parametrize("chunk_size", ["auto", 1, 3])
def test_stores(two, sink, chunk_size, tmp_path, monkeypatch):
    from shardmap.call import by_shape

    monkeypatch.setattr(by_shape, "ROUND_BYTES", 600)  # a few units at a time
    np.save(tmp_path / "flat.npy", torch.cat(words()).numpy())
    numbers = torch.arange(float(len(LENGTHS))).double()
    where = getattr(shardmap, sink)(str(tmp_path / "store"))
    for batch in (Ragged(words()), Ragged.cut(tmp_path / "flat.npy", LENGTHS)):
        mapped = shardmap.vmap(summary, devices=two, out=where, resume=True, chunk_size=chunk_size)
        store = mapped(batch, numbers)
        assert not store.missing()
        for name, rows in expected().items():
            torch.testing.assert_close(store.read(name, 0, len(LENGTHS)), rows)


def test_what_a_cluster_cannot_do_is_refused(two, tmp_path):
    sink = shardmap.MemmapSink(str(tmp_path / "store"))
    with pytest.raises(errors.OptionError, match="draw them outside"):
        shardmap.vmap(
            lambda x: torch.rand(2) + x.sum(), devices=two, out=sink, randomness="different"
        )(words())
    with pytest.raises(errors.RaggedError, match="out= keeps rows of one shape"):
        shardmap.vmap(torch.sin, devices=two, out=sink)(words())
    with pytest.raises(errors.OptionError, match="devices='auto'"):
        shardmap.plan(torch.sum, devices=two)(words())
