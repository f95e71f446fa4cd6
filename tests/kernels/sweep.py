"""The sweep over kernels: every operator of PyTorch's database, its operands in many layouts.

Five distinct samples, each compared with the loop: forward, gradient, and forward-mode derivatives.

    python -m tests.kernels.sweep --rotate 3/40            # each 40th operator, from the third on
    python -m tests.kernels.sweep --only lu_solve,gelu --details
    python -m tests.kernels.sweep --seeds 4 --samples 6    # more choices and more samples

Each operator and group of modes runs in a worker process, so that a crash names it.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests import isolate, oracle, sweep
from tests.kernels import layouts

GROUPS = {"values": ("forward", "gradient"), "tangents": ("jvp", "jacfwd", "hessian")}
"""The modes that run in one process."""
LARGEST = {"forward": 20_000, "gradient": 20_000, "jvp": 2_000, "jacfwd": 24, "hessian": 8}
"""Elements of the largest operand by mode: Jacobians grow with them."""
OTHER_DTYPE = {
    torch.float32: torch.float64,
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float64,
    torch.int64: torch.int32,
    torch.complex64: torch.float64,
    torch.bool: torch.int64,
}


OUT_OF_BOUNDS = {"lu_unpack": ("stacked", "one_number")}
"""Layouts in which torch's own kernel leaves its memory, in the plain loop as well: `lu_unpack`
writes past one factorisation with several pivots, and reads past a pivot without dimensions."""


@dataclass(frozen=True)
class Case:
    """One operator, one batch, one layout, one mode."""

    name: str
    op: Any
    leaves: list[Any]
    spec: Any
    at: list[int]
    """Positions of the tensors in `leaves`."""
    mode: str
    layout: str
    turn: int
    """Rotates what a case does not try in full: mapped operands, the odd operand, the loss."""

    def __str__(self) -> str:
        shapes = [tuple(self.leaves[i].shape[1:]) for i in self.at]
        return f"{self.name} {self.mode} {self.layout} turn {self.turn} {shapes}"

    @property
    def odd(self) -> int:
        """The operand that differs from the others."""
        return self.turn % len(self.at)

    def mapped(self) -> list[int]:
        """Positions among the tensors that are mapped: all, one, all but one."""
        count = len(self.at)
        other = (self.turn // 4) % count
        every = list(range(count))
        if count == 1 or self.turn % 4 in (0, 3):
            return every
        return [other] if self.turn % 4 == 1 else [k for k in every if k != other]

    def batches(self, noise: float = 0.0, wide: bool = False) -> list[torch.Tensor]:
        """The operands: mapped ones with the samples in front, the others as one sample.

        Args:
            noise: By how many roundings they are off.
            wide: Whether those in single precision are the same numbers in double precision.
        """
        mapped = self.mapped()
        found = []
        for k, i in enumerate(self.at):
            batch: torch.Tensor = self.leaves[i].clone()
            if wide and batch.dtype is torch.float32:
                batch = batch.double()
            if noise and (batch.is_floating_point() or batch.is_complex()):
                batch = batch * (1 + noise * torch.finfo(batch.dtype).eps)
            if self.layout == "one_number" and k == self.odd:
                batch = batch.flatten(1)[:, 0].to(OTHER_DTYPE.get(batch.dtype, batch.dtype))
            elif self.layout in layouts.OF_ALL:
                batch = layouts.OF_ALL[self.layout](batch)
            elif self.layout in layouts.OF_ONE and k == self.odd:
                batch = layouts.OF_ONE[self.layout](batch)
            found.append(batch if k in mapped else batch[1 % len(batch)])
        return found

    def function(self) -> Callable[..., Any]:
        """The operator as a function of its tensors."""
        rest = [None if i in self.at else leaf for i, leaf in enumerate(self.leaves)]
        function = sweep.forward(self.op, self.spec, rest, self.at)
        if self.layout != "stacked":
            return function
        odd = self.odd

        def stacked(*tensors: torch.Tensor) -> list[torch.Tensor]:
            # One operand has two rows, the others one: the kernel has to broadcast.
            own = [
                torch.stack([t, t.flip(-1) if t.dim() else t]) if k == odd else t.unsqueeze(0)
                for k, t in enumerate(tensors)
            ]
            return function(*own)

        return stacked

    def loss(self, function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        """A scalar of the results, whose cotangent is dense, one number, or one of each sample."""

        def weighted(*tensors: torch.Tensor) -> torch.Tensor:
            return sweep.scalar(function(*tensors))

        def summed(*tensors: torch.Tensor) -> torch.Tensor:
            parts = [r for r in function(*tensors) if r.is_floating_point() or r.is_complex()]
            if not parts:
                raise TypeError("nothing to differentiate")
            return torch.stack([p.real.sum() if p.is_complex() else p.sum() for p in parts]).sum()

        def scaled(*tensors: torch.Tensor) -> torch.Tensor:
            factor = tensors[differentiable(tensors)[0]].detach().abs().sum()
            return summed(*tensors) * (factor + 0.5)

        return (weighted, summed, scaled)[self.turn % 3]


def differentiable(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Positions of the real and complex tensors."""
    return [k for k, t in enumerate(tensors) if t.is_floating_point() or t.is_complex()]


def subject_of(case: Case) -> Callable[..., Any]:
    """The function that is mapped in the mode of `case`."""
    function = case.function()
    if case.mode == "forward":
        return function
    loss = case.loss(function)

    def gradient(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wrt = differentiable(tensors)
        own = [t.detach().requires_grad_() if k in wrt else t for k, t in enumerate(tensors)]
        result = loss(*own)
        return torch.autograd.grad(result, [own[k] for k in wrt], materialize_grads=True)

    def along_one(transform: Callable[..., Any]) -> Callable[..., Any]:
        def tangents(*tensors: torch.Tensor) -> Any:
            wrt = differentiable(tensors)
            if not wrt:
                raise TypeError("nothing to differentiate")
            k = wrt[case.turn % len(wrt)]

            def of_one(t: torch.Tensor) -> Any:
                return loss(*[t if j == k else other for j, other in enumerate(tensors)])

            def all_of_one(t: torch.Tensor) -> Any:
                given = [t if j == k else other for j, other in enumerate(tensors)]
                return [r for r in function(*given) if r.is_floating_point() or r.is_complex()]

            return transform(of_one, all_of_one, tensors[k])

        return tangents

    def jvp(_: Any, all_of_one: Any, t: torch.Tensor) -> Any:
        return torch.func.jvp(all_of_one, (t,), (torch.ones_like(t),))

    def jacfwd(_: Any, all_of_one: Any, t: torch.Tensor) -> Any:
        return torch.func.jacfwd(all_of_one)(t)

    def hessian(of_one: Any, _: Any, t: torch.Tensor) -> Any:
        return torch.func.hessian(of_one)(t)

    transforms = {"jvp": jvp, "jacfwd": jacfwd, "hessian": hessian}
    return gradient if case.mode == "gradient" else along_one(transforms[case.mode])


def names_of_layouts(mode: str, count: int) -> list[str]:
    """The layouts that are tried in a mode with `count` operands."""
    if mode in GROUPS["tangents"]:
        return ["plain"]
    found = [*layouts.OF_ALL, "equal_columns", "stacked"]
    return found + (["equal_samples", "one_number"] if count > 1 else [])


def dtypes_of(op: Any, mode: str) -> list[torch.dtype]:
    """The dtypes that an operator is tried in: the first of the preferred ones that it has."""
    if mode == "forward":
        supported = op.supported_dtypes("cpu")
    else:
        supported = op.supported_backward_dtypes("cpu") if op.supports_autograd else ()
    return [d for d in sweep.PREFERRED if d in supported][:1]


def cases(name: str, op: Any, group: str, samples: int, seeds: int) -> Iterator[Case]:
    """The cases of one operator."""
    if "as_strided" in name:
        return  # it reads the whole batch's memory, which each layout changes
    left_out = OUT_OF_BOUNDS.get(name, ())
    for mode in GROUPS[group]:
        for dtype in dtypes_of(op, mode):
            batches = sweep.batches(op, dtype, samples)
            for number, (leaves, spec, at) in enumerate(batches):
                if max(leaves[i][0].numel() for i in at) > LARGEST[mode]:
                    continue
                for seed in range(seeds):
                    for j, layout in enumerate(names_of_layouts(mode, len(at))):
                        if layout in left_out:
                            continue
                        turn = 3 * number + j + 5 * seed
                        yield Case(name, op, leaves, spec, at, mode, layout, turn)


def judge_case(case: Case) -> oracle.Verdict:
    """The case by `shardmap.vmap` and by the loop."""
    import shardmap

    def build(noise: float = 0.0, wide: bool = False) -> oracle.Setting:
        tensors, mapped = case.batches(noise, wide), case.mapped()
        dims = tuple(0 if k in mapped else None for k in range(len(tensors)))
        function = subject_of(case)

        def run(vmap: oracle.Subject) -> Any:
            return vmap(function, dims)(*tensors)

        return oracle.Setting(run, tensors)

    checks = oracle.Checks(gradient=False, requires_grad=False, cancels=True)
    verdict = oracle.compare(build, shardmap.vmap, checks, lambda: build(noise=3.0))
    if verdict.kind == "wrong" and case.layout == "equal_columns" and _singular(build):
        return oracle.Verdict("skipped", "the loop divides by a rounding error")
    if verdict.kind == "wrong":
        other = oracle.compare(
            build, shardmap.vmap, checks, lambda: build(noise=3.0), sweep.loop_under_a_mode
        )
        return other if other.kind == "right" else verdict
    return verdict


def _singular(build: Callable[..., oracle.Setting]) -> bool:
    """True if the loop itself divides by zero, or by rounding, as for equal columns.

    It gives infinities then, or something else in double precision.
    """
    singles, doubles = (
        [
            t
            for t in pytree.tree_leaves(build(wide=wide).run(oracle.loop))
            if t.is_floating_point() or t.is_complex()
        ]
        for wide in (False, True)
    )
    if any(not t.isfinite().all() for t in singles):
        return True
    pairs = zip(singles, doubles, strict=True)
    return any(
        float((a.to(b.dtype) - b).abs().max()) > 1e-3 * max(float(b.abs().max()), 1e-3)
        for a, b in pairs
        if a.numel()
    )


def draws_random(case: Case) -> bool:
    """True if the operator draws random numbers: the loop has no one answer then."""
    with sweep.RandomCalls() as watch:
        try:
            case.function()(*[t[0] for t in (case.leaves[i] for i in case.at)])
        except Exception:
            return False
    return watch.found


def judge(item: str, known: dict[str, Any], samples: int, seeds: int, loud: bool) -> dict[str, Any]:
    """Every case of one operator in one group of modes."""
    name, group = item.split("|")
    counts: collections.Counter[str] = collections.Counter()
    details: list[str] = []
    for case in cases(name, known[name], group, samples, seeds):
        if case.layout == "plain" and draws_random(case):
            return {"counts": {f"{case.mode} skipped": 1}, "details": []}
        if loud:
            print(case, file=sys.stderr, flush=True)
        verdict = judge_case(case)
        kind = "loop" if verdict.kind == "right" and verdict.fallback else verdict.kind
        counts[f"{case.mode} {kind}"] += 1
        if kind in ("wrong", "refused"):
            lines = verdict.detail.strip().splitlines() or [""]
            said = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 else lines[0]
            details.append(f"{kind}: {case}: {said}")
    return {"counts": counts, "details": details}


def run(
    names: Sequence[str], groups: Sequence[str], samples: int, seeds: int, workers: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each operator and group with its counts and details."""
    command = [sys.executable, "-m", "tests.kernels.sweep", "--serve"]
    command += ["--samples", str(samples), "--seeds", str(seeds)]
    items = [f"{name}|{group}" for name in names for group in groups]
    for item, answer in isolate.run(command, items, workers, timeout_s=300):
        if answer.startswith("{"):
            yield item, json.loads(answer)
        else:
            yield item, {"counts": {"crashed": 1}, "details": [f"crash: {item}: {answer}"]}


def verdict_of(result: dict[str, Any]) -> str:
    """The worst kind among the cases of an operator."""
    kinds = {kind.split()[-1] for kind in result["counts"]}
    order = ("crashed", "wrong", "refused", "loop", "right")
    return next((kind for kind in order if kind in kinds), "uncounted")


def rotated(names: Sequence[str], rotate: str) -> list[str]:
    """Part `k/n` of the operators: each n-th one from the k-th on."""
    k, n = (int(part) for part in rotate.split("/"))
    return list(names)[k % n :: n]


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns 1 if anything is wrong or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sweep", description=__doc__)
    parser.add_argument("--only", default="", help="operators, with commas between")
    parser.add_argument("--rotate", default="0/1", help="k/n: each n-th operator from the k-th on")
    parser.add_argument("--seeds", type=int, default=1, help="choices of operands per layout")
    parser.add_argument("--samples", type=int, default=3, help="sample inputs per operator")
    parser.add_argument("--groups", default=",".join(GROUPS), help="values, tangents")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--details", action="store_true", help="print refusals too")
    parser.add_argument("--here", action="store_true", help="in this process, each case printed")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    known = sweep.operators()
    if args.serve:
        isolate.serve(lambda item: judge(item, known, args.samples, args.seeds, False))
        return 0
    names = args.only.split(",") if args.only else rotated(list(known), args.rotate)
    groups = args.groups.split(",")
    if args.here:
        results = (
            (f"{n}|{g}", judge(f"{n}|{g}", known, args.samples, args.seeds, True))
            for n in names
            for g in groups
        )
    else:
        results = run(names, groups, args.samples, args.seeds, args.workers)
    verdicts: collections.Counter[str] = collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for item, result in results:
        verdicts[f"{item.split('|')[1]} {verdict_of(result)}"] += 1
        totals.update(result["counts"])
        for detail in result["details"]:
            if args.details or not detail.startswith("refused"):
                print(detail, flush=True)
    print("operators:", dict(sorted(verdicts.items())))
    print("cases:", dict(sorted(totals.items())))
    return int(any(kind.endswith(("wrong", "crashed")) for kind in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
