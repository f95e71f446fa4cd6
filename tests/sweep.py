"""The sweep over PyTorch's operator database.

Each operator mapped over five distinct samples, each compared with the loop: at once, in chunks
of two, and on two lanes.

    python -m tests.sweep --subject shardmap --workers 2         # judge against the scoreboard
    python -m tests.sweep --subject torch --update --workers 2   # refresh a column of it
    python -m tests.sweep --only linalg_svd,add --details
    python -m tests.sweep --dtype bfloat16 --details             # of operators that have it

Importing the database needs `expecttest`; some of its operators need `scipy` and `numpy` for
samples.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import random
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests import isolate, oracle, scoreboard
from tests.scoreboard import DIRECTIONS

BATCH = 5
SAMPLES = 10
LARGEST_SAMPLE = 20_000
"""Elements; larger samples show nothing that small ones do not, and take minutes."""
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
PATHS: tuple[dict[str, Any], ...] = ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]})
"""Ways to compute a batch: at once, two samples at a time, on two lanes."""
PREFERRED = (
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.bool,
    torch.bfloat16,
    torch.float16,
)


def operators() -> dict[str, Any]:
    """The operators with one right answer, by name and variant."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {
        op.formatted_name: op
        for op in op_db
        if op.name not in UNINITIALISED and not op.has_nondeterministic_output
    }


# -- samples ---------------------------------------------------------------------------------------


def draw(op: Any, dtype: torch.dtype, seed: int, count: int) -> list[tuple[Any, ...]]:
    """Up to `count` sample inputs, spread over the first sixty."""
    # The database seeds before each sample; seeding absent accelerators takes 5 ms each time.
    with unittest.mock.patch.object(torch, "manual_seed", torch.default_generator.manual_seed):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # the database draws from the global generator
        every = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 60))
    step = max(len(every) / count, 1.0)
    picked = [every[int(i * step)] for i in range(min(count, len(every)))]
    return [(s.input, s.args, s.kwargs) for s in picked]


def batches(
    op: Any, dtype: torch.dtype, count: int = SAMPLES
) -> Iterator[tuple[list[Any], Any, list[int]]]:
    """Batches of distinct samples.

    The leaves, stacked where they are tensors, their structure, and which are tensors.

    The variants of a sample come from other seeds. Where those differ in more than tensor values,
    or not at all, the variant is the sample scaled by a number, which keeps symmetry, rank,
    triangles and ranges; integers and booleans stay as they are.
    """
    drawn = [draw(op, dtype, seed, count) for seed in range(BATCH)]
    for index, sample in enumerate(drawn[0]):
        leaves, spec = pytree.tree_flatten(sample)
        others = [pytree.tree_flatten(d[index]) for d in drawn[1:] if index < len(d)]
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if not at or any(
            leaves[i].layout != torch.strided or leaves[i].numel() > LARGEST_SAMPLE for i in at
        ):
            continue
        alike = len(others) == BATCH - 1
        alike = alike and all(
            s == spec and all(same_kind(a, b) for a, b in zip(leaves, flat, strict=True))
            for flat, s in others
        )
        for i in at:
            variants = (
                [leaves[i], *(flat[i] for flat, _ in others)] if alike else [leaves[i]] * BATCH
            )
            if all(torch.equal(variants[0], v) for v in variants[1:]) and (
                leaves[i].is_floating_point() or leaves[i].is_complex()
            ):
                variants = [v * (1 - 0.1 * k) for k, v in enumerate(variants)]
            leaves[i] = torch.stack([v.detach() for v in variants])
        yield leaves, spec, at


def same_kind(a: Any, b: Any) -> bool:
    """True if two leaves may stand in one batch."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and b.layout == torch.strided
        )
    return type(a) is type(b) and (
        a == b if isinstance(a, (int, float, str, bool, complex, torch.dtype, type(None))) else True
    )


def choices(at: list[int]) -> list[list[int]]:
    """Choices of mapped tensors: all, the first, all but the first."""
    return [at, at[:1], at[1:]] if len(at) > 1 else [at]


# -- one operator ----------------------------------------------------------------------------------


def forward(op: Any, spec: Any, rest: list[Any], at: list[int]) -> Callable[..., Any]:
    """The operator as a function of its tensors."""

    def function(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = list(rest)
        for i, tensor in zip(at, tensors, strict=True):
            leaves[i] = tensor
        first, args, kwargs = pytree.tree_unflatten(leaves, spec)
        results = [
            leaf
            for leaf in pytree.tree_leaves(op(first, *args, **kwargs))
            if isinstance(leaf, torch.Tensor)
        ]
        if not results or any(r.layout != torch.strided for r in results):
            raise TypeError("no dense tensor comes out")
        return results

    return function


def scalar(results: list[torch.Tensor]) -> torch.Tensor:
    """A weighted sum of the differentiable results.

    Plain sums of softmax and the like have no gradient.
    """
    parts = []
    for r in results:
        if r.is_floating_point() or r.is_complex():
            weighted = r * torch.linspace(0.5, 1.5, r.numel()).reshape(r.shape)
            parts.append((weighted.real + weighted.imag if r.is_complex() else weighted).sum())
    return torch.stack(parts).sum()


def gradient(function: Callable[..., Any], wrt: list[int], functional: bool) -> Callable[..., Any]:
    """The gradient of `scalar` by the tensors at `wrt`, in the way that the subject has."""

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return scalar(function(*tensors))

    def by_autograd(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = [t.detach().requires_grad_() if i in wrt else t for i, t in enumerate(tensors)]
        return torch.autograd.grad(loss(*own), [own[i] for i in wrt], materialize_grads=True)

    return torch.func.grad(loss, tuple(wrt)) if functional else by_autograd


def judge(
    name: str,
    op: Any,
    subject: oracle.Subject,
    dtypes: Sequence[torch.dtype] = PREFERRED,
) -> dict[str, Any]:
    """Compares one operator in both directions, in the first of `dtypes` that it has.

    The details name the first sample that is not right.
    """
    result: dict[str, Any] = {}
    for direction in DIRECTIONS:
        found: dict[str, str] = {}
        counts: collections.Counter[str] = collections.Counter()
        supported = (
            op.supported_dtypes("cpu")
            if direction == "forward"
            else op.supported_backward_dtypes("cpu")
            if op.supports_autograd
            else ()
        )
        dtype = next((d for d in dtypes if d in supported), None)
        if dtype is not None:
            for index, (leaves, spec, at) in enumerate(batches(op, dtype)):
                for mapped in choices(at):
                    verdict = judge_paths(op, leaves, spec, at, mapped, direction, subject)
                    kind = (
                        "fallback" if verdict.kind == "right" and verdict.fallback else verdict.kind
                    )
                    counts[kind] += 1
                    found.setdefault(
                        kind,
                        f"{name} {dtype} sample {index}, mapped {mapped} of {at}: {verdict.detail}",
                    )
        worst = next(
            (k for k in ("wrong", "refused", "fallback", "right") if counts[k]), "uncounted"
        )
        result[direction] = worst
        result[f"{direction}_served"] = counts["right"] + counts["fallback"]
        result[f"{direction}_detail"] = (
            found.get(worst, "")
            if worst in ("wrong", "refused", "fallback")
            else found.get("skipped", "")
        )
    return result


def judge_paths(
    op: Any,
    leaves: list[Any],
    spec: Any,
    at: list[int],
    mapped: list[int],
    direction: str,
    subject: oracle.Subject,
) -> oracle.Verdict:
    """One batch on every path; only shardmap has more than one, tried where all are mapped."""
    several = subject is oracle.shardmap_subject() and mapped == at
    verdict = oracle.Verdict("skipped")
    for options in PATHS if several else PATHS[:1]:

        def on_path(*args: Any, options: dict[str, Any] = options, **kwargs: Any) -> Any:
            return subject(*args, **kwargs, **options)

        on_this = on_path if options else subject
        verdict = judge_batch(op, leaves, spec, at, mapped, direction, on_this)
        if verdict.kind != "right":
            said = f" ({options})" if options else ""
            return dataclasses.replace(verdict, detail=verdict.detail + said)
    return verdict


def judge_batch(
    op: Any,
    leaves: list[Any],
    spec: Any,
    at: list[int],
    mapped: list[int],
    direction: str,
    subject: oracle.Subject,
) -> oracle.Verdict:
    """One batch, one choice of mapped tensors."""
    rest = [None if i in at else leaf for i, leaf in enumerate(leaves)]
    in_dims = tuple(0 if i in mapped else None for i in at)

    def build(noise: float = 0.0) -> oracle.Setting:
        tensors = [oracle.twin(leaves[i]) if i in mapped else leaves[i][0].clone() for i in at]
        if noise:
            tensors = [
                t * (1 + noise * torch.finfo(t.dtype).eps)
                if t.is_floating_point() or t.is_complex()
                else t
                for t in tensors
            ]
        function = forward(op, spec, rest, at)

        def run(vmap: oracle.Subject) -> Any:
            if direction == "forward":
                return vmap(function, in_dims)(*tensors)
            wrt = [
                k
                for k, i in enumerate(at)
                if i in mapped and (tensors[k].is_floating_point() or tensors[k].is_complex())
            ]
            if not wrt:
                raise TypeError("nothing to differentiate by")
            return vmap(gradient(function, wrt, vmap is oracle.torch_func), in_dims)(*tensors)

        return oracle.Setting(run, tensors)

    reference = subject is oracle.torch_func
    checks = oracle.Checks(
        gradient=False,
        aliasing=not reference,
        requires_grad=False,
        refusals=(Exception,) if reference else oracle.REFUSALS,
    )
    try:
        with RandomCalls() as watch:
            of_views = pytree.tree_leaves(build().run(oracle.loop))
        if "as_strided" in op.name:
            of_copies = pytree.tree_leaves(
                build().run(
                    lambda f, dims: oracle.loop(lambda *rows: f(*(r.clone() for r in rows)), dims)
                )
            )
            for one, other in zip(of_views, of_copies, strict=True):
                oracle.assert_same(one, other, "an absolute storage offset reads another row")
    except Exception as error:
        return oracle.Verdict("skipped", oracle.first_line(error))
    if watch.found:
        return oracle.Verdict("skipped", "draws random numbers")
    verdict = oracle.compare(build, subject, checks, lambda: build(noise=3.0))
    if verdict.kind == "wrong":
        # Some derivatives have two formulas in torch, one for when a dispatch mode or a subclass is
        # around (the gradient of a product).
        other = oracle.compare(build, subject, checks, lambda: build(noise=3.0), loop_under_a_mode)
        return other if other.kind == "right" else verdict
    return verdict


def loop_under_a_mode(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    **options: Any,
) -> Any:
    """The loop while a dispatch mode that does nothing is active."""

    def mapped(*args: Any, **kwargs: Any) -> Any:
        with RandomCalls():
            return oracle.loop(func, in_dims, out_dims, randomness, **options)(*args, **kwargs)

    return mapped


class RandomCalls(TorchDispatchMode):
    """Notice calls that draw random numbers, also those wrapped in a fixed seed."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Attention kernels carry the tag for their dropout, which the samples that count do not
        # use.
        self.found |= (
            torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()
        )
        return func(*args, **(kwargs or {}))


def run(
    names: list[str], subject_name: str, workers: int, timeout_s: float = 120, dtype: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Judges operators in worker processes."""
    command = [sys.executable, "-m", "tests.sweep", "--serve", "--subject", subject_name]
    command += ["--dtype", dtype] if dtype else []
    for name, answer in isolate.run(command, names, workers, timeout_s):
        failed = {d: "crashed" for d in DIRECTIONS} | {f"{d}_detail": answer for d in DIRECTIONS}
        yield name, json.loads(answer) if answer.startswith("{") else failed


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns 1 if anything is wrong or worse than stored."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--subject", default="shardmap", choices=("shardmap", "torch", "loop"))
    parser.add_argument("--update", action="store_true", help="store the results in the scoreboard")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--dtype", default="", help="judge operators in this one; such results are not stored"
    )
    parser.add_argument("--only", default="", help="operators, with commas between")
    parser.add_argument(
        "--details", action="store_true", help="print each result that is not right"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    dtypes = (getattr(torch, args.dtype),) if args.dtype else PREFERRED
    if args.update and args.dtype:
        parser.error("the scoreboard holds no results of one dtype")
    if args.serve:
        known, subject = operators(), oracle.subject_named(args.subject)
        warnings.simplefilter("ignore")
        isolate.serve(lambda name: judge(name, known[name], subject, dtypes))
        return 0
    names = args.only.split(",") if args.only else list(operators())
    board, results, bad = scoreboard.load(), {}, []
    for name, result in run(names, args.subject, args.workers, dtype=args.dtype):
        results[name] = result
        if args.details:
            for direction in DIRECTIONS:
                if result[direction] not in ("right", "uncounted"):
                    print(
                        f"{result[direction]:9s} {direction:9s} {result[f'{direction}_detail']}",
                        flush=True,
                    )
        if args.dtype:  # the scoreboard counts batches of other dtypes
            bad += [f"{name}: {d}" for d in DIRECTIONS if result[d] in ("wrong", "crashed")]
        elif args.subject == "shardmap":
            bad += scoreboard.complaints(name, result, board)
    print(scoreboard.summary(results))
    print("\n".join(bad))
    if args.update:
        scoreboard.store(results, args.subject)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
