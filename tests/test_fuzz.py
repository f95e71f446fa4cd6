"""Random programs against the loop.

A fixed range of seeds at each run, thousands on request.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests import fuzz, fuzz_programs, oracle

SEEDS = 150
SERVED = 0.98


def verdicts(
    first: int, last: int, subject: oracle.Subject, judged: fuzz.Judge = fuzz.judge
) -> list[tuple[fuzz.Program, oracle.Verdict]]:
    """Each seed's program and what the comparison found."""
    programs = [fuzz.generate(seed) for seed in range(first, last)]
    return [(program, judged(program, subject, oracle.REFUSALS)) for program in programs]


def assert_served(
    found: list[tuple[fuzz.Program, oracle.Verdict]],
    subject: oracle.Subject,
    judged: fuzz.Judge = fuzz.judge,
) -> None:
    """Not one wrong, and few refused."""
    wrong = [
        fuzz.report(program, verdict, subject, judged=judged)
        for program, verdict in found
        if verdict.kind == "wrong"
    ]
    assert not wrong, "\n\n".join([f"{len(wrong)} wrong", *wrong[:3]])
    counted = [verdict for _, verdict in found if verdict.kind != "skipped"]
    refused = [verdict.detail for verdict in counted if verdict.kind == "refused"]
    assert len(refused) <= (1 - SERVED) * len(counted), "\n".join(refused)


def test_fixed_seeds() -> None:
    """The same programs each time, so that a failure can be repeated."""
    subject = oracle.shardmap_subject()
    assert_served(verdicts(0, SEEDS, subject), subject)


def test_each_map_is_called_three_times() -> None:
    """Other data at each call, and other captured tensors at the last."""
    subject = oracle.shardmap_subject()
    found = verdicts(1000, 1000 + SEEDS // 2, subject, fuzz.judge_calls)
    assert_served(found, subject, fuzz.judge_calls)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_a_thousand_maps_are_called_three_times(first: int) -> None:
    """`python -m tests.fuzz --seeds 0:1000 --calls` is the same."""
    subject = oracle.shardmap_subject()
    found = verdicts(first, first + 250, subject, fuzz.judge_calls)
    assert_served(found, subject, fuzz.judge_calls)


def stale(forgotten: str) -> oracle.Subject:
    """A map that does at later calls what it has done at the first."""

    def vmap(func, in_dims=0, out_dims=0, randomness="error", **options):
        del options
        kept = {}

        def mapped(*args):
            names = [name for name in func.__globals__ if name[0] == "c" and name[1:].isdigit()]
            now = {name: func.__globals__[name] for name in names}
            given = kept.setdefault("args", args)
            func.__globals__.update(kept.setdefault("captured", now))
            try:
                of = given if forgotten == "arguments" else args
                return oracle.loop(func, in_dims, out_dims, randomness)(*of)
            finally:
                func.__globals__.update(now)

        return mapped

    return vmap


@pytest.mark.parametrize("forgotten", ["arguments", "captured tensors"])
def test_the_harness_notices_what_is_replayed(forgotten: str) -> None:
    """A recording that has kept values of the first call is found at a later one."""
    found = verdicts(0, 60, stale(forgotten), fuzz.judge_calls)
    wrong = [verdict.detail for _, verdict in found if verdict.kind == "wrong"]
    assert len(wrong) >= 5
    assert all(detail.startswith(("call 1", "call 2")) for detail in wrong)
    if forgotten == "captured tensors":
        assert all(detail.startswith("call 2") for detail in wrong)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 5000, 500))
def test_thousands_of_seeds(first: int) -> None:
    """The long run, in parts.

    `python -m tests.fuzz --seeds 0:5000 --workers 2` is the same in worker processes.
    """
    subject = oracle.shardmap_subject()
    assert_served(verdicts(first, first + 500, subject), subject)


def test_programs_follow_from_their_seed() -> None:
    """Two generations of a seed are one program."""
    assert [fuzz.generate(seed) for seed in range(20)] == [
        fuzz.generate(seed) for seed in range(20)
    ]


def test_views_that_autograd_has_given_up_on_do_not_stop_the_generator() -> None:
    """One of several views of a base that was written later raises where it is asked."""
    growth = fuzz_programs.Growth(fuzz.generate(0), random.Random(0))
    base = torch.randn(4, 3, requires_grad=True) * 1
    stale = base.unbind(0)[0]
    base.add_(1)
    with pytest.raises(RuntimeError, match="is a view and its base"):
        _ = stale.is_leaf
    growth.envs[0] |= {"v900": stale, "v901": base}
    assert growth.bare("v900")
    assert not growth.bare("v901")


def test_programs_have_substance() -> None:
    """Programs are long, and most of those that can have gradients compare them."""
    found = verdicts(0, 100, oracle.loop)
    assert all(verdict.kind in ("right", "skipped") for _, verdict in found)
    assert sum(len(program.steps) for program, _ in found) > 600
    assert sum(verdict.gradient in ("first", "second") for _, verdict in found) > 25


def wrong_map(damage: str) -> oracle.Subject:
    """A map with a fault, of the kinds that the harness must notice."""

    def vmap(func, in_dims=0, out_dims=0, randomness="error", **options):
        del options

        def mapped(*args):
            result = oracle.loop(func, in_dims, out_dims, randomness)(*args)
            leaves = list(result) if isinstance(result, tuple) else [result]
            first = leaves[0]
            if damage == "value" and first.is_floating_point():
                leaves[0] = first * 1.01 + 0.01
            if damage == "dtype":
                leaves[0] = first.double() if first.dtype != torch.float64 else first.float()
            if damage == "gradient" and first.is_floating_point():
                leaves[0] = first.detach() + 0 * first
            if damage == "detached":
                leaves[0] = first.detach()
            if damage == "aliasing":
                leaves[0] = first[:1].expand(first.shape) if first.shape[0] > 1 else first
            return tuple(leaves) if isinstance(result, tuple) else leaves[0]

        return mapped

    return vmap


@pytest.mark.parametrize("damage", ["value", "dtype", "gradient", "detached", "aliasing"])
def test_the_harness_notices(damage: str) -> None:
    """A map that is wrong in one way is found out, and shrunk to a few lines."""
    subject = wrong_map(damage)
    wrong = [(p, v) for p, v in verdicts(0, 60, subject) if v.kind == "wrong"]
    assert len(wrong) >= 5
    program, verdict = wrong[0]
    kind = fuzz.category(verdict)
    small = fuzz.shrink(program, lambda p: fuzz.category(fuzz.judge(p, subject)) == kind)
    assert len(small.steps) <= len(program.steps)
    assert fuzz.judge(small, subject).kind == "wrong"
