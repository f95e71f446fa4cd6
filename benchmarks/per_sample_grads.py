"""Per-sample gradients against torch.func, Opacus and JAX: `python -m benchmarks.per_sample_grads`.

The peers run in turn, several rounds, and are compared within each round; before any timing their
values are compared with those of `torch.func.vmap(torch.func.grad(...))`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

import shardmap
from benchmarks import common, models
from benchmarks.models import Case

BASELINE = "torch.func"
TARGET = 1.05
"""Time over torch.func's that both ways of shardmap should keep to, on every model."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Rounding, relative to the largest magnitude of one sample's gradient of one parameter: sums of
thousands of terms in another order."""
KINKED = 0.1
"""Fraction of samples that may be further off in float32: rounding moves an activation across the
kink of a relu or a pool now and then, and the gradient jumps. In float64 that does not happen, and
no sample may be."""


@dataclass(frozen=True)
class Peer:
    """One way to compute per-sample gradients: `run` is timed, `tensors` names what it returned."""

    run: Callable[[], Any]
    tensors: Callable[[Any], Mapping[str, Tensor]]


def torch_func(case: Case) -> Peer:
    """Make the baseline: vmap over grad of a functional call."""
    params = {name: value.detach() for name, value in case.model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(case.model, params, (x.unsqueeze(0),))
        return F.cross_entropy(logits, y.unsqueeze(0))

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return Peer(lambda: mapped(params, case.inputs, case.targets), dict)


def shardmap_default(case: Case) -> Peer:
    """Make `shardmap.vmap` over plain autograd, as called by default."""
    return _shardmap(case, "auto")


def shardmap_each(case: Case) -> Peer:
    """Make `shardmap.vmap` over plain autograd, recorded at each call."""
    return _shardmap(case, "each")


def shardmap_once(case: Case) -> Peer:
    """Make `shardmap.vmap` over plain autograd, recorded at the first call only."""
    return _shardmap(case, "once")


def _shardmap(case: Case, trace: str) -> Peer:
    names, params = zip(*case.model.named_parameters(), strict=True)

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(case.model(x.unsqueeze(0)), y.unsqueeze(0))
        return torch.autograd.grad(loss, params)

    mapped = shardmap.vmap(gradient, trace=trace)
    return Peer(
        lambda: mapped(case.inputs, case.targets),
        lambda result: dict(zip(names, result, strict=True)),
    )


def opacus(case: Case) -> Peer:
    """Make Opacus' hooks on modules.

    They also compute the batch's own gradient, as in any use of them.
    """
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(case.model), loss_reduction="sum")
    params: dict[str, Any] = {
        name.removeprefix("_module."): value for name, value in model.named_parameters()
    }

    def run() -> dict[str, Tensor]:
        F.cross_entropy(model(case.inputs), case.targets, reduction="sum").backward()
        result = {name: value.grad_sample for name, value in params.items()}
        for value in params.values():
            value.grad = value.grad_sample = None
        return result

    return Peer(run, dict)


def jax(case: Case) -> Peer:
    """Make jit over vmap over grad, compiled before it is timed."""
    import jax
    import jax.numpy as jnp

    wide = case.dtype == torch.float64
    with jax.enable_x64(wide):
        params = {
            name: jnp.asarray(value.detach().numpy())
            for name, value in case.model.named_parameters()
        }
        inputs, targets = jnp.asarray(case.inputs.numpy()), jnp.asarray(case.targets.numpy())

    def loss(params: Mapping[str, Any], x: Any, y: Any) -> Any:
        return -jax.nn.log_softmax(case.jax_forward(params, x))[y]

    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))

    def run() -> dict[str, Any]:
        with jax.enable_x64(wide):
            return jax.block_until_ready(mapped(params, inputs, targets))

    return Peer(
        run,
        lambda result: {
            name: torch.from_numpy(numpy.array(value)) for name, value in result.items()
        },
    )


PEERS: dict[str, Callable[[Case], Peer]] = {
    BASELINE: torch_func,
    "shardmap": shardmap_default,
    "shardmap each": shardmap_each,
    "shardmap once": shardmap_once,
    "opacus": opacus,
    "jax": jax,
}
RESULTS = Path(__file__).parent / "results"
OURS = ("shardmap", "shardmap once")
OPTIONAL = ("opacus", "jax")


def installed(names: list[str]) -> list[str]:
    """Leave out the optional peers that cannot be imported, each with a line on stderr."""
    found = []
    for name in names:
        if name in OPTIONAL:
            try:
                __import__(name)
            except ImportError as error:
                print(f"{name}: left out, it cannot be imported here ({error})", file=sys.stderr)
                continue
        found.append(name)
    return found


def check(case: Case, peers: Mapping[str, Peer], outliers: float) -> None:
    """Compare every peer's gradients with the baseline's, sample by sample.

    Args:
        case: The model and its data.
        peers: The peers, the baseline among them.
        outliers: The fraction of samples that may differ by more than rounding.

    Raises:
        SystemExit: A gradient is missing or wrong.
    """
    expected = peers[BASELINE].tensors(peers[BASELINE].run())
    for peer_name, peer in peers.items():
        found = peer.tensors(peer.run())
        call = f"{case.name}, {peer_name}, {case.dtype}"
        if found.keys() != expected.keys():
            raise SystemExit(
                f"{call}: gradients of other parameters: {sorted(found.keys() ^ expected.keys())}"
            )
        for name in expected:
            errors = common.relative_errors(found[name].detach(), expected[name].detach())
            wrong = (errors > TOLERANCE[case.dtype]).double().mean().item()
            if wrong > outliers:
                raise SystemExit(
                    f"{call}: the gradient of {name} is wrong for {wrong:.1%} of the samples, by "
                    f"up to {errors.max():.2g} of its size"
                )


def measure(case: Case, names: list[str], timer: common.Timer) -> dict[str, Any]:
    """Check in both precisions, then time the named peers on one model in float32."""
    double = case.double()
    check(double, {name: PEERS[name](double) for name in names}, outliers=0.0)
    peers = {name: PEERS[name](case) for name in names}
    check(case, peers, outliers=KINKED)
    seconds = timer.run({name: peer.run for name, peer in peers.items()})
    return {
        name: {
            "milliseconds": asdict(common.milliseconds(seconds[name])),
            "ratio": asdict(common.ratio(seconds, name, BASELINE)),
        }
        for name in names
    }


def table(results: Mapping[str, Mapping[str, Any]], names: list[str]) -> str:
    """Write one row per model.

    The baseline's time, every other peer's time over it, and whether ours keep to the target.
    """
    others = [name for name in names if name != BASELINE]
    judged = [name for name in OURS if name in names]
    rows = []
    for model, result in results.items():
        ratios = [common.Quartiles(**result[name]["ratio"]).text() for name in others]
        worst = max((result[name]["ratio"]["median"] for name in judged), default=0.0)
        rows.append(
            [
                model,
                f"{result[BASELINE]['milliseconds']['median']:.1f} ms",
                *ratios,
                common.verdict(worst, TARGET if judged else None),
            ]
        )
    return common.markdown(["model", BASELINE, *others, f"ours <= {TARGET}"], rows)


def missed(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the models and ways of ours that are over the target."""
    return [
        f"{model}, {name}: {result[name]['ratio']['median']:.2f} of {BASELINE}, target {TARGET}"
        for model, result in results.items()
        for name in OURS
        if name in result and result[name]["ratio"]["median"] > TARGET
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if a target is missed."""
    makers = models.cases()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.per_sample_grads", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", choices=list(makers), default=list(makers))
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=list(PEERS),
        help=f"{BASELINE} always runs",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed runs of each peer (default: 15)"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, help="discarded runs of each peer (default: 3)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the table and the numbers (default: benchmarks/results if all models and "
        "peers run, else none)",
    )
    options = parser.parse_args(arguments)

    common.use_threads(options.threads)
    warnings.filterwarnings(
        "ignore", message="Full backward hook is firing"
    )  # Opacus on models whose input requires no grad
    names = installed([name for name in PEERS if name == BASELINE or name in options.peers])
    description = common.machine(("torch", *[name for name in OPTIONAL if name in names]))
    timer = common.Timer(options.rounds, options.warmup)
    results = {}
    for model in options.models:
        print(f"{model} ...", file=sys.stderr)
        results[model] = measure(makers[model](), names, timer)

    title = f"Per-sample gradients, float32: time over torch.func's, median (quartiles) of {options.rounds} paired runs."
    text = "\n\n".join([title, table(results, names), common.machine_line(description)])
    print(text)
    whole = list(results) == list(makers) and names == list(PEERS)
    folder = options.results or (RESULTS if whole else None)
    if folder is not None:
        stem = f"per_sample_grads_{options.threads}_threads"
        common.write_json(
            folder / f"{stem}.json", {"machine": description, "target": TARGET, "results": results}
        )
        (folder / f"{stem}.md").write_text(text + "\n")
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
