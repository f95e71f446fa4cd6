"""Samples of unequal shapes against the loop over them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardmap
from shardmap import Ragged, errors

LENGTHS = (5, 2, 5, 7, 1, 2, 3, 0, 5, 11, 2)


def words(lengths=LENGTHS, width=3, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(n, width, dtype=dtype) for n in lengths]


def assert_same(found, expected):
    """`found` is what stacking `expected` gives, or a Ragged of it where that is not possible."""
    if len({e.shape for e in expected}) == 1:
        torch.testing.assert_close(found, torch.stack(expected))
    else:
        assert isinstance(found, Ragged)
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)


FUNCTIONS = {
    "equal results": lambda x: (x * x).sum(0).tanh(),
    "ragged results": lambda x: x.cumsum(0).sin(),
    "the number of words": lambda x: x.new_tensor(x.shape[0]),
    "a branch on the length": lambda x: x.sum() if x.shape[0] % 2 else x.prod(),
    "gradients": torch.func.grad(lambda x: (x.softmax(0) ** 3).sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lengths", [LENGTHS, (4,), (3, 3, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"], "chunk_size": 1}, {"trace": "once"}],
    ids=str,
)
def test_results_are_those_of_the_loop_in_its_order(name, lengths, options):
    samples = words(lengths)
    mapped = shardmap.vmap(FUNCTIONS[name], **options)
    for _ in range(2):  # the second time what `trace="once"` has kept
        assert_same(mapped(Ragged(samples)), [FUNCTIONS[name](s) for s in samples])


def test_ragged_and_plain_and_shared_arguments_together():
    samples, others = words(), words([n + 1 for n in reversed(LENGTHS)])
    scale, weights = (
        torch.randn(3, len(samples), dtype=torch.float64),
        torch.randn(3, 3, dtype=torch.float64),
    )

    def f(pair, scale, weights, *, power):
        x, y = pair
        return {"outer": (x @ weights @ y.T) * scale.sum(), "total": (x.sum() + y.sum()) ** power}

    found = shardmap.vmap(f, in_dims=(0, 1, None))(
        (Ragged(samples), Ragged(others)), scale, weights, power=2
    )
    expected = [
        f((x, y), s, weights, power=2) for x, y, s in zip(samples, others, scale.T, strict=True)
    ]
    assert_same(found["outer"], [e["outer"] for e in expected])
    assert_same(found["total"], [e["total"] for e in expected])


def test_gradients_reach_the_samples_and_what_is_captured():
    samples = [s.requires_grad_() for s in words()]
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def f(x):
        return (x @ weights).cos() * x[:, 0]

    out = shardmap.vmap(f)(Ragged(samples))
    found = torch.autograd.grad(sum(row.square().sum() for row in out), [weights, *samples])
    expected = torch.autograd.grad(sum(f(s).square().sum() for s in samples), [weights, *samples])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_reductions_are_over_all_samples(name, dtype):
    samples = words(dtype=dtype)
    rows = torch.stack([s.sum(0) for s in samples])
    expected = getattr(rows, {"max": "amax", "min": "amin"}.get(name, name))(0)
    found = shardmap.vmap(lambda x: x.sum(0), reduce=name)(Ragged(samples))
    assert found.dtype == dtype
    # Of half precision, the sum of each of the seven shapes is rounded too.
    slack = (
        {"rtol": 1e-3, "atol": 7 * 2**-11 * float(rows.abs().sum(0).max())}
        if dtype == torch.float16
        else {}
    )
    torch.testing.assert_close(found, expected, **slack)


def test_one_output_is_reduced_and_another_is_not():
    samples = words()
    total, rows, count = shardmap.vmap(
        lambda x: (x.sum(0), x * 2, torch.tensor(x.shape[0])),
        reduce=(shardmap.reduce.mean(), None, "sum"),
    )(Ragged(samples))
    torch.testing.assert_close(total, torch.stack([s.sum(0) for s in samples]).mean(0))
    assert_same(rows, [s * 2 for s in samples])
    assert count == sum(LENGTHS)
    assert count.dtype == torch.int64


def test_random_draws_differ_by_sample_and_repeat_with_the_seed():
    samples = [torch.zeros(n) for n in (2, 4, 2, 4, 2)]
    mapped = shardmap.vmap(lambda x: F.dropout(x + torch.rand_like(x), 0.0), randomness="different")
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(list(mapped(Ragged(samples))))
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    firsts = [float(d[0]) for d in draws[0]]
    assert len(set(firsts)) == 5


def test_reductions_of_gradients_take_all_parameters_of_all_samples():
    samples = words()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            ]
        )
        for x in samples
    ]
    gradients = torch.stack(rows)
    reduce = shardmap.reduce

    def mapped(how):
        return shardmap.per_sample_grad(
            model, lambda out: out.square().sum(), flat=True, reduce=how
        )(Ragged(samples))

    torch.testing.assert_close(mapped("norm"), gradients.norm(dim=1))
    torch.testing.assert_close(mapped(reduce.second_moment()), gradients.square().mean(0))
    clipped = (gradients * (2.0 / gradients.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    torch.testing.assert_close(mapped(reduce.clipped_sum(2.0)), clipped)
    both = mapped(reduce.together(mean="mean", sketch=reduce.project(50, seed=4)))
    torch.testing.assert_close(both["mean"], gradients.mean(0))
    # The same directions whatever the shape of the sample: sketches of two samples can be compared.
    sketch = shardmap.vmap(lambda x: x.clone(), reduce=reduce.project(50, seed=4))(gradients)
    torch.testing.assert_close(both["sketch"], sketch)

    # Noise comes once, not once for each shape.
    torch.manual_seed(6)
    noise = mapped(reduce.clipped_sum(2.0, noise_multiplier=3.0)) - clipped
    torch.manual_seed(6)
    plain = (
        shardmap.vmap(lambda x: x.clone(), reduce=reduce.clipped_sum(2.0, noise_multiplier=3.0))(
            gradients
        )
        - clipped
    )
    torch.testing.assert_close(noise, plain)


def test_under_inference_mode():
    with torch.inference_mode():
        samples = words()
        assert_same(
            shardmap.vmap(torch.cumsum, in_dims=(0, None))(Ragged(samples), 0),
            [s.cumsum(0) for s in samples],
        )


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_to_a_sample_is_refused_and_reaches_no_sample(inference):
    samples = words()
    before = [s.clone() for s in samples]
    with (
        torch.inference_mode(inference),
        pytest.raises(errors.CapturedWriteError, match="clone the argument"),
    ):
        shardmap.vmap(lambda x: x.add_(1).sum())(Ragged(samples))
    assert all(torch.equal(a, b) for a, b in zip(samples, before, strict=True))


def test_per_sample_gradients_of_a_recurrent_network_equal_the_loop():
    torch.manual_seed(2)
    cell, out = nn.GRU(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    parameters = [*cell.parameters(), *out.parameters()]
    samples, labels = words([n for n in LENGTHS if n]), torch.arange(10) % 2

    def gradient(x, label):
        loss = F.cross_entropy(out(cell(x.unsqueeze(0))[0][0, -1]), label)
        return torch.autograd.grad(loss, parameters)

    found = shardmap.vmap(gradient)(Ragged(samples), labels)
    for f, *rows in zip(
        found, *[gradient(x, y) for x, y in zip(samples, labels, strict=True)], strict=True
    ):
        torch.testing.assert_close(f, torch.stack(rows))


REFUSED = {
    "no samples": (
        errors.EmptyBatchError,
        "no samples",
        lambda r: shardmap.vmap(torch.sum)(Ragged([])),
    ),
    "shared": (
        errors.InDimsError,
        "in_dim 0",
        lambda r: shardmap.vmap(torch.dot, in_dims=(None, 0))(r, torch.ones(11)),
    ),
    "another dimension": (
        errors.InDimsError,
        "in_dim 0",
        lambda r: shardmap.vmap(torch.sum, in_dims=2)(Ragged([torch.ones(2, 1)])),
    ),
    "other sizes": (
        errors.InDimsError,
        "disagree",
        lambda r: shardmap.vmap(torch.add)(r, torch.ones(3)),
    ),
    "out_dims": (
        errors.RaggedError,
        "out_dims=1",
        lambda r: shardmap.vmap(torch.neg, out_dims=1)(r),
    ),
    "one draw": (
        errors.OptionError,
        "randomness='same'",
        lambda r: shardmap.vmap(torch.rand_like, randomness="same")(r),
    ),
    "a plan of unequal results": (
        errors.RaggedError,
        r"a plan is of equal results, and output 0 has shape \[0, 3\]",
        lambda r: shardmap.plan(torch.neg)(r),
    ),
    "a plan for a cluster": (
        errors.OptionError,
        "devices='auto'",
        lambda r: shardmap.plan(torch.sum, devices="ray")(r),
    ),
    "a store of unequal results": (
        errors.RaggedError,
        "out= keeps rows of one shape",
        lambda r: shardmap.vmap(torch.neg, out=shardmap.MemmapSink("never"))(r),
    ),
    "a fold of unequal results": (
        errors.RaggedError,
        "reduce=",
        lambda r: shardmap.vmap(torch.neg, reduce=(torch.add, None))(r),
    ),
    "a kernel of unequal results": (
        errors.RaggedError,
        "reduce=",
        lambda r: shardmap.vmap(torch.neg, reduce="gram")(r),
    ),
    "ragged sums": (
        errors.OutputError,
        "unequal",
        lambda r: shardmap.vmap(torch.neg, reduce="sum")(r),
    ),
    "structures": (
        errors.OutputError,
        "same structure",
        lambda r: shardmap.vmap(lambda x: (x.sum(),) * (1 + len(x) % 2))(r),
    ),
    "a tensor": (errors.OptionError, "pass a list", lambda r: Ragged(torch.ones(3))),
    "no tensors": (errors.OptionError, "sample 1 is a int", lambda r: Ragged([torch.ones(2), 3])),
    "sparse": (errors.OptionError, "dense", lambda r: Ragged([torch.eye(2).to_sparse()])),
    "two dtypes": (
        errors.OptionError,
        "one dtype",
        lambda r: Ragged([torch.ones(2), torch.ones(2).double()]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_with_a_remedy(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error, said, call = REFUSED[name]
    with pytest.raises(error, match=said):
        call(Ragged(words()))
    assert not list(tmp_path.iterdir())


def test_a_ragged_batch_says_what_it_holds():
    assert (
        repr(Ragged(words((2, 1, 2))))
        == "Ragged(3 samples of torch.float64: 1 x [1, 3], 2 x [2, 3])"
    )
    assert (
        repr(Ragged(words(range(9))))
        == "Ragged(9 samples of torch.float64: 1 x [0, 3], 1 x [1, 3], ..., 1 x [8, 3])"
    )
    assert repr(Ragged([])) == "Ragged(no samples)"
    assert torch.equal(Ragged(words())[3], words()[3])
