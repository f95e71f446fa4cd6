"""The page that lists what serves each operator: it is what the command writes, and holds."""

from __future__ import annotations

import warnings

import pytest

from tests import scoreboard, sweep, tiers
from tests.test_sweep import PARTS, part

STABLE = ("add", "linalg_svd", "nn_functional_linear", "hash_tensor", "tanh")


def test_the_page_is_what_the_command_writes() -> None:
    assert tiers.page(tiers.load()) == tiers.PAGE.read_text(encoding="utf-8")


def test_every_operator_of_the_sweep_is_listed() -> None:
    found = tiers.load()["operators"]
    judged = scoreboard.load()["operators"]
    assert [name for name in judged if name not in found] == []


def test_what_is_not_batched_has_a_reason() -> None:
    for name, found in tiers.load()["operators"].items():
        for direction, entry in found.items():
            assert entry["tier"] in tiers.TIERS, (name, direction)
            assert bool(entry.get("why")) == (entry["tier"] in ("by sample", "refused")), name


def measured_again(names: list[str]) -> dict[str, tuple[tiers.Found, tiers.Found]]:
    """What serves these operators now and is not what is stored."""
    known, stored = sweep.operators(), tiers.load()["operators"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: tiers.served(name, known[name]) for name in names}
    return {name: (now, stored[name]) for name, now in found.items() if now != stored.get(name, {})}


def test_some_operators_are_served_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCH", tiers.BATCH)
    assert measured_again(list(STABLE)) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("index", range(PARTS))
def test_all_are_served_as_the_page_says(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCH", tiers.BATCH)
    assert measured_again(part(list(sweep.operators()), index)) == {}
