"""Carry out a run: load the data, make the model, map the function, report, and leave a complete folder."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import shardmap
from shardmap.config import BoundRun, to_yaml
from shardmap.errors import ConfigError, DeviceError
from shardmap.extras import require
from shardmap.jobs.base import Dataset, Findings, Outcome
from shardmap.jobs.folder import RunFolder, environment, one_seed, save_tensors
from shardmap.planning.device import resolve
from shardmap.planning.memory import parse_bytes
from shardmap.run.base import Event, listen


def execute(
    run: BoundRun,
    *,
    say: Callable[[str], None] = lambda text: None,
    listener: Callable[[Event], None] = lambda event: None,
) -> tuple[Path, Findings | None]:
    """Carry out a run.

    Args:
        run: The configuration with its import paths resolved, as `shardmap.config.bind` returns it.
        say: Receives what a person wants to read: the plan, the findings.
        listener: Receives the events of the map while it works, for a progress bar.

    Returns:
        The run folder and what the report found; None without a report.

    Raises:
        ConfigError: The configuration turned out wrong once the data was there. Nothing is left behind.
    """
    config = run.config
    _devices(config.devices, torch.device("cpu"))  # a device that is not there is answered before anything is loaded
    if config.memory_budget is not None and parse_bytes(config.memory_budget) is None:
        raise ConfigError(f"memory_budget: {config.memory_budget!r} is no amount of memory; write for example 6GiB or 512 MiB")
    if config.devices == "ray":
        require("ray", extra="ray", purpose="for devices: ray")
    with RunFolder(config.output) as folder, one_seed(config.seed):
        folder.log("started", function=config.function.path, output=config.output)
        (folder.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        began = time.perf_counter()

        dataset = run.data()
        if not isinstance(dataset, Dataset):
            raise ConfigError(f"data.path: {config.data.path!r} returned a {type(dataset).__name__}; return a shardmap.jobs.Dataset")
        columns = _pick_columns(dataset, config.columns)
        say(f"{config.function.path} over {len(dataset)} samples of {', '.join(config.columns or dataset.columns)}")

        model = None if run.model is None else run.model(dataset)
        leading = () if run.model is None else (model,)

        @functools.wraps(run.function.function)  # errors and warnings call it by its name
        def one_sample(*row: Any) -> Any:
            # A run's outputs end in files: detached here, no chunk keeps an autograd graph alive, and other processes can compute them.
            return pytree.tree_map_only(Tensor, Tensor.detach, run.function.function(*leading, *row, **run.function.args))

        def observe(event: Event) -> None:
            folder.log_event(event)
            listener(event)

        options = {"randomness": config.randomness, "chunk_size": config.chunk_size, "memory_budget": config.memory_budget}
        if config.devices == "ray":
            plan = f"{len(dataset)} samples on Ray, in a few chunks per worker, cut when it is known how many workers there are"
            run_map = functools.partial(shardmap.vmap(one_sample, devices="ray", **options), *columns)
        else:
            planned = shardmap.plan(one_sample, devices=config.devices, **options)(*columns)
            plan, run_map = planned.summary, planned.run
        say(plan)
        folder.log("planned", plan=plan.splitlines())
        with listen(observe):
            outputs = run_map()
        if config.save_outputs:
            save_tensors(folder.path / "outputs.safetensors", outputs)

        findings = None
        if run.report is not None:
            findings = run.report(Outcome(dataset, model, outputs, folder.path))
            if not isinstance(findings, Findings):
                name, kind = run.report.function.__name__, type(findings).__name__
                raise ConfigError(f"report.path: {name} returned a {kind}; return a shardmap.jobs.Findings")
        seconds = round(time.perf_counter() - began, 3)
        _write_json(folder.path / "environment.json", environment())
        _write_json(folder.path / "summary.json", {"samples": len(dataset), "seconds": seconds, **(findings.numbers if findings else {})})
        return folder.finish(), findings


def _devices(devices: list[str] | str, home: torch.device) -> tuple[str, ...]:
    """The devices of the plan, one entry per shard; Ray's workers are placed when it runs, and are one entry here."""
    if devices == "ray":
        return ("ray",)
    try:
        return resolve(devices, home, "run")
    except DeviceError as error:
        raise ConfigError(str(error)) from error


def _pick_columns(dataset: Dataset, names: list[str] | None) -> list[Tensor]:
    if names == []:
        raise ConfigError(f"columns: [] is empty; name at least one of {', '.join(dataset.columns)}, or leave the key out")
    for name in names or ():
        if name not in dataset.columns:
            raise ConfigError(f"columns: {name!r} is not in the data; known: {', '.join(dataset.columns)}")
    return [dataset[name] for name in (dataset.columns if names is None else names)]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
