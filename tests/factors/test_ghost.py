"""Reductions of per-sample gradients from their factors, against the gradients of the loop."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardmap
from shardmap.factors.project import rows_of_matrix
from shardmap.run.base import RunStarted, listen
from tests.on_ray import TWO, local_ray
from tests.transforms.test_per_sample_grad import Tied, loop

Problem = tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Callable[..., Tensor]]


class Twice(nn.Module):
    """One convolution used twice, and a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.conv(x))).flatten()
        return self.linear(torch.tanh(self.linear(x)))[:3]


class Attends(nn.Module):
    """An encoder layer between an embedding and a head, over T positions."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=padding)
        self.layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(0))


class Recurrent(nn.Module):
    """One weight, used at each of five steps with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.around, self.out = (
            nn.Linear(6, 20),
            nn.Linear(20, 20, bias=False),
            nn.Linear(20, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inward(x))
        for step in range(5):
            h = torch.tanh(self.around(h) * (1 + 0.1 * step) + h)
        return self.out(h)


class Scaled(nn.Module):
    """Weights that are not used as they are: transposed, scaled, negated, sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.s = (
            nn.Parameter(torch.randn(6, 5)),
            nn.Parameter(torch.randn(5, 4)),
            nn.Parameter(torch.randn(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ (0.5 * self.w)) / 3.0
        return (-(h @ self.v) * self.s)[:3] + (h @ self.v[:, 1:])


def problems() -> dict[str, Callable[[], Problem]]:
    def images(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 4, 4), torch.randint(3, (n,))

    def sentences(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(40, (n, 5)), torch.randint(3, (n,))

    def vectors(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 6), torch.randint(3, (n,))

    return {
        "mlp": lambda: (nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), vectors, F.cross_entropy),
        "wide": lambda: (nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 3)).double(), doubles, F.cross_entropy),
        "cnn": lambda: (
            nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 2), nn.Flatten(0), nn.Linear(16, 3)), images, F.cross_entropy,
        ),
        "strided": lambda: (
            nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.Conv2d(8, 8, 2, padding=1, dilation=2, groups=4), nn.Flatten(0), nn.LazyLinear(3)),
            images, F.cross_entropy,
        ),
        "transposed": lambda: (nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Flatten(0), nn.LazyLinear(3)), images, F.cross_entropy),
        "twice": lambda: (Twice(), images, F.cross_entropy),
        "tied": lambda: (Tied(), lambda n: (torch.randint(11, (n, 3)), torch.randint(11, (n, 3))), F.cross_entropy),
        "tied once": lambda: (Tied(), lambda n: (torch.randint(11, (n, 1)), torch.randint(11, (n, 1))), F.cross_entropy),
        "attends": lambda: (Attends(), sentences, F.cross_entropy),
        "padded": lambda: (Attends(padding=3), sentences, F.cross_entropy),
        "recurrent": lambda: (Recurrent(), vectors, F.cross_entropy),
        "scaled": lambda: (Scaled(), vectors, F.cross_entropy),
    }  # fmt: skip


def doubles(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


def made(
    name: str, size: int
) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor, list[Tensor]]:
    """A model, its loss, a batch, and the gradients of the loop."""
    torch.manual_seed(7)
    model, batch, loss = problems()[name]()
    x, y = batch(size)
    if size:
        model(x[0])  # lazy layers learn their sizes
    return model, loss, x, y, loop(list(model.parameters()), lambda a, b: loss(model(a), b), x, y)


def close(found: Any, expected: Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-4
    scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients], 1)


@pytest.fixture(autouse=True)
def no_fallback(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing falls back: what is from factors agrees with the samples' own values at once."""
    with caplog.at_level(logging.WARNING, logger="shardmap"):
        yield
    assert [r.getMessage() for r in caplog.records if "factors" in r.getMessage()] == []


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


def explained(
    model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor, reduce: Any
) -> str:
    params = tuple(model.parameters())
    return shardmap.plan(
        lambda a, b: torch.autograd.grad(loss(model(a), b), params), reduce=reduce
    )(x, y).explain()


def test_explain_says_what_is_from_factors() -> None:
    model, loss, x, y, _ = made("mlp", 13)
    text = explained(model, loss, x, y, shardmap.reduce.clipped_sum(1.0))
    assert "sum: norm from factors [20, T] x [T, 6], T = 1" in text
    assert "summed over samples from factors [3, T] x [T, 20], T = 1" in text
    assert "gram: inner products from factors [20, T] x [T, 6], T = 1" in explained(
        model, loss, x, y, "gram"
    )
    assert "project: projected from factors [20, T] x [T, 6], T = 1" in explained(
        model, loss, x, y, shardmap.reduce.project(4)
    )
    assert "factors" not in explained(model, loss, x, y, None)


def test_gradients_that_are_summed_are_never_made() -> None:
    """A layer of 64 MiB: its gradient for each of 64 samples would be 4 GiB."""
    model = nn.Linear(4096, 4096, bias=False)
    x, y = torch.randn(64, 4096), torch.randn(64, 4096)
    params = tuple(model.parameters())
    for reduce in ("norm", "mean", shardmap.reduce.clipped_sum(1.0), "second_moment"):
        plan = shardmap.plan(
            lambda a, b: torch.autograd.grad(F.mse_loss(model(a), b), params),
            reduce=reduce,
            chunk_size=64,
        )(x, y)
        assert plan.lanes[0].peak_bytes is not None
        assert plan.lanes[0].peak_bytes < 6 * (64 << 20)


def test_user_written_norms_are_found() -> None:
    model, loss, x, y, gradients = made("mlp", 7)
    params = tuple(model.parameters())

    def by_hand(a: Tensor, b: Tensor) -> Tensor:
        found = torch.autograd.grad(loss(model(a), b), params)
        return torch.stack([torch.linalg.vector_norm(g) for g in found]).norm()

    close(shardmap.vmap(by_hand)(x, y), flat(gradients).norm(dim=1))
    assert "linalg_vector_norm: norm from factors" in shardmap.plan(by_hand)(x, y).explain()

    def of_vector(a: Tensor, b: Tensor) -> Tensor:
        return (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(a), b), params)])
            .square()
            .sum()
        )

    close(shardmap.vmap(of_vector)(x, y), flat(gradients).square().sum(1))
    assert "norm from factors" in shardmap.plan(of_vector)(x, y).explain()


def test_products_that_are_written_to_are_left_alone() -> None:
    """What is written in place after the product was made must not reach its norm."""
    x, y = torch.randn(7, 20), torch.randn(7, 30)

    def fn(a: Tensor, b: Tensor) -> Tensor:
        left, right = a.clone().unsqueeze(1), b.clone().unsqueeze(0)
        product = left @ right
        left.zero_()
        return product.square().sum()

    close(shardmap.vmap(fn)(x, y), x.square().sum(1) * y.square().sum(1))

    def inplace(a: Tensor, b: Tensor) -> Tensor:
        product = a.unsqueeze(1) @ b.unsqueeze(0)
        product[0] = 0
        return product.square().sum()

    close(shardmap.vmap(inplace)(x, y), x[:, 1:].square().sum(1) * y.square().sum(1))


def test_inputs_that_are_written_to() -> None:
    """The call that writes has the input as its result, and is read by calls before it."""
    x = torch.randn(7, 5)

    def fn(a: Tensor) -> Tensor:
        out = (a + 1).square().sum()
        a.mul_(2)
        return out + (a.unsqueeze(1) @ a.unsqueeze(0)).square().sum()

    expected = (x + 1).square().sum(1) + (2 * x).square().sum(1) ** 2
    for reduce, wanted in ((None, expected), ("sum", expected.sum())):
        close(shardmap.vmap(fn, reduce=reduce)(x.clone()), wanted)


def test_long_chains_are_followed() -> None:
    """Sums of thousands of terms, and of weights that are used thousands of times."""
    x = torch.randn(3, 4)

    def chain(a: Tensor) -> Tensor:
        total = a
        for _ in range(3000):
            total = total + a
        return total.square().sum()

    close(shardmap.vmap(chain)(x), (3001 * x).square().sum(1))
    close(shardmap.vmap(lambda a: chain(a), reduce="sum")(x), (3001 * x).square().sum())

    def products(a: Tensor) -> Tensor:
        total = a.unsqueeze(1) @ a.unsqueeze(0)
        for step in range(400):
            total = total + (a * step).unsqueeze(1) @ a.unsqueeze(0)
        return total.square().sum()

    close(shardmap.vmap(products)(x), (1 + sum(range(400))) ** 2 * x.square().sum(1) ** 2)


def test_nan_and_infinity_come_through() -> None:
    model, loss, x, y, _ = made("mlp", 7)
    x[2, 3], x[4, 1] = torch.nan, torch.inf
    gradients = loop(list(model.parameters()), lambda a, b: loss(model(a), b), x, y)
    norms = shardmap.per_sample_grad(model, loss, reduce="norm")(x, y)
    assert torch.equal(norms.isfinite(), flat(gradients).norm(dim=1).isfinite())
    assert not norms.isfinite().all()


def test_gradients_from_outside_flow_through_norms() -> None:
    """Where outer autograd records, nothing is rewritten."""
    w = torch.randn(5, 4, requires_grad=True)
    x, y = torch.randn(7, 5), torch.randn(7, 4)

    def norm(a: Tensor, b: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((torch.tanh(a @ w) - b).square().sum(), w, create_graph=True)
        return g.square().sum()

    (found,) = torch.autograd.grad(shardmap.vmap(norm, reduce="sum")(x, y), w)
    (expected,) = torch.autograd.grad(
        torch.stack([norm(a, b) for a, b in zip(x, y, strict=True)]).sum(), w
    )
    close(found, expected)


def test_noise_is_drawn_once_from_the_seeded_generator() -> None:
    model, loss, x, y, _ = made("mlp", 13)
    plain = shardmap.per_sample_grad(model, loss, reduce=shardmap.reduce.clipped_sum(0.5))(x, y)
    found = []
    for chunk in (None, 2, 5):
        torch.manual_seed(3)
        noisy = shardmap.per_sample_grad(
            model,
            loss,
            reduce=shardmap.reduce.clipped_sum(0.5, noise_multiplier=2.0),
            chunk_size=chunk,
        )(x, y)
        found.append(torch.cat([(noisy[k] - plain[k]).flatten() for k in plain]))
    close(found[0], found[1])
    close(found[0], found[2])
    assert 0.75 < float(found[0].std()) < 1.25  # 183 entries
    torch.manual_seed(4)
    other = shardmap.per_sample_grad(
        model, loss, reduce=shardmap.reduce.clipped_sum(0.5, noise_multiplier=2.0)
    )(x, y)
    assert not torch.allclose(other["0.weight"] - plain["0.weight"], found[0][:120].view(20, 6))


def test_each_output_can_have_its_own() -> None:
    model, loss, x, y, gradients = made("mlp", 7)
    params = tuple(model.parameters())

    def fn(a: Tensor, b: Tensor) -> tuple[Any, Tensor]:
        value = loss(model(a), b)
        return torch.autograd.grad(value, params), value.detach()

    norms, mean = shardmap.vmap(fn, reduce=("norm", "mean"))(x, y)
    close(norms, flat(gradients).norm(dim=1))
    close(mean, F.cross_entropy(model(x), y).detach())


def test_results_go_to_a_store(tmp_path: Any) -> None:
    model, loss, x, y, gradients = made("mlp", 13)
    store = shardmap.per_sample_grad(
        model, loss, reduce="norm", out=shardmap.ZarrSink(tmp_path / "norms"), chunk_size=5
    )(x, y)
    close(store.read("result", 0, 13), flat(gradients).norm(dim=1))


@pytest.mark.parametrize("trace", ["once", "each"])
def test_after_a_batch_that_cannot_be_computed_comes_one_that_can(trace: str) -> None:
    """The second sample's token is out of bounds: the check before the first run meets it."""
    model, loss, x, y, gradients = made("attends", 13)
    norms = flat(gradients).norm(dim=1)
    limit = float(norms.median())
    mapped = shardmap.per_sample_grad(
        model, loss, reduce=shardmap.reduce.clipped_sum(limit), flat=True, trace=trace, chunk_size=5
    )
    bad = x.clone()
    bad[1, 0] = 1000
    for _ in range(2):
        with pytest.raises(IndexError):
            mapped(bad, y)
        close(mapped(x, y), torch.tensordot((limit / norms).clamp(max=1), flat(gradients), 1))
    assert (
        "summed over samples from factors" in mapped.plan(x, y).explain()
    )  # and factors are still used


def test_samples_of_unequal_shapes() -> None:
    torch.manual_seed(9)
    model = Attends()
    tokens, labels = [torch.randint(40, (n,)) for n in (3, 5, 3, 1, 5)], torch.randint(3, (5,))
    gradients = loop(
        list(model.parameters()),
        lambda i: F.cross_entropy(model(tokens[int(i)]), labels[int(i)]),
        torch.arange(5),
    )
    norms = flat(gradients).norm(dim=1)
    ragged = shardmap.Ragged(tokens)
    close(shardmap.per_sample_grad(model, F.cross_entropy, reduce="norm")(ragged, labels), norms)
    limit = float(norms.median())
    found = shardmap.per_sample_grad(
        model, F.cross_entropy, reduce=shardmap.reduce.clipped_sum(limit)
    )(ragged, labels)
    for value, g in zip(found.values(), gradients, strict=True):
        close(value, torch.tensordot((limit / norms).clamp(max=1), g, 1))
    with pytest.raises(shardmap.errors.OptionError, match="samples are grouped by shape"):
        shardmap.per_sample_grad(model, F.cross_entropy, reduce="gram")(ragged, labels)


@pytest.mark.ray
def test_workers_use_factors() -> None:
    model, loss, x, y, gradients = made("attends", 13)
    norms = flat(gradients).norm(dim=1)
    limit = float(norms.median())
    several = shardmap.reduce.together(
        norms="norm",
        clipped=shardmap.reduce.clipped_sum(limit),
        gram="gram",
        second="second_moment",
        sketch=shardmap.reduce.project(7),
    )
    mapped = shardmap.per_sample_grad(model, loss, flat=True, reduce=several)
    with local_ray():
        found = shardmap.per_sample_grad(
            model, loss, flat=True, reduce=several, devices=TWO, chunk_size=3
        )(x, y)
    close(found["norms"], norms)
    close(found["clipped"], torch.tensordot((limit / norms).clamp(max=1), flat(gradients), 1))
    close(found["gram"], flat(gradients) @ flat(gradients).T)
    close(found["second"], flat(gradients).square().mean(0))
    close(found["sketch"], mapped(x, y)["sketch"])


def test_matrices_that_do_not_fit_are_refused_at_once() -> None:
    model, loss, x, y, _ = made("mlp", 13)
    with pytest.raises(
        shardmap.errors.OverBudget, match=r"1 x \[13, 13\], 676 B, and the budget is 600 B"
    ):
        shardmap.per_sample_grad(model, loss, reduce="gram", memory_budget=600)(x, y)


def test_a_total_lies_in_memory_as_a_stacked_result_does() -> None:
    for name in ("mlp", "tied", "padded", "scaled", "cnn"):
        model, loss, x, y, _ = made(name, 5)
        for value in shardmap.per_sample_grad(model, loss, reduce="sum")(x, y).values():
            assert value.is_contiguous(), name


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: shardmap.reduce.clipped_sum(0), "max_norm=0; pass a number above 0"),
        (
            lambda: shardmap.reduce.clipped_sum(1.0, -1),
            "noise_multiplier=-1; pass a number of at least 0",
        ),
        (lambda: shardmap.reduce.project(0), "dim=0; pass a positive int"),
        (lambda: shardmap.reduce.project(3, "sparse"), "kind='sparse'; choose"),
        (lambda: shardmap.reduce.project(3, seed=-1), "seed=-1; pass an int of at least 0"),
        (lambda: shardmap.reduce.together(), "nothing to compute"),
        (lambda: shardmap.reduce.together(a="norms"), "'norms' is no reduction"),
        (lambda: shardmap.vmap(lambda x: x, reduce="norm")(torch.arange(3)), "one is torch.int64"),
        (
            lambda: shardmap.vmap(lambda x: (x, x), reduce=("norm",))(torch.ones(3)),
            "does not fit what the function returns",
        ),
        (
            lambda: shardmap.vmap(lambda x: x, reduce="gram", out_dims=1)(torch.ones(3, 2)),
            "leave out_dims at 0",
        ),
        (
            lambda: shardmap.vmap(lambda x: x, reduce="gram", out=shardmap.MemmapSink("never"))(
                torch.ones(3, 2)
            ),
            "save it yourself",
        ),
        (
            lambda: shardmap.vmap(lambda x: x * 1j, reduce=shardmap.reduce.project(3))(
                torch.ones(3, 2)
            ),
            "view_as_real",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(shardmap.errors.OptionError) as caught:
        make()
    assert text in str(caught.value)
    assert str(caught.value).startswith("shardmap.")
