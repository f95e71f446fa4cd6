"""The differential fuzzer: random programs, the loop against the map.

A program is python source, grown line by line (`tests.fuzz_steps`, `tests.fuzz_writes`) and run on
every row while it grows, so that what is left is known to run. Everything follows from the seed.

    python -m tests.fuzz --seeds 0:5000 --workers 2
    python -m tests.fuzz --seeds 17:18 --show
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import linecache
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from tests import (
    fuzz_steps,  # noqa: F401  (registers steps)
    fuzz_writes,  # noqa: F401  (registers steps)
    isolate,
    oracle,
)
from tests.fuzz_scope import FLOATS, STEPS, Scope

Refusals = tuple[type[BaseException], ...]

LARGEST_MAGNITUDE = 40.0
"""Lines whose result exceeds it are taken back, so that rounding cannot grow without bound."""
LARGEST_TENSOR = 400
NOT_RUNNABLE = (
    RuntimeError,
    IndexError,
    TypeError,
    ValueError,
    NotImplementedError,
    AttributeError,
    NameError,
    AssertionError,
    KeyError,
    ZeroDivisionError,
    SyntaxError,
)
"""What a line that does not fit its operands may raise in the loop; it is taken back."""

CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_float64": lambda: default_dtype(torch.float64),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor that a program is given."""

    shape: tuple[int, ...]
    """Of one row."""
    dtype: torch.dtype
    in_dim: int | None
    """None: unmapped (captured tensors always are)."""
    layout: str
    """How the batch lies in memory: contiguous, permuted, sliced."""
    requires_grad: bool

    def make(self, size: int, seed: int, perturbed: bool) -> torch.Tensor:
        """The values, and where asked for the same with rounding errors of a few units."""
        generator = torch.Generator().manual_seed(seed)
        shape = list(self.shape)
        if self.in_dim is not None:
            shape.insert(self.in_dim if self.in_dim >= 0 else len(shape) + 1 + self.in_dim, size)
        if self.dtype.is_floating_point:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 1.5
            if perturbed:
                values = values * (
                    1
                    + 4
                    * torch.finfo(self.dtype).eps
                    * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)
                )
        else:
            values = torch.randint(
                0, 2 if self.dtype == torch.bool else 5, shape, generator=generator
            )
        values = values.to(self.dtype)
        if self.layout == "permuted" and values.dim() > 1:
            order = list(range(values.dim()))
            random.Random(seed).shuffle(order)
            back = [order.index(i) for i in range(len(order))]
            values = values.permute(order).contiguous().permute(back)
        elif self.layout == "sliced" and values.dim():
            values = torch.stack([values, torch.full_like(values, 1)], -1)[..., 0]
        return values.detach().requires_grad_(self.requires_grad)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function as source text, its inputs, and how it is mapped."""

    seed: int
    size: int
    inputs: tuple[Input, ...]
    captured: tuple[Input, ...]
    steps: tuple[str, ...]
    returns: tuple[str, ...]
    out_dims: int | tuple[int, ...] = 0
    chunk_size: int | None = None
    devices: tuple[str, ...] | None = None
    second_order: bool = False
    context: str = "plain"
    outer: str = "none"
    """A `torch.func` transform around the map: none, vjp, jvp, vmap."""
    precision: torch.dtype | None = None

    def source(self) -> str:
        """The mapped function."""
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        body = "\n".join(self.steps).splitlines()
        value = self.returns[0] if len(self.returns) == 1 else f"({', '.join(self.returns)},)"
        return (
            f"def fn({names}):\n"
            + "".join(f"    {line}\n" for line in body)
            + f"    return {value}\n"
        )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the map that say how to compute."""
        options: dict[str, Any] = {"chunk_size": self.chunk_size} if self.chunk_size else {}
        return options | ({"devices": list(self.devices)} if self.devices else {})

    def text(self) -> str:
        """All that is needed to see what is mapped over what."""
        lines = [
            f"# seed {self.seed}, batch of {self.size}, context {self.context}, outer "
            f"{self.outer}, second order {self.second_order}"
        ]
        for prefix, group in (("x", self.inputs), ("c", self.captured)):
            lines += [f"# {prefix}{i}: {dataclasses.asdict(spec)}" for i, spec in enumerate(group)]
        call = (
            f"vmap(fn, {tuple(s.in_dim for s in self.inputs)}, {self.out_dims}, **{self.options()})"
        )
        return "\n".join(
            [
                *lines,
                self.source() + f"# {call}({', '.join(f'x{i}' for i in range(len(self.inputs)))})",
            ]
        )

    def setting(self, perturbed: bool = False) -> oracle.Setting:
        """A fresh copy of the inputs and the function over them."""
        inputs = [
            spec.make(self.size, 1000 * self.seed + i, perturbed)
            for i, spec in enumerate(self.inputs)
        ]
        captured = [
            spec.make(0, 1000 * self.seed + 500 + i, perturbed)
            for i, spec in enumerate(self.captured)
        ]

        def run(vmap: oracle.Subject) -> Any:
            function = compiled(self.source(), captured, vmap)
            with CONTEXTS[self.context]():
                return vmap(
                    function, tuple(s.in_dim for s in self.inputs), self.out_dims, **self.options()
                )(*inputs)

        around = (
            run if self.outer == "none" else lambda vmap: self.transformed(vmap, inputs, captured)
        )
        return oracle.Setting(around, inputs, captured)

    def transformed(
        self, vmap: oracle.Subject, inputs: list[torch.Tensor], captured: list[torch.Tensor]
    ) -> Any:
        """The map under an outer transform, by its floating-point inputs and outputs."""
        function = compiled(self.source(), captured, vmap)
        mapped = vmap(
            function, tuple(s.in_dim for s in self.inputs), self.out_dims, **self.options()
        )
        at = [i for i, t in enumerate(inputs) if t.is_floating_point()]

        def by_floats(*floats: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(at, floats, strict=True))
            outputs = mapped(*(given.get(i, t) for i, t in enumerate(inputs)))
            return tuple(
                o
                for o in (outputs if isinstance(outputs, tuple) else (outputs,))
                if o.is_floating_point()
            )

        floats = tuple(inputs[i].detach() for i in at)
        if not at:
            raise TypeError("nothing to transform by")
        if self.outer == "jvp":
            return torch.func.jvp(by_floats, floats, tuple(t.cos() for t in floats))
        if self.outer == "vmap":
            return torch.func.vmap(by_floats)(*(torch.stack([t, t * 0.5]) for t in floats))
        outputs, pull = torch.func.vjp(by_floats, *floats)[:2]
        return outputs, pull(tuple(o.detach().cos() for o in outputs))


def namespace(captured: list[torch.Tensor], vmap: oracle.Subject) -> dict[str, Any]:
    """The globals of a program."""
    return {"torch": torch, "F": F, "vmap": vmap} | {f"c{i}": t for i, t in enumerate(captured)}


def compiled(source: str, captured: list[torch.Tensor], vmap: oracle.Subject) -> Callable[..., Any]:
    """The function of a source, whose lines show in tracebacks."""
    filename = f"<fuzz {hash(source)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = namespace(captured, vmap)
    exec(compile(source, filename, "exec"), scope)
    return scope["fn"]


# ----------------------------------------------------------------------------------------------
# growing a program


class Growth:
    """A program on its way: the rows it runs on, and the lines accepted so far."""

    def __init__(self, program: Program, rng: random.Random) -> None:
        self.program, self.rng, self.steps, self.serial = program, rng, list[str](), 0
        self.restart()

    def restart(self) -> None:
        """Runs the accepted lines on fresh rows."""
        setting = self.program.setting()
        size, row = oracle.rows(tuple(setting.inputs), tuple(s.in_dim for s in self.program.inputs))
        self.shared = {t.untyped_storage().data_ptr() for t in setting.inputs + setting.captured}
        self.names = [f"x{i}" for i in range(len(setting.inputs))] + [
            f"c{i}" for i in range(len(setting.captured))
        ]
        self.envs = [
            namespace(setting.captured, oracle.loop) | {f"x{i}": t for i, t in enumerate(row(j))}
            for j in range(size)
        ]
        for line in self.steps:
            for env in self.envs:
                exec(line, env)
        self.names += sorted(
            (n for n in self.envs[0] if re.fullmatch(r"v\d+", n)), key=lambda n: int(n[1:])
        )

    def owned(self, name: str) -> bool:
        """Whether the program made the tensor itself (one in fifty times a mapped input passes for such)."""
        own = self.envs[0][name].untyped_storage().data_ptr() not in self.shared
        return own or (
            name.startswith("x")
            and self.program.inputs[int(name[1:])].in_dim is not None
            and self.rng.random() < 0.02
        )

    def bare(self, name: str) -> bool:
        """Whether a tensor claims to require grad but leads nowhere: a view made under no_grad."""
        t = self.envs[0].get(name)
        return t is not None and t._is_view() and t.requires_grad and t.is_leaf

    def try_line(self) -> None:
        """Adds one random line, if it runs on every row and leaves everything tame."""
        weights, steps = zip(*STEPS, strict=True)
        scope = Scope(self.rng, self.envs[0], self.names, self.owned, self.serial)
        try:
            line = self.rng.choices(steps, weights)[0](scope)
        except RuntimeError:  # autograd has given up on a view after a write to its base
            return
        if (
            line is not None
            and "nextafter" in line
            and any(map(self.bare, re.findall(r"\b[xcv]\d+\b", line)))
        ):
            # its derivative keeps both arguments, and whether torch notices later writes to them
            # depends on such a view
            return
        if line is None or re.search(
            r"\bNone\b(?!\])", line.replace("[None", "[").replace("(0, None)", "")
        ):
            return
        if self.rng.random() < 0.05:
            line = f"with torch.no_grad():\n    {line}"
        try:
            code = compile(line, "<line>", "exec")
            for env in self.envs:
                exec(code, env)
            self.check(scope.new_names)
        except NOT_RUNNABLE:
            self.restart()
            return
        self.steps.append(line)
        self.names += scope.new_names
        self.serial += len(scope.new_names)

    def check(self, new: list[str]) -> None:
        """Raises ValueError unless all tensors are small, finite, and of one shape and dtype in all rows."""
        for name in self.names + new:
            values = [env[name] for env in self.envs]
            if (
                not all(isinstance(t, torch.Tensor) for t in values)
                or len({(t.shape, t.dtype) for t in values}) > 1
                or values[0].numel() > LARGEST_TENSOR
            ):
                raise ValueError(name)
            if (
                values[0].dtype not in (*FLOATS, torch.int64, torch.int32, torch.bool)
                or values[0].layout != torch.strided
            ):
                raise ValueError(name)
            for t in values:
                if t.numel() and not (t.detach().double().abs().max() <= LARGEST_MAGNITUDE):
                    raise ValueError(name)


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    grad = rng.random() < 0.6
    size = rng.choice((1, 2, 3, 3, 5, 7))

    def spec(mapped: bool) -> Input:
        dtype = rng.choices(
            (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool),
            (55, 18, 4, 14, 4, 5),
        )[0]
        shape = tuple(
            rng.choices((1, 2, 3, 4), (1, 2, 5, 3))[0]
            for _ in range(rng.choices((0, 1, 2, 3), (2, 4, 5, 2))[0])
        )
        in_dim = (
            rng.choice((0, 0, 0, rng.randrange(-len(shape) - 1, len(shape) + 1)))
            if mapped
            else None
        )
        layout = rng.choices(("contiguous", "permuted", "sliced"), (6, 2, 1))[0]
        return Input(
            shape, dtype, in_dim, layout, grad and dtype.is_floating_point and rng.random() < 0.85
        )

    inputs = tuple(spec(i == 0 or rng.random() < 0.8) for i in range(rng.randrange(1, 4)))
    captured = tuple(
        dataclasses.replace(
            spec(False),
            dtype=rng.choice((torch.float32, torch.float32, torch.float64)),
            requires_grad=grad and rng.random() < 0.8,
        )
        for _ in range(rng.randrange(3))
    )
    context = rng.choices(tuple(CONTEXTS), (84, 5, 3, 4, 4))[0]
    program = Program(
        seed, size, inputs, captured, (), ("x0",), chunk_size=rng.choice((None, None, None, 1, 2, 3, 100)),
        devices=rng.choice((None, None, None, ("cpu", "cpu"), ("cpu", "cpu", "cpu"))), second_order=grad and rng.random() < 0.25,
        context=context,
    )  # fmt: skip
    with CONTEXTS[context](), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        growth = Growth(program, rng)
        for _ in range(rng.randrange(3, 22)):
            growth.try_line()
        env = growth.envs[0]
        weights = [(1 + i) * (4 if env[n].requires_grad else 1) for i, n in enumerate(growth.names)]
        returns = tuple(
            rng.choices(growth.names, weights)[0] for _ in range(rng.choice((1, 2, 2, 3, 4)))
        )
        dims = tuple(
            rng.choice((0, 0, 0, rng.randrange(-env[n].dim() - 1, env[n].dim() + 1)))
            for n in returns
        )
        low = [
            t.dtype for t in env.values() if isinstance(t, torch.Tensor) and t.is_floating_point()
        ] + [torch.bfloat16] * (context == "autocast")
    outer = (
        rng.choices(("none", "vjp", "jvp", "vmap"), (94, 3, 2, 1))[0]
        if context == "plain"
        else "none"
    )
    order = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if outer != "none" and any("no_grad" in line for line in growth.steps):
        # torch.func's levels have a grad mode of their own: no_grad inside does not stop what
        # autograd records below them.
        program = dataclasses.replace(
            program,
            captured=tuple(dataclasses.replace(c, requires_grad=False) for c in program.captured),
        )
    return dataclasses.replace(
        program,
        outer=outer,
        steps=tuple(growth.steps),
        returns=returns,
        out_dims=dims[0] if len(dims) == 1 else dims,
        precision=min(low, key=order.index, default=None),
    )


def judge(
    program: Program, subject: oracle.Subject, refusals: Refusals = oracle.REFUSALS
) -> oracle.Verdict:
    """Compares the subject with the loop on one program."""
    aliasing = program.outer != "vmap"  # torch's own map repeats what no sample changes as a view
    checks = oracle.Checks(
        second_order=program.second_order,
        aliasing=aliasing,
        precision=program.precision,
        refusals=refusals,
    )
    return oracle.compare(program.setting, subject, checks, lambda: program.setting(perturbed=True))


# ----------------------------------------------------------------------------------------------
# shrinking


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
    """What kind of failure it is, without its numbers, so that shrinking does not wander to another one."""
    lines = verdict.detail.strip().splitlines() or [""]
    head = lines[-1] if verdict.detail.startswith("crash") else lines[0]
    return verdict.kind + ": " + re.sub(r"[-+]?\d[\d.e+-]*|\(.*|output \d+|v\d+", "#", head)[:60]


def report(
    program: Program,
    verdict: oracle.Verdict,
    subject: oracle.Subject,
    small: bool = True,
    refusals: Refusals = oracle.REFUSALS,
) -> str:
    """The shrunk program and what it does."""
    if small and verdict.kind != "right":
        kind = category(verdict)
        program = shrink(program, lambda p: category(judge(p, subject, refusals)) == kind)
        verdict = judge(program, subject, refusals)
    return f"{program.text()}\n# {verdict.kind}: {verdict.detail}"


# ---------------------------------------------------------------------------------------------- the
# command


def run_seed(seed: str, subject_name: str, shrinking: bool) -> dict[str, Any]:
    """One seed's verdict as plain data; called in a worker process."""
    subject = oracle.subject_named(subject_name)
    refusals = (Exception,) if subject_name == "torch" else oracle.REFUSALS
    program = generate(int(seed))
    verdict = judge(program, subject, refusals)
    bad = verdict.kind == "wrong"
    return {
        "seed": int(seed), "kind": verdict.kind, "detail": verdict.detail.splitlines()[0] if verdict.detail else "",
        "lines": len(program.steps), "gradient": verdict.gradient,
        "report": report(program, verdict, subject, shrinking, refusals) if bad else "",
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
    parser.add_argument("--show", action="store_true", help="print each program and its verdict")
    parser.add_argument("--max-reports", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        isolate.serve(lambda seed: run_seed(seed, args.subject, not args.no_shrink))
        return 0
    first, last = map(int, args.seeds.split(":"))
    if args.show:
        for seed in range(first, last):
            program = generate(seed)
            subject = oracle.subject_named(args.subject)
            print(report(program, judge(program, subject), subject, not args.no_shrink), "\n")
        return 0
    command = [sys.executable, "-m", "tests.fuzz", "--serve", "--subject", args.subject] + [
        "--no-shrink"
    ] * args.no_shrink
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
