"""`shardmap.per_sample_grad` against the loop of torch.autograd.grad, sample by sample."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardmap
from shardmap.errors import OptionError, TransformError

SIZES = (0, 1, 3, 13)


class Tied(nn.Module):
    """An embedding whose weight is also that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens))))


class Normed(nn.Module):
    """A buffer, a frozen layer, a layer that is never used, and a batch norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last, self.unused = (
            nn.Linear(6, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
            nn.Linear(2, 2),
        )
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("shift", torch.randn(5))
        self.frozen.requires_grad_(False)
        self.norm.running_mean = torch.randn(5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.relu(self.first(x)) + self.get_buffer("shift"))
        return self.last(self.norm(x))


def loop(tensors: Sequence[Tensor], loss: Callable[..., Tensor], *batch: Tensor) -> list[Tensor]:
    """The gradients of each sample, stacked."""
    rows = [
        torch.autograd.grad(loss(*row), tensors, allow_unused=True, materialize_grads=True)
        for row in zip(*batch, strict=True)
    ]
    return [
        torch.stack([r[k] for r in rows]) if rows else torch.zeros(0, *t.shape, dtype=t.dtype)
        for k, t in enumerate(tensors)
    ]


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def models() -> dict[
    str,
    Callable[[], tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Callable[..., Tensor]]],
]:
    def labels(n: int, k: int) -> Tensor:
        return torch.randint(k, (n,))

    return {
        "mlp": lambda: (
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
            lambda n: (torch.randn(n, 6), labels(n, 3)),
            F.cross_entropy,
        ),
        "cnn": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(0), nn.Linear(64, 3)
            ),
            lambda n: (torch.randn(n, 2, 8, 8), labels(n, 3)),
            F.cross_entropy,
        ),
        "conv1d": lambda: (
            nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(0), nn.Linear(24, 3)),
            lambda n: (torch.randn(n, 2, 8), labels(n, 3)),
            F.cross_entropy,
        ),
        "tied": lambda: (
            Tied(),
            lambda n: (torch.randint(11, (n, 4)), torch.randint(11, (n, 4))),
            F.cross_entropy,
        ),
        "encoder": lambda: (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
            lambda n: (torch.randn(n, 3, 8), torch.randn(n, 3, 8)),
            F.mse_loss,
        ),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", models())
def test_gradients_of_each_sample(name: str, size: int) -> None:
    torch.manual_seed(1)
    model, batch, loss = models()[name]()
    x, y = batch(size)
    expected = loop(list(model.parameters()), lambda a, b: loss(model(a), b), x, y)
    found = shardmap.per_sample_grad(model, loss)(x, y)
    assert list(found) == [n for n, _ in model.named_parameters()]
    for value, wanted in zip(found.values(), expected, strict=True):
        close(value, wanted)
    flat = shardmap.per_sample_grad(model, loss, flat=True, chunk_size=5)(x, y)
    close(flat, torch.cat([e.flatten(1) for e in expected], 1))


def test_buffers_and_frozen_parameters_are_constants_and_unused_ones_have_zero_gradients() -> None:
    torch.manual_seed(2)
    model = Normed()
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # a batch of one: batch norm refuses a single vector
    expected = loop(list(chosen.values()), lambda a, b: F.cross_entropy(model(a[None])[0], b), x, y)
    found = shardmap.per_sample_grad(model, F.cross_entropy, batch_of_one=True)(x, y)
    assert list(found) == list(chosen)
    assert "frozen.weight" not in found
    for value, wanted in zip(found.values(), expected, strict=True):
        close(value, wanted)
    assert not found["unused.weight"].any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("*.weight", ["0.weight", "2.weight"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_parameters_are_chosen_by_name(params: Any, names: list[str]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(3, 6), torch.randint(3, (3,))
    found = shardmap.per_sample_grad(model, F.cross_entropy, params=params)(x, y)
    assert list(found) == names
    named = dict(model.named_parameters())
    for name, wanted in zip(
        names,
        loop([named[n] for n in names], lambda a, b: F.cross_entropy(model(a), b), x, y),
        strict=True,
    ):
        close(found[name], wanted)


def test_a_shared_parameter_is_found_under_each_of_its_names() -> None:
    torch.manual_seed(4)
    model = Tied()
    tokens = torch.randint(11, (3, 4))
    by_second_name = shardmap.per_sample_grad(model, F.cross_entropy, params="out.weight")(
        tokens, tokens
    )
    assert list(by_second_name) == ["embed.weight"]
    close(
        by_second_name["embed.weight"],
        shardmap.per_sample_grad(model, F.cross_entropy)(tokens, tokens)["embed.weight"],
    )


def test_a_function_of_parameters_is_as_torch_func() -> None:
    torch.manual_seed(5)
    params = {"w": torch.randn(4, 3), "b": [torch.randn(3)]}

    def fn(params: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.tanh(x @ params["w"] + params["b"][0]), y)

    x, y = torch.randn(7, 4), torch.randn(7, 3)
    expected = torch.func.vmap(torch.func.grad(fn), in_dims=(None, 0, 0))(params, x, y)
    found = shardmap.per_sample_grad(fn)(params, x, y)
    close(found["w"], expected["w"])
    close(found["b"][0], expected["b"][0])
    by_loss = shardmap.per_sample_grad(lambda p, x: torch.tanh(x @ p["w"] + p["b"][0]), F.mse_loss)(
        params, x, y
    )
    close(by_loss["w"], expected["w"])
    turned = shardmap.per_sample_grad(fn, in_dims=(1, 0))(params, x.T.contiguous(), y)
    close(turned["w"], expected["w"])
    close(shardmap.per_sample_grad(fn, trace="once")(params, x, y)["w"], expected["w"])


def test_a_tuple_is_the_models_arguments_and_a_dict_its_named_ones() -> None:
    torch.manual_seed(6)
    model = nn.Bilinear(3, 4, 2)
    a, b, y = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 2)
    expected = loop(list(model.parameters()), lambda a, b, y: F.mse_loss(model(a, b), y), a, b, y)
    close(shardmap.per_sample_grad(model, F.mse_loss)((a, b), y)["weight"], expected[0])
    close(
        shardmap.per_sample_grad(model, F.mse_loss)({"input1": a, "input2": b}, y)["weight"],
        expected[0],
    )


def test_aux_comes_back_beside_the_gradients() -> None:
    torch.manual_seed(7)
    model = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))

    def loss(logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(logits, label), {"hit": logits.argmax() == label, "logits": logits}

    gradients, aux = shardmap.per_sample_grad(model, loss, has_aux=True)(x, y)
    close(
        gradients["weight"],
        loop([model.weight], lambda a, b: F.cross_entropy(model(a), b), x, y)[0],
    )
    assert torch.equal(aux["hit"], model(x).argmax(1) == y)
    close(aux["logits"], model(x).detach())
    assert not aux["logits"].requires_grad


def test_it_works_without_grad_mode_and_follows_new_parameters() -> None:
    torch.manual_seed(8)
    model = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    gradients = shardmap.per_sample_grad(model, F.mse_loss, trace="once")
    with torch.no_grad():
        close(gradients(x, y)["weight"], loop_in_grad(model, x, y))
    model.weight = nn.Parameter(torch.randn(2, 3))
    close(gradients(x, y)["weight"], loop_in_grad(model, x, y))
    with torch.no_grad():
        model.weight += 1
    close(gradients(x, y)["weight"], loop_in_grad(model, x, y))


def loop_in_grad(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return loop([model.weight], lambda a, b: F.mse_loss(model(a), b), x, y)[0]


def test_options_are_those_of_vmap() -> None:
    torch.manual_seed(9)
    model = nn.Linear(3, 2)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    expected = loop([model.weight], lambda a, b: F.mse_loss(model(a), b), x, y)[0]
    close(
        shardmap.per_sample_grad(model, F.mse_loss, devices=["cpu", "cpu"], chunk_size=2)(x, y)[
            "weight"
        ],
        expected,
    )
    close(
        shardmap.per_sample_grad(model, F.mse_loss, reduce="mean")(x, y)["weight"], expected.mean(0)
    )
    with pytest.raises(OptionError, match="chunk_size=0 is not positive"):
        shardmap.per_sample_grad(model, F.mse_loss, chunk_size=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk'"):
        shardmap.per_sample_grad(model, F.mse_loss, **{"chunk": 3})  # pyright: ignore[reportArgumentType]


def test_calls_can_be_planned() -> None:
    torch.manual_seed(10)
    model = nn.Linear(3, 2)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    expected = loop([model.weight], lambda a, b: F.mse_loss(model(a), b), x, y)[0]
    plan = shardmap.per_sample_grad(model, F.mse_loss, chunk_size=2).plan(x, y)
    assert plan.lanes[0].chunks == 4
    close(plan.run()["weight"], expected)
    clipped = shardmap.per_sample_grad(model, F.mse_loss, reduce="norm", params="weight").plan(x, y)
    close(clipped.run(), expected.flatten(1).norm(dim=1))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    of_function = shardmap.per_sample_grad(lambda p, x: x @ p["weight"].T + p["bias"], F.mse_loss)
    close(of_function.plan(weights, x, y).run()["weight"], expected)


MODEL = nn.Sequential(nn.Linear(3, 2))
FROZEN = copy.deepcopy(MODEL).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: shardmap.per_sample_grad(3, F.mse_loss),
            "3 is a int; pass a module or a function",
        ),
        (lambda: shardmap.per_sample_grad(MODEL, "mse"), "loss='mse' is a str; pass a function"),
        (
            lambda: shardmap.per_sample_grad(MODEL, F.mse_loss, params="0.wieght"),
            "fits no parameter of Sequential; did you mean '0.weight'?",
        ),
        (lambda: shardmap.per_sample_grad(MODEL, F.mse_loss, params=[]), "params=[]; pass a name"),
        (lambda: shardmap.per_sample_grad(FROZEN, F.mse_loss), "all its parameters are frozen"),
        (
            lambda: shardmap.per_sample_grad(FROZEN, F.mse_loss, params="0.weight"),
            "'0.weight' is frozen",
        ),
        (
            lambda: shardmap.per_sample_grad(FROZEN, F.mse_loss, params="*"),
            "fits frozen parameters only",
        ),
        (lambda: shardmap.per_sample_grad(nn.ReLU(), F.mse_loss), "it has no parameters"),
        (
            lambda: shardmap.per_sample_grad(F.mse_loss, params="w"),
            "selects a module's parameters by name",
        ),
        (
            lambda: shardmap.per_sample_grad(MODEL)(torch.randn(2, 3)),
            "the loss of one sample is torch.float32 (2,); return one",
        ),
        (
            lambda: shardmap.per_sample_grad(MODEL, lambda o: 1.0)(torch.randn(2, 3)),
            "the loss of one sample is a float",
        ),
        (
            lambda: shardmap.per_sample_grad(MODEL, lambda o: o.sum(), has_aux=True)(
                torch.randn(2, 3)
            ),
            "return (loss, aux)",
        ),
        (
            lambda: shardmap.per_sample_grad(lambda p, x: x.sum())([1], torch.randn(2, 3)),
            "pytree of floating-point tensors",
        ),
    ],
)
def test_mistakes_are_named_with_their_remedy(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TransformError, match=r"shardmap\.per_sample_grad\(.*" + re.escape(text)):
        make()
