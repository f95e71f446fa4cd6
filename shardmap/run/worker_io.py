"""Inputs that workers read themselves, outputs that workers return, and their copy into place.

And their copy into place.
"""

from __future__ import annotations

import numpy as np
import torch

from shardmap.reduce import Reduction
from shardmap.run.base import Job, Output
from shardmap.run.gather import Gather
from shardmap.run.messages import HOST


def read_there(job: Job) -> set[int]:
    """The inputs that workers read themselves."""
    return {i for i, column in job.columns.items() if column.travels}


def combined_here(out: Output) -> bool:
    """True if an output is combined by a function of the user's, which does not travel.

    Then the driver calls it.
    """
    return out.reduction is not None and out.reduction.combine is not None


def on_worker(out: Output, *, stored: bool) -> Output:
    """An output as a worker gives it.

    On its host, a row per sample, or reduced as far as it can.
    """
    if out.reduction is not None and not combined_here(out):
        return Output(
            out.shape,
            out.dtype,
            HOST,
            out.mapped,
            None,
            Reduction(out.reduction.name),
            False,
            out.summed,
        )
    return Output(
        out.shape, out.dtype, HOST, out.mapped, 0 if out.mapped or stored else None, None, False
    )


class Arrivals(Gather):
    """Results that come from workers: copied on the one thread that has nothing else to do.

    torch copies on all of them, which then spin for a while on the cores that workers compute on:
    half a megabyte cost 3.5 ms of CPU.
    """

    def put(self, slot: torch.Tensor, t: torch.Tensor) -> None:
        """Copy a task's results to where they belong."""
        if slot.device.type != "cpu" or not (slot.is_contiguous() and t.is_contiguous()):
            slot.copy_(t)
            return
        np.copyto(slot.flatten().view(torch.uint8).numpy(), t.flatten().view(torch.uint8).numpy())
