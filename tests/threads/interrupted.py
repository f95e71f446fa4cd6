"""Map in a loop while SIGINT arrives at random moments: `python -m tests.threads.interrupted N`.

After each interrupt the state of the thread is as before, and all maps compute what the loop does.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import shardmap
from tests.threads import process

N = 5
x = torch.randn(N, 4, dtype=torch.float64)
weight = torch.randn(4, 4, dtype=torch.float64)
leaf = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

SENDER = """
import os, random, sys, time
random.seed(int(sys.argv[3]))
for _ in sys.stdin:
    time.sleep(random.random() * float(sys.argv[2]))
    os.kill(int(sys.argv[1]), 2)
"""


def state() -> dict[str, Any]:
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    hooks: Any = torch._C._autograd  # type: ignore[attr-defined]
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "forward mode": torch._C._is_fwd_grad_enabled(),  # type: ignore[attr-defined]
        "dual level": forward_ad._current_level,
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "transforms": functorch.get_dynamic_layer_stack_depth(),
        "requires_grad_ allowed": functorch.get_inplace_requires_grad_allowed(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast nesting": nesting,
        "saved tensors hooks": hooks._top_saved_tensors_default_hooks(True),
        "hooks refused": hooks._saved_tensors_hooks_get_disabled_error_message(),
        "garbage collection": gc.isenabled(),
        "fast paths": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "torch random": torch.random.get_rng_state().tolist(),
        "python random": random.getstate(),
        "gradient": leaf.grad is None,
        "said to be in a mode": is_in_torch_dispatch_mode(),
    }


def plain(r: Tensor) -> Tensor:
    return (r @ weight).tanh()


def pointwise(r: Tensor) -> Tensor:
    return r.sin() + 1


def transformed(r: Tensor) -> Tensor:
    return torch.func.grad(lambda v: (v @ weight).sin().sum())(r)


def twice(r: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.jacrev(lambda v: (v @ weight).sin().sum()))(r)


def forward(r: Tensor) -> Tensor:
    return torch.func.jvp(lambda v: (v @ weight).sin(), (r,), (torch.ones_like(r),))[1]


def inside(r: Tensor) -> Tensor:
    with torch.no_grad(), torch.autograd.graph.save_on_cpu():
        h = (r @ weight).exp()
    with torch.enable_grad():
        y = r.detach().requires_grad_()
        (g,) = torch.autograd.grad((y * h).square().sum(), y)
    with torch.autocast("cpu", enabled=False):
        return g + torch.func.vmap(lambda row: (row * r).sum())(weight)


def outer(r: Tensor) -> Tensor:
    return (r @ leaf).sin()


def outer_loop() -> Any:
    return torch.autograd.grad(torch.stack([outer(r) for r in x]).sum(), leaf)[0]


def kinds(folder: str) -> dict[str, tuple[Callable[[], Any], Any]]:
    """By name: a map made and called, and what the loop returns."""

    def loop(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([f(r) for r in x]).detach()

    def stored() -> Tensor:
        path = Path(tempfile.mkdtemp(dir=folder)) / "store"
        sink = shardmap.MemmapSink(path)
        return shardmap.vmap(plain, out=sink, chunk_size=2)(x).read(0, 0, N)

    once = shardmap.vmap(inside, trace="once")
    often, product = shardmap.vmap(pointwise), shardmap.vmap(plain)

    def outside() -> Tensor:
        return torch.func.grad(lambda b: shardmap.vmap(plain)(b).sum())(x)

    wanted = torch.func.grad(lambda b: torch.stack([plain(r) for r in b]).sum())(x)
    return {
        "plain": (lambda: shardmap.vmap(plain)(x), loop(plain)),
        "replayed": (lambda: [often(x) for _ in range(200)][-1], loop(pointwise)),
        "product replayed": (lambda: [product(x) for _ in range(50)][-1], loop(plain)),
        "chunked": (lambda: shardmap.vmap(inside, chunk_size=2)(x), loop(inside)),
        "reduced": (lambda: shardmap.vmap(plain, reduce="sum")(x), loop(plain).sum(0)),
        "once": (lambda: once(x), loop(inside)),
        "transforms inside": (lambda: shardmap.vmap(twice)(x), loop(twice)),
        "forward mode inside": (lambda: shardmap.vmap(forward)(x), loop(forward)),
        "gradients inside": (lambda: shardmap.vmap(transformed)(x), loop(transformed)),
        "transforms outside": (outside, wanted),
        "stored": (stored, loop(plain)),
        "gradients outside": (
            lambda: torch.autograd.grad(shardmap.vmap(outer)(x).sum(), leaf)[0],
            outer_loop(),
        ),
        "nested": (
            lambda: shardmap.vmap(lambda r: shardmap.vmap(lambda w: (w * r).sum())(weight))(x),
            loop(lambda r: weight @ r),
        ),
    }


def main(count: int, seed: int) -> None:
    process.limit()
    torch.set_num_threads(1)
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        maps = kinds(folder)
        for name, (call, want) in maps.items():
            torch.testing.assert_close(call(), want, msg=lambda m, n=name: f"{n} before: {m}")
        started = time.perf_counter()
        for call, _ in maps.values():
            call()
        window = 2 * (time.perf_counter() - started) / len(maps)
        sender = subprocess.Popen(
            [sys.executable, "-c", SENDER, str(os.getpid()), str(window), str(seed)],
            stdin=subprocess.PIPE,
            text=True,
        )
        assert sender.stdin is not None
        names = list(maps)
        struck = 0
        while struck < count:
            name = names[random.randrange(len(names))]
            before = state()
            arrived = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                sender.stdin.write("\n")
                sender.stdin.flush()
                until = time.perf_counter() + 20 * window
                while time.perf_counter() < until:  # a finalizer may have swallowed it
                    maps[name][0]()
                time.sleep(10)
            except KeyboardInterrupt as error:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                arrived = error.__traceback__ is not None
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            after = state()
            changed = [
                f"{key}: {str(before[key])[:80]} became {str(after[key])[:80]}"
                for key in before
                if before[key] != after[key]
            ]
            assert not changed, f"{name}, interrupt {struck}: {changed}"
            if not arrived:
                continue
            struck += 1
            for other in (name, names[struck % len(names)]):
                call, want = maps[other]
                torch.testing.assert_close(
                    call(), want, msg=lambda m, o=other, n=name: f"{o} after {n}: {m}"
                )
        sender.stdin.close()
        sender.wait(10)
    print(f"{struck} interrupts")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
