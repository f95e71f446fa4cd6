"""`trace="auto"`: how often the function runs, what is replayed directly, and what is let go."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from shardmap.call.guards import Guards
from shardmap.rules import registry
from tests.call.runs import counting

SCALE = 2.0


def loop(f: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    return torch.stack([f(*r) for r in zip(*rows, strict=True)])


def often(mapped: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Call a map until it must have been recorded again."""
    for _ in range(20):
        mapped(x)


def test_the_function_runs_for_two_recordings_and_then_now_and_then() -> None:
    def function(r: Tensor) -> Tensor:
        return r.sin() + 1

    mapped = shardmap.vmap(function)
    runs = []
    for k in range(12):
        x = torch.randn(5, 3) + k
        with counting(function) as calls:
            found = mapped(x)
        assert torch.equal(found, x.sin() + 1)
        runs.append(calls())
    # The first and the last sample; again; then each time that the number of calls has doubled.
    assert runs == [2, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_function_made_anew_at_each_step_is_known_again() -> None:
    """As in a training loop: a closure over weights that each step makes."""
    runs = []

    def step(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        def loss(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return (a @ w - b).square()

        with counting(loss) as calls:
            found = shardmap.vmap(lambda a, b: torch.func.grad(loss)(weight, a, b))(x, y)
        runs.append(calls())
        return found

    weight = torch.ones(3, requires_grad=True)
    for _ in range(12):
        x, y = torch.randn(7, 3), torch.randn(7)
        found = step(weight, x, y)
        expected = 2 * (x @ weight - y)[:, None] * x
        torch.testing.assert_close(found, expected.detach())
        weight = (weight - 0.1 * found.mean(0)).detach().requires_grad_()
    assert sum(runs) <= 9, "the first two weights, recorded twice, and now and then again"
    assert runs.count(0) >= 4


def test_weights_that_are_rebound_need_no_recording() -> None:
    model = nn.Linear(3, 2)

    def function(r: Tensor) -> Tensor:
        return model(r).sum()

    mapped, runs = shardmap.vmap(function), []
    for _ in range(14):
        x = torch.randn(4, 3)
        with counting(function) as calls:
            found = mapped(x)
        torch.testing.assert_close(found, model(x).sum(1))
        model.weight = nn.Parameter(torch.randn(2, 3))
        runs.append(calls())
    assert sum(runs[9:]) == 0, "five further sets of weights"


def test_a_parameter_shared_by_another_name_later_is_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mapped = shardmap.vmap(lambda r: torch.func.functional_call(model, {}, (r,)))
    for k in range(6):
        if k == 4:
            model[1].weight = model[0].weight
        x = torch.randn(4, 3)
        torch.testing.assert_close(mapped(x), model(x))


def test_a_model_that_is_deleted_is_freed() -> None:
    def use() -> tuple[weakref.ref[object], weakref.ref[object]]:
        model = nn.Linear(3, 2)
        mapped = shardmap.vmap(lambda r: model(r))
        for _ in range(4):
            mapped(torch.randn(4, 3))
        return weakref.ref(model), weakref.ref(model.weight)

    whose, weight = use()
    gc.collect()
    assert whose() is None
    assert weight() is None


def test_many_functions_do_not_pile_up() -> None:
    kept = []
    for _ in range(40):
        model = nn.Linear(2, 2)
        for _ in range(3):
            shardmap.vmap(lambda r, m=model: m(r))(torch.randn(3, 2))
        kept.append(weakref.ref(model))
    del model
    gc.collect()
    assert sum(ref() is not None for ref in kept) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1],
        lambda x: x[:0],
        lambda x: torch.cat([x, x]),
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: x.clone().requires_grad_(),
        lambda x: nn.Parameter(x),
        lambda x: x[:, :2],
        lambda x: torch.complex(x, x).conj(),
    ],
)
def test_another_kind_of_argument_is_no_direct_replay(change: Callable[[Tensor], Tensor]) -> None:
    mapped = shardmap.vmap(lambda r: (r * 2).cumsum(0), in_dims=0)
    x = torch.arange(15.0).view(5, 3)
    for _ in range(5):
        assert torch.equal(mapped(x), (x * 2).cumsum(1))
    other = change(x)
    for _ in range(2):
        found = mapped(other)
        assert torch.equal(found, (other * 2).cumsum(1))
        assert found.dtype == other.dtype
        assert found.requires_grad == other.requires_grad
        assert torch.equal(mapped(x), (x * 2).cumsum(1))


def test_under_modes_and_transforms_nothing_is_direct() -> None:
    mapped = shardmap.vmap(lambda r: r.sin().sum())
    x = torch.randn(4, 3)
    for _ in range(5):
        mapped(x)
    torch.testing.assert_close(torch.func.grad(lambda t: mapped(t).sum())(x), x.cos())
    torch.testing.assert_close(torch.func.vmap(mapped)(x[None].repeat(2, 1, 1))[1], x.sin().sum(1))
    with torch.inference_mode():
        assert torch.equal(mapped(x), loop(lambda r: r.sin().sum(), x))
    _, tangent = torch.func.jvp(mapped, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, x.cos().sum(1))
    with torch.autocast("cpu"):
        assert torch.equal(mapped(x), loop(lambda r: r.sin().sum(), x))


def test_two_arguments_that_are_one_tensor() -> None:
    mapped = shardmap.vmap(lambda a, b: a * b + a)
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    for first, second in [(x, y)] * 4 + [(x, x), (y, x), (y, y), (x, y)]:
        assert torch.equal(mapped(first, second), first * second + first)


def test_the_results_of_two_calls_are_two_tensors() -> None:
    mapped = shardmap.vmap(lambda r: (r * 2, torch.ones(2)))
    x = torch.randn(4, 3)
    for _ in range(5):
        kept = mapped(x)
    again = mapped(x + 1)
    kept[1].zero_()
    assert torch.equal(kept[0], x * 2)
    assert torch.equal(again[0], (x + 1) * 2)
    assert torch.equal(again[1], torch.ones(4, 2))


def test_a_branch_takes_its_path_at_each_call() -> None:
    scales = [2.0, 3.0]
    mapped = shardmap.vmap(lambda r: r * scales[0] if r.sum() > 0 else r * scales[1])
    for k in range(6):
        scales[1] = 3.0 + k
        x = torch.randn(9, 3)
        expected = torch.stack([r * (scales[0] if r.sum() > 0 else scales[1]) for r in x])
        assert torch.equal(mapped(x), expected)


def test_a_plan_says_if_the_function_is_replayed() -> None:
    x = torch.randn(4, 3)
    text = shardmap.plan(lambda r: r * SCALE)(x).explain()
    assert "then replayed while what it reads is unchanged" in text
    text = shardmap.plan(lambda r: r * eval("SCALE"))(x).explain()
    assert "recorded at each call, because it calls builtins.eval" in text
    text = shardmap.plan(lambda r: r if r.sum() > 0 else -r)(x).explain()
    assert "then replayed while what it reads is unchanged" in text
    assert "trace='once' keeps their paths" in text


def test_a_change_that_no_guard_sees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    global SCALE
    mapped = shardmap.vmap(lambda r: torch.full((2,), SCALE) * r)
    x = torch.randn(3, 2)
    for _ in range(4):
        mapped(x)
    blind = Guards._tensors
    monkeypatch.setattr(Guards, "check", lambda self, parts: blind(self, parts))
    SCALE = 5.0
    try:
        with pytest.raises(errors.StaleReplayError, match="trace='each'"):
            often(mapped, x)
        monkeypatch.undo()
        assert torch.equal(mapped(x), x * 5), "recorded at each call from now on"
        remedy = shardmap.vmap(lambda r: torch.full((2,), SCALE) * r, trace="each")
        assert torch.equal(remedy(x), x * 5)
    finally:
        SCALE = 2.0


ASKING: dict[str, Callable[[Tensor], Tensor]] = {
    "of samples": lambda r: torch.full((2,), SCALE) * r if r.sum() > -99 else r,
    "of what they share": lambda r: torch.full((2,), SCALE) * r if ONES.sum() > 0 else r,
    "checks": lambda r: torch.distributions.Normal(r, SCALE).log_prob(r).sum(),
}
ONES = torch.ones(2)


@pytest.mark.parametrize("name", ASKING)
def test_a_change_that_no_guard_sees_is_an_error_if_it_asks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    global SCALE
    mapped = shardmap.vmap(ASKING[name])
    for _ in range(4):
        mapped(torch.randn(3, 2))
    blind = Guards._tensors
    monkeypatch.setattr(Guards, "check", lambda self, parts: blind(self, parts))
    SCALE = 5.0
    try:
        with pytest.raises(errors.StaleReplayError, match="trace='each'"):
            often(mapped, torch.randn(3, 2))
    finally:
        SCALE = 2.0


TRACKED = True


def test_two_calls_that_are_written_alike_are_told_apart_in_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That an argument requires grad is not written: the text says that python's values differ."""
    global TRACKED

    def function(r: Tensor) -> Tensor:
        scaled = r * torch.ones(2, requires_grad=TRACKED)
        return scaled.detach() + (2 if TRACKED else 5)

    mapped = shardmap.vmap(function)
    for _ in range(4):
        mapped(torch.randn(3, 2))
    blind = Guards._tensors
    monkeypatch.setattr(Guards, "check", lambda self, parts: blind(self, parts))
    TRACKED = False
    try:
        with pytest.raises(
            errors.StaleReplayError,
            match=r"\(`.*mul.*` takes other values from python for one sample than for another\)",
        ):
            often(mapped, torch.randn(3, 2))
    finally:
        TRACKED = True


def test_many_threads_share_one_map() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    mapped = shardmap.vmap(lambda r: model(r))
    wrong: list[object] = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for k in range(30):
            x = torch.randn(3 + (seed + k) % 3, 3, generator=generator)
            with torch.no_grad():
                found = mapped(x)
            if not torch.allclose(found, model(x), atol=1e-6):
                wrong.append((seed, k))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_of_the_function_is_raised_each_time() -> None:
    def function(r: Tensor) -> Tensor:
        if SCALE > 100:
            raise KeyError("too large")
        return r * SCALE

    global SCALE
    mapped = shardmap.vmap(function)
    x = torch.randn(3, 2)
    try:
        for value in (2.0, 2.0, 2.0, 200.0, 200.0, 3.0, 3.0, 3.0, 200.0):
            SCALE = value
            if value > 100:
                with pytest.raises(KeyError):
                    mapped(x)
            else:
                assert torch.equal(mapped(x), x * value)
    finally:
        SCALE = 2.0


def test_weights_may_be_swapped() -> None:
    """`swap_tensors` refuses tensors with weak references to them."""
    model = nn.Linear(4, 4)
    mapped = shardmap.vmap(model)
    for _ in range(6):
        x = torch.randn(3, 4)
        torch.testing.assert_close(mapped(x), model(x))
        torch.utils.swap_tensors(model.weight, nn.Parameter(torch.randn(4, 4)))


def test_cleared_caches_and_new_rules_are_no_direct_replays() -> None:
    def function(r: Tensor) -> Tensor:
        return torch.special.expit(r)

    mapped = shardmap.vmap(function)
    x = torch.randn(4, 3)
    for _ in range(5):
        assert torch.equal(mapped(x), x.sigmoid())
    shardmap.clear_caches()
    with counting(function) as calls:
        assert torch.equal(mapped(x), x.sigmoid())
    assert calls() > 0
    for _ in range(4):
        mapped(x)
    served: list[int] = []

    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        (given,) = args
        served.append(1)
        return b.call(torch.sigmoid, given, shape=given.shape, dtype=given.dtype)

    original = registry.lookup(torch.ops.aten.sigmoid.default)
    assert original is not None
    try:
        shardmap.batching_rule(torch.ops.aten.sigmoid.default, replace=True)(rule)
        assert torch.equal(mapped(x), x.sigmoid())
        assert served, "the rule that is registered now"
    finally:
        shardmap.batching_rule(torch.ops.aten.sigmoid.default, replace=True)(original)


@pytest.mark.parametrize("check", ["first", "off"])
@pytest.mark.parametrize("size", [1, 5])
def test_equal_samples_prove_nothing(size: int, check: str) -> None:
    """A number that python reads unseen is the same for them, and another later."""
    mapped = shardmap.vmap(lambda r: r * float(repr(r[0])[7:-1]), check=check)
    alike = torch.ones(size, 3)
    for _ in range(4):
        assert torch.equal(mapped(alike), alike)
    for k in (2.0, 3.0, 0.5):
        assert torch.equal(mapped(alike * k), alike * k * k)


class Weight:
    def __init__(self, value: float) -> None:
        self.value = value


WEIGHTS: list[Weight] = []


def by_address(row: Tensor) -> Tensor:
    for weight in sorted(WEIGHTS, key=id):
        row = row * weight.value + 1
    return row


def by_mapped_address(row: Tensor) -> Tensor:
    for _, value in sorted(zip(map(id, WEIGHTS), [w.value for w in WEIGHTS], strict=True)):
        row = row * value + 1
    return row


def by_hash(row: Tensor) -> Tensor:
    order: Callable[[object], int] = hash
    for weight in sorted(WEIGHTS, key=order):
        row = row * weight.value + 1
    return row


@pytest.mark.parametrize("function", [by_address, by_mapped_address, by_hash])
def test_the_order_of_addresses_is_that_of_the_call(function: Callable[[Tensor], Tensor]) -> None:
    """Another function calls `id`, which no profile function sees: recorded at each call."""
    mapped = shardmap.vmap(function)
    orders = set()
    for call in range(40):
        WEIGHTS[:] = [Weight(value) for value in (2.0, 3.0, 5.0, 7.0)]
        others = [Weight(k) for k in range(call * 7 % 50)][::2]  # the next addresses are others
        x = torch.randn(3, 2)
        assert torch.equal(mapped(x), loop(function, x))
        orders.add(tuple(w.value for w in sorted(WEIGHTS, key=id)))
        del others
    assert len(orders) > 1
    text = shardmap.plan(function)(torch.randn(3, 2)).explain()
    assert "recorded at each call, because it hands " in text


def test_a_call_of_a_builtin_function_that_reads_its_arguments_is_replayed() -> None:
    """Handing on `len` or `float` needs no recording; nor does a name of one's own like `id`."""
    text = shardmap.plan(lambda r: r * sum(map(len, ["ab", "c"])))(torch.randn(3, 2)).explain()
    assert "then replayed while what it reads is unchanged" in text
    id = float
    text = shardmap.plan(lambda r: r * sum(map(id, ["1", "2"])))(torch.randn(3, 2)).explain()
    assert "then replayed while what it reads is unchanged" in text


class Meter:
    """Measures what the garbage collector takes, as libraries do that meter a program."""

    def __init__(self) -> None:
        self.began, self.called = 0.0, 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        self.began = time.perf_counter()
        self.called += 1

    def method(self, phase: str, info: dict[str, int]) -> None:
        self(phase, info)


def of_function(meter: Meter) -> Callable[[str, dict[str, int]], None]:
    return lambda phase, info: meter(phase, info)


@contextlib.contextmanager
def metered(callback: Callable[[str, dict[str, int]], None]) -> Iterator[None]:
    """Let the collector call a function, and collect all the time."""
    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(5)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.method, of_function])
def test_what_the_garbage_collector_calls_is_no_part_of_the_function(form: Any) -> None:
    meter = Meter()

    def function(r: Tensor) -> Tensor:
        return r * len([[k] for k in range(50)])

    with metered(form(meter)):
        text = shardmap.plan(function)(torch.randn(3, 2)).explain()
    assert meter.called
    assert "then replayed while what it reads is unchanged" in text


@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.method, of_function])
def test_a_function_that_calls_what_the_collector_calls_reads_what_it_reads(form: Any) -> None:
    meter = Meter()
    callback = form(meter)

    def function(r: Tensor) -> Tensor:
        callback("start", {})
        return r * (meter.began > 0)

    with metered(callback):
        text = shardmap.plan(function)(torch.randn(3, 2)).explain()
    assert "recorded at each call, because it calls time.perf_counter" in text


def test_checkpointed_functions_are_replayed() -> None:
    """A checkpoint reads the state of torch's generator, only to give it back."""
    layer = nn.Linear(3, 3)

    def function(x: Tensor) -> Tensor:
        h = checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=False)
        assert isinstance(h, Tensor)
        return torch.tanh(layer(h))

    mapped = shardmap.vmap(function)
    with counting(function) as calls:
        for _ in range(7):
            rows = torch.rand(5, 3, requires_grad=True)
            found = mapped(rows)
            counted = calls()
            wanted = torch.stack([function(row) for row in rows])
            torch.testing.assert_close(found, wanted)
            leaves = rows, *layer.parameters()
            for a, b in zip(
                torch.autograd.grad(found.square().sum(), leaves),
                torch.autograd.grad(wanted.square().sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            assert calls() >= counted + 5
        counted = calls()
        mapped(rows)
        mapped(rows)
        assert calls() - counted <= 2  # the 8th call records again


def test_reading_the_state_beside_a_checkpoint_is_seen() -> None:
    def function(x: Tensor) -> Tensor:
        h = checkpoint(torch.tanh, x, use_reentrant=False)
        assert isinstance(h, Tensor)
        return h * torch.get_rng_state().sum()

    with pytest.raises(errors.EscapeError, match="read it outside of the function"):
        shardmap.vmap(function)(torch.rand(3, 2))
