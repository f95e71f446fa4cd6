"""Carry out a run: load the data, make the model, map the function, report, and leave a complete folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shardmap
from shardmap import Store
from shardmap.config import BoundRun, to_yaml
from shardmap.errors import ConfigError, StoreMismatchError
from shardmap.jobs.base import Findings, Outcome
from shardmap.jobs.folder import RunFolder, environment, one_seed, save_tensors
from shardmap.jobs.parts import Parts, check_machine, load_parts, map_options
from shardmap.jobs.stores import check_store, sink_of, with_keys
from shardmap.run.base import Event, RunFinished, listen


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
        ConfigError: The configuration turned out wrong once the data was there. Nothing is left behind, but for units in a store.
        StoreMismatchError: The store that is to be gone on with holds another run.
    """
    config = run.config
    check_machine(config)  # a device that is not there is answered before anything is loaded
    found = check_store(config)
    with RunFolder(config.output) as folder, one_seed(config.seed):
        folder.log("started", function=config.function.path, output=config.output)
        (folder.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        began = time.perf_counter()
        parts = load_parts(run, say)

        again: dict[str, int] = {}

        def observe(event: Event) -> None:
            folder.log_event(event)
            if isinstance(event, RunFinished):
                again.update(event.redone)
            listener(event)

        plan, run_map = _planned(run, parts, found)
        say(plan)
        folder.log("planned", plan=plan.splitlines())
        with listen(observe):
            outputs = run_map()
        if config.save_outputs:
            save_tensors(folder.path / "outputs.safetensors", outputs)

        findings = None
        if run.report is not None:
            findings = run.report(Outcome(parts.dataset, parts.model, outputs, folder.path, config.reduce is not None))
            if not isinstance(findings, Findings):
                name, kind = run.report.function.__name__, type(findings).__name__
                raise ConfigError(f"report.path: {name} returned a {kind}; return a shardmap.jobs.Findings")
        summary: dict[str, Any] = {"samples": len(parts.dataset), "seconds": round(time.perf_counter() - began, 3)}
        if again:
            summary["redone"] = again
        if isinstance(outputs, Store):
            summary |= {"store": outputs.url, "units": outputs.header.units}
        _write_json(folder.path / "environment.json", environment())
        _write_json(folder.path / "summary.json", {**summary, **(findings.numbers if findings else {})})
        return folder.finish(), findings


def _planned(run: BoundRun, parts: Parts, found: Store | None) -> tuple[str, Callable[[], Any]]:
    """What is going to happen, in words, and what makes it happen."""
    config, options = run.config, map_options(run.config)
    samples = len(parts.dataset)
    if config.store is not None:
        mapped = shardmap.vmap(parts.one_sample, out=sink_of(config), resume=config.resume, **options)
        there = "" if found is None else f"; {len(found.receipts())} of {found.header.units} units are there, and stay"

        def into_store() -> Store:
            try:
                return mapped(*parts.columns)
            except StoreMismatchError as error:
                raise (error if found is None else with_keys(error, found, config)) from None

        return f"{samples} samples, written to {config.store} as they are computed{there}", into_store
    if config.devices == "ray":
        mapped = shardmap.vmap(parts.one_sample, **options)
        workers = "a few chunks per worker, cut when it is known how many workers there are"
        return f"{samples} samples on Ray, in {workers}", lambda: mapped(*parts.columns)
    planned = shardmap.plan(parts.one_sample, **options)(*parts.columns)
    return planned.summary, planned.run


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
