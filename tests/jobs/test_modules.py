"""Modules beside a configuration: found from anywhere, first, and never another run's."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from shardmap.errors import ConfigError
from shardmap.jobs import modules
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load
from shardmap.store import open_store
from tests import on_ray

ROOT = Path(__file__).parents[2]


def run_folder(folder: Path, factor: int, more: str = "") -> Path:
    """A run whose function multiplies by a number that another module beside it holds."""
    folder.mkdir(parents=True)
    (folder / "numbers_of_mine.py").write_text(f"FACTOR = {factor}\n")
    (folder / "work.py").write_text(
        "import torch\nfrom shardmap.jobs import Dataset\n"
        "def load(*, rows: int = 5):\n    return Dataset({'x': torch.arange(1.0, rows + 1)})\n"
        "def scaled(x):\n    import numbers_of_mine\n    return x * numbers_of_mine.FACTOR\n"
        "class Items:\n    def __len__(self):\n        return 5\n"
        "    def __getitem__(self, i):\n        return torch.tensor(float(i))\n"
    )
    (folder / "run.yaml").write_text(
        f"data: work.load\nfunction: work.scaled\noutput: {folder / 'out'}\n{more}"
    )
    return folder


def test_a_run_is_found_from_anywhere_by_its_folder_or_its_file(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "a.b c:d%2", 3)  # every character that a name has to escape
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for word in (str(folder), str(folder / "run.yaml"), "../a.b c:d%2"):
        assert main(["run", word]) == 0
    for out in ("out", "out-2", "out-3"):
        values = open_store(folder / out / "results.zarr").read(0, 0, 5)
        assert torch.equal(values, 3 * torch.arange(1.0, 6))


def test_plan_resume_verify_and_report_find_the_modules_too(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path / "one", 7, "chunk_size: 2\n")
    monkeypatch.chdir("/")
    assert main(["plan", str(folder)]) == 0
    assert main(["run", str(folder)]) == 0
    store = open_store(folder / "out" / "results.zarr")
    store.discard(1)
    assert main(["resume", str(folder / "out")]) == 0
    assert main(["verify", str(folder / "out"), "--all"]) == 0
    assert main(["report", str(folder / "out")]) == 0
    assert "3 of 3 units recomputed: equal to the last bit" in capsys.readouterr().out
    assert torch.equal(store.read(0, 0, 5), 7 * torch.arange(1.0, 6))


def test_two_runs_with_modules_of_the_same_names_stay_apart_in_one_process(tmp_path):
    bound = [bind(load(run_folder(tmp_path / f"run{n}", n))) for n in (2, 3, 5)]
    x = torch.tensor(10.0)
    # each imports its numbers only now, when the others have been bound
    assert [float(run.function.function(x)) for run in bound] == [20.0, 30.0, 50.0]
    assert [float(run.function.function(x)) for run in reversed(bound)] == [50.0, 30.0, 20.0]


def test_runs_that_are_bound_in_many_threads_stay_apart(tmp_path):
    folders = [run_folder(tmp_path / f"run{n}", n) for n in range(12)]
    found: dict[int, float] = {}
    gate = threading.Barrier(len(folders))

    def work(n: int) -> None:
        gate.wait()
        found[n] = float(bind(load(folders[n])).function.function(torch.tensor(1.0)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: float(n) for n in range(len(folders))}


def test_what_a_module_defines_can_be_pickled_to_another_process(tmp_path):
    function = bind(load(run_folder(tmp_path / "a.b", 11))).function.function
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(function, protocol)) is function
    code = "import pickle, sys, torch; f = pickle.load(sys.stdin.buffer); print(f(torch.ones(2)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(function),
        capture_output=True,
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == b"tensor([11., 11.])\n", done.stderr


def test_relative_and_dotted_imports_between_modules_of_a_run(tmp_path):
    folder = run_folder(tmp_path / "run", 13)
    (folder / "parts_of_mine").mkdir()
    (folder / "parts_of_mine" / "__init__.py").write_text("")
    (folder / "parts_of_mine" / "inner.py").write_text(
        "from numbers_of_mine import FACTOR\nfrom parts_of_mine import __name__ as own\n"
    )
    (folder / "work.py").write_text(
        "import parts_of_mine.inner, parts_of_mine.inner as inner\nimport os.path\n"
        "from .numbers_of_mine import FACTOR\nfrom parts_of_mine import inner as again\n"
        "assert parts_of_mine.inner is inner is again and os.path.sep\n"
        "assert inner.FACTOR == FACTOR and inner.own.endswith('.parts_of_mine')\n"
        "def load(): ...\ndef scaled(x): return x * FACTOR\n"
    )
    bound = bind(load(folder))
    assert float(bound.function.function(torch.tensor(2.0))) == 26.0


def test_another_runs_folder_can_be_named(tmp_path, monkeypatch):
    shared = run_folder(tmp_path / "shared", 17)
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.yaml").write_text(
        "python: [., ../shared]\ndata: work.load\nfunction: work.scaled\n"
    )
    bound = bind(load(other))
    assert bound.config.python == [str(other), str(shared)]
    assert float(bound.function.function(torch.tensor(2.0))) == 34.0
    monkeypatch.chdir(tmp_path)  # on the command line a folder is relative to this one
    assert load(other, ["--python", "shared"]).python == [str(shared)]
    assert load(other, ["--python", '["other", "shared"]']).python == [str(other), str(shared)]


def test_a_module_that_is_nowhere_is_told_with_the_places_that_were_looked_in(tmp_path):
    folder = run_folder(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=rf"no module wrok in {folder}, the current directory"):
        bind(load(folder, ["--data", "wrok.load"]))


def test_a_module_beside_wins_over_an_installed_one_and_leaves_it_alone(tmp_path):
    folder = run_folder(tmp_path / "run", 1)
    (folder / "json.py").write_text("def dumps(x): return 'mine'\n")
    (folder / "work.py").write_text("import json\ndef load(): ...\ndef scaled(x): return json\n")
    assert bind(load(folder)).function.function(1).dumps(1) == "mine"
    import json

    assert json.dumps(1) == "1"


def test_a_package_beside_is_not_loaded_twice(tmp_path):
    """A configuration may lie in the root of shardmap's own repository."""
    (tmp_path / "shardmap").mkdir()
    (tmp_path / "shardmap" / "__init__.py").write_text("raise AssertionError\n")
    assert modules.import_module("shardmap.jobs", [tmp_path]) is sys.modules["shardmap.jobs"]


def test_allow_admits_modules_beside_a_configuration_by_their_folder(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run", 1)
    monkeypatch.chdir("/")
    bind(load(folder), allow=[f"{tmp_path}/run"])
    bind(load(folder), allow=["elsewhere", f"{tmp_path}/"])
    for allow in ("work", "torch", f"{tmp_path}/other", f"{tmp_path}/ru"):
        with pytest.raises(ConfigError, match=rf"'work\.load' is not allowed.*--allow {folder}"):
            bind(load(folder), allow=[allow])
    (folder / "torch.py").write_text("raise AssertionError('run')\n")
    with pytest.raises(ConfigError, match=r"'torch\.neg' is not allowed"):  # not torch's
        bind(load(folder, ["--data", "os.getcwd", "--function", "torch.neg"]), ["os", "torch"])
    monkeypatch.chdir(folder)
    bind(load(folder), allow=["work"])  # the current directory: as python finds it


@pytest.mark.ray
def test_workers_of_a_cluster_read_a_dataset_that_a_module_beside_defines(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run", 19)
    with (folder / "work.py").open("a") as file:
        file.write("import shardmap\ndef items(): return shardmap.source(Items())\n")
    bound = bind(load(folder, ["--data", "work.items"]))
    (column,) = bound.data().columns
    assert column.travels  # its rows are read by the workers, which import the module by its name
    monkeypatch.chdir("/")
    words = ["--data", "work.items", "--devices", "ray", "--workers", "1", "--chunk_size", "2"]
    with on_ray.local_ray():
        assert main(["run", str(folder), *words, "--store", str(tmp_path / "store")]) == 0
    values = open_store(tmp_path / "store").read(0, 0, 5)
    assert torch.equal(values, 19 * torch.arange(5.0))
