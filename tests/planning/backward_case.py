"""A map whose gradients are recorded from outside, alone in its process: predicted and measured.

`python -m tests.planning.backward_case REMAT BUDGET SAMPLES` prints the plan's peak, the budget and
the peak resident set of forward and backward above what was in use before, in bytes, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

import shardmap
from shardmap.planning.memory import parse_bytes

WIDTH, LAYERS = 512, 8


def in_use(line: str) -> int:
    """Bytes of a line of the process's status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(line))


def main(remat: bool, budget: str, samples: int) -> None:
    """Run once forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.GELU())
    # torch.utils.checkpoint imports a hundred megabytes of modules when it is first used
    for how in (False, True):
        mapped = shardmap.vmap(small, remat=how, memory_budget="1GiB")
        mapped(torch.randn(9, 5)).sum().backward()
    layers = [
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()) for _ in range(LAYERS)
    ]
    net = torch.nn.Sequential(*layers)
    batch = torch.randn(samples, WIDTH)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is in use now
    before = in_use("VmRSS")
    plan = shardmap.plan(net, memory_budget=budget, remat=remat)(batch)
    plan.run().sum().backward()
    measured = in_use("VmHWM") - before
    gradient = net[0][0].weight.grad
    whole = torch.zeros_like(gradient)
    for start in range(0, samples, 500):
        net.zero_grad()
        net(batch[start : start + 500]).sum().backward()
        whole += net[0][0].weight.grad
    found = {
        "predicted": max(lane.peak_bytes for lane in plan.lanes),
        "budget": parse_bytes(budget),
        "measured": measured,
        "chunks": sum(lane.chunks for lane in plan.lanes),
        "gradients agree": torch.allclose(gradient, whole, rtol=1e-3, atol=1e-3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] == "remat", sys.argv[2], int(sys.argv[3]))
