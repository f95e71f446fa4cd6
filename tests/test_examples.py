"""The examples run, and their numbers are right by another way."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"gradient_neighbours.py": ["--samples", "60", "--picture", "neighbours.png"]}
"""Arguments, where a run without any takes long."""


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
    """The example's names; its blocks are so small that two samples of three are not in the first one."""
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
    expected = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(row, parameters)]) for row in rows])
    torch.testing.assert_close(store.read(0, 0, 61), expected, rtol=1e-3, atol=1e-5)

    near = neighbours["neighbours"](task, store)
    taught, new = expected[:30], expected[30:]
    torch.testing.assert_close(near.gradient, F.normalize(new, dim=1) @ F.normalize(taught, dim=1).T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near.losses, torch.stack(rows[30:]).detach(), rtol=1e-4, atol=1e-5)
    assert near.hardest.tolist() == near.losses.topk(3).indices.tolist()

    # A step so small that the loss changes by the inner product of gradients, the teacher's of length one.
    teachers = torch.tensor([29, 2, 17])
    after = neighbours["after_a_step"](task, store, 30 + near.hardest, teachers, 1e-2)
    slopes = (new[near.hardest] * F.normalize(taught[teachers], dim=1)).sum(1)
    torch.testing.assert_close(near.losses[near.hardest] - after, 1e-2 * slopes, rtol=0.1, atol=2e-3)


def test_sentences_have_one_owner_and_no_markup(neighbours):
    found = list(neighbours["documentation"]())
    texts = [text for text, _ in found]
    assert len(texts) == len(set(texts)) > 500
    assert {package for _, package in found} == set(range(8))
    assert not any(sign in text for text in texts for sign in "`*_|<>\n")


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
