"""Run a call's job on the devices of this machine."""

from __future__ import annotations

import torch

from shardmap import errors
from shardmap.call.job import names_of, split_of
from shardmap.call.options import Options
from shardmap.planning.refusal import refusal_of
from shardmap.rules.philox import TorchDraws
from shardmap.run import local, prepare
from shardmap.run import ray as on_ray
from shardmap.run.base import Job
from shardmap.run.sites import small


def refuse_elsewhere(job: Job, options: Options, inlined: bool, cluster: bool) -> None:
    """Refuse to run the function itself on other devices than the samples'.

    Raises:
        VariesError: The call names other devices, or a cluster.
    """
    names = [] if cluster else names_of(job, options, inlined)
    if cluster or any(torch.device(name) != job.home for name in names):
        raise errors.VariesError(
            f"{options.call}: the function has to be run sample by sample, where its samples are, "
            f"and devices={options.devices!r}; use torch's operators for what differs by sample, "
            "or devices='auto'"
        )


def shares_torchs_draws(job: Job, options: Options) -> bool:
    """True if samples share draws that torch repeats each time they are computed.

    Such a call is not cut, and stays on one device.
    """
    drawn = any(isinstance(seed, TorchDraws) for seed in job.seed)
    return drawn and options.randomness == "same"


def is_whole(job: Job, options: Options, inlined: bool = False) -> bool:
    """True if a map is so small that it runs as one chunk, without a plan."""
    if not inlined and on_ray.asked_for(options.devices) is not None:
        return False
    names = names_of(job, options, inlined)
    size = None if inlined else options.chunk_size
    uncut = size is None or size == "auto" or (isinstance(size, int) and size >= job.samples)
    plain = (
        uncut
        and len(names) == 1
        and options.memory_budget is None
        and not any(o.reduction for o in job.outputs)
    )
    return plain and names[0] == str(job.home) and (inlined or small(job))


def locally(job: Job, options: Options, inlined: bool) -> list[torch.Tensor]:
    """Run on this machine: as one chunk if the map is small, else by a plan."""
    on = prepare.Devices(job, options.budget.on)
    if is_whole(job, options, inlined):
        return local.run_whole(job, on)
    cut = split_of(job, on, names_of(job, options, inlined), options, inlined)
    refusal = refusal_of(cut)
    if refusal is not None:
        raise errors.OverBudget(f"{options.call}: {refusal}")
    return local.run(job, cut, on)
