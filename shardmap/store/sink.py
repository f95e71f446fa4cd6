"""Sinks: the user's side of a store.

A sink creates the store at a place, finds it again, or refuses the place.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from shardmap.errors import StoreError, StoreMismatchError
from shardmap.store.base import Store, kind_of
from shardmap.store.header import Header, differences
from shardmap.store.manifest import (
    FOLDER,
    JOURNAL,
    Head,
    Manifest,
    Objects,
    find_manifest,
    new_manifest,
)
from shardmap.store.places import LocalPlace, Place, place_of, warn_if_full


class Sink(ABC):
    """Base of sinks, the values of `out=`: a sink makes the store for the results."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The path or URL that the user gave."""

    @abstractmethod
    def create(self, header: Header, resume: bool = False) -> Store:
        """Make the store, or find it again.

        Args:
            header: The description of the rows and the identity of the run.
            resume: Continue the stored run; missing files are created.

        Returns:
            The store, ready for workers.

        Raises:
            StoreError: It cannot be made or continued.
        """


class PlaceSink(Sink):
    """Base of sinks that write to a place. Kinds are frozen dataclasses."""

    overwrite: bool
    attributes: Mapping[str, Any] | None

    @abstractmethod
    def _store(self, url: str, header: Header) -> Store:
        """Make the store object of this kind."""

    @abstractmethod
    def _lay_out(self, store: Store) -> None:
        """Create those files shared by all units that do not exist yet.

        Raises:
            StoreDamagedError: Units are committed, but their files are gone.
        """

    @abstractmethod
    def _check(self, place: Place, header: Header) -> None:
        """Refuse results or a place that this kind cannot write to, before anything is made.

        Raises:
            StoreError: The message has the reason.
            MissingExtraError: A package is not installed.
        """

    def create(self, header: Header, resume: bool = False) -> Store:
        """Make the store, or find it again.

        Args:
            header: The description of the rows and the identity of the run.
            resume: Continue the stored run; missing files are created. Otherwise the place
                must be empty, or hold a store that `overwrite=True` allows to replace.

        Returns:
            The store, ready for workers.

        Raises:
            StoreMismatchError: The store is of another run; the message lists the differences.
            StoreError: The place is not empty, holds something else, or cannot be written to.
        """
        place = place_of(self.where)
        header = self._with_attributes(header)
        self._check(place, header)
        manifest = self._found(place, resume)
        if manifest is not None and resume:
            return self._resumed(place, manifest.head(), header)
        if manifest is not None:
            _clear(manifest, place)
        store = self._store(place.url, header)
        new_manifest(place).start(Head(store.kind, header))
        self._finish_layout(store, place)
        return store

    def check(self, resume: bool = False) -> Store | None:
        """Refuse a place where no store can be made or resumed, before anything is computed.

        Args:
            resume: As for `create`.

        Returns:
            The existing store, if any.

        Raises:
            StoreError: As for `create`, as far as it can be known without the run.
        """
        place = place_of(self.where)
        manifest = self._found(place, resume)
        if manifest is None:
            return None
        head = manifest.head()
        return kind_of(head, place.url)(place.url, head.header)

    def _with_attributes(self, header: Header) -> Header:
        if self.attributes is None:
            return header
        if not isinstance(self.attributes, Mapping):
            raise StoreError(
                f"attributes={self.attributes!r} is a {type(self.attributes).__name__}: pass names "
                "and values, such as a dict"
            )
        return dataclasses.replace(header, attributes={**header.attributes, **self.attributes})

    def _found(self, place: Place, resume: bool) -> Manifest | None:
        """The manifest of the existing store.

        Refuses data that may be neither continued nor replaced.
        """
        if isinstance(place, LocalPlace) and place.exists("") and not place.is_folder():
            raise StoreError(
                f"{place.url} is a file, where a store needs a folder: name another place"
            )
        manifest = find_manifest(place)
        if manifest is None:
            self._refuse_foreign(place)
        elif not resume and not self.overwrite:
            raise StoreError(
                f"{place.url} holds a store already: pass resume=True to go on with it, "
                "overwrite=True to the sink to replace it, "
                "or name another place"
            )
        return manifest

    def _resumed(self, place: Place, stored: Head, header: Header) -> Store:
        store = self._store(place.url, stored.header)
        if stored.kind != store.kind:
            raise StoreMismatchError(
                f"{place.url} holds a store of kind {stored.kind}, not {store.kind}: use its sink, "
                "or name another place"
            )
        if differing := differences(stored.header, header):
            raise StoreMismatchError(
                f"{place.url} holds another run, so it cannot be resumed: {'; '.join(differing)}. "
                "Make the call as it was made before, "
                "name another place, or start anew with overwrite=True and without resume"
            )
        store._tidy()
        self._finish_layout(store, place)
        return store

    def _finish_layout(self, store: Store, place: Place) -> None:
        with place.explained("making the store"):
            self._lay_out(store)
        rows = sum(stop - start for start, stop in map(store.header.rows, store.missing()))
        warn_if_full(place, rows * store.header.row_bytes)

    def _refuse_foreign(self, place: Place) -> None:
        if found := place.names():
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise StoreError(
                f"{place.url} is not empty and no store of shardmap ({', '.join(found[:3])}{more}; "
                "no manifest): nothing of it is touched, "
                "even with overwrite=True; name another place, or remove it yourself"
            )


def _clear(manifest: Manifest, place: Place) -> None:
    """Remove a store, and only its own files."""
    head = manifest.head()
    old = kind_of(head, place.url)(place.url, head.header)
    names = old._files()
    if isinstance(manifest, Objects) or not place.remote:
        manifest.start(head)  # first the commits are dropped, then the files
    for name in names:
        place.remove(name)
    for name in (JOURNAL, FOLDER):
        place.remove(name)
