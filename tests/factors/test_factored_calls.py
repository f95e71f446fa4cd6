"""Reductions from factors in calls of every kind: explained, stored, inside other maps, refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardmap
from tests.factors.problems import Attends, close, flat, made
from tests.factors.problems import no_fallback as no_fallback
from tests.on_ray import TWO, local_ray
from tests.transforms.test_per_sample_grad import loop


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
    """A value that is written in place after the product was made must not reach its norm."""
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
    """Nothing is rewritten under outer autograd."""
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
    products = shardmap.per_sample_grad(model, F.cross_entropy, reduce="gram")(ragged, labels)
    close(products, flat(gradients) @ flat(gradients).T)


@pytest.mark.ray
@pytest.mark.rotating
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
    for name in ("mlp", "tied", "padded", "scaled", "cnn", "positions"):
        model, loss, x, y, _ = made(name, 5)
        for value in shardmap.per_sample_grad(model, loss, reduce="sum")(x, y).values():
            assert value.is_contiguous(), name


def test_products_that_norms_need_are_summed_as_they_are() -> None:
    """No layer of this model has a product that is dearer to make than its norm from factors."""
    model, loss, x, y, _ = made("positions", 5)
    clipped = shardmap.reduce.clipped_sum(0.1)
    text = explained(model, loss, x, y, clipped)
    assert "[3, T] x [T, 3], T = 1" in text  # the head
    assert "T = 64" not in text


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
