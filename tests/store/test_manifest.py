"""The record of what is done: crashes in the middle of a line, damage, places without appending."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest
import torch

from shardmap.errors import StoreError
from shardmap.store import MemmapSink, Receipt, SafetensorsSink, Store, ZarrSink, open_store
from shardmap.store.manifest import JOURNAL, Journal, Objects, decode, encode, find_manifest
from shardmap.store.places import RemotePlace, place_of
from tests.store.kinds import fill, header, rows_of, same


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A finished store in a folder."""
    h = header()
    store = MemmapSink(tmp_path / "out").create(h)
    fill(store, rows_of(h))
    return store


def journal(store: Store) -> Path:
    return Path(store.url) / JOURNAL


def test_lines_are_json_and_tell_when_they_are_changed() -> None:
    entry = {"unit": 3, "text": 'quotes " and ,"crc":"', "n": [1, None, 2.5]}
    line = encode(entry)
    assert line.endswith(b"\n")
    assert {k: v for k, v in json.loads(line).items() if k != "crc"} == entry
    assert decode(line) == {k: v for k, v in entry.items()}
    for at in range(len(line) - 1):
        assert decode(line[:at]) is None
        assert decode(line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]) is None


def test_a_manifest_has_a_header_and_a_line_per_commit(store: Store) -> None:
    lines = [json.loads(line) for line in journal(store).read_text().splitlines()]
    assert lines[0]["shardmap"] == {"format": 1, "kind": "memmap"}
    assert [line["unit"] for line in lines[1:]] == [2, 1, 0]
    assert all(
        checksum.partition(":")[0] in ("sha256", "blake2b")
        for line in lines[1:]
        for checksum in line["checksums"]
    )


def test_a_crash_at_any_byte_of_the_last_line_loses_that_line_only(store: Store) -> None:
    path, rows = journal(store), rows_of(store.header)
    whole = path.read_bytes()
    begin = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in (
        *range(begin, begin + 5),
        (begin + len(whole)) // 2,
        len(whole) - 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:cut])
        again = open_store(store.url)
        assert again.missing() == [0]
        assert (
            path.read_bytes() == whole[:cut]
        )  # reading changes nothing: another process may be writing
        fill(again, rows, [0])
        assert path.read_bytes().count(b"\n") == 4
        assert open_store(store.url).missing() == []


def test_a_last_line_that_has_its_length_but_not_its_content(store: Store) -> None:
    path = journal(store)
    whole = path.read_bytes()
    for tail in (b"\0" * 100, b"\0" * 100 + b"\n"):
        path.write_bytes(whole + tail)
        again = open_store(store.url)
        assert again.missing() == []
        again.discard(1)
        assert open_store(store.url).missing() == [1]
        assert b"\0" not in path.read_bytes()


def test_damage_in_the_middle_is_refused(store: Store) -> None:
    path = journal(store)
    lines = path.read_bytes().split(b"\n")
    for number, where in ((0, "first line"), (2, "line 3")):
        damaged = list(lines)
        damaged[number] = lines[number].replace(b"1", b"7", 1)
        path.write_bytes(b"\n".join(damaged))
        with pytest.raises(
            StoreError, match=f"{where} of manifest.jsonl is damaged; restore it from a copy"
        ):
            open_store(store.url).missing()
        with pytest.raises(StoreError, match="damaged"):
            MemmapSink(store.url).create(store.header, resume=True)
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="first line"):
        open_store(store.url)


def test_manifests_of_others_and_of_later_versions_are_refused(store: Store) -> None:
    path = journal(store)
    head = json.loads(path.read_text().splitlines()[0])
    del head["crc"]
    for change, message in (
        ({"format": 2, "kind": "memmap"}, "later version of shardmap .format 2, here 1.: upgrade"),
        ({"format": 1, "kind": "tape"}, "kind 'tape' is unknown here"),
        (None, "none of shardmap's"),
    ):
        path.write_bytes(encode({**head, "shardmap": change}))
        with pytest.raises(StoreError, match=message):
            open_store(store.url)


def test_a_commit_that_fails_leaves_the_manifest_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, receipt = journal(store), store.receipts()[1]
    store.discard(1)
    whole = path.read_bytes()
    pwrite = os.pwrite

    def full(handle: int, data: bytes, at: int) -> int:
        if at == len(whole):
            return pwrite(handle, data[:10], at)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            StoreError,
            match="appending to manifest.jsonl failed: No space left .*; free space there",
        ):
            store.commit(receipt)
    assert path.read_bytes() == whole
    assert store.missing() == [1]
    store.commit(receipt)
    assert store.missing() == []


def test_a_store_that_is_removed_is_missed(store: Store) -> None:
    os.remove(journal(store))
    with pytest.raises(StoreError, match="the store was removed, or is not there on this machine"):
        type(store)(store.url, store.header).missing()
    with pytest.raises(StoreError, match="No such file"):
        store.missing()


def test_many_commits_are_not_read_again_for_each(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    place = type(store._place)
    read = place.read
    monkeypatch.setattr(place, "read", lambda self, name: reads.append(name) or read(self, name))
    again = open_store(store.url)
    receipt = again.receipts()[0]
    count = len(reads)
    for _ in range(50):
        again.commit(receipt)
    assert len(reads) == count
    other = open_store(store.url)
    other.discard(0)
    assert again.missing() == [0]


# Places where nothing can be appended.


def test_a_store_in_memory_has_an_object_per_commit(tmp_path: Path) -> None:
    h = header()
    rows = rows_of(h)
    store = ZarrSink(f"memory://objects{tmp_path}").create(h)
    fill(store, rows, [1, 2])
    files = fsspec.filesystem("memory")
    root = f"/objects{tmp_path}/manifest"
    assert sorted(p.rpartition("/")[2] for p in files.ls(root, detail=False)) == [
        "header.json",
        "unit-00000001.json",
        "unit-00000002.json",
    ]
    store.discard(1)
    assert not files.exists(f"{root}/unit-00000001.json")
    assert open_store(store.url).missing() == [0, 1]
    fill(store, rows, [0, 1])
    assert open_store(store.url).missing() == store.missing() == []
    data = files.cat_file(f"{root}/unit-00000001.json")
    files.pipe_file(f"{root}/unit-00000001.json", data.replace(b"4", b"5", 1))
    with pytest.raises(
        StoreError,
        match="manifest/unit-00000001.json is damaged; remove it, and its unit is computed again",
    ):
        open_store(store.url).missing()
    files.rm_file(f"{root}/unit-00000001.json")
    assert open_store(store.url).missing() == [1]
    files.pipe_file(f"{root}/header.json", b"{}")
    with pytest.raises(StoreError, match="manifest/header.json is damaged"):
        open_store(store.url)


def test_stores_are_copied_from_folders_to_urls_and_back(tmp_path: Path) -> None:
    h = header()
    rows = rows_of(h)
    store = ZarrSink(tmp_path / "out").create(h)
    fill(store, rows, [0, 1])
    url = f"memory://copied{tmp_path}"
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path / "out"), f"/copied{tmp_path}", recursive=True)
    copy = open_store(url)
    assert isinstance(find_manifest(place_of(url)), Journal)
    assert copy.missing() == [2]
    assert same(copy.read(1, 0, 8), rows[1][:8])
    with pytest.raises(StoreError, match="copied there from a folder and can only be read"):
        copy.commit(store.receipts()[0])

    remote = ZarrSink(f"memory://from{tmp_path}").create(h)
    fill(remote, rows, [0, 1])
    files.get(f"/from{tmp_path}", str(tmp_path / "back"), recursive=True)
    back = ZarrSink(tmp_path / "back").create(h, resume=True)
    assert isinstance(find_manifest(place_of(tmp_path / "back")), Objects)
    assert back.missing() == [2]
    fill(back, rows, [2])
    assert back.corrupt() == []
    assert ZarrSink(tmp_path / "back", overwrite=True).create(h).missing() == [0, 1, 2]
    assert isinstance(find_manifest(place_of(tmp_path / "back")), Journal)


def test_errors_of_remote_clients_are_put_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = header()
    store = ZarrSink(f"memory://errors{tmp_path}").create(h)
    receipt = store.write(0, [torch.zeros(4), torch.zeros(4, 3, 5).bfloat16()])

    class ClientError(Exception):
        """An error like botocore's, which is no OSError."""

    def refuse(*_: object, **__: object) -> None:
        raise ClientError("AccessDenied\nrequest id 7")

    place = store._place
    assert isinstance(place, RemotePlace)
    monkeypatch.setattr(place._files, "pipe_file", refuse)
    with pytest.raises(
        StoreError,
        match="writing manifest/unit-00000000.json failed: ClientError: AccessDenied request id 7 "
        ".*reached from",
    ):
        store.commit(receipt)
    monkeypatch.undo()
    store.commit(receipt)
    assert store.missing() == [1, 2]


def test_receipts_are_data(tmp_path: Path) -> None:
    store = SafetensorsSink(tmp_path / "out").create(header())
    fill(store, rows_of(header()))
    receipt = store.receipts()[2]
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt
    assert (receipt.start, receipt.stop, receipt.bytes, len(receipt.checksums)) == (
        8,
        11,
        3 * (4 + 30),
        2,
    )
