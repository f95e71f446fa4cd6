"""Find the run of a path or URL, and how much of it is complete."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from shardmap import Store, open_store
from shardmap.errors import ConfigError, StoreError
from shardmap.jobs.config import RunConfig, load
from shardmap.jobs.folder import COMPLETE, RESULTS, RunFolder, state_of
from shardmap.jobs.stores import configuration_of, differing

PLACES = ("output", "store", "store_kind", "save_outputs")
"""Keys that cannot change any more once a run has its folder."""


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A run that has stopped and can be resumed."""

    config: RunConfig
    folder: Path | None
    """Its run folder; None if a new one must be made."""
    complete: bool = False
    """True if nothing is missing."""
    before: RunConfig | None = None
    """The configuration stored in the folder."""

    def check(self, config: RunConfig) -> None:
        """Refuse overrides that turn it into another run.

        Args:
            config: The configuration with resolved import paths: only then arguments have their
                types.

        Raises:
            ConfigError: It is another run.
        """
        if self.before is None or self.folder is None:
            return
        if told := differing(self.before.identity(), config.identity()):
            again = self.folder / "config.yaml"
            raise ConfigError(
                f"{self.folder}: holds another run. Keys that differ: {told}; start that one by "
                f"`shardmap run {again}`"
            )

    def partly(self) -> bool:
        """True if there is a store that the run can continue."""
        place = self.config.store or (None if self.folder is None else str(self.folder / RESULTS))
        try:
            return self.config.stored and place is not None and bool(opened(place).header)
        except ConfigError:
            return False

    def reopen(self) -> RunFolder | None:
        """Reopen the folder in which the run continues, if there is one."""
        return None if self.folder is None else RunFolder.reopen(self.folder)


def find(place: str, overrides: Sequence[str] = ()) -> Stopped:
    """Find the run that a run folder or a store belongs to.

    Args:
        place: A run folder, complete or not, or the path or URL of a run's store.
        overrides: As for `shardmap.jobs.config.load`.

    Raises:
        ConfigError: There is no run, or the overrides turn it into another one.
    """
    path = Path(place)
    if "://" not in place and path.name == RESULTS and state_of(path.parent) is not None:
        path = path.parent
    if "://" not in place and state_of(path) is not None:
        return _in_folder(path, overrides)
    store = opened(place)
    config = configuration_of(store, overrides)
    if config is None:
        raise ConfigError(
            f"{store.url} was not written by a configured run; call shardmap.vmap as it was "
            "called, with resume=True"
        )
    return Stopped(dataclasses.replace(config, resume=True), unfinished_folder(store, config))


def store_in(place: str) -> Store:
    """Open the store at a path or URL, or the store of a run folder's outputs.

    Raises:
        ConfigError: There is no store.
    """
    path = Path(place)
    if "://" in place or state_of(path) is None:
        return opened(place)
    config = load(path / "config.yaml")
    if not config.stored or _gathered(path):
        why = (
            "reduced"
            if config.reduce is not None
            else "gathered in memory"
            if config.save_outputs
            else "not kept"
        )
        raise ConfigError(
            f"{place}: its outputs were {why}, and are in no store, so nothing can be compared; "
            "run it again"
        )
    return opened(config.store or str(path / RESULTS))


def opened(url: str) -> Store:
    """Open the store at a path or URL.

    Raises:
        ConfigError: There is no store.
    """
    try:
        return open_store(url)
    except StoreError as error:
        raise ConfigError(str(error)) from error


def _in_folder(path: Path, overrides: Sequence[str]) -> Stopped:
    for word in overrides:
        key = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and key in PLACES:
            raise ConfigError(
                f"{word}: {path} is resumed in its place, with its outputs there; leave --{key} out"
            )
    before, config = load(path / "config.yaml"), load(path / "config.yaml", overrides)
    state = state_of(path)
    complete = state is not None and state["state"] == COMPLETE
    if complete and before.stored and not _gathered(path):
        complete = not opened(before.store or str(path / RESULTS)).missing()
    if complete and overrides:
        raise ConfigError(
            f"{path}: is complete, so {overrides[0]} changes nothing; start it anew by `shardmap "
            f"run {path / 'config.yaml'}`"
        )
    if config.store is not None:
        config = dataclasses.replace(config, resume=True)
    return Stopped(config, path, complete, before)


def _gathered(path: Path) -> bool:
    """True if a folder's outputs were gathered in memory and saved, not written to a store."""
    return (path / "outputs.safetensors").exists()


def unfinished_folder(store: Store, config: RunConfig) -> Path | None:
    """The folder of the stopped run that began a store, if it is the given run.

    Args:
        store: The store of its outputs.
        config: The configuration of the run that continues.
    """
    named, begun = (
        store.header.attributes.get("run"),
        store.header.attributes.get("configuration", {}),
    )
    if not isinstance(named, str) or begun.get("output") != config.output:
        return None
    path = Path(named)
    state = state_of(path)
    if state is None or state["state"] == COMPLETE or not (path / "config.yaml").is_file():
        return None
    return path if load(path / "config.yaml").digest() == config.digest() else None
