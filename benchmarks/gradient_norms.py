"""Norms and clipped sums of per-sample gradients, from factors.

`python -m benchmarks.gradient_norms`.

A 4-layer MLP 784-256-256-256-10 (batch 4,096) and a transformer of two layers over 32 positions
(batch 1,024). Each peer is timed at several chunk sizes and its best is taken, interleaved in one
run, minimum of the rounds:

- torch.func: `vmap(grad)`, the gradients materialised, chunk by chunk, then their norms, and the sum weighted by the clipping factors;
- opacus: ghost clipping (`GradSampleModuleFastGradientClipping`): one backward pass for the norms, a second one for the clipped sum;
- backward: an ordinary backward pass of the summed loss, which gives no norms; what the others are measured by;
- shardmap: `per_sample_grad(model, loss, reduce=...)` with automatic chunks, recorded once, and at each call.

The peaks are measured in processes of their own, clipped sums against the ordinary pass over chunks
of 1,024. The last part is the mean and the norms of the MLP's gradients over a million samples, a
slice scaled, against torch.func in a chunk loop written by hand; and the Gram matrix of a CNN's
gradients on 500 digits (the empirical NTK of the sum of its logits), against the product of the
stacked gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from benchmarks.common import (
    Timer,
    machine,
    machine_line,
    markdown,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.memory import Watch
from benchmarks.models import TOKENS, VOCABULARY, Transformer, digits_cnn

RESULTS = Path(__file__).parent / "results"
MAX_NORM = 1.0
MILLION = 1_000_000
LEAST_SPEED = {"mlp": 8.0}
"""Against torch.func."""
MOST = {"mlp": {"opacus": 1.0}, "transformer": {"backward": 1.6, "opacus": 0.8}}
"""Time over a peer's."""
MOST_MEMORY = 1.3
MILLION_SPEED = 10.0
MOST_OF_EXPLICIT = 0.25

Problem = tuple[nn.Module, Tensor, Tensor]
Call = Callable[[], Any]


def problem(name: str, samples: int) -> Problem:
    """A model and a batch."""
    torch.manual_seed(0)
    labels = torch.randint(10, (samples,))
    if name == "transformer":
        return Transformer(fused=True), torch.randint(VOCABULARY, (samples, TOKENS)), labels
    widths = (784, 256, 256, 256, 10)
    layers = [
        layer
        for a, b in zip(widths, widths[1:], strict=False)
        for layer in (nn.Linear(a, b), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1]), torch.randn(samples, 784), labels


def ours(p: Problem, reduce: Any, trace: str) -> Call:
    """One call of the library."""
    model, x, y = p
    mapped = shardmap.per_sample_grad(
        model, F.cross_entropy, reduce=reduce, batch_of_one=True, trace=trace
    )
    return lambda: mapped(x, y)


def by_torch_func(p: Problem, clipped: bool, chunk: int) -> Call:
    """Materialised gradients, chunk by chunk."""
    model, x, y = p
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Any:
        norms, total = [], {name: torch.zeros_like(value) for name, value in parameters.items()}
        for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
            gradients = mapped(parameters, a, b)
            norms.append(
                torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            )
            if clipped:
                weights = (MAX_NORM / norms[-1]).clamp(max=1)
                for name, g in gradients.items():
                    total[name] += torch.tensordot(weights, g, 1)
        return total if clipped else torch.cat(norms)

    return run


def by_opacus(p: Problem, clipped: bool, chunk: int) -> Call:
    """Ghost clipping with hooks on modules."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, x, y = p
    hooked: Any = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), max_grad_norm=MAX_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )
    parameters = {name.removeprefix("_module."): value for name, value in hooked.named_parameters()}

    def run() -> Any:
        norms, total = [], {name: torch.zeros_like(value) for name, value in parameters.items()}
        for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
            hooked.enable_hooks()
            losses = F.cross_entropy(hooked(a), b, reduction="none")
            losses.sum().backward(retain_graph=clipped)
            norms.append(hooked.get_norm_sample())
            if clipped:
                weights = hooked.get_clipping_coef()
                for value in parameters.values():
                    value.grad = None
                hooked.disable_hooks()
                (weights * losses).sum().backward()
                for name, value in parameters.items():
                    total[name] += value.grad
            for value in parameters.values():
                value.grad = None
        return total if clipped else torch.cat(norms)

    return run


def by_backward(p: Problem, chunk: int) -> Call:
    """The gradient of the summed loss."""
    model, x, y = p
    parameters = tuple(model.parameters())

    def run() -> Any:
        total = [torch.zeros_like(value) for value in parameters]
        for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
            loss = F.cross_entropy(model(a), b, reduction="sum")
            for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                t += g
        return total

    return run


def compared(name: str, samples: int, rounds: int) -> dict[str, Any]:
    """Seconds of each peer at each of its chunk sizes, and how far its values are from those of torch.func."""
    p = problem(name, samples)
    small = (16, 64) if name == "mlp" else (32, 128)
    found: dict[str, Any] = {"samples": samples, "seconds": {}, "errors": {}}
    for task, reduce in (("norms", "norm"), ("clipped", shardmap.reduce.clipped_sum(MAX_NORM))):
        clipped = task == "clipped"
        calls: dict[str, Call] = {
            "shardmap once": ours(p, reduce, "once"),
            "shardmap each": ours(p, reduce, "each"),
        }
        calls |= {f"backward {c}": by_backward(p, c) for c in (128, 256, 512, 1024, samples)}
        calls |= {f"opacus {c}": by_opacus(p, clipped, c) for c in (128, 512, 1024)}
        calls |= {f"torch.func {c}": by_torch_func(p, clipped, c) for c in small}
        q = exact(p)
        expected = by_torch_func(q, clipped, small[0])()
        values = {
            "shardmap once": ours(q, reduce, "once"),
            "shardmap each": ours(q, reduce, "each"),
            "opacus": by_opacus(q, clipped, 128),
        }
        found["errors"][task] = {
            name: difference(call(), expected) for name, call in values.items()
        }
        found["seconds"][task] = Timer(rounds=rounds, warmup=1, primed=True).run(calls)
    return found


def exact(p: Problem) -> Problem:
    """The same in float64, of a few samples.

    In float32 a unit within rounding of zero may be on for one peer and off for another.
    """
    model, x, y = p
    return (
        copy.deepcopy(model).double(),
        x[:512].double() if x.is_floating_point() else x[:512],
        y[:512],
    )


def difference(found: Any, expected: Any) -> float:
    """The largest difference, over the largest expected value of the same tensor."""
    pairs = (
        [(found, expected)]
        if isinstance(found, Tensor)
        else [(found[name], expected[name]) for name in expected]
    )
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def by_hand(p: Problem, chunk: int) -> Call:
    """The mean gradient and the norms, with torch.func and a loop."""
    model, x, y = p
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Any:
        total, norms = {name: torch.zeros_like(value) for name, value in parameters.items()}, []
        for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
            gradients = mapped(parameters, a, b)
            for name, g in gradients.items():
                total[name] += g.sum(0)
            norms.append(
                torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            )
        return {name: t / len(x) for name, t in total.items()}, torch.cat(norms)

    return run


def million(samples: int, rounds: int) -> dict[str, Any]:
    """Seconds for the mean and the norms of a slice."""
    p = problem("mlp", samples)
    reduce = shardmap.reduce.together(mean="mean", norms="norm")
    calls = {"shardmap": ours(p, reduce, "each")} | {
        f"torch.func {c}": by_hand(p, c) for c in (8, 16, 32, 64)
    }
    (mean, norms), found = by_hand(exact(p), 16)(), ours(exact(p), reduce, "each")()
    errors = {"mean": difference(found["mean"], mean), "norms": difference(found["norms"], norms)}
    return {
        "samples": samples,
        "errors": errors,
        "seconds": Timer(rounds=rounds, warmup=1, primed=True).run(calls),
    }


def digits(samples: int) -> Problem:
    """A CNN and real digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images[:samples] / 16, dtype=torch.float32).unsqueeze(1)
    return digits_cnn(), images, torch.tensor(bunch.target[:samples])


def kernel(p: Problem) -> Call:
    """The Gram matrix, as the library computes it."""
    model, x, _ = p
    mapped = shardmap.per_sample_grad(model, torch.sum, reduce="gram", batch_of_one=True)
    return lambda: mapped(x)


def explicit_kernel(p: Problem) -> Call:
    """The Gram matrix of the stacked gradients."""
    model, x, _ = p
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    mapped = torch.func.vmap(
        torch.func.grad(lambda q, x: torch.func.functional_call(model, q, (x[None],)).sum()),
        (None, 0),
    )

    def run() -> Tensor:
        rows = torch.cat([g.flatten(1) for g in mapped(parameters, x).values()], 1)
        return rows @ rows.T

    return run


def peak(which: str, name: str, samples: int) -> dict[str, int]:
    """Peak bytes of one way, in this process, which has done a quarter of it before."""
    p = digits(samples) if name == "digits" else problem(name, samples)
    few = (
        p[0],
        p[1][: samples // 4],
        p[2][: samples // 4],
    )  # enough to be planned: what planning imports is no part of the map
    make: Callable[[Problem], Call] = {
        "shardmap": lambda p: ours(p, shardmap.reduce.clipped_sum(MAX_NORM), "each"),
        "backward": lambda p: by_backward(p, 1024),
        "kernel": kernel,
        "explicit": explicit_kernel,
    }[which]
    make(few)()
    call = make(p)
    with Watch("cpu") as watch:
        result = call()
    del result
    return {"peak": watch.peak}


def alone(which: str, name: str, samples: int, threads: int) -> int:
    """`peak` in a process of its own."""
    code = (
        f"import json, torch; torch.set_num_threads({threads}); from benchmarks import "
        "gradient_norms as g; "
        f"print(json.dumps(g.peak({which!r}, {name!r}, {samples})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def kernels(samples: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds and peaks of the Gram matrix."""
    p = digits(samples)
    calls = {"shardmap": kernel(p), "explicit": explicit_kernel(p)}
    error = difference(calls["shardmap"](), calls["explicit"]())
    peaks = {which: alone(which, "digits", samples, threads) for which in ("kernel", "explicit")}
    return {
        "samples": samples,
        "error": error,
        "memory": peaks,
        "seconds": Timer(rounds=rounds, warmup=1, primed=True).run(calls),
    }


def best(seconds: dict[str, list[float]], peer: str) -> tuple[float, str]:
    """A peer's least time, and at which chunk size."""
    return min(
        (min(values), name.removeprefix(peer).strip())
        for name, values in seconds.items()
        if name.startswith(peer)
    )


def report(results: dict[str, Any]) -> str:
    """The tables, each figure with what it has to be."""
    parts = []
    for name in ("mlp", "transformer"):
        if name not in results:
            continue
        found = results[name]
        for task, seconds in found["seconds"].items():
            once = best(seconds, "shardmap once")[0]
            rows = []
            for peer in ("shardmap once", "shardmap each", "backward", "opacus", "torch.func"):
                time, chunk = best(seconds, peer)
                error = next(
                    (f"{e:.1e}" for k, e in found["errors"][task].items() if k.startswith(peer)), ""
                )
                rows.append(
                    [peer, chunk or "auto", f"{1e3 * time:.1f}", f"{once / time:.2f}", error]
                )
            parts.append(
                f"{name}, {task}, {found['samples']} samples; minimum of the rounds, each peer at "
                "its best chunk size"
            )
            parts.append(
                markdown(["", "chunk", "ms", "shardmap once over it", "largest difference"], rows)
            )
            for peer, most in MOST[name].items():
                ratio = once / best(seconds, peer)[0]
                parts.append(
                    f"time over {peer}: {ratio:.2f} (at most {most}): {verdict(ratio, most)}"
                )
            if name in LEAST_SPEED:
                speed = best(seconds, "torch.func")[0] / once
                parts.append(
                    f"speed against torch.func: {speed:.1f} (at least {LEAST_SPEED[name]}): "
                    f"{verdict(LEAST_SPEED[name], speed)}"
                )
        memory = found["memory"]
        ratio = memory["shardmap"] / memory["backward"]
        parts.append(
            f"{name}: peak of clipped sums {memory['shardmap'] / 2**20:.0f} MiB, of an ordinary "
            "pass over chunks of 1,024 "
            f"{memory['backward'] / 2**20:.0f} MiB: {ratio:.2f} (at most {MOST_MEMORY}): "
            f"{verdict(ratio, MOST_MEMORY)}"
        )
    if "million" in results:
        found = results["million"]
        mine, (theirs, chunk) = (
            best(found["seconds"], "shardmap")[0],
            best(found["seconds"], "torch.func"),
        )
        scale = MILLION / found["samples"]
        parts.append(
            f"mean and norms of {MILLION} MLP gradients, {found['samples']} timed: shardmap "
            f"{scale * mine:.1f} s, torch.func in chunks of "
            f"{chunk} {scale * theirs:.1f} s: {theirs / mine:.1f} times as fast (at least "
            f"{MILLION_SPEED}): "
            f"{verdict(MILLION_SPEED, theirs / mine)}; largest differences "
            f"{found['errors']['mean']:.1e}, {found['errors']['norms']:.1e}"
        )
    if "ntk" in results:
        found = results["ntk"]
        memory, ratio = found["memory"], found["memory"]["kernel"] / found["memory"]["explicit"]
        slower = best(found["seconds"], "shardmap")[0] / best(found["seconds"], "explicit")[0]
        parts.append(
            f"Gram matrix of a CNN's gradients on {found['samples']} digits: peak "
            f"{memory['kernel'] / 2**20:.1f} MiB, explicitly "
            f"{memory['explicit'] / 2**20:.1f} MiB: {ratio:.2f} (at most {MOST_OF_EXPLICIT}): "
            f"{verdict(ratio, MOST_OF_EXPLICIT)}; time "
            f"over explicitly {slower:.2f}; largest difference {found['error']:.1e}"
        )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run the requested benchmarks and write the tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["mlp", "transformer", "million", "ntk"]
    parser.add_argument("--parts", nargs="+", default=every, choices=every)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--samples",
        type=int,
        nargs=3,
        default=[4096, 1024, 4096],
        help="of the MLP, the transformer, the slice",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "gradient_norms",
        help="without ending: .md and .json are written",
    )
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="Full backward hook is firing"
    )  # opacus: the input of the first layer needs no gradient
    use_threads(options.threads)
    results: dict[str, Any] = {"machine": machine(("torch", "opacus"))}
    for name, samples in zip(("mlp", "transformer"), options.samples, strict=False):
        if name in options.parts:
            results[name] = compared(name, samples, options.rounds)
            results[name]["memory"] = {
                which: alone(which, name, samples, options.threads)
                for which in ("shardmap", "backward")
            }
    if "million" in options.parts:
        results["million"] = million(options.samples[2], max(3, options.rounds // 2))
    if "ntk" in options.parts:
        results["ntk"] = kernels(500, options.rounds, options.threads)
    text = f"{machine_line(results['machine'])}\n\n{report(results)}"
    sys.stdout.write(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), results)
    return int("FAIL" in text)


if __name__ == "__main__":
    sys.exit(main())
