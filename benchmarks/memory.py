"""Predicted against measured memory: `python -m benchmarks.memory`.

Each case runs in a process of its own. Measured is the peak resident set of the run (VmHWM) above
what the process held when the run began (VmRSS, after imports, model, inputs and plan, with
malloc's free memory given back); on a machine with CUDA `--device cuda` takes the allocator's peak
instead. Predicted is `plan.lanes[0].peak_bytes` of a plan made before anything has run, and of one
made after the run: what the first chunk showed of kernels' workspaces is remembered per program and
device.

The second table is a map whose result is 600 MiB and which would need more than 6 GiB at once,
under `memory_budget="1GiB"`, beside torch.func.vmap with the chunk sizes that its user might guess.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import shardmap
from benchmarks.common import machine, machine_line, markdown, use_threads, write_json
from benchmarks.models import TOKENS, VOCABULARY, Transformer, cifar_cnn, mlp

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
LARGE = 512 * MIB
"""From here on the targets hold: smaller peaks drown in the process around them."""

Case = Callable[[str], tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]]


def _gradient(model: torch.nn.Module) -> Callable[..., Any]:
    parameters = tuple(model.parameters())
    return lambda x, y: torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)


def _norms(model: torch.nn.Module) -> Callable[..., Any]:
    one = _gradient(model)

    def function(x: Tensor, y: Tensor) -> Any:
        gradients = one(x, y)
        return gradients, sum(
            (g.square().sum() for g in gradients), torch.zeros((), device=x.device)
        ).sqrt()

    return function


def _classified(
    model: torch.nn.Module, shape: tuple[int, ...], device: str
) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)


def _mlp(device: str) -> Any:
    model = mlp().to(device)
    return _gradient(model), _classified(model, (3000, 784), device), {}


def _cnn(device: str) -> Any:
    model = cifar_cnn().to(device)
    return _gradient(model), _classified(model, (1500, 3, 32, 32), device), {}


def _transformer(device: str) -> Any:
    model = Transformer(fused=False).to(device)
    tokens = torch.randint(VOCABULARY, (1200, TOKENS), device=device)
    return _gradient(model), (tokens, torch.randint(10, (1200,), device=device)), {}


def _jacobian(device: str) -> Any:
    inner, outer = torch.randn(256, 64, device=device), torch.randn(2048, 256, device=device)

    def function(x: Tensor) -> Any:
        return torch.autograd.functional.jacobian(lambda v: outer @ torch.tanh(inner @ v), x)

    return function, (torch.randn(1500, 64, device=device),), {}


def _reduction(device: str) -> Any:
    model = mlp().to(device)
    # of maxima, which need the gradients themselves: sums and means come from factors, and a chunk
    # of those holds next to nothing
    return _norms(model), _classified(model, (4000, 784), device), {"reduce": ("max", None)}


def _outer(device: str) -> Any:
    model = torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU()) for _ in range(16)]
    ).to(device)
    return model, (torch.randn(8000, 1024, device=device),), {}


CASES: dict[str, tuple[Case, tuple[Any, ...]]] = {
    "MLP gradients": (_mlp, (8, 64, 256, 1024, 3000)),
    "CNN gradients": (_cnn, (8, 64, 256, 700, 1500)),
    "transformer gradients": (_transformer, (8, 64, 256, 600, 1200)),
    "batch Jacobian": (_jacobian, (8, 64, 200, 500, 1500)),
    "reduction": (_reduction, (64, 256, 600, 1500, 2500)),
    "outer autograd": (_outer, (250, 1000, 2000, 4000, 8000)),
}
"""The mapped functions, each with its chunk sizes."""


def _wide(device: str) -> Any:
    """Large activations, small gradients: a chunk needs ten times its share of the result."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(),
        torch.nn.Linear(512, 95), torch.nn.ReLU(), torch.nn.Linear(95, 10),
    ).to(device)  # fmt: skip
    return model, _classified(model, (2300, 3, 72, 72), device)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


class Watch:
    """The peak of what happens inside, above what was there when it began."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Watch:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak = (
            torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")
        ) - self.before


def measure(name: str, chunk: Any, device: str) -> dict[str, Any]:
    """One case, in this process."""
    torch.manual_seed(0)
    function, batch, options = CASES[name][0](device)
    make = shardmap.plan(function, chunk_size=chunk, memory_fraction=1.0, **options)
    plan = make(*batch)
    first = plan.lanes[0].peak_bytes
    with Watch(device) as watch:
        result = plan.run()
    del result
    again = make(*batch)
    return {
        "case": name, "chunk": chunk, "predicted": first, "corrected": again.lanes[0].peak_bytes, "measured": watch.peak,
        "scale": again.lanes[0].memory.scale,
    }  # fmt: skip


def measure_budget(which: str, chunk: Any, device: str) -> dict[str, Any]:
    """The second table's map with shardmap or torch.func, in this process; the inputs count."""
    torch.manual_seed(0)
    torch.ones(8, 8) @ torch.ones(8, 8)
    with Watch(device) as watch:
        model, (x, y) = _wide(device)
        if which == "shardmap":
            found = shardmap.vmap(_gradient(model), memory_budget="1GiB")(x, y)
        else:
            parameters = {k: p.detach() for k, p in model.named_parameters()}

            def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])

            found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=chunk)(
                parameters, x, y
            )
        size = sum(t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(found))
    whole = (
        shardmap.plan(_gradient(model), chunk_size=None)(x, y).lanes[0].peak_bytes
        if which == "shardmap"
        else None
    )
    return {
        "peer": which,
        "chunk": chunk,
        "measured": watch.peak,
        "result": size,
        "unchunked": whole,
    }


def alone(function: str, *arguments: Any, threads: int) -> dict[str, Any]:
    """Call a function of this module in a process of its own."""
    code = (
        f"import json, torch; torch.set_num_threads({threads}); from benchmarks import memory; "
        f"print(json.dumps(memory.{function}(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{function}{arguments} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(row: dict[str, Any]) -> str:
    """True if a case meets the targets."""
    if row["measured"] < LARGE:
        return ""
    before, after = row["predicted"] / row["measured"], row["corrected"] / row["measured"]
    return "pass" if 1 / 1.3 <= before <= 1.3 and 1.0 <= after <= 1.15 else "FAIL"


def report(rows: list[dict[str, Any]], budget: list[dict[str, Any]]) -> str:
    """The tables."""
    parts = []
    if rows:
        cells = [
            [
                row["case"], str(row["chunk"]), f"{row['measured'] / MIB:.0f}", f"{row['predicted'] / row['measured']:.2f}",
                f"{row['corrected'] / row['measured']:.2f}", f"{row['scale']:.2f}", judge(row),
            ]
            for row in rows
        ]  # fmt: skip
        header = [
            "case",
            "chunk",
            "measured peak, MiB",
            "predicted / measured",
            "after the first chunk",
            "learned",
            "from 512 MiB",
        ]
        parts.append(markdown(header, cells))
    if budget:
        ours = budget[0]
        parts.append(
            f'memory_budget="1GiB"; in one chunk it would need {ours["unchunked"] / MIB:.0f} MiB '
            "(over 6144); with the inputs, above the "
            f"idle process: {ours['measured'] / MIB:.0f} MiB (at most 1024): "
            f"{'pass' if ours['measured'] <= 1024 * MIB else 'FAIL'}"
        )
        cells = [
            [
                r["peer"],
                str(r["chunk"]),
                f"{r['result'] / MIB:.0f}",
                f"{r['measured'] / MIB:.0f}",
                f"{r['measured'] / r['result']:.2f}",
            ]
            for r in budget
        ]
        parts.append(
            markdown(["", "chunk_size", "result, MiB", "peak, MiB", "peak / result"], cells)
        )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run the requested benchmarks and write the tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the two smallest chunk sizes of each case, no torch.func",
    )
    parser.add_argument("--no-budget", action="store_true", help="leave the second table out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "memory",
        help="without ending: .md and .json are written",
    )
    options = parser.parse_args()
    use_threads(options.threads)
    rows = []
    for name in options.cases:
        for chunk in CASES[name][1][: 2 if options.quick else None]:
            rows.append(alone("measure", name, chunk, options.device, threads=options.threads))
            sys.stderr.write(f"{rows[-1]}\n")
    budget = []
    if not options.no_budget:
        budget.append(
            alone("measure_budget", "shardmap", "auto", options.device, threads=options.threads)
        )
        for chunk in () if options.quick else (1, 4, 16, 64, 256, None):
            budget.append(
                alone(
                    "measure_budget", "torch.func", chunk, options.device, threads=options.threads
                )
            )
    description = machine(("torch", "numpy"))
    text = f"{machine_line(description)}\n\n{report(rows, budget)}"
    sys.stdout.write(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(
        options.output.with_suffix(".json"),
        {"machine": description, "rows": rows, "budget": budget},
    )
    return int(
        any(judge(row) == "FAIL" for row in rows)
        or any(b["measured"] > 1024 * MIB for b in budget[:1])
    )


if __name__ == "__main__":
    sys.exit(main())
