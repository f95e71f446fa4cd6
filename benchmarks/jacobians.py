"""Batch Jacobians and Hessians against torch.func and JAX: `python -m benchmarks.jacobians`.

Four functions: a wide and a narrow two-layer net (32 -> 2048 and 2048 -> 32), the Hessian of a
64-input MLP, and the flow map of Lorenz-96 (40 variables, 50 Runge-Kutta steps). torch.func runs at
its best: both modes, `vmap` unchunked and at several chunk sizes, are tried on each function first;
the three fastest are timed, and the best of them is the peer. All peers run in turn, and ratios are
taken within a round.

Peak memory is that of one call in a process of its own, above what the process held, after a first
call. torch.func's is that of the fastest variant, and, beside it, that of the fastest chunked one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shardmap
from benchmarks.common import (
    Quartiles,
    Timer,
    machine,
    machine_line,
    markdown,
    milliseconds,
    ratio,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.memory import Watch

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
STEPS, STEP, FORCING = 50, 0.01, 8.0
TIME_TARGET = 1.05
TRACES = ("auto", "once", "each")
FINALISTS = 3
"""Variants of torch.func that are timed beside us, the fastest of the search; the peer is the
one with the lowest median."""


@dataclass(frozen=True)
class Case:
    """A function of one sample, a batch, and the wanted derivatives."""

    function: Callable[[Tensor], Tensor]
    batch: Tensor
    jax: Callable[[], Callable[[Any], Any]]
    """Makes the same function in JAX."""
    hessian: bool
    chunks: tuple[int, ...]
    """Chunk sizes that torch.func's user might try, besides none."""
    memory_target: float

    @property
    def modes(self) -> tuple[str, ...]:
        """Transforms of torch.func, and of JAX, that give the result."""
        return ("hessian",) if self.hessian else ("jacrev", "jacfwd")


def dense(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def dense_jax(net: nn.Sequential, scalar: bool = False) -> Callable[[], Callable[[Any], Any]]:
    """The same net in JAX."""

    def make() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        layers = [
            (jnp.asarray(m.weight.numpy()), jnp.asarray(m.bias.numpy()))
            for m in net
            if isinstance(m, nn.Linear)
        ]

        def function(x: Any) -> Any:
            for weight, bias in layers[:-1]:
                x = jnp.tanh(weight @ x + bias)
            x = layers[-1][0] @ x + layers[-1][1]
            return x[0] if scalar else x

        return function

    return make


def flow(x: Tensor, steps: int = STEPS) -> Tensor:
    """Lorenz-96 for half a unit of time: 50 Runge-Kutta steps (Lorenz, 1996)."""

    def slope(x: Tensor) -> Tensor:
        return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + FORCING

    for _ in range(steps):
        a = slope(x)
        b = slope(x + STEP / 2 * a)
        c = slope(x + STEP / 2 * b)
        d = slope(x + STEP * c)
        x = x + STEP / 6 * (a + 2 * b + 2 * c + d)
    return x


def flow_jax() -> Callable[[Any], Any]:
    """The same flow map in JAX, as a loop that is compiled once."""
    import jax
    import jax.numpy as jnp

    def slope(x: Any) -> Any:
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + FORCING

    def step(_: int, x: Any) -> Any:
        a = slope(x)
        b = slope(x + STEP / 2 * a)
        c = slope(x + STEP / 2 * b)
        d = slope(x + STEP * c)
        return x + STEP / 6 * (a + 2 * b + 2 * c + d)

    return lambda x: jax.lax.fori_loop(0, STEPS, step, x)


def cases() -> dict[str, Case]:
    """The functions, each with its batch."""
    wide, narrow, potential = dense(32, 256, 2048), dense(2048, 256, 32), dense(64, 256, 256, 1)
    torch.manual_seed(1)
    return {
        "32 -> 2048, batch 64": Case(
            wide, torch.randn(64, 32), dense_jax(wide), False, (4, 16, 32), 0.6
        ),
        "2048 -> 32, batch 64": Case(
            narrow, torch.randn(64, 2048), dense_jax(narrow), False, (4, 16, 32), 0.6
        ),
        "Hessian, 64 inputs, batch 256": Case(
            lambda x: potential(x)[0],
            torch.randn(256, 64),
            dense_jax(potential, scalar=True),
            True,
            (8, 16, 32, 64, 128),
            0.6,
        ),
        "Lorenz-96, 50 steps, batch 512": Case(
            flow, FORCING + torch.randn(512, 40), flow_jax, False, (16, 32, 64, 128, 256), 0.8
        ),
    }


def shardmaps(case: Case, trace: str) -> Callable[[Tensor], Any]:
    """The batch's derivatives with this library, as it is called by default."""
    return (
        shardmap.hessian(case.function, trace=trace)
        if case.hessian
        else shardmap.jacobian(case.function, trace=trace)
    )


def torch_func(case: Case, mode: str, chunk: int | None) -> Callable[[Tensor], Tensor]:
    """The batch's derivatives with torch.func."""
    return torch.func.vmap(getattr(torch.func, mode)(case.function), chunk_size=chunk)


def jax_peer(case: Case, mode: str) -> Callable[[], Any]:
    """The batch's derivatives with JAX, compiled."""
    import jax

    mapped = jax.jit(jax.vmap(getattr(jax, mode)(case.jax())))
    x = np.asarray(case.batch.numpy())
    return lambda: jax.block_until_ready(mapped(x))


def search(case: Case) -> list[tuple[float, str, int | None]]:
    """torch.func's variants by time, the fastest first.

    A mode that is twenty times slower than the best is tried once.
    """
    found: list[tuple[float, str, int | None]] = []
    for mode in case.modes:
        for chunk in (None, *case.chunks):
            peer = torch_func(case, mode, chunk)
            seconds = _once(peer, case.batch)
            if not found or seconds < 4 * min(found)[0]:
                seconds = min(seconds, *[_once(peer, case.batch) for _ in range(3)])
            found.append((seconds, mode, chunk))
            if seconds > 20 * min(found)[0]:
                break
    return sorted(found, key=lambda f: f[0])


def _once(peer: Callable[[Tensor], Any], batch: Tensor) -> float:
    start = time.perf_counter()
    peer(batch)
    return time.perf_counter() - start


def check(name: str, case: Case, peers: dict[str, Any]) -> None:
    """Refuse to time wrong numbers."""
    expected = peers["torch.func 0"]()
    scale = expected.abs().max().item()
    for peer, call in peers.items():
        error = (torch.from_numpy(np.array(call())) - expected).abs().max().item() / scale
        if not error < 1e-4:
            raise SystemExit(
                f"{name}: {peer} differs from torch.func by {error:.2g} of the largest entry"
            )


def measure(name: str, case: Case, timer: Timer, threads: int, with_jax: bool) -> dict[str, Any]:
    """Times and peaks of one case."""
    variants = search(case)
    tried = {
        f"torch.func {i}": torch_func(case, mode, chunk)
        for i, (_, mode, chunk) in enumerate(variants[:FINALISTS])
    }
    peers: dict[str, Callable[[], Any]] = {
        peer: lambda mapped=mapped: mapped(case.batch) for peer, mapped in tried.items()
    }
    for trace in TRACES:
        mapped = shardmaps(case, trace)
        peers[f"shardmap, trace={trace}"] = lambda mapped=mapped: mapped(case.batch)
    if with_jax:
        peers["jax.jit"] = jax_peer(case, variants[0][1])
    check(name, case, peers)
    seconds = timer.run(peers)
    best = min(tried, key=lambda peer: statistics.median(seconds[peer]))
    _, mode, chunk = variants[int(best.split()[1])]
    seconds = {"torch.func": seconds[best]} | {
        peer: s for peer, s in seconds.items() if peer not in tried
    }
    chunked = next((v for v in variants if v[2] is not None), variants[0])
    peaks = {
        **{f"shardmap, trace={trace}": peak(name, trace, None, threads) for trace in TRACES},
        "torch.func": peak(name, mode, chunk, threads),
        "torch.func, chunked": peak(name, chunked[1], chunked[2], threads),
    }
    return {
        "variants": [{"seconds": s, "mode": m, "chunk": c} for s, m, c in variants],
        "best": {"mode": mode, "chunk": chunk},
        "chunked": {"mode": chunked[1], "chunk": chunked[2]},
        "milliseconds": {peer: asdict(milliseconds(s)) for peer, s in seconds.items()},
        "ratio": {peer: asdict(ratio(seconds, peer, "torch.func")) for peer in seconds},
        "peaks": peaks,
    }


def peak_here(name: str, which: str, chunk: int | None) -> dict[str, int]:
    """Peak bytes of one call in this process."""
    case = cases()[name]
    mapped = shardmaps(case, which) if which in TRACES else torch_func(case, which, chunk)
    mapped(case.batch)
    with Watch("cpu") as watch:
        result = mapped(case.batch)
    return {"peak": watch.peak, "result": result.numel() * result.element_size()}


def peak(name: str, which: str, chunk: int | None, threads: int) -> dict[str, int]:
    """`peak_here` in a process of its own."""
    code = (
        f"import json, torch; torch.set_num_threads({threads}); from benchmarks import jacobians; "
        f"print(json.dumps(jacobians.peak_here({name!r}, {which!r}, {chunk!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {which}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, Any]) -> str:
    """The tables."""
    times, memory = [], []
    for name, r in results.items():
        ratios = {peer: Quartiles(**q) for peer, q in r["ratio"].items()}
        best = (
            f"{r['best']['mode']}, {'whole' if r['best']['chunk'] is None else r['best']['chunk']}"
        )
        row = [name, best, f"{r['milliseconds']['torch.func']['median']:.1f} ms"]
        row += [ratios[f"shardmap, trace={trace}"].text() for trace in TRACES]
        row += [
            ratios["jax.jit"].text() if "jax.jit" in ratios else "",
            verdict(ratios["shardmap, trace=auto"].median, TIME_TARGET),
        ]
        times.append(row)
        p = r["peaks"]
        *own, theirs, chunked = (p[k]["peak"] / MIB for k in p)
        ours = own[0]  # by default
        memory.append(
            [
                name, f"{p['torch.func']['result'] / MIB:.0f}", *[f"{peak:.0f}" for peak in own],
                f"{theirs:.0f}", f"{chunked:.0f}", f"{ours / theirs:.2f}",
                f"{ours / chunked:.2f}", verdict(ours / theirs, cases()[name].memory_target),
            ]
        )  # fmt: skip
    header = [
        "",
        "torch.func at its best: mode, chunk",
        "its time",
        *[f"shardmap, trace={t}" for t in TRACES],
        "jax.jit",
        "at most 1.05",
    ]
    second = [
        "",
        "result",
        *[f"shardmap, trace={t}" for t in TRACES],
        "torch.func at its best",
        "its best chunked",
        "ratio, by default",
        "to chunked",
        "0.6, flow map 0.8",
    ]
    return (
        "Times: over torch.func's in the same round, median (quartiles).\n\n"
        + markdown(header, times)
        + "\n\nPeak memory of a call, in MiB above what its process held before:\n\n"
        + markdown(second, memory)
        + "\n"
    )


def main() -> int:
    """Run the requested benchmarks and write the tables; return 1 if a target is missed."""
    names = list(cases())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="*", default=names, metavar="PART", help="parts of the cases' names"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-jax", action="store_true")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "jacobians",
        help="without ending: .md and .json are written",
    )
    options = parser.parse_args()
    use_threads(options.threads)
    description = machine(("torch", "numpy", "jax"))
    results: dict[str, Any] = {}
    for name, case in cases().items():
        if any(part in name for part in options.cases):
            sys.stderr.write(f"{name} ...\n")
            results[name] = measure(
                name, case, Timer(options.rounds, warmup=2), options.threads, not options.no_jax
            )
    text = f"{machine_line(description)}\n\n{report(results)}"
    sys.stdout.write(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), {"machine": description, "results": results})
    return int("FAIL" in text)


if __name__ == "__main__":
    sys.exit(main())
