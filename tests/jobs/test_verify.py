"""`shardmap verify`: checksums, and units that are computed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.cli import main
from tests.jobs.stored_run import CONFIG, MODULE, chunks, forget_modules, rows
from tests.jobs.stored_run import workplace as workplace


def test_a_good_store_is_verified_and_left_alone(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    before = {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()}
    runs = sorted(Path("runs").iterdir())
    capsys.readouterr()
    assert main(["verify", "store"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: all as written"
    assert out[-2] == "3 of 6 units recomputed: equal to the last bit"
    assert out[-1].startswith(
        "not compared with the plain loop: shardmap.compare(noisy, in_dims=0)"
    )
    assert "the function draws random numbers" in out[-1]
    seen, listening = chunks()
    with listening:
        assert main(["verify", "store", "--all", "--devices", '["cpu", "cpu"]']) == 0
    assert sorted(seen)[0] == (0, 4)
    assert sum(b - a for a, b in seen) == 23
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == "6 of 6 units recomputed: equal to the last bit"
    assert main(["verify", "store", "--units", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no unit was computed again"
    assert {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()} == before
    assert sorted(Path("runs").iterdir()) == runs


def test_a_flipped_byte_is_found_discarded_and_computed_anew(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store", "--store_kind", "memmap"])
    whole = rows()
    path = Path("store/noisy.npy")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # in the last unit
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "store"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: 1 damaged"
    assert out[1] == "unit 5 (rows 20 to 22): damaged, its bytes are not those that were written"
    assert (
        out[-1] == "`shardmap verify store --discard` takes these units back, `shardmap resume "
        "store` computes them anew"
    )
    assert shardmap.open_store("store").missing() == []
    assert main(["verify", "store", "--discard"]) == 1
    assert "1 units are discarded" in capsys.readouterr().out
    assert shardmap.open_store("store").missing() == [5]
    assert main(["resume", "store"]) == 0
    assert main(["verify", "store", "--all"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(rows(), whole, strict=True))


def test_a_changed_number_with_a_right_checksum_is_found(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    store = shardmap.open_store("store")
    changed = store.read_unit(1)
    changed[0][2, 1] += 0.25
    store.commit(store.write(1, changed))
    capsys.readouterr()
    assert main(["verify", "store", "--all"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 of 6 units are committed; checksums: all as written"
    assert out[-4] == "6 of 6 units recomputed: 1 differ"
    assert out[-3] == "unit 1 (rows 4 to 7): noisy differs by up to 0.25"
    assert main(["verify", "store", "--all", "--discard"]) == 1
    assert shardmap.open_store("store").missing() == [1]
    assert main(["verify", "store"]) == 0
    assert "5 of 6 units are committed" in capsys.readouterr().out


def test_rounding_is_no_difference_and_is_said(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    store = shardmap.open_store("store")
    changed = store.read_unit(1)
    changed[1][:] = torch.nextafter(changed[1], torch.tensor(torch.inf))
    store.commit(store.write(1, changed))
    capsys.readouterr()
    assert main(["verify", "store", "--all"]) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("6 of 6 units recomputed: equal within rounding, largest difference ")
    assert last.endswith(", in norm")


WITHOUT_DRAWS = """
import torch, shardmap
from shardmap.jobs import Dataset, Findings

@torch.library.custom_op("users_loop::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@twice.register_fake
def _(x):
    return torch.empty_like(x)

@shardmap.batching_rule(torch.ops.users_loop.twice.default, replace=True)
def wrong(b, eq, args, kwargs):
    return b.call(torch.ops.aten.mul.Tensor, args[0], 3)

def load(*, rows: int = 23):
    return Dataset({"x": torch.arange(3.0 * rows).view(rows, 3) / rows})

def model(dataset):
    return torch.arange(3.0)

def wave(weight, x):
    return (x * weight).sin()

def energy(weight, x):
    return (x * weight).sin().sum()

def doubled(weight, x):
    return twice(x)

def report(outcome):
    return Findings("done", {})
"""


def write_run(workplace: Path, function: str, *lines: str) -> None:
    (workplace / "users_store.py").write_text(WITHOUT_DRAWS)
    forget_modules()
    text = CONFIG.replace("noisy", function).replace("randomness: different\n", "")
    (workplace / "run.yaml").write_text("\n".join([text, *lines]))


@pytest.mark.parametrize(
    ("task", "function"),
    [
        ("vmap", "wave"),
        ("per_sample_grad", "energy"),
        ("jacobian", "wave"),
        ("hessian", "energy"),
    ],
)
def test_some_rows_are_computed_by_the_loop(
    task: str, function: str, workplace: Path, capsys
) -> None:
    write_run(workplace, function, f"task: {task}")
    main(["run", "run.yaml", "--store", "store"])
    capsys.readouterr()
    assert main(["verify", "store"]) == 0
    out = capsys.readouterr().out
    assert "3 of 6 units recomputed: equal to the last bit" in out
    assert re.search(r"rows \d+ to \d+: .* the map agrees with the loop on [34] samples", out)


def test_a_map_that_is_reproducible_and_wrong_is_found(workplace: Path, capsys) -> None:
    write_run(workplace, "doubled", "check: 'off'")
    main(["run", "run.yaml", "--store", "store"])
    capsys.readouterr()
    assert main(["verify", "store"]) == 1
    out = capsys.readouterr().out
    assert "3 of 6 units recomputed: equal to the last bit" in out
    assert "the map DIFFERS from the loop" in out
    assert "they part at users_loop::twice" in out


@pytest.mark.parametrize("change", ["function", "model", "data"])
def test_code_that_has_changed_since_is_said_in_words(change: str, workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    old, new = {
        "function": (".sin()", ".cos()"),
        "model": ("randn", "rand"),
        "data": ("+ shift", "+ shift + 1"),
    }[change]
    (workplace / "users_store.py").write_text(MODULE.replace(old, new))
    forget_modules()
    capsys.readouterr()
    assert main(["verify", "store"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("6 of 6 units are committed; checksums: all as written\n")
    assert captured.err.count("\n") == 1
    wanted = (
        "data: the samples have changed"
        if change == "data"
        else "program: the function, or a tensor that it captures, has changed"
    )
    assert f"cannot be compared, it holds another run: {wanted}" in captured.err
    assert (
        "The configuration is the same: the code or the files that it names have changed"
        in captured.err
    )


def test_a_function_that_is_gone_is_said_in_words(workplace: Path, capsys) -> None:
    main(["run", "run.yaml", "--store", "store"])
    (workplace / "users_store.py").write_text(MODULE.replace("def noisy", "def noise"))
    forget_modules()
    capsys.readouterr()
    assert main(["verify", "store"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "shardmap: function.path: 'users_store.noisy' cannot be imported, users_store "
        "has no noisy; did you mean users_store.noise?\n"
    )


def test_a_store_of_a_script_is_hashed_and_nothing_else(workplace: Path, capsys) -> None:
    shardmap.vmap(torch.sin, out=shardmap.MemmapSink("store"), chunk_size=3)(torch.ones(7, 2))
    assert main(["verify", "store"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 of 3 units are committed; checksums: all as written"
    assert "not written by a configured run" in out[1]
    assert f"out=shardmap.store.Recompute({str(workplace / 'store')!r}), resume=True" in out[1]
    assert main(["resume", "store"]) == 2
    assert (
        "was not written by a configured run; call shardmap.vmap as it was called"
        in capsys.readouterr().err
    )
