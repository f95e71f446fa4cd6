"""Carry out a run: load the data, make the model, map the function, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmap import Plan, Store
from shardmap.errors import ConfigError, RaggedError, StoreMismatchError
from shardmap.jobs.base import Findings, Outcome
from shardmap.jobs.config import BoundRun, RunConfig, to_yaml
from shardmap.jobs.folder import (
    COMPLETE,
    RunFolder,
    environment,
    save_tensors,
    state_of,
    write_json,
)
from shardmap.jobs.measure import Peaks, measured, predicted
from shardmap.jobs.parts import Parts, check_machine, load_parts, map_options
from shardmap.jobs.reproducible import one_seed
from shardmap.jobs.resume import unfinished_folder
from shardmap.jobs.stores import check_store, sink_of, with_keys
from shardmap.jobs.tasks import mapped, planned
from shardmap.run import timeline
from shardmap.run.base import Event, listen

logger = logging.getLogger(__name__)


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run that can be resumed."""

    def __init__(self, folder: Path):
        """`folder` is the run folder, which stays."""
        super().__init__(str(folder))
        self.folder = folder


@dataclass(frozen=True)
class _Map:
    """A map that is ready to run, with its description and its plan."""

    text: str
    plan: Plan | None
    run: Callable[[], Any]


def execute(
    run: BoundRun,
    *,
    folder: RunFolder | None = None,
    say: Callable[[str], None] = lambda text: None,
    listener: Callable[[Event], None] = lambda event: None,
) -> tuple[Path, Findings | None]:
    """Carry out a run.

    Args:
        run: The configuration with its import paths resolved, as `shardmap.jobs.config.bind`
            returns it.
        folder: A folder to continue in; by default a new one is made.
        say: Receives texts for people: the plan, the findings.
        listener: Receives the events of the map while it works, for a progress bar.

    Returns:
        The run folder and the report's findings; None without a report.

    Raises:
        ConfigError: The configuration does not fit the data. Nothing is left
            behind, but for committed units.
        StoreMismatchError: The store that is resumed holds another run.
        RunInterrupted: Ctrl-C, and committed units are left in the folder.
    """
    config = run.config
    check_machine(config)  # an absent device is refused before anything is loaded
    found = check_store(config)
    folder = folder or _folder(config, found, say)
    try:
        with folder, one_seed(config.seed):
            return _carry_out(run, folder, found, say, listener)
    except KeyboardInterrupt:
        if folder.path.exists():
            raise RunInterrupted(folder.path) from None
        raise
    except ConfigError as error:
        if folder.path.exists() and not folder.resumed:
            raise ConfigError(
                f"{error}; what is computed stays, and `shardmap resume {folder.path} --key value` "
                "goes on with it"
            ) from error
        raise
    except Exception:
        if folder.path.exists():
            logger.warning(
                "what is computed stays, and `shardmap resume %s` goes on with it", folder.path
            )
        raise


def _folder(config: RunConfig, found: Store | None, say: Callable[[str], None]) -> RunFolder:
    """Reopen the folder of the stopped run that began the store, or make a new folder."""
    begun = None if found is None else unfinished_folder(found, config)
    if begun is not None:
        return RunFolder.reopen(begun)
    folder = RunFolder.create(config.output, to_yaml(config))
    if folder.path != Path(config.output):
        there = state_of(Path(config.output))
        stopped = there is not None and there["state"] != COMPLETE
        hint = (
            f", a run that has not ended; `shardmap resume {config.output}` goes on with it"
            if stopped
            else ""
        )
        say(f"run folder {folder.path}: there is {config.output} already{hint}")
    return folder


def _carry_out(
    run: BoundRun,
    folder: RunFolder,
    found: Store | None,
    say: Callable[[str], None],
    listener: Callable[[Event], None],
) -> tuple[Path, Findings | None]:
    config, began = run.config, time.perf_counter()
    named = config.function or config.model
    assert named is not None
    folder.log(
        "resumed" if folder.resumed else "started",
        task=config.task,
        function=named.path,
        output=str(folder.path),
    )
    (folder.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_json(folder.path / "environment.json", environment())
    parts = load_parts(run, say)
    work = _map(run, parts, folder, found)
    say(work.text)
    folder.log("planned", plan=work.text.splitlines())
    _write_plan(folder.path, work, len(parts.dataset))
    outputs, redone = _mapped(folder, work, listener)
    if config.save_outputs and not isinstance(outputs, Store):
        save_tensors(folder.path / "outputs.safetensors", outputs)
    findings = _report(
        run, Outcome(parts.dataset, parts.model, outputs, folder.path, config.reduce is not None)
    )
    summary: dict[str, Any] = {
        "samples": len(parts.dataset),
        "seconds": round(time.perf_counter() - began, 3),
    }
    if redone:
        summary["redone"] = redone
    if isinstance(outputs, Store):
        summary |= {"store": outputs.url, "units": outputs.header.units}
    write_json(folder.path / "summary.json", {**summary, **(findings.numbers if findings else {})})
    return folder.finish(), findings


def _map(run: BoundRun, parts: Parts, folder: RunFolder, found: Store | None) -> _Map:
    """Plan the map, and prepare it."""
    config, options = run.config, map_options(run)
    samples = len(parts.dataset)
    sink = sink_of(config, folder.path) if config.stored else None
    if sink is not None and config.store is None:
        found = folder.found()
    try:
        plan = None if config.devices == "ray" else planned(parts, config, options, sink)
    except RaggedError as error:
        if config.store is not None:
            raise ConfigError(f"store: {error}") from error
        text = f"{samples} samples of unequal shapes and results, a map for each shape"
        return _Map(text, None, mapped(parts, config, options))
    if sink is None:
        text = (
            f"{samples} samples on Ray, in a few chunks per worker, cut when it is known how many "
            "workers there are"
        )
        return _Map(text if plan is None else plan.summary, plan, mapped(parts, config, options))
    again = config.resume or config.store is None
    work = mapped(parts, config, {**options, "out": sink, "resume": again})
    there = (
        ""
        if found is None
        else f"; {len(found.receipts())} of {found.header.units} units are there, and stay"
    )

    def into_store() -> Store:
        try:
            return work()
        except StoreMismatchError as error:
            raise (error if found is None else with_keys(error, found, config)) from None

    text = f"{samples} samples, written to {sink.where} as they are computed{there}"
    return _Map(text if plan is None else f"{plan.summary}\n{text}", plan, into_store)


def _write_plan(folder: Path, work: _Map, samples: int) -> None:
    values = (
        {"samples": samples, "lanes": [], "explain": work.text}
        if work.plan is None
        else predicted(work.plan)
    )
    (folder / "plan.txt").write_text(values["explain"] + "\n", encoding="utf-8")
    write_json(folder / "plan.json", values)


def _mapped(
    folder: RunFolder, work: _Map, listener: Callable[[Event], None]
) -> tuple[Any, dict[str, int]]:
    """Run the map and write its measurements into the folder.

    Returns:
        The outputs, and the number of chunks that were computed again, by cause.
    """
    events: list[Event] = []

    def observe(event: Event) -> None:
        folder.log_event(event)
        events.append(event)
        listener(event)

    lanes = {} if work.plan is None else {lane.name: lane.device for lane in work.plan.lanes}
    with Peaks(lanes.values()) as peaks, listen(observe):
        outputs = work.run()
    took = measured(events, peaks.peak_bytes, lanes)
    write_json(folder.path / "measured.json", took)
    timeline.write(folder.path / "timeline.json", events)
    return outputs, took["redone"]


def _report(run: BoundRun, outcome: Outcome) -> Findings | None:
    if run.report is None:
        return None
    findings = run.report(outcome)
    if not isinstance(findings, Findings):
        name, kind = getattr(run.report.function, "__name__", "it"), type(findings).__name__
        raise ConfigError(f"report.path: {name} returned a {kind}; return a shardmap.jobs.Findings")
    return findings
