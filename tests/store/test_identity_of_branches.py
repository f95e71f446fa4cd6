"""Stores of functions whose samples take several paths: they are known by the function alone."""

from __future__ import annotations

import decimal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap import errors

Function = Callable[[torch.Tensor], torch.Tensor]
RARE = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
SCALE = decimal.Decimal("1.5")


def branches(r: torch.Tensor) -> torch.Tensor:
    return r.sin() if r[0] > 0 else r.cos()


def recursive(r: torch.Tensor) -> torch.Tensor:
    return recursive(r / 2) + 1 if r.abs().sum() > 1 else r.exp()


def looped(r: torch.Tensor) -> torch.Tensor:
    return r * float(sum(r.tolist()))


def rows(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, dtype=torch.float64, generator=generator)


def into(where: Path, f: Function, x: torch.Tensor, resume: bool = True) -> None:
    sink = shardmap.MemmapSink(where)
    store = shardmap.vmap(f, out=sink, chunk_size=7, resume=resume)(x)
    found = store.read("result", 0, len(x))
    torch.testing.assert_close(torch.as_tensor(found), torch.stack([f(r) for r in x]))


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
@pytest.mark.parametrize("size", [1, 3, 61, 100, 200, 1000])
@pytest.mark.parametrize("f", [branches, recursive, looped])
def test_a_store_is_resumed_whatever_was_called_before(
    f: Function, size: int, tmp_path: Path
) -> None:
    x = rows(size)
    into(tmp_path / "s", f, x, resume=False)
    into(tmp_path / "s", f, x)
    for seed in range(1, 5):
        shardmap.vmap(f, randomness="different")(rows(97 * seed, seed))
        shardmap.vmap(f)(rows(97 * seed, seed))
    shardmap.vmap(f, out=shardmap.MemmapSink(tmp_path / "s"), chunk_size=7, resume=True)(x).discard(
        0
    )
    into(tmp_path / "s", f, x)


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
def test_draws_of_branches_are_resumed_by_their_seed(tmp_path: Path) -> None:
    for f in (branches, lambda r: r + torch.rand(3) if r[0] > 1 else r.cos()):
        sink = shardmap.MemmapSink(tmp_path / f.__name__)
        mapped = shardmap.vmap(f, out=sink, chunk_size=7, randomness="different", resume=True)
        for _ in range(3):
            torch.manual_seed(3)
            mapped(rows(61))


PROGRAM = """
import sys, decimal, torch, shardmap
weights = {"rare": torch.linspace(0, 1, 3, dtype=torch.float64), "other": {3, 5, "a", "b", "c"}}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3, dtype=torch.float64)
        self.layer.register_forward_hook(lambda *_: None)
    def forward(self, r):
        if r[0] > float(decimal.Decimal("1.5")):
            return self.layer(r) * weights["rare"] * len(weights["other"])
        return r.cos() if r[1] > 0 else shardmap.vmap(lambda q: q * 2)(r)
torch.manual_seed(0)
model = Model().requires_grad_(False)
generator = torch.Generator().manual_seed(0)
x = torch.randn(61, 3, dtype=torch.float64, generator=generator)
for k in range(int(sys.argv[2])):
    shardmap.vmap(model)(torch.randn(200, 3, dtype=torch.float64))
shardmap.vmap(model, out=shardmap.MemmapSink(sys.argv[1]), chunk_size=7, resume=True)(x)
"""


def test_a_store_is_resumed_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROGRAM))
    for calls in ("0", "2", "0"):
        command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "s"), calls]
        subprocess.run(command, check=True)
    script.write_text(textwrap.dedent(PROGRAM.replace("r.cos()", "r.cosh()")))
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "StoreMismatchError" in done.stderr


LOG: list[int] = []


def test_a_list_that_the_function_only_adds_to_is_no_part_of_it(tmp_path: Path) -> None:
    own: list[int] = []
    read: list[int] = []

    def logs(r: torch.Tensor) -> torch.Tensor:
        LOG.append(1)
        own.append(2)
        return r.sin() if r[0] > 0 else r.cos() * (1 + len(read))

    for size in (1, 7, 61):
        for _ in range(3):
            into(tmp_path / str(size), logs, rows(size))
    assert LOG
    assert own
    read.append(1)
    with pytest.raises(errors.StoreMismatchError, match="program: the function"):
        into(tmp_path / "61", logs, rows(61))


def with_constant(number: float) -> Function:
    return eval(f"lambda r: r * {number} if r[0] > 1.5 else r.cos()")


def with_weight(weight: torch.Tensor) -> Function:
    return lambda r: r * weight if r[0] > 1.5 else r.cos()


def with_global(r: torch.Tensor) -> torch.Tensor:
    return r * RARE * float(SCALE) if r[0] > 1.5 else r.cos()


def test_what_changes_on_a_rare_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(61)
    assert 0 < int((x[:, 0] > 1.5).sum()) < 8
    assert float(x[0, 0]) <= 1.5, "the first sample takes the other path"
    refused = pytest.raises(errors.StoreMismatchError, match="program: the function")
    for name, before, same, after in (
        ("constant", with_constant(2.0), with_constant(2.0), with_constant(3.0)),
        ("weight", with_weight(RARE), with_weight(RARE.clone()), with_weight(RARE * 2)),
    ):
        into(tmp_path / name, before, x, resume=False)
        into(tmp_path / name, same, x)
        with refused:
            into(tmp_path / name, after, x)
    into(tmp_path / "global", with_global, x, resume=False)
    into(tmp_path / "global", with_global, x)
    with monkeypatch.context() as patch, refused:
        patch.setattr(sys.modules[__name__], "RARE", RARE + 1)
        into(tmp_path / "global", with_global, x)
    with monkeypatch.context() as patch, refused:
        patch.setattr(sys.modules[__name__], "SCALE", decimal.Decimal("2.5"))
        into(tmp_path / "global", with_global, x)
    into(tmp_path / "global", with_global, x)


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
def test_samples_of_unequal_shapes_are_known_by_the_function_too(tmp_path: Path) -> None:
    samples = [rows(1 + k % 3, k) for k in range(61)]
    ragged = shardmap.Ragged(samples)

    def f(t: torch.Tensor) -> torch.Tensor:
        return t.sum(0).sin() if t[0, 0] > 0 else t.mean(0)

    for _ in range(3):
        sink = shardmap.MemmapSink(tmp_path / "s")
        store = shardmap.vmap(f, out=sink, chunk_size=7, resume=True)(ragged)
        want = torch.stack([f(t) for t in samples])
        torch.testing.assert_close(torch.as_tensor(store.read("result", 0, 61)), want)
        shardmap.vmap(f)(shardmap.Ragged(samples[::-1]))
