"""Calls that go from their arguments to the replay directly: nested arguments, and questions."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state
from torch.utils import _pytree as pytree

import shardmap
from shardmap.call import direct
from shardmap.call.fingerprint import fingerprint
from tests.call.runs import counting

SHARED = torch.linspace(-1, 1, 4)
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
LSTM, CELL = nn.LSTM(4, 3), nn.GRUCell(4, 3)


@pytest.fixture(params=["auto", "once"])
def trace(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def weights() -> None:
    for model in (MODEL, LSTM, CELL):
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)


def of_model(weights: dict[str, Tensor], row: Tensor) -> Tensor:
    return functional_call(MODEL, weights, (row,))


def loss(weights: dict[str, Tensor], row: Tensor, *, target: Tensor) -> Tensor:
    return (of_model(weights, row) - target).square().sum()


def ensemble() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    base = copy.deepcopy(MODEL).to("meta")
    members = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(4)]
    weights, buffers = stack_module_state(members)

    def member(w: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (w, b), (x,))

    return member, ({k: t.detach() for k, t in weights.items()}, buffers, torch.randn(2, 4))


def rows(seed: int, size: int = 5) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def detached() -> dict[str, Tensor]:
    return {name: t.detach() for name, t in MODEL.named_parameters()}


def in_a_dict(seed: int) -> Any:
    return ({"a": rows(seed), "b": [rows(seed + 1), {"c": rows(seed + 2)}]},), {}


def loop(f: Callable[..., Any], args: Any, kwargs: Any, dims: Any, kw_dims: Any) -> Any:
    """The results of each sample, stacked."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    where = pytree.tree_leaves((dims, kw_dims))
    size = next(t.shape[d] for t, d in zip(leaves, where, strict=True) if d is not None)
    found = []
    for k in range(size):
        sample = [t if d is None else t.select(d, k) for t, d in zip(leaves, where, strict=True)]
        a, named = pytree.tree_unflatten(sample, structure)
        found.append(f(*a, **named))
    return pytree.tree_map(lambda *ts: torch.stack(ts), *found)


NESTED: dict[str, tuple[Callable[..., Any], Callable[[int], Any], Any, Any]] = {
    "a dict and a list in it": (
        lambda d: d["a"] * d["b"][0] + d["b"][1]["c"],
        in_a_dict,
        ({"a": 0, "b": [0, {"c": 0}]},),
        {},
    ),
    "weights in a dict": (of_model, lambda s: ((detached(), rows(s)), {}), None, {}),
    "gradients, a named target": (
        grad(loss),
        lambda s: ((detached(), rows(s)), {"target": rows(s + 9)[:, :3]}),
        None,
        {"target": 0},
    ),
    "numbers and nothing": (
        lambda r, p: r * p[0] if p[1] is None else r,
        lambda s: ((rows(s), [2.5, None]), {}),
        (0, [None, None]),
        {},
    ),
    "another dimension": (
        lambda t: t[0] - t[1],
        lambda s: (((rows(s).t(), rows(s + 3)),), {}),
        ((1, 0),),
        {},
    ),
    "one tensor twice": (lambda a, b: a[0] * b, lambda s: (lambda x: (([x], x), {}))(rows(s)), ([0], 0), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested_arguments_are_replayed_directly(
    name: str, monkeypatch: pytest.MonkeyPatch, trace: str
) -> None:
    function, arguments, dims, kw_dims = NESTED[name]
    if dims is None:
        dims = ({key: None for key in detached()}, 0)
    mapped = shardmap.vmap(function, in_dims=dims, kw_in_dims=kw_dims or None, trace=trace)
    ran = []
    run = direct.Direct.run
    monkeypatch.setattr(direct.Direct, "run", lambda *a: ran.append(1) or run(*a))
    for seed in range(9):
        args, kwargs = arguments(seed)
        found = mapped(*args, **kwargs)
        want = loop(function, args, kwargs, dims, kw_dims)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b)
    assert len(ran) >= 3


def test_another_structure_or_number_is_no_direct_replay(trace: str) -> None:
    def function(d: dict[str, Any], scale: float) -> Tensor:
        x, y = d.values()
        return x * scale - y

    mapped = shardmap.vmap(function, in_dims=(0, None), trace=trace)
    for _ in range(6):
        a, b = rows(0), rows(1)
        assert torch.equal(mapped({"a": a, "b": b}, 2.0), a * 2 - b)
    assert torch.equal(mapped({"b": b, "a": a}, 2.0), b * 2 - a)
    assert torch.equal(mapped({"a": a, "b": b}, 3.0), a * 3 - b)
    assert torch.equal(mapped({"a": a, "b": b}, -0.0), a * -0.0 - b)
    assert torch.equal(mapped({"a": a, "c": b}, 2.0), a * 2 - b)
    a = a.requires_grad_()
    found = mapped({"a": a, "b": b}, 2.0)
    (got,) = torch.autograd.grad(found.sum(), a)
    assert torch.equal(got, torch.full_like(a, 2.0))


def test_an_ensemble_is_replayed_directly(trace: str) -> None:
    member, (weights, buffers, x) = ensemble()
    mapped = shardmap.vmap(member, in_dims=(0, 0, None), trace=trace)
    for seed in range(6):
        weights = {k: t + 0.1 * seed for k, t in weights.items()}
        x = torch.randn(2, 4)
        with counting(member) as calls:
            found = mapped(weights, buffers, x)
        want = [member({k: t[i] for k, t in weights.items()}, {}, x) for i in range(4)]
        torch.testing.assert_close(found, torch.stack(want))
    assert calls() == 0


DISTRIBUTIONS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda r: (
        torch.distributions.Normal(r, 1.0, validate_args=True).log_prob(r * 2).sum()
    ),
    "categorical": lambda r: torch.distributions.Categorical(logits=r).entropy(),
    "divergence": lambda r: torch.distributions.kl_divergence(
        torch.distributions.Gamma(r.exp(), 1.0), torch.distributions.Gamma(1.0, r.exp())
    ).sum(),
    "solve": lambda r: torch.linalg.solve(torch.outer(r, r) + torch.eye(4), r),
    "loss": lambda r: nn.functional.gaussian_nll_loss(r, SHARED, r.exp()),
    "recurrent": lambda r: LSTM(r[None])[0].sum(0),
    "cell": lambda r: CELL(r),
    "assertion": lambda r: r.log1p() if bool((r > -9).all()) else r,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_question_that_all_answer_alike_needs_no_recording(name: str, trace: str) -> None:
    function = DISTRIBUTIONS[name]
    mapped = shardmap.vmap(function, trace=trace)
    with torch.no_grad():
        for seed in range(7):
            x = rows(seed)
            with counting(function) as calls:
                found = mapped(x)
            torch.testing.assert_close(found, torch.stack([function(r) for r in x]), equal_nan=True)
    assert calls() == 0


def test_an_error_of_a_later_call_is_the_loops(trace: str) -> None:
    mapped = shardmap.vmap(DISTRIBUTIONS["normal"], trace=trace)
    for seed in range(6):
        mapped(rows(seed))
    bad = rows(6)
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        mapped(bad)
    x = rows(7)
    want = torch.stack([DISTRIBUTIONS["normal"](r) for r in x])
    torch.testing.assert_close(mapped(x), want)


def test_a_singular_matrix_of_a_later_call_is_the_loops_error(trace: str) -> None:
    mapped = shardmap.vmap(lambda m: torch.linalg.inv(m), trace=trace)
    for seed in range(6):
        m = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mapped(m), torch.linalg.inv(m))
    m[2] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        mapped(m)


@pytest.mark.parametrize("ways", ["one", "two", "in turn", "now and then"])
def test_branches_of_later_calls(ways: str, trace: str) -> None:
    """Samples that leave the recorded path are served by theirs, as at the first call."""
    scale = [2.0, 3.0]

    def function(r: Tensor) -> Tensor:
        return r.sin() * scale[0] if r.sum() > 0 else r.exp() * scale[1]

    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(20):
        x = rows(seed, 7)
        sign = x.sum(1, keepdim=True).sign()
        if ways == "one" or (ways == "now and then" and seed % 5):
            x = x * sign
        elif ways == "in turn":
            x = x * sign * (-1) ** seed
        if seed % 6 == 5:
            scale[seed % 2] += 1
        torch.testing.assert_close(mapped(x), torch.stack([function(r) for r in x]))


def test_gradients_from_outside_are_the_loops(trace: str) -> None:
    """A few steps of training, by maps that are replayed directly and by the loop."""
    weight = torch.randn(4, requires_grad=True)
    twin = weight.detach().clone().requires_grad_()

    def function(r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale = (r * w).sum().sin()
        return (r * w).tanh().sum() * scale, w.detach() * r

    mapped = shardmap.vmap(lambda r: function(r, weight), trace=trace)
    for seed in range(8):
        x = rows(seed).requires_grad_(seed % 3 == 0)
        found = mapped(x)
        want = [torch.stack(t) for t in zip(*[function(r, twin) for r in x], strict=True)]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
            assert a.requires_grad == b.requires_grad
        inputs = (weight, x) if x.requires_grad else (weight,)
        others = (twin, x) if x.requires_grad else (twin,)
        got = torch.autograd.grad(found[0].square().sum(), inputs)
        expected = torch.autograd.grad(want[0].square().sum(), others)
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            weight -= 0.1 * got[0]
            twin -= 0.1 * expected[0]


def test_draws_are_those_of_a_recording_at_each_call(trace: str) -> None:
    generator = torch.Generator()

    def function(r: Tensor) -> Tensor:
        noise = torch.randn(4, generator=generator)
        return nn.functional.dropout(r * 2 + torch.rand(4), 0.4) + noise

    each = shardmap.vmap(function, randomness="different", trace="each")
    mapped = shardmap.vmap(function, randomness="different", trace=trace)
    for seed in range(8):
        found = []
        for f in (each, mapped):
            torch.manual_seed(seed)
            generator.manual_seed(seed + 1)
            found.append((f(rows(seed)), f(rows(seed)), torch.rand(2)))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(found[0][0], found[0][1])


KEEPING: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "product": lambda w: lambda r: r * w,
    "draw": lambda w: lambda r: r * w + torch.rand(4),
    "question": lambda w: lambda r: r * w if r.sum() < 99 else r,
    "solve": lambda w: lambda r: torch.linalg.solve(torch.eye(4) + w.diag() / 9, r),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", KEEPING)
def test_nothing_of_a_call_is_kept_alive(name: str, grad: bool, trace: str) -> None:
    def calls() -> list[weakref.ref[Tensor]]:
        weight, x = torch.rand(4, requires_grad=grad), rows(0)
        mapped = shardmap.vmap(KEEPING[name](weight), randomness="different", trace=trace)
        for _ in range(8):
            found = mapped(x)
        return [weakref.ref(t) for t in (weight, x, found)]

    kept = calls()
    gc.collect()
    assert [t() is None for t in kept] == [True] * 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_that_are_used_between_calls_are_replayed(kind: type[nn.RNNBase]) -> None:
    """`functional_call` puts other weights into a layer, which then lists its weights anew."""
    layer = kind(4, 3)

    def function(weights: dict[str, Tensor], r: Tensor) -> Tensor:
        return functional_call(layer, weights, (r[None],))[0].square().sum()

    def plain(r: Tensor) -> Tensor:
        return layer(r[None])[0].square().sum()

    slopes = grad(function)
    mapped, values = shardmap.vmap(slopes, in_dims=(None, 0)), shardmap.vmap(plain)
    for seed in range(9):
        x = rows(seed)
        weights = {name: t.detach() + seed for name, t in layer.named_parameters()}
        with counting(function) as calls, counting(plain) as plain_calls, torch.no_grad():
            found, results = mapped(weights, x), values(x)
        for k, r in enumerate(x):
            torch.testing.assert_close({n: t[k] for n, t in found.items()}, slopes(weights, r))
            torch.testing.assert_close(results[k], plain(r).detach())
        if seed == 4:  # a parameter of the layer's own is another one from now on
            layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l0.detach() * 2)
        with torch.no_grad():
            layer.bias_hh_l0.add_(1)
    assert not calls()
    assert not plain_calls()


def test_a_function_that_reads_the_list_of_weights_follows_it() -> None:
    layer = nn.RNN(4, 3)
    layer._flat_weights = list(layer._flat_weights)
    mapped = shardmap.vmap(lambda r: layer._flat_weights[2] * r[:3])
    for seed in range(7):
        layer._flat_weights[2] = torch.full((3,), float(seed))
        x = rows(seed)
        torch.testing.assert_close(mapped(x), x[:, :3] * seed)


def test_a_map_inside_that_is_used_between_calls_is_replayed(trace: str) -> None:
    """What maps remember of their calls is not among what functions read."""
    inner = {mode: shardmap.vmap(torch.sin, trace=mode) for mode in ("auto", "once")}

    def function(r: Tensor) -> Tensor:
        return inner["auto"](r) * inner["once"](r)

    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(6):
        x = rows(seed)
        with counting(function) as calls:
            torch.testing.assert_close(mapped(x), x.sin() ** 2)
        for each in inner.values():
            each(x[0])
            each(x)
    assert calls() == 0


def test_a_map_inside_is_known_by_what_it_does() -> None:
    """A store of it is resumed after the map has been called elsewhere."""
    inner = shardmap.vmap(torch.sin)
    known = fingerprint(inner)
    for seed in range(5):
        inner(rows(seed))
        assert fingerprint(inner) == known
    assert fingerprint(shardmap.vmap(torch.cos)) != known


def test_once_compares_what_is_read_before_a_direct_replay() -> None:
    settings = {"scale": 2.0}
    fixed = torch.ones(4)

    def function(r: Tensor, w: Tensor) -> Tensor:
        return r * w * settings["scale"] + fixed

    mapped = shardmap.vmap(function, in_dims=(0, None), trace="once")
    for seed in range(8):
        settings["scale"] += seed == 4
        x, w = rows(seed), rows(seed)[0] if seed % 3 else fixed
        torch.testing.assert_close(mapped(x, w), torch.stack([function(r, w) for r in x]))
        torch.testing.assert_close(mapped(x, w), torch.stack([function(r, w) for r in x]))


@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}], ids=str)
def test_what_all_samples_share_is_computed_without_gradients(
    trace: str, options: dict[str, Any]
) -> None:
    """The scale of a fake quantisation may not require one: the function passes a detached one."""
    layer = nn.Linear(4, 3)

    def gradient(row: Tensor) -> Any:
        scale = layer.weight.detach().abs().amax(1) / 127
        zero = torch.zeros(3, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, -128, 127)
        loss = nn.functional.linear(row, weight, layer.bias).square().sum()
        return torch.autograd.grad(loss, tuple(layer.parameters()))

    mapped = shardmap.vmap(gradient, trace=trace, **options)
    for seed in range(5):
        x = rows(seed)
        for got, own in zip(mapped(x), zip(*map(gradient, x), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(own))
        with torch.no_grad():
            layer.bias += 1
    assert "fake_quantize" in shardmap.plan(gradient, trace=trace, **options)(rows(0)).explain()
