"""All that needs a GPU, in one run of at most eight minutes: `python -m benchmarks.gpu`.

Runs the tests of marker `gpu`, the models of benchmarks.users on the GPU, a map that runs out of
memory, copies that overlap with work, CUDA graphs and compiled maps where the library has them, and
writes a table with the GPU's name into benchmarks/results/. Needs torch, numpy and psutil alone:
what is missing (pytest, transformers) is said. Each part runs in a process of its own with a limit,
so that one that hangs or dies costs no other; the table is written again after each.

`--dry` goes through the same parts on the CPU, with few samples, to see that they run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardmap
from benchmarks.common import Timer, machine, machine_line, write_json

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 450
"""Of the whole run: under eight minutes with what starting takes."""
LAST_LINE = "result of the part: "


def has_option(name: str) -> bool:
    """True if `shardmap.vmap` has this option."""
    return name in inspect.signature(shardmap.vmap).parameters


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """The median of some runs, each with an idle device before and after."""
    found = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        result = call()
        wait(device)
        found.append(time.perf_counter() - start)
        del result
    return statistics.median(found)


def tests(device: str) -> str:
    """The tests that need a GPU; on the CPU, that they are found."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: the tests of marker gpu were not run"
    plain = ["-o", "addopts=", "-o", "timeout=", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
    only = [] if device.startswith("cuda") else ["--collect-only"]
    # The ones whose modules are among what is there: others import what this machine may lack.
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, *only, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    text = "\n".join([*failed, *lines[-1:]]) or done.stderr[-2000:]
    if done.returncode:
        raise SystemExit(
            f"pytest -m gpu ended with {done.returncode}: {text}\n{done.stdout[-6000:]}"
        )
    return f"`pytest -m gpu`: {text}"


def rows(device: str, only: list[str], compiled: bool, dry: bool) -> str:
    """The table of benchmarks.users for some of its rows."""
    from benchmarks import users

    arguments = [
        "--device",
        device,
        "--peers",
        "--threads",
        str(os.cpu_count() or 2),
        "--only",
        *only,
    ]
    arguments += ["--compile"] if compiled else []
    arguments += ["--smoke"] if dry else ["--rounds", "5" if compiled else "9"]
    with contextlib.redirect_stdout(io.StringIO()) as written:
        users.main(arguments)
    return written.getvalue().split("\n\n", 1)[1]


def wide(x: Tensor) -> Tensor:
    """Hold 64 MiB in float32 for each sample of 4,096 numbers, a square table."""
    table = torch.outer(x, x)
    return (table.sin() * table.cos()).sum(1)


def out_of_memory(device: str, dry: bool) -> str:
    """A chunk that does not fit is halved, and nothing is computed twice or lost."""
    cuda = device.startswith("cuda")
    x = torch.randn(13 if dry else 101, 512 if dry else 4096, device=device)
    wanted = torch.stack([wide(row) for row in x])
    hog = None
    if cuda:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(max(0, free - (2 << 30)), dtype=torch.uint8, device=device)
    told = "1000GiB" if cuda else "8MiB"
    lied = shardmap.vmap(wide, chunk_size=64 if cuda else "auto", memory_budget=told)
    start = time.perf_counter()
    found = lied(x)
    wait(device)
    first = time.perf_counter() - start
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    later = seconds(lambda: lied(x), device, 3)
    fits = shardmap.vmap(wide, chunk_size=8)
    fits(x)
    known = seconds(lambda: fits(x), device, 3)
    del hog
    if apart > 1e-4:
        raise SystemExit(f"wrong after memory ran out: by up to {apart:.1e} of the largest entry")
    where = (
        "2 GiB free, told 1,000 GiB, chunks of 64 samples of at least 128 MiB asked for"
        if cuda
        else "on the CPU nothing is refused: a budget of 8 MiB instead"
    )
    return (
        f"{where}: first call {1e3 * first:.1f} ms, later ones {1e3 * later:.1f} ms, chunks of 8 "
        f"that fit {1e3 * known:.1f} ms; largest difference to the loop {apart:.1e}"
    )


def overlap(device: str, dry: bool) -> str:
    """Chunks from and to the host: what the run takes against its copies and its work alone."""
    if not device.startswith("cuda"):
        return "no streams on the CPU: nothing to overlap"
    samples, width, chunk = (512, 64, 64) if dry else (4096, 1024, 256)
    weight = torch.randn(width, width, device=device)
    x = torch.randn(samples, width, width)

    def work(table: Tensor) -> Tensor:
        for _ in range(6):
            table = (table @ weight).tanh()
        return table

    mapped = shardmap.vmap(work, devices="cuda:*", chunk_size=chunk, trace="once")
    on_device = shardmap.vmap(work, chunk_size=chunk, trace="once")
    here = x[:chunk].to(device)
    wanted = on_device(here).cpu()
    found = mapped(x)
    apart = float((found[:chunk] - wanted).abs().max())
    del found
    parts, out = samples // chunk, torch.empty_like(x[:chunk])
    ours = seconds(lambda: mapped(x), device, 3)
    computing = parts * seconds(lambda: on_device(here), device, 5)
    into = parts * seconds(lambda: here.copy_(x[:chunk]), device, 5)
    back = parts * seconds(lambda: out.copy_(here), device, 5)
    pinned = x[:chunk].pin_memory()
    fast = parts * seconds(lambda: here.copy_(pinned, non_blocking=True), device, 5)
    return (
        f"{samples} tables of {width} x {width} from the host in chunks of {chunk}: the map "
        f"{ours:.2f} s; its work alone {computing:.2f} s, copies there {into:.2f} s (pinned "
        f"{fast:.2f} s), back {back:.2f} s; hidden "
        f"{100 * (1 - ours / (computing + into + back)):.0f}% of the sum; largest difference "
        f"{apart:.1e}"
    )


def graphs(device: str, dry: bool) -> str:
    """CUDA graphs against launches, for a function of many small operators."""
    said = []
    depth, samples = (10, 16) if dry else (100, 1024)
    layers = [torch.randn(8, 8, device=device) / 3 for _ in range(depth)]

    originals = [weight.clone() for weight in layers]

    def loss(x: Tensor) -> Tensor:
        for weight in layers:
            x = (weight @ x).tanh()
        return x.square().sum()

    function = torch.func.grad(loss)
    x = torch.randn(samples, 8, device=device)
    wanted = torch.func.vmap(function)(x)
    ways: dict[str, dict[str, Any]] = {"by default": {}, "recorded once": {"trace": "once"}}
    if has_option("cuda_graphs") and device.startswith("cuda"):
        ways["CUDA graphs"] = {"trace": "once", "cuda_graphs": True}
        ways["CUDA graphs in chunks"] = {
            "trace": "once", "cuda_graphs": True, "chunk_size": samples // 5
        }  # fmt: skip
    if has_option("compile"):
        ways["compiled"] = {"trace": "once", "compile": True}
    if has_option("compile") and "CUDA graphs" in ways:
        ways["compiled CUDA graphs"] = {"trace": "once", "compile": True, "cuda_graphs": True}
    calls: dict[str, Callable[[], Any]] = {}
    func = torch.func.vmap(function)
    calls["torch.func"] = lambda: (func(x), wait(device))[0]
    for way, options in ways.items():
        mapped = shardmap.vmap(function, **options)
        calls[way] = lambda mapped=mapped: (mapped(x), wait(device))[0]
        start = time.perf_counter()
        apart = float((calls[way]() - wanted).abs().max() / wanted.abs().max())
        first = time.perf_counter() - start
        for weight in layers:  # written in place: no graph is captured again
            weight.mul_(1.01)
        changed = torch.func.vmap(function)(x)
        apart = max(apart, float((calls[way]() - changed).abs().max() / changed.abs().max()))
        for weight, before in zip(layers, originals, strict=True):
            weight.copy_(before)
        if apart > 1e-3:
            raise SystemExit(f"{way} is wrong by up to {apart:.1e} of the largest entry")
        said.append(f"{way} differs by {apart:.1e}, first call {first:.2f} s")
    found = Timer(rounds=3 if dry else 21, warmup=4).run(calls)
    times = {way: 1e3 * statistics.median(values) for way, values in found.items()}
    said += [f"{way} {time_of:.2f} ms" for way, time_of in times.items()]
    if "CUDA graphs" not in ways:
        said.append(
            "no CUDA graphs: "
            + ("not on the CPU" if has_option("cuda_graphs") else "the option does not exist")
        )
    return f"gradient of {depth} layers of 8 x 8, {samples} samples: " + "; ".join(said)


FIRST = ["GPT-2", "BERT", "small transformer", "CNN", "ResNet", "neural ODE", "x +"]
REST = ["LSTM", "ViT", "equivariant", "ensemble", "Jacobian", "Hessian", "Lorenz"]
COMPILED = ["small transformer", "neural ODE", "CNN"]

Part = tuple[str, Callable[[str, bool], str], int]
"""A heading, what runs it on a device (dry or not), and its most seconds."""

PARTS: dict[str, Part] = {
    "tests": ("Tests", lambda device, dry: tests(device), 120),
    "memory": ("Out of memory", out_of_memory, 40),
    "overlap": ("Copies beside work", overlap, 50),
    "graphs": ("Graphs", graphs, 70),
    "models": ("Models", lambda d, dry: rows(d, ["x +", "CNN"] if dry else FIRST, False, dry), 120),
    "more": ("More models", lambda d, dry: rows(d, ["Hessian"] if dry else REST, False, dry), 120),
    "compiled": (
        "Compiled",
        lambda d, dry: rows(d, ["x +"] if dry else COMPILED, True, dry),
        110,
    ),
}


def run_part(name: str, device: str, dry: bool, most: float) -> tuple[str, float]:
    """Run a part in a process of its own; return what it said and its seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", device]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command + (["--dry"] if dry else []),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=most,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr or b""
        tail = (said.decode() if isinstance(said, bytes) else said)[-1500:]
        return f"FAIL: not done after {most:.0f} s; it had said:\n\n```\n{tail}\n```", most
    took = time.perf_counter() - start
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(LAST_LINE):
            return json.loads(line.removeprefix(LAST_LINE)), took
    return f"FAIL: ended with {done.returncode}:\n\n```\n{done.stderr[-3000:]}\n```", took


def named(device: str) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(0) if device.startswith("cuda") else "CPU, a dry run"


def main() -> int:
    """Run all parts within the limit and write the table; return 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, with few samples")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of all parts")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device or ("cpu" if options.dry else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here; --dry goes through it on the CPU")
    if options.part:
        sys.stdout.write(
            f"\n{LAST_LINE}{json.dumps(PARTS[options.part][1](device, options.dry))}\n"
        )
        return 0
    stem = "gpu_" + re.sub(r"\W+", "_", named(device)).strip("_").lower()
    head = f"{named(device)}; {machine_line(machine(('torch', 'numpy', 'transformers')))}"
    said: dict[str, Any] = {}
    end, text = time.perf_counter() + options.limit, ""
    for name in options.only:
        heading, _, most = PARTS[name]
        left = end - time.perf_counter()
        if left < 10:
            said[heading] = ("not run: the limit was reached", 0.0)
        else:
            said[heading] = run_part(name, device, options.dry, min(most, left))
        parts = [f"## {h} ({took:.0f} s)\n\n{found}" for h, (found, took) in said.items()]
        text = "\n\n".join([f"# {head}", *parts]) + "\n"
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{stem}.md").write_text(text, encoding="utf-8")
        write_json(options.output / f"{stem}.json", {"machine": head, "parts": said})
    sys.stdout.write(text)
    return int(any(found.startswith("FAIL") for found, _ in said.values()))


if __name__ == "__main__":
    sys.exit(main())
