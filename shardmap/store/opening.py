"""Open an existing store by its place."""

from __future__ import annotations

import os

from shardmap.errors import StoreError
from shardmap.store import memmap, safetensors, zarr  # noqa: F401 - each makes its kind known
from shardmap.store.base import Store, kind_of
from shardmap.store.manifest import find_manifest
from shardmap.store.places import place_of


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store of a run that has finished, or is writing.

    Args:
        url: The folder or URL that was given to the sink.

    Returns:
        The store, of whichever kind it is.

    Raises:
        StoreError: There is no store, or it cannot be read.
    """
    place = place_of(url)
    manifest = find_manifest(place)
    if manifest is None:
        there = "no manifest of shardmap there" if place.exists("") else "nothing there"
        raise StoreError(f"{place.url}: {there}: name the folder or URL that was given to the sink")
    head = manifest.head()
    return kind_of(head, place.url)(place.url, head.header)
