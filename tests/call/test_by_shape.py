"""One map over samples of unequal shapes: pieces, stores, sources, plans, against the loop."""

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import Ragged, errors

LENGTHS = (5, 2, 5, 7, 1, 2, 3, 0, 5, 11, 2, 3, 7)
PIECES = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"chunk_size": None},
    {"devices": ["cpu", "cpu"], "chunk_size": 2},
    {"trace": "once", "chunk_size": 4},
    {"check": "always"},
]


def words(lengths=LENGTHS, width=3, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(n, width, dtype=dtype) for n in lengths]


def summary(x):
    return {"sum": x.sum(0).sin(), "count": torch.tensor(len(x)), "square": x.T @ x}


def wide(x):
    """Large enough for the results to be worth planning."""
    return (x.sum(0).sin()[:, None] * torch.ones(3, 60_000)).cos()


def looped(function, *columns):
    rows = [function(*row) for row in zip(*columns, strict=True)]
    if isinstance(rows[0], dict):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return torch.stack(rows)


@pytest.mark.parametrize("options", PIECES, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (4,), (2, 2, 2), (1, 2, 3), (3, 1, 3, 1, 3)], ids=str)
def test_results_in_pieces_are_those_of_the_loop(options, lengths):
    samples = words(lengths)
    mapped = shardmap.vmap(summary, **options)
    for _ in range(2):
        torch.testing.assert_close(mapped(Ragged(samples)), looped(summary, samples))


@pytest.mark.parametrize("options", [*PIECES, {"out_dims": 1}, {"out_dims": -1}], ids=str)
def test_large_results_are_where_their_samples_are(options):
    samples = words(dtype=torch.float32)
    expected = looped(wide, samples)
    if "out_dims" in options:
        expected = expected.movedim(0, options["out_dims"])
    torch.testing.assert_close(shardmap.vmap(wide, **options)(Ragged(samples)), expected)


@pytest.mark.parametrize("options", [*PIECES, {"remat": True, "chunk_size": 2}], ids=str)
def test_gradients_from_outside(options):
    samples = [s.requires_grad_() for s in words()]
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(len(samples), dtype=torch.float64, requires_grad=True)

    def function(x, scale):
        return torch.outer((x @ weights).cos() @ x, torch.ones(20_000).double()) * scale

    inputs = [weights, scales, *samples]
    mapped = shardmap.vmap(function, **options)
    found = torch.autograd.grad(mapped(Ragged(samples), scales).square().sum(), inputs)
    rows = [function(s, scale) for s, scale in zip(samples, scales, strict=True)]
    expected = torch.autograd.grad(sum(row.square().sum() for row in rows), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sink", ["MemmapSink", "ZarrSink", "SafetensorsSink"])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 1}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"], "chunk_size": 2}],
    ids=str,
)
def test_stores_hold_the_rows_in_the_order_of_the_samples(sink, options, tmp_path):
    samples = words()
    made = getattr(shardmap, sink)(str(tmp_path / "store"))
    expected = looped(summary, samples)
    for resume in (False, True):  # the second time all is there
        mapped = shardmap.vmap(summary, out=made, resume=resume, **options)
        store = mapped(Ragged(samples))
        for name, rows in expected.items():
            torch.testing.assert_close(store.read(name, 0, len(samples)), rows)
    changed = [*samples[:-1], samples[-1] + 1]
    with pytest.raises(errors.StoreMismatchError, match="samples have changed"):
        shardmap.vmap(summary, out=made, resume=True, **options)(Ragged(changed))
    other = [samples[1], samples[0], *samples[2:]]
    with pytest.raises(errors.StoreMismatchError):
        shardmap.vmap(summary, out=made, resume=True, **options)(Ragged(other))


def test_a_store_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch):
    from shardmap.call.shape_replay import ShapeReplay

    samples, sink = words(), shardmap.MemmapSink(str(tmp_path / "store"))
    compute, started = ShapeReplay.chunk_into, []

    def stopped(self, size, start, *rest):
        started.append(start)
        if len(started) == 4:
            raise KeyboardInterrupt
        return compute(self, size, start, *rest)

    monkeypatch.setattr(ShapeReplay, "chunk_into", stopped)
    mapped = shardmap.vmap(summary, out=sink, resume=True, chunk_size=2)
    with pytest.raises(KeyboardInterrupt):
        mapped(Ragged(samples))
    store = mapped(Ragged(samples))
    assert started == [0, 2, 4, 6, 6, 8, 10, 12]
    for name, rows in looped(summary, samples).items():
        torch.testing.assert_close(store.read(name, 0, len(samples)), rows)


def test_folds_are_in_the_order_of_the_samples():
    samples = words()
    rows = [s.sum(0) for s in samples]

    def combine(a, b):
        return torch.cat([a[:1] + b[:1], b[1:]])

    expected = rows[0]
    for row in rows[1:]:
        expected = combine(expected, row)
    for options in ({}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"], "chunk_size": 2}):
        found = shardmap.vmap(lambda x: x.sum(0), reduce=(combine, None), **options)(
            Ragged(samples)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_size", [None, 2, "auto"])
def test_inner_products_of_gradients(chunk_size):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    samples = words()

    def gradient(x):
        grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    gradients = looped(gradient, samples)
    mapped = shardmap.per_sample_grad(
        model, lambda out: out.square().sum(), reduce="gram", chunk_size=chunk_size
    )
    torch.testing.assert_close(mapped(Ragged(samples)), gradients @ gradients.T)
    both = shardmap.per_sample_grad(
        model, lambda out: out.square().sum(), flat=True,
        reduce=shardmap.reduce.together(kernel="gram", sum="sum"),
    )(Ragged(samples))  # fmt: skip
    torch.testing.assert_close(both["kernel"], gradients @ gradients.T)
    torch.testing.assert_close(both["sum"], gradients.sum(0))


def test_lists_of_unequal_lengths_and_nested_tensors_are_batches():
    samples = words([n for n in LENGTHS if n])
    numbers = torch.arange(float(len(samples))).double()
    nested = torch.nested.nested_tensor(samples, layout=torch.jagged)

    def function(x, number):
        return x.sum(0) * number

    expected = looped(function, samples, numbers)
    for batch in (samples, nested, Ragged(samples)):
        torch.testing.assert_close(shardmap.vmap(function)(batch, numbers), expected)
        found = shardmap.vmap(function, in_dims=(0, None))(batch, numbers[3])
        torch.testing.assert_close(found, looped(lambda x: function(x, numbers[3]), samples))
        named = shardmap.vmap(lambda *, x: x.sum(0), kw_in_dims={"x": 0})(x=batch)
        torch.testing.assert_close(named, looped(lambda x: x.sum(0), samples))
    kinds = {"list": list, "nested": torch.Tensor, "error": Ragged}
    for ragged, kind in kinds.items():
        found = shardmap.vmap(torch.sin, ragged=ragged)(samples)
        assert isinstance(found, kind)
        rows = found.unbind() if ragged == "nested" else found
        for a, b in zip(rows, samples, strict=True):
            torch.testing.assert_close(a, b.sin())


def test_gradients_reach_a_nested_tensor():
    samples = words((3, 1, 4))
    nested = torch.nested.nested_tensor(samples, layout=torch.jagged, requires_grad=True)
    (found,) = torch.autograd.grad(
        shardmap.vmap(lambda x: x.sin().sum())(nested).square().sum(), nested
    )
    rows = [s.requires_grad_() for s in words((3, 1, 4))]
    expected = torch.autograd.grad(sum(r.sin().sum().square() for r in rows), rows)
    for a, b in zip(found.unbind(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_list_of_equal_lengths_stays_a_tree_of_batches():
    pair = [torch.randn(4, 2), torch.randn(4, 5)]
    found = shardmap.vmap(lambda p: p[0].sum() + p[1].sum())(pair)
    torch.testing.assert_close(found, pair[0].sum(1) + pair[1].sum(1))
    with pytest.raises(errors.InDimsError, match="disagree"):
        shardmap.vmap(lambda p: p[0])([torch.ones(3), torch.ones(4, 2)])


@pytest.mark.parametrize("reduce", [None, "sum"])
@pytest.mark.parametrize("options", PIECES[:5], ids=str)
def test_samples_are_read_from_sources(options, reduce, tmp_path):
    samples = words()
    flat, lengths = torch.cat(samples), [len(s) for s in samples]
    np.save(tmp_path / "flat.npy", flat.numpy())
    column = shardmap.source(torch.arange(float(len(samples))).double())

    def function(x, number):
        return x.sum(0) * (number + 1)

    expected = looped(function, samples, column.read(0, len(samples))[0])
    expected = expected if reduce is None else expected.sum(0)
    for values in (tmp_path / "flat.npy", shardmap.source(flat).columns[0], flat, flat.numpy()):
        batch = Ragged.cut(values, lengths)
        assert len(batch) == len(samples)
        assert batch.shapes == [tuple(s.shape) for s in samples]
        assert all(torch.equal(a, b) for a, b in zip(batch, samples, strict=True))
        assert repr(batch) == repr(Ragged(samples))
        found = shardmap.vmap(function, reduce=reduce, **options)(batch, *column.columns)
        torch.testing.assert_close(found, expected)


def test_what_no_source_of_samples_can_be_is_refused():
    for values, lengths, said in (
        (torch.ones(5), [2, 2], "add up to 4, and values has 5 rows"),
        (torch.ones(5), [6, -1], "lengths has -1"),
        (torch.ones(5), [2.9, 2.1], "lengths has 2.9"),
        (torch.ones(()), [1], "values has 0 rows"),
    ):
        with pytest.raises(errors.OptionError, match=said):
            Ragged.cut(values, lengths)
    with pytest.raises(errors.SourceError, match="give one of its columns"):
        Ragged.cut({"x": torch.ones(3), "y": torch.ones(3)}, [3])
    assert len(Ragged.cut(torch.ones(0, 2), [])) == 0


@pytest.mark.parametrize("reduce", [None, "mean", "max"])
def test_a_plan_says_what_there_is_of_each_shape_and_runs(reduce):
    samples = words(dtype=torch.float32)
    planned = shardmap.plan(wide, chunk_size=3, reduce=reduce)(Ragged(samples))
    assert (planned.samples, planned.fits) == (len(samples), True)
    told = planned.explain()
    assert "Samples of 7 shapes" in told
    for shape, count in (([5, 3], 3), ([0, 3], 1), ([11, 3], 1), ([7, 3], 2)):
        assert f"{count} x {shape}: " in told
    expected = looped(wide, samples)
    expected = {"mean": expected.mean(0), "max": expected.amax(0)}.get(str(reduce), expected)
    torch.testing.assert_close(planned.run(), expected)
    model = nn.Linear(3, 2)
    gradients = shardmap.per_sample_grad(model, lambda out: out.square().sum())
    found = gradients.plan(Ragged(samples)).run()
    torch.testing.assert_close(found, gradients(Ragged(samples)))


def test_a_plan_over_budget_refuses_to_run():
    planned = shardmap.plan(wide, memory_budget="1MiB")(Ragged(words(dtype=torch.float32)))
    assert not planned.fits
    with pytest.raises(errors.OverBudget):
        planned.run()


@pytest.mark.parametrize("trace", ["each", "once"])
def test_draws_do_not_depend_on_the_pieces(trace, tmp_path):
    samples = words(dtype=torch.float32)

    def function(x):
        return torch.rand(4) + torch.rand(max(1, len(x))).sum()

    found = []
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}):
        torch.manual_seed(5)
        mapped = shardmap.vmap(function, randomness="different", trace=trace, **options)
        found.append(mapped(Ragged(samples)))
    torch.manual_seed(5)
    sink = shardmap.MemmapSink(str(tmp_path / "store"))
    mapped = shardmap.vmap(function, randomness="different", out=sink, chunk_size=2)
    found.append(mapped(Ragged(samples)).read(0, 0, len(samples)))
    for other in found[1:]:
        assert torch.equal(found[0], other)
    assert len(found[0].unique(dim=0)) == len(samples)


def test_samples_of_one_shape_may_go_different_ways(tmp_path):
    samples = words([2 + i % 3 for i in range(211)])

    def function(x):
        return x.sum(0) if x.sum() > 0 else x.prod(0) * len(x)

    expected = looped(function, samples)
    for options in ({}, {"chunk_size": 7}, {"trace": "once"}):
        mapped = shardmap.vmap(function, **options)
        for _ in range(2):
            torch.testing.assert_close(mapped(Ragged(samples)), expected)
    sink = shardmap.MemmapSink(str(tmp_path / "store"))
    store = shardmap.vmap(function, out=sink, chunk_size=10)(Ragged(samples))
    torch.testing.assert_close(store.read(0, 0, len(samples)), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_writes_to_any_mapped_argument_are_refused(plain):
    samples, others = words(), torch.zeros(len(LENGTHS))

    def function(x, other):
        return (other if plain else x).add_(1).sum()

    for options in ({}, {"reduce": "sum"}):
        with pytest.raises(errors.CapturedWriteError, match="clone the argument"):
            shardmap.vmap(function, **options)(Ragged(samples), others)
    assert not others.any()


def test_transforms_take_samples_of_unequal_shapes():
    samples = words()

    def function(x):
        return x.sum(0).sin()

    for made, plain in (
        (shardmap.jacrev, torch.func.jacrev),
        (shardmap.jacfwd, torch.func.jacfwd),
        (shardmap.jacobian, torch.func.jacrev),
        (shardmap.hessian, torch.func.hessian),
    ):
        found = made(function)(Ragged(samples))
        assert isinstance(found, Ragged)
        for a, sample in zip(found, samples, strict=True):
            torch.testing.assert_close(a, plain(function)(sample))


def test_under_an_outer_transform():
    samples, weights = words(), torch.randn(3, dtype=torch.float64)

    def total(w):
        return shardmap.vmap(lambda x: (x @ w).sin().sum())(Ragged(samples)).square().sum()

    def loop(w):
        return sum((x @ w).sin().sum().square() for x in samples)

    torch.testing.assert_close(torch.func.grad(total)(weights), torch.func.grad(loop)(weights))
    torch.testing.assert_close(
        torch.func.hessian(total)(weights), torch.func.hessian(loop)(weights)
    )


@pytest.mark.parametrize("how", [{}, {"chunk_size": 2}, {"trace": "once"}], ids=str)
@pytest.mark.parametrize("function", [torch.unique, lambda t: t[t > 1], lambda t: t[t > 1] * t[0]])
def test_shapes_that_follow_from_values_too(function, how) -> None:
    rows = [torch.tensor(values) for values in ([1, 1, 2], [3, 4, 5], [1, 1], [2, 3], [7], [5, 5])]
    mapped = shardmap.vmap(function, ragged="list", **how)
    nested = shardmap.vmap(function, ragged="nested", **how)
    for order in (rows, rows[::-1]):
        expected = [function(row) for row in order]
        for found in (mapped(shardmap.Ragged(order)), nested(shardmap.Ragged(order)).unbind()):
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, expected))
    with pytest.raises(errors.RaggedError, match="pass ragged='list'"):
        shardmap.vmap(lambda t: t[t > 1].outer(t[t > 1]), ragged="nested")(shardmap.Ragged(rows))
