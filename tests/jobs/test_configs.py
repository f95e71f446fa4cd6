"""The runs in configs/: each runs, and what it finds is checked by another way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from safetensors.torch import load_file
from sklearn.kernel_ridge import KernelRidge

from shardmap.errors import ConfigError
from shardmap.jobs import Dataset, Outcome
from shardmap.jobs.config import bind, load
from shardmap.jobs.run import execute
from shardmap.store import open_store
from tests.jobs.demos import (
    CONFIGS,
    digits,
    lorenz,
    lorenz_reports,
    ntk,
    ntk_reports,
    potential,
    private_reports,
    text,
    text_reports,
)


def run(name: str, folder: Path, *overrides: str):
    """Run a configuration with some of its values replaced: its folder, and its findings."""
    bound = bind(load(CONFIGS / name, [*overrides, "--output", str(folder / "run")]))
    where, findings = execute(bound, say=lambda _: None)
    assert findings is not None
    return where, findings


def assert_is_a_picture(path: Path):
    pixels = imread(path)
    assert min(pixels.shape[:2]) >= 400
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


def test_every_folder_is_a_run():
    assert all((folder / "run.yaml").is_file() for folder in CONFIGS.iterdir())


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_every_configuration_can_be_bound_and_says_how_to_run_it(path):
    config = load(path, [])
    bind(config)
    assert config.output == f"runs/{path.name}"
    assert f"shardmap run configs/{path.name}/run.yaml\n" in (path / "run.yaml").read_text()


# -- Lyapunov exponents ----------------------------------------------------------------------------


def test_lyapunov_exponents_of_lorenz_96_are_the_published_ones(tmp_path):
    folder, findings = run("lorenz96_lyapunov", tmp_path)
    numbers = findings.numbers
    # 1.67 is what is commonly quoted for 40 places and forcing 8; 13 and 27.1 are those of Lorenz
    # and Emanuel 1998.
    assert abs(numbers["largest_exponent"] / 1.67 - 1) < 0.03
    assert abs(numbers["kaplan_yorke_dimension"] / 27.1 - 1) < 0.03
    assert numbers["positive_exponents"] == 13
    assert abs(numbers["sum_of_exponents"] + 40) < 0.05  # the flow's divergence is -40 everywhere
    exponents = load_file(folder / "exponents.safetensors")["exponents"]
    assert exponents.abs().min() < 0.02  # one is zero, along the trajectory
    assert_is_a_picture(folder / "exponents.png")
    assert f"{exponents[0]:.3f}" in findings.headline


def test_the_largest_exponent_is_the_rate_at_which_two_states_part():
    """No Jacobian in this.

    Pairs of states 1e-7 apart are followed, and brought together again after each interval.
    """
    states = lorenz.trajectories(count=64, intervals=1, approach=150)["state"]
    apart = torch.randn(states.shape, dtype=torch.float64)
    rates = []
    for interval in range(250):
        apart = 1e-7 * F.normalize(apart, dim=1)
        after = lorenz.flow(states)
        apart = lorenz.flow(states + apart) - after
        states = after
        if interval >= 50:
            rates.append((apart.norm(dim=1) / 1e-7).log() / 0.2)
    assert abs(float(torch.stack(rates).mean()) / 1.67 - 1) < 0.03


def test_exponents_of_a_linear_flow_are_its_eigenvalues(tmp_path):
    rates = torch.tensor([0.3, -0.1, -1.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    jacobian = turn @ torch.diag((rates * 0.5).exp()) @ turn.T
    dataset = Dataset(
        {"state": torch.zeros(120, 3), "trajectory": torch.arange(2).repeat_interleave(60)}
    )
    findings = lorenz_reports.lyapunov(
        Outcome(dataset, None, jacobian.expand(120, 3, 3), tmp_path), interval=0.5, discarded=40
    )
    torch.testing.assert_close(load_file(tmp_path / "exponents.safetensors")["exponents"], rates)
    assert math.isclose(findings.numbers["kaplan_yorke_dimension"], 2.2, abs_tol=1e-3)
    with pytest.raises(ConfigError, match="discarded: 60 of the 60"):
        lorenz_reports.lyapunov(
            Outcome(dataset, None, jacobian.expand(120, 3, 3), tmp_path), discarded=60
        )


@pytest.mark.parametrize(
    ("spectrum", "dimension"),
    [
        ([0.906, 0.0, -14.572], 2.0622),
        ([-1.0, -2.0], 0.0),
        ([1.0, -0.5], 2.0),
        ([1.0, -4.0, 2.0], 1.25),
    ],
    ids=["Lorenz 1963", "a point", "growing", "the first that falls below"],
)
def test_kaplan_yorke(spectrum, dimension):
    assert math.isclose(
        lorenz_reports.kaplan_yorke(torch.tensor(spectrum, dtype=torch.float64)),
        dimension,
        abs_tol=1e-4,
    )


# -- a learned potential ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "energy", "downhill"),
    [
        ((-0.558, 1.442), -146.70, 0),
        ((0.623, 0.028), -108.17, 0),
        ((-0.050, 0.467), -80.77, 0),
        ((-0.822, 0.624), -40.66, 1),
        ((0.212, 0.293), -72.25, 1),
    ],
)
def test_the_potential_has_its_published_valleys_and_passes(point, energy, downhill):
    place = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    value = potential.mueller_brown(place)
    assert abs(100 * value.item() - energy) < 0.02
    (slope,) = torch.autograd.grad(value, place)
    assert (
        float(slope.norm()) < 0.05
    )  # points are given to three digits, and curvatures are up to 40
    hessian = potential.mueller_brown_hessian(place.detach())
    assert int((torch.linalg.eigvalsh(hessian) < 0).sum()) == downhill
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(potential.mueller_brown, place.detach())
    )


def laplacian_by_differences(function, point, step=1e-3):
    """The five-point star, and no derivative."""
    moves = step * torch.eye(2, dtype=point.dtype)
    return (
        sum(function(point + m) + function(point - m) for m in moves).sub(4 * function(point))
        / step**2
    )


def test_the_learned_potential_bends_as_the_one_it_was_learned_from(tmp_path):
    folder, findings = run("potential_hessian", tmp_path, "--data.init_args.count", "601")
    torch.manual_seed(0)  # what the run did
    dataset = potential.points(count=601)
    model = potential.train(dataset, rounds=400)
    kept = load_file(folder / "curvature.safetensors")
    assert torch.equal(kept["point"], dataset["point"])
    with torch.no_grad():
        learned = laplacian_by_differences(lambda p: model(p).squeeze(-1), dataset["point"])
    exact = laplacian_by_differences(potential.mueller_brown, dataset["point"])
    torch.testing.assert_close(kept["laplacian"], learned, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kept["expected"], exact, rtol=1e-3, atol=1e-3)
    error = float(((learned - exact).square().mean() / exact.square().mean()).sqrt())
    assert abs(findings.numbers["laplacian_relative_error"] - error) < 1e-3
    assert error < 0.06
    assert findings.numbers["same_bends"] > 0.95
    assert open_store(folder / "results.zarr").read(0, 0, 601).shape == (601, 2, 2)
    assert_is_a_picture(folder / "laplacian.png")


# -- a tangent kernel ------------------------------------------------------------------------------


def test_the_tangent_kernel_is_the_gram_matrix_of_all_gradients(tmp_path):
    folder, findings = run(
        "ntk_cnn", tmp_path, "--model.init_args.width", "4", "--report.init_args.labels", "60"
    )
    torch.manual_seed(0)
    model = ntk.Network(width=4)
    images, labels = (digits.load()[name] for name in ("image", "true_label"))
    assert len(images) == 1797
    jacobian = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).sum()),
        in_dims=(None, 0),
    )
    rows = torch.cat(
        [
            g.flatten(1)
            for g in jacobian({k: v.detach() for k, v in model.named_parameters()}, images).values()
        ],
        dim=1,
    )
    kernel = load_file(folder / "kernel.safetensors")["kernel"]
    torch.testing.assert_close(
        kernel, rows @ rows.T, rtol=1e-4, atol=1e-4 * float((rows @ rows.T).abs().max())
    )
    assert_is_a_picture(folder / "kernel.png")

    # Regression by scikit-learn, with the ridge that the run chose.
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    kernel, labels = (
        (kernel / kernel.diagonal().mean())[order][:, order].double().numpy(),
        labels[order],
    )
    machine = KernelRidge(alpha=findings.numbers["ridge"], kernel="precomputed")
    machine.fit(kernel[:60, :60], F.one_hot(labels[:60], 10).double().numpy() - 0.1)
    share = float(
        (torch.tensor(machine.predict(kernel[60:, :60])).argmax(1) == labels[60:]).double().mean()
    )
    assert abs(findings.numbers["read_right"] - share) < 0.002
    assert share > 0.6


def test_the_ridge_has_the_least_error_where_each_sample_is_really_left_out():
    rows = torch.randn(25, 40, dtype=torch.float64)
    labels = torch.randint(10, (25,))
    _, ridge = ntk_reports.regression(rows @ rows.T, labels, 20)
    kernel = ((rows @ rows.T) / (rows @ rows.T).diagonal().mean())[:20, :20].numpy()
    targets = F.one_hot(labels[:20], 10).double().numpy() - 0.1
    errors = {}
    for alpha in ntk_reports.RIDGES:
        gaps = []
        for out in range(20):
            others = [i for i in range(20) if i != out]
            machine = KernelRidge(alpha=alpha, kernel="precomputed").fit(
                kernel[np.ix_(others, others)], targets[others]
            )
            gaps.append(machine.predict(kernel[out : out + 1, others]) - targets[out])
        errors[alpha] = float((np.concatenate(gaps) ** 2).mean())
    assert ridge == min(errors, key=lambda alpha: errors[alpha])


def test_the_report_on_a_kernel_takes_gradients_too_and_refuses_means(tmp_path):
    dataset = digits.load()
    few = Dataset({"image": dataset["image"][:40], "true_label": dataset["true_label"][:40]})
    rows = {"a": torch.randn(40, 3, 2), "b": torch.randn(40, 5)}
    ntk_reports.kernel_regression(Outcome(few, None, rows, tmp_path), labels=20)
    flat = torch.cat([rows["a"].flatten(1), rows["b"]], dim=1)
    torch.testing.assert_close(load_file(tmp_path / "kernel.safetensors")["kernel"], flat @ flat.T)
    with pytest.raises(ConfigError, match="reduce: gram"):
        ntk_reports.kernel_regression(
            Outcome(few, None, torch.randn(3, 2), tmp_path, reduced=True), labels=20
        )
    with pytest.raises(ConfigError, match="labels: 40 of 40"):
        ntk_reports.kernel_regression(Outcome(few, None, rows, tmp_path), labels=40)


# -- a private step --------------------------------------------------------------------------------


def test_the_private_sum_is_the_clipped_sum_and_noise_of_the_size_that_was_asked_for(tmp_path):
    folder, findings = run("dp_sgd_sums", tmp_path)
    torch.manual_seed(0)
    dataset = digits.load()
    model = digits.train(dataset, epochs=2)
    parameters = list(model.parameters())
    rows = []
    for image, label in zip(dataset["image"], dataset["label"], strict=True):
        loss = F.cross_entropy(model(image), label)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    gradients = torch.stack(rows)
    norms = gradients.norm(dim=1)
    kept = load_file(folder / "step.safetensors")
    torch.testing.assert_close(kept["norms"], norms, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kept["mean"], gradients.mean(0), rtol=1e-3, atol=1e-4)
    clipped = (gradients / norms.clamp_min(1).unsqueeze(1)).sum(0)
    noise = (kept["private"] - clipped) / 20
    assert abs(float(noise.std()) - 1) < 5 / (2 * len(noise)) ** 0.5
    assert abs(float(noise.mean())) < 5 / len(noise) ** 0.5
    numbers = findings.numbers
    assert abs(numbers["clipped"] - float((norms > 1).double().mean())) < 0.002
    assert (
        abs(numbers["cosine"] - float(F.cosine_similarity(kept["private"], kept["mean"], dim=0)))
        < 1e-4
    )
    slope = float(kept["mean"] @ F.normalize(kept["mean"], dim=0))
    assert (
        0 < numbers["loss_fell_private"] < numbers["loss_fell_mean"] < 0.02 * slope
    )  # the loss is convex along so short a way
    assert_is_a_picture(folder / "norms.png")


def test_the_report_on_a_private_step_says_which_reductions_it_needs(tmp_path):
    dataset = digits.load()
    model = digits.train(dataset, epochs=0)
    with pytest.raises(ConfigError, match="reduce: the report needs"):
        private_reports.private_step(
            Outcome(dataset, model, {"norms": torch.ones(1797)}, tmp_path, reduced=True)
        )


# -- sentences -------------------------------------------------------------------------------------


def test_gradient_norms_of_sentences_are_those_of_the_loop_over_them(tmp_path):
    folder, findings = run(
        "ragged_text",
        tmp_path,
        "--data.init_args.sentences",
        "61",
        "--model.init_args.epochs",
        "1",
    )
    torch.manual_seed(0)
    dataset = text.load(sentences=61)
    model = text.train(dataset, epochs=1)
    assert len(dataset) == 61
    expected = []
    for words, topic in zip(dataset["words"], dataset["topic"], strict=True):
        states = model.recurrent(model.embedding(words))[0]
        loss = F.cross_entropy(model.out(states[-1]), topic)
        expected.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            ).norm()
        )
    kept = load_file(folder / "norms.safetensors")
    torch.testing.assert_close(kept["norm"], torch.stack(expected), rtol=1e-3, atol=1e-5)
    assert findings.numbers["difference_of_padded"] < 1e-5
    assert findings.numbers["changed_if_padding_were_read"] > 0.3
    assert_is_a_picture(folder / "norms.png")


def test_sentences_have_one_topic_each_and_lengths_that_are_theirs():
    dataset = text.load(sentences=10_000)
    words, length = text.padded(dataset["words"])
    assert len(dataset) > 500
    assert len(words.unique(dim=0)) > 0.95 * len(
        words
    )  # sentences that differ by a rare word look alike
    assert torch.equal((words != text.END).sum(1), length)
    assert all(bool((sentence != text.END).all()) for sentence in dataset["words"])
    assert (int(length.min()), int(length.max())) == (text.LEAST, text.MOST)
    assert set(dataset["topic"].tolist()) == set(range(len(text.TOPICS)))


def test_the_report_on_sentences_needs_norms(tmp_path):
    dataset = text.load(sentences=5)
    with pytest.raises(ConfigError, match="reduce: norm"):
        text_reports.gradients_by_length(
            Outcome(dataset, None, torch.ones(3), tmp_path, reduced=True)
        )
