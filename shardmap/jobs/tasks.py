"""What a run computes for each sample: the function itself, or derivatives of it, by the library's own calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import shardmap
from shardmap import api
from shardmap.config import RunConfig
from shardmap.jobs.parts import Parts
from shardmap.options import MapOptions
from shardmap.planned import Plan
from shardmap.run.prepare import Devices
from shardmap.run.storing import unit_of
from shardmap.store import Sink


def mapped(parts: Parts, config: RunConfig, options: MapOptions) -> Callable[[], Any]:
    """The run's computation over all of its samples, ready to be called.

    Args:
        parts: What the configuration names, made.
        config: Which task, and what goes with it.
        options: As for `shardmap.vmap`.
    """
    call = _batched(parts, config, options)

    def run() -> Any:
        return call(*parts.columns)

    return run


def planned(parts: Parts, config: RunConfig, options: MapOptions, sink: Sink | None = None) -> Plan:
    """The plan of a run's map; torch's random state is left as it is, so that a map made after it draws as if there was no plan.

    Args:
        parts: What the configuration names, made.
        config: Which task, and what goes with it.
        options: As for `shardmap.plan`.
        sink: Where the outputs go, if that is a store: memory then holds those that are being put together, and no more.
    """
    function = parts.detached if config.task == "vmap" else _one(parts, config, options)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        plan = shardmap.plan(function, **options)(*parts.columns)  # pyright: ignore[reportCallIssue]  a plan has no out=
        if sink is None or not plan.samples:
            return plan
        job = dataclasses.replace(plan._job, unit=unit_of(plan._job, config.chunk_size, sink))
        on = Devices(job)
        cut = api._split(job, on, api._names(job, plan._options, False), plan._options, False, always=True)
    return Plan(job, cut, on, plan._structure, plan._options)


def _batched(parts: Parts, config: RunConfig, options: MapOptions) -> Callable[..., Any]:
    """The library's call for the task: a function of the columns."""
    if config.task == "vmap":
        return shardmap.vmap(parts.detached, **options)
    if config.task == "per_sample_grad":
        if parts.loss is not None:
            return shardmap.per_sample_grad(parts.call, parts.loss, params=config.params, flat=config.flat, **options)
        gradient = shardmap.per_sample_grad(parts.call, params=config.params, flat=config.flat, **options)
        return functools.partial(gradient, *parts.leading)
    argnums = tuple(config.argnums) if isinstance(config.argnums, list) else config.argnums
    if config.task == "jacobian":
        return shardmap.jacobian(parts.one_sample, config.method, argnums=argnums, **options)
    if config.task == "hessian":
        return shardmap.hessian(parts.one_sample, argnums=argnums, **options)
    return shardmap.hvp(parts.one_sample, **options)


def _one(parts: Parts, config: RunConfig, options: MapOptions) -> Callable[..., Any]:
    """The task for one sample: inside a map its own map is a part of that one."""
    inner = _batched(parts, config, {"randomness": options.get("randomness", "error")})

    @functools.wraps(parts.one_sample, updated=())
    def one(*row: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t[0].detach(), inner(*[value[None] for value in row]))

    return one
