"""The examples run, and their numbers are right by another way."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_every_example_is_a_script_that_runs(capsys):
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    for script in scripts:
        runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out.strip(), script.name
