"""Recordings of many shapes are remembered, and none of them goes stale."""

import gc
import weakref

import pytest
import torch

import shardmap
from shardmap import Ragged

LENGTHS = (3, 1, 4, 1, 5, 3, 2, 5)


def samples(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, generator=generator) * scale for n in LENGTHS]


@pytest.fixture
def calls(monkeypatch):
    """The lengths of the samples that are recorded."""
    from shardmap.call import execute

    found = []
    record = execute.record

    def noting(func, batch, *rest, **named):
        found.append(int(batch.tensors()[0].shape[1]))
        return record(func, batch, *rest, **named)

    monkeypatch.setattr(execute, "record", noting)
    return found


def check(function, rows, **options):
    torch.testing.assert_close(
        shardmap.vmap(function, **options)(Ragged(rows)), torch.stack([function(r) for r in rows])
    )


def test_of_known_shapes_one_is_recorded_at_each_call(calls):
    weights = torch.randn(2)

    def function(x):
        return (x @ weights).square().sum()

    check(function, samples())
    assert sorted(calls) == [1, 2, 3, 4, 5]
    for _ in range(2):
        calls.clear()
        check(function, samples(2.0))
        assert calls == [3]
    mapped = shardmap.vmap(function, trace="once")
    for _ in range(3):
        calls.clear()
        mapped(Ragged(samples()))
    assert calls == []


def test_a_new_shape_is_recorded_beside_those_that_are_known(calls):
    def function(x):
        return x.cumsum(0).sin().sum()

    check(function, samples())
    calls.clear()
    check(function, [*samples(), torch.randn(7, 2)])
    assert calls == [3, 7]
    calls.clear()
    check(function, [torch.randn(7, 2), *samples()])
    assert calls == [7]


@pytest.mark.parametrize("trace", ["each", "once"])
def test_what_one_shape_alone_reads_is_read_anew(trace):
    tables = {3: torch.ones(2), 5: torch.full((2,), 2.0)}
    settings = {"scale": 1.0}

    def function(x):
        if len(x) == 5:
            return (x @ tables[5]).sum() * settings["scale"]
        return (x @ tables[3]).sum()

    mapped = shardmap.vmap(function, trace=trace)

    def compare():
        expected = torch.stack([function(r) for r in samples()])
        torch.testing.assert_close(mapped(Ragged(samples())), expected)
        torch.testing.assert_close(
            shardmap.vmap(function, trace=trace)(Ragged(samples())), expected
        )

    compare()
    compare()
    tables[5] = torch.tensor([3.0, -1.0])
    compare()
    tables[5].mul_(2)
    compare()
    settings["scale"] = 7.0
    compare()
    tables[3] = torch.tensor([0.5, 4.0])
    compare()


@pytest.mark.parametrize("trace", ["each", "once"])
def test_an_argument_that_all_share_is_that_of_the_call(trace):
    def function(x, weights, power):
        return (x @ weights).sum() ** power

    mapped = shardmap.vmap(function, in_dims=(0, None, None), trace=trace)
    for power in (1, 2, 3, 2):
        weights = torch.randn(2)
        expected = torch.stack([function(r, weights, power) for r in samples()])
        torch.testing.assert_close(mapped(Ragged(samples()), weights, power), expected)


@pytest.mark.parametrize("trace", ["each", "once"])
def test_gradients_flow_to_the_weights_of_this_call(trace):
    weights = [torch.randn(2, dtype=torch.float64, requires_grad=True)]
    rows = [r.double() for r in samples()]

    def function(x):
        return (x @ weights[0]).square().sum()

    mapped = shardmap.vmap(function, trace=trace)
    for _ in range(3):
        (found,) = torch.autograd.grad(mapped(Ragged(rows)).sum(), weights)
        (wanted,) = torch.autograd.grad(sum(function(r) for r in rows), weights)
        torch.testing.assert_close(found, wanted)
        weights[0] = (weights[0] - 0.1 * found).detach().requires_grad_()


def test_modes_of_torch_make_other_recordings():
    weights = torch.randn(2, requires_grad=True)

    def function(x):
        return (x @ weights).sum()

    mapped = shardmap.vmap(function)
    assert mapped(Ragged(samples())).requires_grad
    with torch.no_grad():
        assert not mapped(Ragged(samples())).requires_grad
    assert mapped(Ragged(samples())).requires_grad


def test_a_branch_on_a_captured_value_is_asked_again():
    switch = torch.tensor(1.0)

    def function(x):
        return x.sum() if len(x) != 4 or switch > 0 else x.prod()

    check(function, samples())
    check(function, samples())
    switch.fill_(-1.0)
    check(function, samples())


def test_what_cannot_be_found_by_name_is_recorded_at_each_call(calls):
    def function(x):
        return (x @ next(hidden)).sum() if len(x) == 3 else x.sum()

    weights = torch.randn(2)
    hidden = iter(lambda: weights, None)  # an iterator, which cannot be compared
    for _ in range(3):
        calls.clear()
        check(function, samples())
        assert sorted(calls) == [1, 2, 3, 4, 5]
        weights = torch.randn(2)


def test_what_is_remembered_keeps_no_function_and_no_model_alive():
    def made():
        model = torch.nn.Linear(2, 3)

        def function(x):
            return model(x).sum()

        check(function, samples())
        return weakref.ref(function), weakref.ref(model)

    function, model = made()
    gc.collect()
    assert function() is None
    assert model() is None
    shardmap.clear_caches()


@pytest.mark.parametrize("count", [1, 2, 70])
def test_as_many_shapes_as_there_are(count):
    rows = [torch.randn(1 + i, 1) for i in range(count)]
    mapped = shardmap.vmap(lambda x: x.sin().sum(), check="off")
    for _ in range(2):
        torch.testing.assert_close(mapped(Ragged(rows)), torch.stack([r.sin().sum() for r in rows]))
