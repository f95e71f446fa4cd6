"""The examples run, and their numbers are right by another way."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

import shardmap

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "dp_sgd.py": ["--steps", "3"],
    "ensembles.py": ["--networks", "3", "--steps", "20"],
    "find_mislabelled.py": ["--samples", "200", "--epochs", "2"],
    "gradient_neighbours.py": ["--samples", "60", "--picture", "neighbours.png"],
    "influence.py": ["--left-out", "3", "--projections", "1", "--directions", "16"],
    "lyapunov.py": ["--trajectories", "2", "--units", "2"],
    "ntk_regression.py": ["--samples", "150", "--labels", "30", "--width", "4", "--steps", "10"],
    "ragged_text.py": ["--sentences", "60", "--steps", "1"],
}
"""Arguments, where a run without any takes long."""


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch):
    """Let modules beside the examples be imported, as in a script."""
    monkeypatch.syspath_prepend(EXAMPLES)


def test_robust_standard_errors_equal_their_closed_form():
    example = runpy.run_path(str(EXAMPLES / "robust_standard_errors.py"))
    features, malignant = example["load"]()
    weights = example["fit"](features, malignant)
    usual, robust = example["standard_errors"](weights, features, malignant)
    p = torch.sigmoid(features @ weights).detach()
    scores = (p - malignant).unsqueeze(1) * features  # the gradient of logistic regression, by hand
    bread = torch.linalg.inv(features.T @ ((p * (1 - p)).unsqueeze(1) * features))
    torch.testing.assert_close(usual, bread.diagonal().sqrt())
    torch.testing.assert_close(robust, (bread @ scores.T @ scores @ bread).diagonal().sqrt())
    assert scores.sum(0).abs().max() < 1e-4  # it is a minimum


@pytest.fixture
def neighbours(monkeypatch) -> dict:
    """The example's names.

    Its blocks are so small that two samples of three are not in the first one.
    """
    example = runpy.run_path(str(EXAMPLES / "gradient_neighbours.py"))
    monkeypatch.setitem(example["cosines"].__globals__, "BLOCK", 13)
    return example


@pytest.mark.parametrize("which", ["digits", "sentences"])
def test_neighbours_by_gradient_are_those_of_all_gradients_in_memory(tmp_path, neighbours, which):
    task = neighbours[which](61, epochs=1)
    task = task if which == "digits" else task[0]
    parameters = list(task.model.parameters())
    assert 90_000 < sum(p.numel() for p in parameters) < 200_000
    store = neighbours["gradients"](task, tmp_path / "store", "cpu")
    rows = [task.loss(task.model, *[column[i] for column in task.batch]) for i in range(61)]
    expected = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(row, parameters)]) for row in rows]
    )
    torch.testing.assert_close(store.read(0, 0, 61), expected, rtol=1e-3, atol=1e-5)

    near = neighbours["neighbours"](task, store)
    taught, new = expected[:30], expected[30:]
    torch.testing.assert_close(
        near.gradient, F.normalize(new, dim=1) @ F.normalize(taught, dim=1).T, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(near.losses, torch.stack(rows[30:]).detach(), rtol=1e-4, atol=1e-5)
    assert near.hardest.tolist() == near.losses.topk(3).indices.tolist()

    # A step so small that the loss changes by the inner product of gradients, the teacher's of
    # length one.
    teachers = torch.tensor([29, 2, 17])
    after = neighbours["after_a_step"](task, store, 30 + near.hardest, teachers, 1e-2)
    slopes = (new[near.hardest] * F.normalize(taught[teachers], dim=1)).sum(1)
    torch.testing.assert_close(
        near.losses[near.hardest] - after, 1e-2 * slopes, rtol=0.1, atol=2e-3
    )


def test_sentences_have_one_owner_and_no_markup(neighbours):
    found = list(neighbours["sentences"].__globals__["documentation"]())
    texts = [text for text, _ in found]
    assert len(texts) == len(set(texts)) > 500
    assert {package for _, package in found} == set(range(8))
    assert not any(sign in text for text in texts for sign in "`*_|<>\n")


def gradient_rows(model: nn.Module, loss, *batch) -> torch.Tensor:
    """Each sample's gradient, one after the other, [N, parameters]."""
    parameters = list(model.parameters())
    rows = []
    for x, *rest in zip(*batch, strict=True):
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), *rest), parameters)])
        )
    return torch.stack(rows)


def test_self_influence_is_the_sum_of_squared_gradient_norms_over_training():
    example = runpy.run_path(str(EXAMPLES / "find_mislabelled.py"))
    images, labels, wrong = example["load"](97, 0.2)
    assert int(wrong.sum()) == 19
    model = example["network"]()
    expected = torch.zeros(97)
    found = torch.zeros(97)
    for _ in range(2):  # an epoch at a time, so that the network is here as it was then
        influence, losses = example["train"](model, images, labels, epochs=1)
        found += influence
        expected += 0.1 * gradient_rows(model, F.cross_entropy, images, labels).square().sum(1)
        torch.testing.assert_close(
            losses[0], F.cross_entropy(model(images), labels, reduction="none").detach()
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (
        example["precision"](torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False]), 2)
        == 0.5
    )


def test_influence_agrees_with_calculus_and_with_scikit_learn_without_the_sample():
    example = runpy.run_path(str(EXAMPLES / "influence.py"))
    features, labels = example["load"]()
    train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
    weights = example["fit"](
        torch.zeros_like(features[0]), *train, torch.ones(400, dtype=features.dtype), steps=15
    )

    out = torch.tensor([0, 3, 399])
    kept = torch.ones(3, 400, dtype=features.dtype).scatter(1, out.unsqueeze(1), 0.0)
    fell = example["lowered"](weights, train, test, kept)
    for row, number in zip(fell, out.tolist(), strict=True):
        others = [i for i in range(400) if i != number]
        machine = LogisticRegression(
            C=1 / example["L2"], fit_intercept=False, solver="newton-cholesky", tol=1e-10
        )
        machine.fit(train[0][others].numpy(), train[1][others].numpy())
        expected = test[1] * (test[0] @ weights) - test[1] * (
            test[0] @ torch.tensor(machine.coef_[0])
        )
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-5)

    # Without a projection: the influence of leaving out a sample is H^-1 times its gradient (Cook
    # and Weisberg 1982).
    p = torch.sigmoid(train[0] @ weights)
    hessian = train[0].T @ ((p * (1 - p)).unsqueeze(1) * train[0]) + example["L2"] * torch.eye(
        496, dtype=p.dtype
    )
    slopes = (p - (train[1] + 1) / 2).unsqueeze(1) * train[0]
    exact = -(test[1].unsqueeze(1) * test[0]) @ torch.linalg.solve(
        hessian, slopes.T
    )  # [test, train]
    near, far = (
        example["influence"](weights, train, test, directions, 4) for directions in (1024, 32)
    )
    assert example["rank_correlation"](exact[:, out], fell.T) > 0.99
    assert example["rank_correlation"](near, exact) > 0.9 > example["rank_correlation"](far, exact)


# What opacus 1.6 says of these, by its PRV accountant: an upper bound, at most 0.01 above.
@pytest.mark.parametrize(
    ("steps", "noise", "opacus"),
    [(100, 20.0, 2.0032), (60, 10.0, 3.2747), (1, 1.0, 4.3874), (300, 5.0, 20.1358)],
)
def test_epsilon_is_that_of_the_privacy_loss_and_of_opacus(steps, noise, opacus):
    spent = runpy.run_path(str(EXAMPLES / "dp_sgd.py"))["epsilon"](steps, noise, 1e-5)
    assert opacus - 0.015 < spent <= opacus
    # delta is the mass by which one normal density exceeds exp(epsilon) times the other; their
    # means are mu apart.
    mu = math.sqrt(steps) / noise
    begins = spent / mu + mu / 2  # the ratio of the densities is exp(mu x - mu^2 / 2)
    delta, _ = quad(
        lambda x: norm.pdf(x, mu) - math.exp(spent) * norm.pdf(x, 0),
        begins,
        begins + 20,
        epsabs=1e-14,
        points=[begins + 1],
    )
    assert math.isclose(delta, 1e-5, rel_tol=1e-5)


def test_epsilon_of_nearly_nothing_is_nothing():
    assert runpy.run_path(str(EXAMPLES / "dp_sgd.py"))["epsilon"](1, 1e6, 1e-5) == 0.0


def test_a_private_step_without_noise_is_a_step_along_the_clipped_sum():
    example = runpy.run_path(str(EXAMPLES / "dp_sgd.py"))
    images, labels = (column[:53] for column in example["load"]())
    model = example["network"]()
    rows = gradient_rows(model, F.cross_entropy, images, labels)
    assert (rows.norm(dim=1) > 1).sum() > 3  # some are clipped
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    example["train"](model, images, labels, steps=1, noise=0.0, rate=0.5)
    expected = before - 0.5 * (rows / rows.norm(dim=1, keepdim=True).clamp_min(1)).sum(0) / 53
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()).detach(), expected)


def test_lyapunov_exponents_are_the_published_ones():
    example = runpy.run_path(str(EXAMPLES / "lyapunov.py"))
    spectrum = example["exponents"](32, 30).mean(0).sort(descending=True).values
    assert abs(float(spectrum[0]) / 1.67 - 1) < 0.03
    assert abs(example["kaplan_yorke"](spectrum) / 27.1 - 1) < 0.03
    assert abs(float(spectrum.sum()) + 40) < 0.05  # the divergence of the flow
    assert math.isclose(
        example["kaplan_yorke"](torch.tensor([0.906, 0.0, -14.572])), 2.0622, abs_tol=1e-4
    )  # Lorenz 1963


def test_the_tangent_kernel_is_made_of_inner_products_of_gradients():
    example = runpy.run_path(str(EXAMPLES / "ntk_regression.py"))
    images, labels = example["load"](67)
    model = example["network"](5)
    rows = gradient_rows(model, lambda logits: logits.sum(), images)
    gram = rows @ rows.T
    torch.testing.assert_close(
        example["tangent_kernel"](model, images),
        gram / gram.diagonal().mean(),
        rtol=1e-4,
        atol=1e-4,
    )
    # Pixels that say the label outright leave nothing to get wrong.
    told = F.one_hot(labels, 10).double()
    assert example["regression"](told @ told.T, labels, 60) == float(
        torch.isin(labels[60:], labels[:60]).double().mean()
    )


def test_networks_of_an_ensemble_are_those_trained_one_by_one():
    example = runpy.run_path(str(EXAMPLES / "ensembles.py"))
    (pixels, labels), new, _, strange = example["load"]()
    torch.manual_seed(5)
    skeleton, together = example["train"](3, pixels, labels, steps=4)
    torch.manual_seed(5)  # the same draws
    models = [
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        for _ in range(3)
    ]
    own = torch.randint(len(labels), (3, len(labels)))
    for step in range(4):
        rows = own.gather(1, torch.randint(len(labels), (3, 64)))
        for model, mine in zip(models, rows, strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3 * (1 - step / 4))
            F.cross_entropy(model(pixels[mine]), labels[mine]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for number, model in enumerate(models):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][number], parameter.detach())
    here, there = (example["predict"](skeleton, together, x) for x in (new[:40], strange[:30]))
    torch.testing.assert_close(
        here, torch.stack([model(new[:40]).softmax(1) for model in models]).detach()
    )
    known, unknown = example["entropy"](here.mean(0)), example["entropy"](there.mean(0))
    area = roc_auc_score([0] * 40 + [1] * 30, torch.cat([known, unknown]).numpy())
    assert math.isclose(example["separation"](unknown, known), area, rel_tol=1e-6)


def test_training_on_sentences_of_unequal_lengths_is_training_one_by_one():
    example = runpy.run_path(str(EXAMPLES / "ragged_text.py"))
    texts, labels = example["load"](21)
    assert labels.bincount().tolist() == [7, 7, 7]
    codes = example["encode"](texts, 21)
    assert [len(code) for code in codes] == [len(words) for words in texts]
    assert len({len(code) for code in codes}) > 3
    model = example["Reader"](100)
    twin = example["Reader"](100)
    twin.load_state_dict(model.state_dict())
    example["train"](model, shardmap.Ragged(codes), labels, steps=2)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack(
            [F.cross_entropy(twin(code), label) for code, label in zip(codes, labels, strict=True)]
        ).mean().backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--samples", "7"], "give at least 20"), (["--samples", "30", "--devices", "tpu9"], "tpu9")],
    ids=["too few", "no such device"],
)
def test_a_mistake_in_an_example_is_one_line(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["gradient_neighbours.py", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "gradient_neighbours.py"), run_name="__main__")
    assert stopped.value.code != 0
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_every_example_is_a_script_that_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [script.name, *SMALL.get(script.name, [])])
        runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out.strip(), script.name
    assert (tmp_path / "neighbours.png").stat().st_size > 50_000
