"""Time of the first call in fresh processes: `python -m benchmarks.first_call`.

A process imports shardmap, makes a model and takes per-sample gradients twice: the first call
records, lowers, checks and plans, the second replays. With `--against PATH`, another checkout of
shardmap takes turns with this one, and times are compared within each round.

`--linear` shows instead that a first call costs the same for each recorded call, up to 20,000 of
them: seconds of the processor for functions of several kinds and of growing length.

`--large` compares the first call for a model of 100 million parameters with torch.func's, in
processes of their own that take turns: seconds of the processor, as other work on the machine
changes those least.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import common

ROOT = Path(__file__).parent.parent
MOST_RATIO = 1.15
"""The most that the first call of the GPT-2 may cost over the other checkout's."""
MOST_SECONDS = 0.3
"""The most that the first `per_sample_grad` of a process may take for the small MLP."""


class LossOf(nn.Module):
    """A model together with its loss, for one sample."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, *sample: Tensor) -> Tensor:
        """Compute the loss of one sample."""
        return self.loss(self.net, *sample)


def small_mlp() -> tuple[LossOf, tuple[Tensor, ...]]:
    """Make 16-32-4 with tanh, a loss and 8 samples."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    loss = LossOf(net, lambda net, x: nn.functional.cross_entropy(net(x[:-1]), x[-1].long()))
    return loss, (torch.cat([torch.randn(8, 16), torch.arange(8.0)[:, None] % 4], 1),)


def gpt2() -> tuple[LossOf, tuple[Tensor, ...]]:
    """Make a GPT-2 of 6 layers, 256 wide, random weights, its loss and 32 texts of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=256, n_layer=6, n_head=4, use_cache=False
    )
    net = GPT2LMHeadModel(config).eval()
    loss = LossOf(net, lambda net, tokens: net(tokens[None], labels=tokens[None]).loss)
    return loss, (torch.randint(0, 512, (32, 32)),)


def large_gpt2() -> tuple[LossOf, tuple[Tensor, ...]]:
    """Make a GPT-2 of 12 layers, 768 wide, 100 million parameters, and 4 texts of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=20000, n_positions=64, n_embd=768, n_layer=12, n_head=12, use_cache=False
    )
    net = GPT2LMHeadModel(config).eval()
    loss = LossOf(net, lambda net, tokens: net(tokens[None], labels=tokens[None]).loss)
    return loss, (torch.randint(0, 20000, (4, 32)),)


MODELS = {"small MLP": small_mlp, "GPT-2, 6 layers": gpt2}
LARGE = "GPT-2, 100 million parameters"
MOST_EXCESS = 0.5
"""The most seconds that the first call of the large model may cost beyond torch.func's."""


LENGTHS = (200, 2000, 20000)
LONG = 10000
"""Recorded calls from which one round is enough: single calls matter no more."""
MOST_GROWTH = 1.5
"""The most that a recorded call may cost in the longest function over the cheapest length."""


def products(length: int, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A chain of products and pointwise calls."""

    def function(x: Tensor) -> Tensor:
        for _ in range(length // 4):
            x = (torch.tanh(x @ weight) + x) * 0.5
        return x

    return function


def layers(length: int, weight: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The gradient of a chain of layers by the weights of each."""
    weights = [weight.clone().requires_grad_() for _ in range(length // 8)]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            for each in weights:
                x = torch.tanh(each @ x)
            return torch.autograd.grad(x.sum(), weights)

    return function


def writes(length: int, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes in place to one buffer and to views of it."""

    def function(x: Tensor) -> Tensor:
        buffer = weight[0].clone()
        for _ in range(length // 3):
            buffer.add_(x)
            buffer[1:].mul_(0.5)
        return buffer

    return function


def splits(length: int, weight: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """Many outputs."""
    return lambda x: [torch.sin(x + i) for i in range(length // 2)]


KINDS = {"products": products, "layers": layers, "writes": writes, "outputs": splits}


def linear(lengths: Sequence[int], rounds: int = 3) -> int:
    """Print what a first call costs for each recorded call; 1 if it grows with their number."""
    import shardmap

    torch.set_num_threads(1)
    rows, missed = [], False
    for kind, make in KINDS.items():
        for grad in (False, True) if kind != "layers" else (False,):
            each = []
            for length in (64, *lengths):
                found = []
                for _ in range(1 if length >= LONG else rounds):
                    shardmap.clear_caches()  # the program is that of the round before
                    function = make(length, torch.randn(4, 4) / 2)
                    x = torch.randn(8, 4, requires_grad=grad)
                    began = time.process_time()
                    with torch.set_grad_enabled(grad):
                        shardmap.plan(function)(x)
                        shardmap.vmap(function)(x)
                    found.append(time.process_time() - began)
                each.append(1e6 * min(found) / length)
            growth = each[-1] / min(each[1:])
            verdict = common.verdict(growth, MOST_GROWTH)
            missed |= verdict == "FAIL"
            name = f"{kind}, gradients from outside" if grad else kind
            rows.append([name, *[f"{value:.0f}" for value in each[1:]], f"{growth:.2f} {verdict}"])
            print(rows[-1], flush=True)
    header = ["us per recorded call", *map(str, lengths), f"growth, <= {MOST_GROWTH}"]
    print(common.markdown(header, rows), common.machine_line(common.machine()), sep="\n\n")
    return 1 if missed else 0


def check(found: Mapping[str, Tensor], loss: LossOf, batch: Sequence[Tensor]) -> None:
    """Compare every sample's gradient with autograd's, one sample at a time.

    Raises:
        SystemExit: A gradient is wrong.
    """
    names, parameters = zip(*loss.named_parameters(), strict=True)
    for index, sample in enumerate(zip(*batch, strict=True)):
        expected = torch.autograd.grad(loss(*sample), parameters)
        for name, gradient in zip(names, expected, strict=True):
            difference = (found[name][index] - gradient).abs().max()
            if difference > 1e-3 * gradient.abs().max() + 1e-6:
                raise SystemExit(f"sample {index}, {name}: wrong by {difference:.2g}")


def child(name: str, threads: int) -> dict[str, float]:
    """Time one model in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loss, batch = MODELS[name]()
    loss(*(column[0] for column in batch)).backward()  # torch's own first call is not ours
    loss.zero_grad()
    start = time.perf_counter()
    import shardmap

    imported = time.perf_counter()
    gradients = shardmap.per_sample_grad(loss)
    found = gradients(*batch)
    first = time.perf_counter()
    gradients(*batch)
    second = time.perf_counter()
    if os.environ.get("FIRST_CALL_TREE") not in (None, str(Path(shardmap.__file__).parents[1])):
        raise SystemExit(f"measured {shardmap.__file__} instead")
    check(found, loss, batch)
    return {
        "import": imported - start,
        "first call": first - imported,
        "second call": second - first,
    }


def large_child(library: str, threads: int) -> dict[str, float]:
    """Time the large model's first two calls in this process, by one library."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loss, batch = large_gpt2()
    loss(*(column[0] for column in batch)).backward()  # torch's own first call is not ours
    loss.zero_grad()
    import shardmap

    if library == "shardmap":
        gradients = shardmap.per_sample_grad(loss)
    else:
        parameters = {name: p.detach() for name, p in loss.named_parameters()}

        def call(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
            return torch.func.functional_call(loss, parameters, sample)

        mapped = torch.func.vmap(torch.func.grad(call), in_dims=(None, *[0] * len(batch)))
        gradients = functools.partial(mapped, parameters)
    seconds = {}
    for which in ("first call", "second call"):
        began = time.process_time()
        found = gradients(*batch)
        seconds[which] = time.process_time() - began
    check(found, loss, batch)
    return seconds


def large(rounds: int, threads: int) -> int:
    """Print the large model's first call beside torch.func's; 1 if it costs too much more."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for library in ("shardmap", "torch.func"):
            found = spawn(library, ROOT, threads, "--large-child")
            for which, value in found.items():
                seconds.setdefault(which, {}).setdefault(library, []).append(value)
    rows, missed = [], False
    for which, of in seconds.items():
        pairs = zip(of["shardmap"], of["torch.func"], strict=True)
        excess = common.Quartiles.of([ours - theirs for ours, theirs in pairs])
        target = MOST_EXCESS if which == "first call" else None
        passed = common.verdict(excess.median, target)
        missed |= passed == "FAIL"
        columns = [common.Quartiles.of(of[name]).text(2) for name in ("shardmap", "torch.func")]
        limit = "" if target is None else f"<= {target}"
        rows.append([f"{LARGE}: {which}", *columns, excess.text(2), limit, passed])
    header = ["seconds of the processor", "shardmap", "torch.func", "difference", "target", ""]
    print(common.markdown(header, rows), common.machine_line(common.machine()), sep="\n\n")
    return 1 if missed else 0


def spawn(name: str, tree: Path, threads: int, child: str = "--child") -> dict[str, float]:
    """Time one model in a process of its own, with the shardmap that lies in `tree`."""
    words = [child, name, "--threads", str(threads)]
    path = os.pathsep.join([str(tree), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).absolute()), *words],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "FIRST_CALL_TREE": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}, shardmap in {tree}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    name: str, trees: Mapping[str, Path], rounds: int, threads: int
) -> dict[str, dict[str, list[float]]]:
    """The seconds of each round, by tree and by what was timed; trees take turns."""
    seconds: dict[str, dict[str, list[float]]] = {tree: {} for tree in trees}
    for index in range(rounds + 1):  # the first round warms the disk's cache
        order = list(trees) if index % 2 else list(reversed(trees))
        for tree in order:
            found = spawn(name, trees[tree], threads)
            for what, value in found.items() if index else ():
                seconds[tree].setdefault(what, []).append(value)
    return seconds


def rows_of(
    name: str, seconds: Mapping[str, Mapping[str, list[float]]]
) -> tuple[list[list[str]], bool]:
    """The table's lines for one model, and whether a target is missed."""
    rows, missed = [], False
    for what, here in seconds["here"].items():
        time_here = common.Quartiles.of(here)
        over, limit, value, target = "", "", time_here.median, None
        if name == "small MLP" and what == "first call":
            target, limit = MOST_SECONDS, f"<= {MOST_SECONDS} s"
        if "there" in seconds:
            ratio = common.ratio({t: seconds[t][what] for t in seconds}, "here", "there")
            over = ratio.text()
            if name != "small MLP" and what == "first call":
                value, target, limit = ratio.median, MOST_RATIO, f"<= {MOST_RATIO}"
        passed = common.verdict(value, target)
        missed |= passed == "FAIL"
        rows.append([f"{name}: {what}", time_here.text(3), over, limit, passed])
    return rows, missed


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_call", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout of shardmap")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9, help="timed processes each (default: 9)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help="a model of 100 million parameters")
    parser.add_argument("--large-child", help=argparse.SUPPRESS)
    parser.add_argument("--linear", action="store_true", help="the cost of each recorded call")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="CALLS")
    options = parser.parse_args(arguments)
    if options.linear:
        return linear(options.lengths)
    if options.large_child:
        print(json.dumps(large_child(options.large_child, options.threads)))
        return 0
    if options.large:
        return large(max(2, options.rounds), options.threads)
    if options.child:
        print(json.dumps(child(options.child, options.threads)))
        return 0
    trees = {"here": ROOT} | ({"there": options.against.absolute()} if options.against else {})
    description, rows, results, missed = common.machine(), [], {}, False
    for name in options.models:
        seconds = measure(name, trees, options.rounds, options.threads)
        lines, over = rows_of(name, seconds)
        rows, missed = rows + lines, missed or over
        results[name] = {
            tree: {what: asdict(common.Quartiles.of(values)) for what, values in found.items()}
            for tree, found in seconds.items()
        }
    print(
        f"Medians (quartiles) of {options.rounds} processes each, in turn.",
        common.markdown(["model", "s", "over the other checkout", "target", ""], rows),
        common.machine_line(description),
        sep="\n\n",
    )
    if options.json:
        common.write_json(options.json, {"machine": description, "results": results})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
