"""Runs end to end: what they compute, what they leave behind, and what they leave alone."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file

import shardmap
from shardmap.errors import ConfigError
from shardmap.jobs import Dataset, Outcome
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load
from shardmap.jobs.folder import RunFolder, save_tensors, state_of
from shardmap.jobs.run import execute
from shardmap.run.base import ChunkDone, RunFinished, RunStarted
from tests.jobs.demos import CONFIGS, digits, digits_reports, input_jacobian


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> tuple[Path, str]:
    """The first run as it is in the repository: its folder, and what it said."""
    said: list[str] = []
    folder, findings = execute(
        bind(
            load(
                CONFIGS / "digits_gradients",
                ["--output", str(tmp_path_factory.mktemp("runs") / "gradients")],
            )
        ),
        say=said.append,
    )
    assert findings is not None
    return folder, "\n".join([*said, findings.headline])


def assert_is_a_picture(path: Path, least_side: int = 400):
    pixels = imread(path)
    assert min(pixels.shape[:2]) >= least_side
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


def test_the_gradient_run_leaves_a_complete_folder(gradients):
    folder, _ = gradients
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "measured.json",
        "plan.json",
        "plan.txt",
        "ranking.csv",
        "scores.safetensors",
        "state.json",
        "summary.json",
        "suspicious.png",
        "suspicious.txt",
        "timeline.json",
    }
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["batch_size"]
        == 64
    )  # defaults filled in
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"]
    assert_is_a_picture(folder / "suspicious.png")
    assert len((folder / "suspicious.txt").read_text().splitlines()) == 1 + 25


def test_the_gradient_run_finds_the_flipped_labels(gradients):
    folder, said = gradients
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["samples"], summary["flipped"], summary["first"]) == (1797, 90, 90)
    assert math.isclose(summary["found_by_chance"], 90 * 90 / 1797, abs_tol=1e-3)
    assert summary["found"] >= 75  # 81 to 87 over ten seeds, see docs/runs.md
    assert f"{summary['found']} of the 90 flipped labels are among the first 90" in said
    assert "chance would give 4.5" in said


def test_the_ranking_agrees_with_the_scores(gradients):
    folder, _ = gradients
    scores = load_file(folder / "scores.safetensors")
    with (folder / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = [int(row["sample"]) for row in rows]
    assert sorted(order) == list(range(1797))
    assert torch.equal(scores["score"][order], scores["score"].sort(descending=True).values)
    assert [row["flipped"] == "yes" for row in rows] == scores["flipped"][order].tolist()
    found = sum(row["flipped"] == "yes" for row in rows[:90])
    assert found == json.loads((folder / "summary.json").read_text())["found"]


def test_the_scores_are_norms_of_the_loops_gradients(gradients):
    folder, _ = gradients
    bound = bind(load(folder / "config.yaml"))
    assert bound.model is not None
    assert bound.data is not None
    torch.manual_seed(bound.config.seed)
    dataset = bound.data()
    model = bound.model(dataset)
    scores = load_file(folder / "scores.safetensors")["score"]
    for row in (0, 255, 256, 1796, int(scores.argmax())):
        grads = digits.loss_gradient(model, dataset["image"][row], dataset["label"][row])
        expected = torch.cat([grad.flatten() for grad in grads]).norm()
        torch.testing.assert_close(scores[row], expected, rtol=1e-3, atol=1e-5)


def test_the_log_holds_plan_training_and_every_chunk(gradients):
    folder, said = gradients
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    events = [row["event"] for row in rows]
    assert events[0] == "started"
    assert events[-1] == "finished"
    assert "\n".join(next(row for row in rows if row["event"] == "planned")["plan"]) in said
    chunks = [(row["start"], row["stop"]) for row in rows if row["event"] == "chunk done"]
    assert len(chunks) > 1
    assert [start for start, _ in chunks] == [0, *[stop for _, stop in chunks[:-1]]]
    assert chunks[-1][1] == 1797
    assert sum(row.get("text", "").startswith("epoch ") for row in rows) == 15


def test_the_jacobian_run_predicts_what_changes_decisions(tmp_path, capsys):
    assert (
        main(
            [
                "run",
                str(CONFIGS / "digits_jacobian"),
                "--model.init_args.epochs",
                "3",
                "--output",
                str(tmp_path / "jacobian"),
            ]
        )
        == 0
    )
    folder = tmp_path / "jacobian"
    (jacobian,) = shardmap.open_store(folder / "results.zarr").read_unit(0)
    assert jacobian.shape == (1797, 10, 1, 8, 8)
    bound = bind(load(folder / "config.yaml"))
    assert bound.model is not None
    assert bound.data is not None
    torch.manual_seed(bound.config.seed)
    dataset = bound.data()
    model = bound.model(dataset)
    for row in (0, 1796):
        torch.testing.assert_close(
            jacobian[row], input_jacobian(model, dataset["image"][row]), rtol=1e-3, atol=1e-4
        )
    assert json.loads((folder / "summary.json").read_text())["changed_by_predicted_step"] > 0.8
    assert_is_a_picture(folder / "sensitivity.png")
    out = capsys.readouterr()
    assert f"written to {folder}" in out.out
    assert "━" not in out.err  # no progress bar without a terminal


def test_the_same_run_in_two_shards_gives_the_same_numbers(gradients, tmp_path):
    folder, _ = gradients
    words = [
        "--devices",
        '["cpu", "cpu"]',
        "--chunk_size",
        "300",
        "--output",
        str(tmp_path / "two"),
    ]
    other, _ = execute(bind(load(CONFIGS / "digits_gradients", words)))
    torch.testing.assert_close(
        load_file(other / "scores.safetensors")["score"],
        load_file(folder / "scores.safetensors")["score"],
    )


def test_a_run_with_the_users_own_function_saves_its_outputs(tmp_path, monkeypatch):
    (tmp_path / "users_run.py").write_text(
        "import torch\nfrom shardmap.jobs import Dataset\n"
        "def load(*, rows: int = 5):\n    return Dataset({'x': torch.arange(3. * rows).view(rows, "
        "3), 'y': torch.ones(rows, 3)})\n"
        "def both(x, y, *, scale: float = 1.0):\n    return {'dot': torch.dot(x, y) * scale, "
        "'twice': (2 * x,)}\n"
    )
    (tmp_path / "run.yaml").write_text(
        "data: users_run.load\nfunction: {path: users_run.both, init_args: {scale: 10}}\noutput: "
        "out/mine\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "run.yaml", "--chunk_size", "2", "--data.init_args.rows", "4"]) == 0
    outputs = Outcome(
        Dataset({"x": torch.zeros(4)}), None, shardmap.open_store("out/mine/results.zarr"), Path()
    ).tensors()
    x = torch.arange(12.0).view(4, 3)
    assert torch.equal(outputs["dot"], 10 * x.sum(1))
    assert torch.equal(outputs["twice.0"], 2 * x)


def test_outputs_of_a_model_are_saved_without_its_graph(tmp_path):
    words = [
        "--function",
        "operator.call",
        "--columns",
        "[image]",
        "--report",
        "null",
        "--model.init_args.epochs",
        "0",
    ]
    words += ["--save_outputs", "true", "--output", str(tmp_path / "run")]
    folder, _ = execute(bind(load(CONFIGS / "digits_gradients", words)))
    assert shardmap.open_store(folder / "results.zarr").read("result", 0, 1797).shape == (1797, 10)


def test_events_reach_the_listener(tmp_path):
    events = []
    words = [
        "--chunk_size",
        "1000",
        "--model.init_args.epochs",
        "0",
        "--report",
        "null",
        "--output",
        str(tmp_path / "run"),
    ]
    execute(bind(load(CONFIGS / "digits_gradients", words)), listener=events.append)
    assert [type(event) for event in events] == [RunStarted, ChunkDone, ChunkDone, RunFinished]


def test_flipped_labels_are_wrong_and_fixed_by_their_seed():
    first, again, other = (digits.load(flipped_fraction=0.05, flip_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["label"], other["label"])
    assert int((first["label"] != first["true_label"]).sum()) == int(first["flipped"].sum()) == 90
    assert int(digits.load()["flipped"].sum()) == 0


def test_the_network_takes_one_image_or_a_batch():
    torch.manual_seed(0)
    dataset = digits.load()
    model = digits.train(dataset, epochs=0)
    torch.testing.assert_close(model(dataset["image"][0]), model(dataset["image"][:1])[0])


@pytest.mark.parametrize("score", ["gradient_norm", "fisher_norm", "class_cosine"])
def test_every_score_ranks_a_lone_opposite_gradient_first(score):
    gradients = torch.ones(20, 6) + 0.01 * torch.randn(20, 6)
    gradients[7] = -5.0
    assert (
        int(
            digits_reports.score_gradients(
                gradients, torch.zeros(20, dtype=torch.int64), score
            ).argmax()
        )
        == 7
    )


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    dataset = digits.load()
    outputs = (torch.full((len(dataset), 3), torch.nan),)
    with pytest.raises(ConfigError, match="not finite"):
        digits_reports.suspicious_labels(
            Outcome(dataset, digits.train(dataset, epochs=0), outputs, tmp_path)
        )


def test_columns_of_different_length_are_refused():
    with pytest.raises(ConfigError, match="differ in their number of rows"):
        Dataset({"x": torch.zeros(3), "y": torch.zeros(4)})


def test_a_run_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("kept")
    (tmp_path / "run-2").write_text("a file")
    for expected in ("run-3", "run-4"):
        with RunFolder.create(str(tmp_path / "run"), "task: vmap\n") as folder:
            assert folder.finish() == tmp_path / expected
    assert (tmp_path / "run" / "precious").read_text() == "kept"


def test_a_run_that_fails_leaves_nothing_and_before_it_ends_it_is_called_unfinished(tmp_path):
    def fail():
        with RunFolder.create(str(tmp_path / "deep" / "run"), "task: vmap\n") as folder:
            save_tensors(folder.path / "outputs.safetensors", {"a": torch.zeros(2)})
            state = state_of(tmp_path / "deep" / "run")
            assert state is not None
            assert state["state"] == "unfinished"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_torchs_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    words = ["--model.init_args.epochs", "1", "--report", "null", "--output", str(tmp_path / "run")]
    execute(bind(load(CONFIGS / "digits_gradients", words)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_without_samples_leaves_a_complete_folder(tmp_path, monkeypatch):
    (tmp_path / "users_none.py").write_text(
        "import torch\nfrom shardmap.jobs import Dataset\ndef load():\n    return "
        "Dataset({'x': torch.ones(0, 3)})\n"
    )
    (tmp_path / "run.yaml").write_text(
        "data: users_none.load\nfunction: torch.neg\noutput: runs/none\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "run.yaml"]) == 0
    assert shardmap.open_store("runs/none/results.zarr").read("result", 0, 0).shape == (0, 3)
    assert main(["resume", "runs/none"]) == 0
