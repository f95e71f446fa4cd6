"""Configurations: what wins over what, what is refused, and in which words."""

import sys
from pathlib import Path

import pytest
import torch

from shardmap.errors import CapturedWriteError, ConfigError
from shardmap.jobs import config
from shardmap.jobs.parts import load_parts, map_options
from shardmap.jobs.tasks import mapped

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = (
    f"python: {CONFIGS / 'digits_gradients'}\ndata: digits.load\nfunction: digits.loss_gradient\n"
)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


CALLS: list[int] = []


def counted(x, *, times: int):
    """Notes each call; its program has as many operators as it is told."""
    CALLS.append(times)
    for _ in range(times):
        x = x.sin()
    return x


def constant():
    """Gives tests a function to name."""


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, MINIMAL + "chunk_size: 32\n")
    assert config.load(path).chunk_size == 32
    assert config.load(path).seed == 0
    loaded = config.load(path, ["--chunk_size", "64", "--seed=3"])
    assert (loaded.chunk_size, loaded.seed) == (64, 3)
    assert config.load(path, ["--chunk-size", "null"]).chunk_size is None


def test_overrides_reach_arguments_of_functions():
    loaded = config.load(
        CONFIGS / "digits_gradients",
        ["--model.init_args.epochs", "2", "--model.init_args.learning_rate", "1e-2"],
    )
    bound = config.bind(loaded)
    assert bound.model is not None
    assert bound.model.args == {"epochs": 2, "batch_size": 64, "learning_rate": 0.01}
    assert bound.data is not None
    assert bound.data.args["flipped_fraction"] == 0.05


def test_a_list_of_devices_can_be_given_as_text(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert config.load(path, ["--devices", '["cpu", "cpu"]']).devices == ["cpu", "cpu"]
    assert config.load(path, ["--devices", "cuda:*"]).devices == "cuda:*"


def test_a_section_can_be_left_out_from_the_command_line():
    assert config.load(CONFIGS / "digits_gradients", ["--report", "null"]).report is None


@pytest.mark.parametrize("name", ["digits_gradients", "digits_jacobian"])
def test_a_resolved_configuration_reads_back_as_itself(name, tmp_path):
    resolved = config.bind(config.load(CONFIGS / name)).config
    again = config.bind(config.load(write(tmp_path, config.to_yaml(resolved)))).config
    assert again == resolved


def test_every_key_is_documented():
    import inspect

    for kind, methods in ((config.RunConfig, 3), (config.Call, 0), (config.Files, 0)):
        source = inspect.getsource(kind)
        assert source.count(chr(34) * 3) == 2 * (
            1 + methods + len(kind.__dataclass_fields__)
        )  # the class, its methods, its fields


def test_every_key_is_in_the_table_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    assert [
        key for key in config.RunConfig.__dataclass_fields__ if f"\n| `{key}` |" not in text
    ] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunk_sise", "3"], "chunk_sise: unknown key, value '3'; did you mean chunk_size?"),
        (
            ["--chunk_size", "many"],
            "chunk_size: 'many' does not fit; give a whole number of at least 1 or auto or null",
        ),
        (
            ["--model.init_args.epoch", "3"],
            "unknown argument of digits.train, value '3'; did you mean model.init_args.epochs?",
        ),
        (
            ["--report.init_args.first", "1.5"],
            "report.init_args.first: 1.5 is out of range; give a number above 0 and of at most 1",
        ),
        (
            ["--report.init_args.score", "best"],
            "give one of gradient_norm, fisher_norm, class_cosine",
        ),
        (
            ["--function", "digits.loss_gradent"],
            "did you mean digits.loss_gradient?",
        ),
        (["--function", "digits.CLASSES"], "which cannot be called; name a function"),
        (["--function", "no_such_package.thing"], "there is no module no_such_package"),
    ],
)
def test_messages_name_key_value_and_remedy(words, message):
    with pytest.raises(ConfigError) as caught:
        config.bind(config.load(CONFIGS / "digits_gradients", words))
    assert message in str(caught.value)


def test_a_required_argument_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text("def load(*, path: str): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"data\.init_args\.path: missing; users_own\.load needs a value"
    ):
        config.bind(config.load(write(tmp_path, MINIMAL), ["--data", "users_own.load"]))


def test_a_module_that_fails_to_import_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "users_broken.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"'users_broken\.load' cannot be imported, RuntimeError: two lines; mend "
        r"users_broken",
    ):
        config.bind(config.load(write(tmp_path, MINIMAL), ["--data", "users_broken.load"]))


def test_a_module_that_needs_another_one_is_told_apart_from_a_misspelt_one(tmp_path, monkeypatch):
    (tmp_path / "users_needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="users_needy needs not_installed_anywhere; install it"):
        config.bind(config.load(write(tmp_path, MINIMAL), ["--data", "users_needy.load"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--workers", "3"],
            "workers: 3, and devices: auto; workers are Ray's: give devices: ray, or leave them "
            "out",
        ),
        (
            ["--workers", "0", "--devices", "ray"],
            "workers: 0 is out of range; give a whole number of at least 1 or null",
        ),
        (
            ["--resume", "true"],
            "resume: true, and there is no store; give store: PATH, or go on with a run folder by "
            "`shardmap resume RUN`",
        ),
        (
            ["--store_kind", "memmap"],
            "store_kind: memmap, and there is no store; give store: PATH, or leave store_kind out",
        ),
        (["--store", ""], "store: '' is empty; give a path or URL, or null"),
        (
            ["--store", "s", "--store_kind", "hdf5"],
            "store_kind: 'hdf5' does not fit; give one of zarr, safetensors, memmap",
        ),
        (
            ["--store", "s", "--reduce", "sum"],
            "reduce: sum, and store: s; what is reduced fits in memory: leave one of them out",
        ),
        (
            ["--store", "s", "--save_outputs", "true"],
            "save_outputs: true, and store: s; the outputs are in the store",
        ),
        (
            ["--store", "s3://b/s", "--store_kind", "memmap"],
            "store_kind: memmap, and store: s3://b/s; only zarr takes URLs",
        ),
        (["--reduce", "median"], "reduce: 'median' is no reduction; did you mean mean?"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_is_imported(
    words, message, tmp_path
):
    path = write(tmp_path, "data: no_such_package.load\nfunction: no_such_package.f\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, words)
    assert message in str(caught.value)


def test_outputs_are_saved_unless_they_are_in_a_store(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert config.load(path).save_outputs is True
    assert config.load(path, ["--save_outputs", "false"]).save_outputs is False
    stored = config.load(path, ["--store", "runs/store"])
    assert stored.save_outputs is False
    assert config.load(write(tmp_path, config.to_yaml(stored))) == stored


def test_a_configuration_survives_json_and_is_checked_again(tmp_path):
    import dataclasses
    import json

    resolved = config.bind(config.load(CONFIGS / "digits_gradients", ["--store", "s"])).config
    values = json.loads(json.dumps(dataclasses.asdict(resolved)))
    assert config.bind(config.from_mapping(values)).config == resolved
    with pytest.raises(ConfigError, match="chunk_sise: unknown key"):
        config.from_mapping({**values, "chunk_sise": 3})
    with pytest.raises(ConfigError, match="function: missing, and so is model"):
        config.from_mapping({"data": "a.b"})


def test_the_digest_is_of_what_is_computed_not_of_where(tmp_path):
    path = write(tmp_path, MINIMAL)
    digest = config.load(path).digest()
    for words in (
        ["--store", "s", "--resume", "true"],
        ["--devices", "ray", "--workers", "7"],
        ["--chunk_size", "5"],
        ["--output", "o"],
    ):
        assert config.load(path, words).digest() == digest
    changed = [
        ["--seed", "1"],
        ["--columns", "[image]"],
        ["--randomness", "same"],
        ["--batch_norm", "frozen"],
        ["--data.init_args.flip_seed", "1"],
        ["--function", "torch.neg"],
    ]
    assert len({digest, *(config.load(path, words).digest() for words in changed)}) == 7


def test_batch_norm_is_handed_to_the_map(tmp_path):
    (tmp_path / "trained.py").write_text(
        "import torch\nfrom torch import nn\nfrom shardmap.jobs import Dataset\n"
        "def load(): return Dataset({'x': torch.arange(42.0).view(7, 2, 3).square().sin()})\n"
        "norm = nn.BatchNorm1d(3)\n"
        "def normalised(x): return norm(x)\n"
    )
    path = write(tmp_path, "data: trained.load\nfunction: trained.normalised\n")
    x = torch.arange(42.0).view(7, 2, 3).square().sin()
    wanted = {
        "frozen": x / (1 + 1e-5) ** 0.5,
        "per_sample": torch.stack([torch.nn.BatchNorm1d(3)(row) for row in x]),
    }
    for how, want in wanted.items():
        bound = config.bind(config.load(path, ["--batch_norm", how]))
        parts = load_parts(bound, lambda told: None)
        got = mapped(parts, bound.config, map_options(bound))()
        torch.testing.assert_close(got, want.detach())
    with pytest.raises(CapturedWriteError, match="batch_norm='per_sample'"):
        mapped(parts, config.load(path), map_options(config.bind(config.load(path))))()


def test_the_check_is_handed_to_the_map_and_runs_the_function_so_often(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(sys.modules[__name__], "CALLS", calls)
    (tmp_path / "samples.py").write_text(
        "import torch\nfrom shardmap.jobs import Dataset\n"
        "def load(): return Dataset({'x': torch.arange(15.0).view(5, 3)})\n"
    )
    text = "data: samples.load\nfunction: tests.jobs.test_config.counted\n"
    seen = {}
    for times, check in enumerate(("off", "first", "always"), start=41):  # a program for each
        words = ["--check", check, "--function.init_args.times", str(times)]
        bound = config.bind(config.load(write(tmp_path, text), words))
        assert map_options(bound)["check"] == check
        parts = load_parts(bound, lambda told: None)
        for _ in range(2):
            calls.clear()
            mapped(parts, bound.config, map_options(bound))()
            seen.setdefault(check, []).append(len(calls))
    assert seen == {"off": [1, 1], "first": [2, 1], "always": [2, 2]}
    with pytest.raises(ConfigError, match="check: 'never' does not fit; give one of first, always"):
        config.load(write(tmp_path, text), ["--check", "never"])
