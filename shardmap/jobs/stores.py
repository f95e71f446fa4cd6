"""The store of a run, which also holds the run's configuration.

So the run can be resumed and verified without the run folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shardmap import MemmapSink, SafetensorsSink, Store, ZarrSink
from shardmap.errors import ConfigError, StoreError, StoreMismatchError
from shardmap.jobs.config import IDENTITY_KEYS, RunConfig, from_mapping
from shardmap.jobs.folder import RESULTS
from shardmap.store.sink import PlaceSink

SINKS = {"zarr": ZarrSink, "safetensors": SafetensorsSink, "memmap": MemmapSink}


def sink_of(config: RunConfig, folder: Path | None = None) -> PlaceSink:
    """The sink of a run's outputs.

    Its store keeps the configuration and its hash, the versions, and the path of the run folder.

    Args:
        config: The run; it has a store.
        folder: The run folder; the store is in it if the configuration names no place.
    """
    named = config.function or config.model
    place = config.store
    if place is None:
        assert folder is not None
        place = str(folder / RESULTS)
    assert named is not None
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    attributes = {
        "function": named.path,
        "configuration": values,
        "configuration_hash": config.digest(),
        "versions": versions(),
    }
    if folder is not None:
        attributes["run"] = str(folder.absolute())
    return SINKS[config.store_kind](place, attributes=attributes)


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    try:
        own = importlib.metadata.version("shardmap")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed, run from its sources"
    return {"shardmap": own, "torch": torch.__version__, "python": platform.python_version()}


def check_store(config: RunConfig) -> Store | None:
    """Refuse a place that cannot hold the run's store, before anything is loaded.

    Args:
        config: The run.

    Returns:
        The existing store that is resumed, if any.

    Raises:
        ConfigError: The place holds data that may be neither continued nor replaced.
    """
    if config.store is None:
        return None
    try:
        found = sink_of(config).check(resume=True)
    except StoreError as error:
        raise ConfigError(f"store: {error}") from error
    if found is None:
        return None
    if not config.resume:
        raise ConfigError(
            f"store: {config.store!r} holds a store already; give resume: true to go on with it, "
            "or name another place"
        )
    if found.kind != config.store_kind:
        raise ConfigError(
            f"store_kind: {config.store_kind}, and {config.store!r} is a store of kind "
            f"{found.kind}; give store_kind: {found.kind}"
        )
    return found


def configuration_of(store: Store, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The configuration that a run has left in its store; None for the store of another call.

    Args:
        store: The store of the results.
        overrides: As for `shardmap.jobs.config.load`.

    Raises:
        ConfigError: It cannot be parsed any more.
    """
    values = store.header.attributes.get("configuration")
    if not isinstance(values, dict):
        return None
    return from_mapping({**values, "store": store.url, "save_outputs": False}, overrides)


def with_keys(error: StoreMismatchError, store: Store, config: RunConfig) -> StoreMismatchError:
    """Extend an error with the configuration's keys that differ from the stored run's."""
    stored: Any = store.header.attributes.get("configuration")
    if not isinstance(stored, dict):
        return error
    told = differing({key: stored.get(key) for key in IDENTITY_KEYS}, config.identity())
    before, here = store.header.attributes.get("versions", {}), versions()
    moved = ", ".join(
        f"{name} {before[name]} then, {here[name]} here"
        for name in here
        if name in before and before[name] != here[name]
    )
    reason = (
        f"Keys that differ: {told}"
        if told
        else "The configuration is the same: the code or the files that it names have changed"
    )
    return StoreMismatchError(f"{error}. {reason}{f' ({moved})' if moved else ''}")


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the keys in which two runs differ, with both values; empty if there are none."""
    before, after = (_flat(json.loads(json.dumps(values, default=str))) for values in (then, now))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    return "; ".join(
        f"{key}: {_show(before.get(key))} is stored, {_show(after.get(key))} is given"
        for key in keys
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested keys to the command line's form: `model.init_args.epochs`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
