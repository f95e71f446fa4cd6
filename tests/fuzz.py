"""The differential fuzzer: random programs, the loop against the map.

A program is python source, grown line by line (`tests.fuzz_steps`, `tests.fuzz_writes`) and run on
every row while it grows, so that what is left is known to run. Everything follows from the seed.

    python -m tests.fuzz --seeds 0:5000 --workers 2
    python -m tests.fuzz --seeds 17:18 --show
    python -m tests.fuzz --seeds 0:1000 --calls
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests import (
    fuzz_combine,  # noqa: F401  (registers steps)
    fuzz_steps,  # noqa: F401  (registers steps)
    fuzz_writes,  # noqa: F401  (registers steps)
    isolate,
    oracle,
)
from tests.fuzz_programs import REBOUND, Program, Refusals, compiled, generate

Judge = Callable[[Program, oracle.Subject, Refusals], oracle.Verdict]


def judge(
    program: Program, subject: oracle.Subject, refusals: Refusals = oracle.REFUSALS
) -> oracle.Verdict:
    """Compares the subject with the loop on one program."""
    return oracle.compare(
        program.setting,
        subject,
        _checks(program, refusals),
        lambda: program.setting(perturbed=True),
    )


def _checks(program: Program, refusals: Refusals) -> oracle.Checks:
    aliasing = program.outer != "vmap"  # torch's own map repeats unmapped values as a view
    return oracle.Checks(
        second_order=program.second_order,
        aliasing=aliasing,
        precision=program.precision,
        refusals=refusals,
    )


def judge_calls(
    program: Program, subject: oracle.Subject, refusals: Refusals = oracle.REFUSALS
) -> oracle.Verdict:
    """Compares the subject with the loop in three calls of one map, each with other data.

    The second call sees the captured tensors of the first, the third finds others in their place.
    """
    function = compiled(program.source(), [], subject)
    mapped = program.map_of(function, subject)
    _, kept = program.tensors()
    found = oracle.Verdict("right")
    for call in range(REBOUND + 1):
        if call == REBOUND:
            _, kept = program.tensors(data=call)
        function.__globals__.update({f"c{i}": t for i, t in enumerate(kept)})
        found = _judge_call(program, subject, mapped, kept, call, refusals)
        if found.kind != "right":
            return dataclasses.replace(found, detail=f"call {call}: {found.detail}")
    return found


def _judge_call(
    program: Program,
    subject: oracle.Subject,
    mapped: Callable[..., Any],
    captured: list[torch.Tensor],
    call: int,
    refusals: Refusals,
) -> oracle.Verdict:
    """One call of a map that is kept, against the loop over a fresh function."""

    def build() -> oracle.Setting:
        setting = program.setting(data=call)

        def run(vmap: oracle.Subject) -> Any:
            if vmap is not subject:
                return fresh(vmap)
            setting.captured[:] = captured
            return program.called(mapped, setting.inputs)

        fresh, setting.run = setting.run, run
        return setting

    return oracle.compare(
        build,
        subject,
        _checks(program, refusals),
        lambda: program.setting(perturbed=True, data=call),
    )


def shrink(program: Program, fails: Callable[[Program], bool], budget: int = 400) -> Program:
    """The smallest variant found that still fails: fewer lines, plainer options, fewer outputs."""

    def variants(p: Program) -> Iterator[Program]:
        for length in (8, 4, 2, 1):
            for start in range(len(p.steps) - length, -1, -1):
                yield dataclasses.replace(p, steps=p.steps[:start] + p.steps[start + length :])
        if len(p.returns) > 1:
            for i in range(len(p.returns)):
                yield dataclasses.replace(
                    p,
                    returns=(p.returns[i],),
                    out_dims=p.out_dims[i] if isinstance(p.out_dims, tuple) else p.out_dims,
                )
        for plain in (
            {"chunk_size": None},
            {"devices": None},
            {"second_order": False},
            {"context": "plain"},
            {"outer": "none"},
            {"size": 2},
        ):
            if any(getattr(p, k) != v for k, v in plain.items()):
                yield dataclasses.replace(p, **plain)
        if isinstance(p.out_dims, int) and p.out_dims != 0:
            yield dataclasses.replace(p, out_dims=0)
        for field in ("inputs", "captured"):
            specs = getattr(p, field)
            for i, spec in enumerate(specs):
                for plain in (
                    {"layout": "contiguous"},
                    {"requires_grad": False},
                    {"in_dim": 0} if spec.in_dim is not None else {},
                ):
                    if any(getattr(spec, k) != v for k, v in plain.items()):
                        yield dataclasses.replace(
                            p,
                            **{
                                field: (
                                    *specs[:i],
                                    dataclasses.replace(spec, **plain),
                                    *specs[i + 1 :],
                                )
                            },
                        )
        for field in ("captured", "inputs"):  # the last one only: names count from the front
            specs = getattr(p, field)
            if len(specs) > (field == "inputs"):
                yield dataclasses.replace(p, **{field: specs[:-1]})

    tries, improved = 0, True
    while improved:
        improved = False
        for smaller in variants(program):
            tries += 1
            if tries > budget:
                return program
            if fails(smaller):
                program, improved = smaller, True
                break
    return program


def category(verdict: oracle.Verdict) -> str:
    """The kind of a failure, without its numbers: shrinking must not wander to another one."""
    lines = verdict.detail.strip().splitlines() or [""]
    head = lines[-1] if verdict.detail.startswith("crash") else lines[0]
    return verdict.kind + ": " + re.sub(r"[-+]?\d[\d.e+-]*|\(.*|output \d+|v\d+", "#", head)[:60]


def report(
    program: Program,
    verdict: oracle.Verdict,
    subject: oracle.Subject,
    small: bool = True,
    refusals: Refusals = oracle.REFUSALS,
    judged: Judge = judge,
) -> str:
    """The shrunk program and what it does."""
    if small and verdict.kind != "right":
        kind = category(verdict)
        program = shrink(program, lambda p: category(judged(p, subject, refusals)) == kind)
        verdict = judged(program, subject, refusals)
    return f"{program.text()}\n# {verdict.kind}: {verdict.detail}"


def run_seed(
    seed: str, subject_name: str, shrinking: bool, judged: Judge = judge
) -> dict[str, Any]:
    """One seed's verdict as plain data; called in a worker process."""
    subject = oracle.subject_named(subject_name)
    refusals = (Exception,) if subject_name == "torch" else oracle.REFUSALS
    program = generate(int(seed))
    verdict = judged(program, subject, refusals)
    bad = verdict.kind == "wrong"
    return {
        "seed": int(seed), "kind": verdict.kind,
        "detail": verdict.detail.splitlines()[0] if verdict.detail else "",
        "lines": len(program.steps), "gradient": verdict.gradient,
        "report": report(program, verdict, subject, shrinking, refusals, judged) if bad else "",
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, and the refusals by what they say."""
    kinds = collections.Counter(r["kind"] for r in results)
    counted = sum(kinds[k] for k in ("right", "refused", "wrong", "crashed"))
    served = kinds["right"] / counted if counted else 0.0
    reasons = collections.Counter(
        re.sub(r"\d+", "#", r["detail"])[:110] for r in results if r["kind"] == "refused"
    )
    gradients = collections.Counter(
        r["gradient"] or "none" for r in results if r["kind"] == "right"
    )
    lines = [
        f"{len(results)} seeds: {dict(kinds)}, served {served:.2%}",
        f"gradients compared: first {gradients['first']}, second {gradients['second']}",
    ]
    return "\n".join(lines + [f"  {n:5d}  {reason}" for reason, n in reasons.most_common(25)])


def main(argv: list[str] | None = None) -> int:
    """Runs a range of seeds and returns 1 if one is wrong or fewer than 98% are served."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="first:last (last is left out)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--subject", default="shardmap", choices=("shardmap", "torch", "loop"))
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument(
        "--calls", action="store_true", help="call each map three times, with other data"
    )
    parser.add_argument("--show", action="store_true", help="print each program and its verdict")
    parser.add_argument("--max-reports", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    judged = judge_calls if args.calls else judge
    if args.serve:
        isolate.serve(lambda seed: run_seed(seed, args.subject, not args.no_shrink, judged))
        return 0
    first, last = map(int, args.seeds.split(":"))
    if args.show:
        for seed in range(first, last):
            program = generate(seed)
            subject = oracle.subject_named(args.subject)
            verdict = judged(program, subject)
            small = not args.no_shrink
            print(report(program, verdict, subject, small, judged=judged), "\n")
        return 0
    command = [sys.executable, "-m", "tests.fuzz", "--serve", "--subject", args.subject] + [
        "--no-shrink"
    ] * args.no_shrink
    command += ["--calls"] * args.calls
    results, shown = [], 0
    for seed, answer in isolate.run(
        command, [str(s) for s in range(first, last)], args.workers, timeout_s=120
    ):
        result = (
            json.loads(answer)
            if answer.startswith("{")
            else {
                "seed": int(seed),
                "kind": "crashed",
                "detail": answer,
                "gradient": "",
                "report": f"# seed {seed}: {answer}",
            }
        )
        results.append(result)
        if result["report"] and shown < args.max_reports:
            shown += 1
            print(result["report"], "\n", flush=True)
    print(summary(results))
    bad = [r["seed"] for r in results if r["kind"] in ("wrong", "crashed")]
    print("wrong seeds:", *bad)
    right, refused = (sum(r["kind"] == kind for r in results) for kind in ("right", "refused"))
    return int(bool(bad) or right < 0.98 * (right + refused))


if __name__ == "__main__":
    raise SystemExit(main())
