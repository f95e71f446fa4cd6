"""Reductions of per-sample gradients from their factors, against the gradients of the loop."""

from typing import Any

import pytest
import torch

import shardmap
from shardmap.factors.project import rows_of_matrix
from shardmap.run.base import RunStarted, listen
from tests.factors.problems import close, flat, made, problems
from tests.factors.problems import no_fallback as no_fallback


@pytest.mark.parametrize("chunk_size", ["auto", 1, 5, None])
@pytest.mark.parametrize("name", problems())
def test_norms(name: str, chunk_size: Any) -> None:
    model, loss, x, y, gradients = made(name, 13)
    close(
        shardmap.per_sample_grad(model, loss, reduce="norm", chunk_size=chunk_size)(x, y),
        flat(gradients).norm(dim=1),
    )


@pytest.mark.parametrize("size", [1, 3, 13])
@pytest.mark.parametrize("name", problems())
def test_clipped_sums(name: str, size: int) -> None:
    model, loss, x, y, gradients = made(name, size)
    norms = flat(gradients).norm(dim=1)
    limit = float(norms.median())
    found = shardmap.per_sample_grad(
        model, loss, reduce=shardmap.reduce.clipped_sum(limit), chunk_size=5
    )(x, y)
    weights = (limit / norms).clamp(max=1)
    for value, g in zip(found.values(), gradients, strict=True):
        close(value, torch.tensordot(weights, g, 1))


@pytest.mark.parametrize("name", problems())
def test_several_together(name: str) -> None:
    model, loss, x, y, gradients = made(name, 13)
    several = shardmap.reduce.together(
        mean="mean", second="second_moment", norms="norm", all=None, gram="gram"
    )
    found = shardmap.per_sample_grad(model, loss, reduce=several, chunk_size=5)(x, y)
    close(found["norms"], flat(gradients).norm(dim=1))
    close(found["gram"], flat(gradients) @ flat(gradients).T)
    for (key, mean), g in zip(found["mean"].items(), gradients, strict=True):
        close(mean, g.mean(0))
        close(found["second"][key], g.square().mean(0))
        close(found["all"][key], g)


@pytest.mark.parametrize("name", problems())
def test_gram_matrices(name: str) -> None:
    model, loss, x, y, gradients = made(name, 13)
    expected = flat(gradients) @ flat(gradients).T
    found = shardmap.per_sample_grad(model, loss, reduce="gram")(x, y)
    close(found, expected)
    assert torch.equal(found, found.T)
    once = shardmap.per_sample_grad(
        model, loss, reduce="gram", trace="once", devices=["cpu", "cpu"], chunk_size=4
    )
    close(once(x, y), expected)
    close(once(x[:7], y[:7]), expected[:7, :7])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", problems())
def test_projections(name: str, kind: str) -> None:
    model, loss, x, y, gradients = made(name, 13)
    rows = flat(gradients)
    matrix = rows_of_matrix(0, rows.shape[1], 19, kind, 5, rows)
    expected = rows @ matrix / 19**0.5
    reduction = shardmap.reduce.project(19, kind, seed=5)
    close(shardmap.per_sample_grad(model, loss, reduce=reduction)(x, y), expected)
    close(
        shardmap.per_sample_grad(model, loss, reduce=reduction, flat=True, chunk_size=5)(x, y),
        expected,
    )


def test_projections_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y, gradients = made("mlp", 7)
    rows = flat(gradients)
    expected = rows @ rows_of_matrix(0, rows.shape[1], 19, "rademacher", 0, rows) / 19**0.5
    monkeypatch.setattr("shardmap.factors.project.BLOCK_ENTRIES", 19 * 7)
    close(shardmap.per_sample_grad(model, loss, reduce=shardmap.reduce.project(19))(x, y), expected)


def test_gram_matrices_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y, gradients = made("attends", 13)
    monkeypatch.setattr("shardmap.factors.gram.BLOCK_BYTES", 4 * 25 * 9)
    close(
        shardmap.per_sample_grad(model, loss, reduce="gram")(x, y),
        flat(gradients) @ flat(gradients).T,
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "twice", "attends", "tied", "scaled"])
def test_gram_matrices_in_several_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map returns some outputs, or some rows of one.

    What is stacked beside them comes once.
    """
    model, loss, x, y, gradients = made(name, 13)
    monkeypatch.setattr("shardmap.call.gram_passes.PASS_BYTES", 13 * 40)
    monkeypatch.setattr("shardmap.call.gram_passes.PASSES", 64)
    runs: list[Any] = []
    with listen(runs.append):
        found = shardmap.per_sample_grad(
            model, loss, reduce=shardmap.reduce.together(gram="gram", norms="norm")
        )(x, y)
    started = sum(isinstance(event, RunStarted) for event in runs)
    assert started > 2
    several = shardmap.reduce.together(gram="gram", norms="norm")
    assert (
        f"takes {started} passes instead"
        in shardmap.per_sample_grad(model, loss, reduce=several).plan(x, y).explain()
    )
    close(found["gram"], flat(gradients) @ flat(gradients).T)
    close(found["norms"], flat(gradients).norm(dim=1))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_projection_matrices_have_independent_entries(kind: str) -> None:
    like = torch.zeros((), dtype=torch.float64)
    matrix = rows_of_matrix(3, 400, 300, kind, 11, like)
    assert abs(float(matrix.mean())) < 0.015  # 120,000 entries: five standard errors
    assert abs(float(matrix.square().mean()) - 1) < 0.03
    products = matrix.T @ matrix / 400  # the identity, up to 1/sqrt(400)
    off = products - torch.diag(products.diagonal())
    assert float(off.abs().max()) < 0.3
    assert abs(float(off.square().mean()) * 400 - 1) < 0.1
    assert not torch.equal(matrix, rows_of_matrix(3, 400, 300, kind, 12, like))
    assert torch.equal(matrix[5:], rows_of_matrix(8, 395, 300, kind, 11, like))


@pytest.mark.parametrize("name", ["mlp", "attends", "cnn"])
def test_of_no_samples(name: str) -> None:
    model, loss, x, y, gradients = made(name, 3)
    assert shardmap.per_sample_grad(model, loss, reduce="norm")(x[:0], y[:0]).shape == (0,)
    assert shardmap.per_sample_grad(model, loss, reduce="gram")(x[:0], y[:0]).shape == (0, 0)
    clipped = shardmap.per_sample_grad(model, loss, reduce=shardmap.reduce.clipped_sum(1.0))(
        x[:0], y[:0]
    )
    for value, g in zip(clipped.values(), gradients, strict=True):
        assert torch.equal(value, torch.zeros_like(g[0]))
    assert shardmap.per_sample_grad(model, loss, reduce=shardmap.reduce.project(5))(
        x[:0], y[:0]
    ).shape == (0, 5)
