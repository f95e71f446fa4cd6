"""The numbers of a refusal add up, and each remedy that it names leads out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap.errors import OverBudget
from shardmap.planning import device as device_memory
from shardmap.planning.memory import format_bytes, parse_bytes
from tests.planning.common import batch_of

WEIGHT = torch.nn.Parameter(batch_of(700, 700, dtype=torch.float32) / 30)
MAPPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "large results": lambda x: x.outer(x),
    "large results that are saved": lambda x: x.outer(x).exp(),
    "large intermediates": lambda x: x.outer(x).sin().sum(0),
    "many intermediates": lambda x: x.outer(x).sin().cos().exp().sum(0),
    "weights": lambda x: ((x @ WEIGHT).tanh() @ WEIGHT).tanh(),
}
OFFERED = {
    ("large results", False): {"pass out=", "pass reduce='sum'", "fewer"},
    ("large results", True): {"pass reduce='sum'", "fewer"},
    ("large results that are saved", False): {"pass out=", "pass reduce='sum'", "fewer"},
    ("large results that are saved", True): {"pass reduce='sum'", "fewer"},
    ("large intermediates", False): set(),
    ("large intermediates", True): {"pass remat=True", "fewer"},
    ("many intermediates", False): set(),
    ("many intermediates", True): {"pass remat=True", "fewer"},
    ("weights", False): set(),
    ("weights", True): set(),
}
"""Remedies besides a larger budget, for some of the budgets."""
BUDGETS = ("100KiB", "3MiB", "5MiB", "8MiB", "12MiB", "20MiB", "30MiB", "45MiB")
SIZE = r"[\d.]+ (?:B|KiB|MiB|GiB)"


def refused(function: Any, batch: torch.Tensor, **options: Any) -> str:
    """The refusal of a call, or nothing."""
    try:
        shardmap.vmap(function, **options)(batch)
    except OverBudget as error:
        return str(error)
    return ""


def number(text: str) -> int:
    found = parse_bytes(text)
    assert found is not None
    return found


def check_numbers(text: str, budget: str) -> None:
    """The parts add up to what is needed, to the rounding of each, and that is over the budget."""
    match = re.search(rf"(?:at least|needs) ({SIZE}) on cpu, budget ({SIZE}) \((.*?)\)[;:]", text)
    assert match is not None, text
    needed, allowed, told = match.groups()
    assert number(allowed) == number(budget)
    parts = re.findall(rf"({SIZE}) (?:for|that|while|of)", told)
    rounding = 0.06 * (1 << 20) * (len(parts) + 1)
    assert abs(sum(map(number, parts)) - number(needed)) <= rounding, text
    assert number(needed) >= number(allowed) - rounding, text


def takes(text: str, function: Any, batch: torch.Tensor, budget: str, path: Path) -> set[str]:
    """Take each remedy of a refusal, and see that what it does not offer would not lead out.

    Returns the names of those that it offers.
    """
    remedies = text[text.rindex("margin") :]
    options = {
        "pass remat=True": {"remat": True},
        "pass out=": {"out": shardmap.MemmapSink(path / f"{len(list(path.iterdir()))}")},
        "pass reduce='sum'": {"reduce": "sum"},
        "pass remat=True and reduce='sum'": {"remat": True, "reduce": "sum"},
    }
    offered = {name for name in options if name in remedies}
    if len(offered) > 1 and "pass remat=True and reduce='sum'" in offered:
        offered.discard("pass remat=True")
    for name, option in options.items():
        if name == "pass out=" and batch.requires_grad:
            assert name not in offered
        elif name in offered:
            assert not refused(function, batch, memory_budget=budget, **option), text
        elif "and" not in name and "at least" not in text:
            assert refused(function, batch, memory_budget=budget, **option), (text, name)
    fewer = re.search(r"at most (\d+) samples? per call", remedies)
    most = int(fewer[1]) if fewer is not None else 0
    if fewer is not None:
        offered.add("fewer")
        assert not refused(function, part_of(batch, most), memory_budget=budget), text
    more = re.search(rf"memory_budget=('|, at least )({SIZE})", remedies)
    assert more is not None, text
    again = refused(function, batch, memory_budget=more[2])
    if again and "least" in more[1]:  # of a lower bound: a chunk is measured now
        more = re.search(rf"memory_budget='({SIZE})'", again)
        assert more is not None, again
        again = refused(function, batch, memory_budget=more[1])
    assert not again, text
    return offered


def part_of(batch: torch.Tensor, size: int) -> torch.Tensor:
    return batch.detach()[:size].clone().requires_grad_(batch.requires_grad)


@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MAPPED)
def test_the_numbers_add_up_and_the_remedies_lead_out(
    name: str, grad: bool, samples: int, tmp_path: Path
) -> None:
    batch = batch_of(samples, 700, dtype=torch.float32).requires_grad_(grad)
    offered: set[str] = set()
    for budget in BUDGETS:
        shardmap.clear_caches()
        with torch.set_grad_enabled(grad):
            text = refused(MAPPED[name], batch, memory_budget=budget)
            if text:
                check_numbers(text, budget)
                offered |= takes(text, MAPPED[name], batch, budget, tmp_path)
    assert offered == (OFFERED[name, grad] if samples > 1 else set())


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_chunk_size_that_is_given_is_given_up_beside_the_remedy(chunk_size: Any) -> None:
    """Where not even chunks of one sample fit as the call stands."""
    batch = batch_of(7, 700, dtype=torch.float32)
    function = MAPPED["large results"]
    text = refused(function, batch, memory_budget="12MiB", chunk_size=chunk_size)
    assert "pass chunk_size='auto', and " in text
    assert refused(function, batch, memory_budget="12MiB", reduce="sum", chunk_size=chunk_size)
    assert not refused(function, batch, memory_budget="12MiB", reduce="sum")


def test_where_the_device_has_no_more_a_larger_budget_is_no_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: 10 << 20)
    batch = batch_of(7, 700, dtype=torch.float32)
    text = refused(MAPPED["large results"], batch)
    assert "memory_budget=" not in text
    assert f"more memory than the {format_bytes(10 << 20)} that are free here" in text
