"""The call of the library that a run makes: a map of the function, or one of its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import shardmap
from shardmap.call.comparison import Comparison
from shardmap.call.options import MapOptions
from shardmap.call.planned import Plan
from shardmap.jobs.config import RunConfig
from shardmap.jobs.parts import Parts
from shardmap.store import Sink


def mapped(parts: Parts, config: RunConfig, options: MapOptions) -> Callable[[], Any]:
    """The run's computation over all of its samples, ready to be called.

    Args:
        parts: The run's samples, model and function.
        config: The configuration, for the task and its keys.
        options: As for `shardmap.vmap`.
    """
    if config.task == "vmap":
        call = shardmap.vmap(parts.detached, **options)
        return lambda: call(*parts.columns)
    call = _transform(parts, config, options)

    def run() -> Any:
        with torch.no_grad():  # values only: results in files are not differentiated
            return call(*_given(parts, config))

    return run


def planned(parts: Parts, config: RunConfig, options: MapOptions, sink: Sink | None = None) -> Plan:
    """The plan of a run's map.

    Torch's random state does not change, so that a later map draws the same numbers as without a
    plan.

    Args:
        parts: The run's samples, model and function.
        config: The configuration, for the task and its keys.
        options: As for `shardmap.plan`.
        sink: Store for the outputs, if there is one: memory then holds only units that are being
            filled.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        plan = _plan(parts, config, options)
        if sink is None or not plan.samples:
            return plan
        return plan.into(sink, config.chunk_size)


def compared(parts: Parts, config: RunConfig, options: MapOptions) -> Comparison:
    """Compare the run's map with the plain loop over all samples of `parts`.

    Args:
        parts: The run's samples, model and function, with few samples.
        config: The configuration, for the task and its keys.
        options: As for `shardmap.compare`.

    Raises:
        OptionError: The function draws random numbers, so that the loop draws others.
    """
    samples = range(len(parts.columns[0]))
    if config.task == "vmap":
        return shardmap.compare(parts.detached, **options)(*parts.columns, samples=samples)  # pyright: ignore[reportCallIssue]  a comparison has no out=
    call = _transform(parts, config, options)
    with torch.no_grad():
        return call.compare(*_given(parts, config), samples=samples)


def _plan(parts: Parts, config: RunConfig, options: MapOptions) -> Plan:
    if config.task == "vmap":
        return shardmap.plan(parts.detached, **options)(*parts.columns)  # pyright: ignore[reportCallIssue]  a plan has no out=
    call = _transform(parts, config, options)
    with torch.no_grad():
        return call.plan(*_given(parts, config))


def _transform(parts: Parts, config: RunConfig, options: MapOptions) -> Any:
    """The library's call for a task: a function of the batch, which has a `plan`."""
    if config.task == "per_sample_grad":
        return shardmap.per_sample_grad(
            parts.call, parts.loss, params=config.params, flat=config.flat, **options
        )
    argnums = tuple(config.argnums) if isinstance(config.argnums, list) else config.argnums
    if config.task == "jacobian":
        return shardmap.jacobian(parts.one_sample, argnums, method=config.method, **options)
    if config.task == "hessian":
        return shardmap.hessian(parts.one_sample, argnums, **options)
    return shardmap.hvp(parts.one_sample, argnums, **options)


def _given(parts: Parts, config: RunConfig) -> tuple[Any, ...]:
    """The arguments of the call; a function of parameters gets the parameters first."""
    leading = parts.leading if config.task == "per_sample_grad" and parts.loss is None else ()
    return (*leading, *parts.columns)
