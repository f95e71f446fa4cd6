"""`shardmap report`: a run folder as one page, whole, safe, and as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap.errors import ConfigError
from shardmap.jobs.report import files, page
from shardmap.run import timeline
from shardmap.run.base import ChunkDone, ChunkRedone, RunFinished, RunStarted
from tests import run_folders
from tests.jobs.pages import EVIL, batch, count, evil, mapped, written
from tests.jobs.pages import finished as finished
from tests.jobs.pages import folder as folder


def test_a_page_says_what_was_planned_measured_and_found(folder: Path) -> None:
    elements = written(folder)
    text = " ".join(elements.text.split())
    plan, measured = (
        json.loads((folder / name).read_text()) for name in ("plan.json", "measured.json")
    )
    for expected in (
        "53 samples, mapped in",
        "17 of 53 rows stand out.",
        "0.949",
        "gradient_norm",
        "mine.mapped(power=2)",
        plan["call"],
    ):
        assert expected in text
    for lane in plan["lanes"]:
        assert shardmap.planning.memory.format_bytes(lane["predicted_peak_bytes"]) in text
        ratio = measured["lanes"][lane["name"]]["seconds"] / lane["predicted_seconds"]
        assert f"{ratio:.2f}×" in text
        peak = measured["lanes"][lane["name"]]["peak_bytes"]
        assert f"{page._bytes(peak)} {peak / lane['predicted_peak_bytes']:.2f}×" in text
    assert f"{measured['seconds'] / plan['predicted_seconds']:.2f}×" in text
    assert "a loop computes aten::nonzero for each sample" in text
    assert text.index("a loop computes") < text.index("epoch 1 of 3"), "warnings come first"
    assert "name 19" in text
    assert "name 20" not in text
    assert "the first 20 rows" in text


def test_what_is_unknown_or_not_over_is_said(folder: Path) -> None:
    measured = json.loads((folder / "measured.json").read_text())
    for lane in measured["lanes"].values():
        lane["peak_bytes"] = None
    (folder / "measured.json").write_text(json.dumps(measured))
    text = written(folder).text
    assert text.count("not measured") == 2
    assert "This run is not complete" not in text
    (folder / "state.json").write_text('{"state": "unfinished"}')
    assert "This run is not complete" in written(folder).text


def test_a_peak_above_the_bound_is_red(folder: Path) -> None:
    measured, plan = (
        json.loads((folder / name).read_text()) for name in ("measured.json", "plan.json")
    )
    for over in (0, 1):
        measured["lanes"]["cpu#1"]["peak_bytes"] = plan["lanes"][0]["predicted_peak_bytes"] + over
        measured["lanes"]["cpu#2"]["peak_bytes"] = 1
        (folder / "measured.json").write_text(json.dumps(measured))
        assert (
            sum(attributes.get("class") == "f-red" for _, attributes in written(folder).found)
            == over
        )


def test_chunks_are_drawn_when_and_where_they_were_computed(folder: Path) -> None:
    """Eight seconds on two lanes.

    Samples 2 and 3 go back after three seconds, and are computed again from the fifth to the
    eighth.
    """
    events = [
        RunStarted(6, 3, ("cpu#1", "cpu#2")),
        ChunkDone("cpu#1", 0, 2, 2.0, at=102.0),
        ChunkRedone("cpu#2", 2, 4, "out of memory", at=103.0),
        ChunkDone("cpu#2", 4, 6, 1.0, at=105.0),
        ChunkDone("cpu#2", 2, 4, 3.0, at=108.0),
        RunFinished(8.0, at=108.0),
    ]
    timeline.write(folder / "timeline.json", events)
    measured = json.loads((folder / "measured.json").read_text())
    (folder / "measured.json").write_text(
        json.dumps({**measured, "seconds": 8.0, "redone": {"worker lost": 2}})
    )
    elements = written(folder)
    blocks = [
        attributes
        for tag, attributes in elements.found
        if tag == "rect" and "chunk" in str(attributes["class"])
    ]
    got = [(b["x"], b["width"], "again" in str(b["class"])) for b in blocks]
    assert got == [
        ("0.00", "250.00", False),
        ("500.00", "125.00", False),
        ("625.00", "375.00", True),
    ]
    (mark,) = [attributes for tag, attributes in elements.found if tag == "line"]
    assert mark["x1"] == "375.00"
    text = " ".join(elements.text.split())
    assert "samples 2 to 3 went back: out of memory" in text
    assert "samples 2 to 3, 3.0 s, computed again" in text
    assert "Handed out again, by cause: worker lost 2." in text
    assert "1 chunk, 2.0 s" in text
    assert "2 chunks, 8.0 s" in text


def test_chunks_too_short_to_see_are_drawn_together(folder: Path) -> None:
    short = [ChunkDone("cpu#1", i, i + 1, 0.001, at=100 + 0.001 * (i + 1)) for i in range(5003)]
    long = ChunkDone("cpu#1", 5003, 5103, 4.997, at=110.0)
    timeline.write(
        folder / "timeline.json",
        [RunStarted(5103, 5004, ("cpu#1",)), *short, long, RunFinished(10.0, at=110.0)],
    )
    elements = written(folder)
    assert count(elements, "rect", "chunk") == 2
    assert "5,003 chunks, 5.0 s" in elements.text
    assert "the short ones together" in elements.text


def test_measured_chunks_serve_without_a_timeline(folder: Path) -> None:
    whole = written(folder)
    (folder / "timeline.json").unlink()
    elements = written(folder)
    assert count(elements, "rect", "chunk") == count(whole, "rect", "chunk") > 0
    assert count(whole, "line", "back") == 1
    assert count(elements, "line", "back") == 0
    assert "timeline.json is not in the run folder" in elements.text


def test_every_output_has_its_numbers(folder: Path) -> None:
    text = " ".join(written(folder).text.split())
    (x,) = [torch.randn(53, 8, 8, generator=torch.Generator().manual_seed(7))]
    holes = mapped(x)["holes"]
    assert f"{int(holes.isnan().sum())} NaN" in text
    assert f"{int(holes.isinf().sum())} infinite" in text
    assert f"{100 * (x > 0).double().mean():.1f}% are true" in text
    assert f"mean {page.number((5 * x).to(torch.int64).double().mean().item())}" in text
    for expected in (
        "float32 [53, 0, 8], 0 B",
        "no values",
        "all are 3",
        "complex64 [53, 8, 8]",
        "bfloat16 [53, 8, 8]",
        "Magnitudes: min",
    ):
        assert expected in text


NAMES = [
    "environment.json",
    "summary.json",
    "plan.json",
    "measured.json",
    "timeline.json",
    "log.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_absent_is_said_and_the_rest_is_there(folder: Path, name: str) -> None:
    (folder / name).unlink()
    text = " ".join(written(folder).text.split())
    assert f"{name} is not in the run folder." in text
    assert "jacobian" in text
    assert sum(f"{other} is not in the run folder." in text for other in NAMES) == 1


@pytest.mark.parametrize(
    "broken",
    [
        '{"lanes": [1, 2]}',
        '{"lanes": {"cpu": 7}}',
        "[]",
        "{",
        "\x00",
        '{"traceEvents": [{"ph": "X"}]}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("name", NAMES[1:])
def test_what_cannot_be_understood_is_said(folder: Path, name: str, broken: str) -> None:
    (folder / name).write_text(broken)
    text = " ".join(written(folder).text.split())
    assert "jacobian" in text
    if (
        name in ("summary.json", "environment.json")
        and broken.startswith("{")
        and broken.endswith("}")
    ):
        assert "lanes" in text or "traceEvents" in text, "any keys may be in there"
    elif name == "log.jsonl":
        assert ("1 line is no JSON" in text) == (not broken.startswith("{") or broken == "{")
    elif (name, broken) not in {
        ("plan.json", '{"traceEvents": [{"ph": "X"}]}'),
        ("measured.json", '{"traceEvents": [{"ph": "X"}]}'),
    }:
        assert re.search(
            rf"({re.escape(name)}|The lanes in plan.json and measured.json) (cannot be|is not)",
            text,
        )


def test_a_folder_of_the_configuration_alone_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("function: mine.mapped\n")
    text = written(tmp_path).text
    assert "No outputs are kept in the run folder" in text
    assert "mine.mapped" in text


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_few_samples(tmp_path: Path, samples: int) -> None:
    text = " ".join(
        written(run_folders.make(tmp_path / "few", mapped, batch(samples))).text.split()
    )
    assert f"float32 [{samples}, 10, 8, 8]" in text


def test_single_numbers_are_shown(tmp_path: Path) -> None:
    path = run_folders.make(tmp_path / "single", torch.sin, batch(3))
    tree = {
        "a": torch.tensor(0.125),
        "b": torch.tensor(7),
        "c": torch.tensor(1 - 2j),
        "d": torch.tensor(float("nan")),
        "e": torch.tensor(True),
    }
    run_folders.save_tensors(path / "outputs.safetensors", tree)
    elements = written(path)
    for value in ("0.125", "7", "1 - 2i", "nan", "yes"):
        assert f">{value}</p>" in (path / "report.html").read_text()
    assert "float32 []" in elements.text


@pytest.mark.parametrize("sink", [shardmap.ZarrSink, shardmap.SafetensorsSink, shardmap.MemmapSink])
def test_outputs_come_from_a_store(tmp_path: Path, sink: Callable[..., Any]) -> None:
    place = str(tmp_path / "results")
    config = {**run_folders.CONFIG, "store": place}
    path = run_folders.make(tmp_path / "run", mapped, batch(), config=config, sink=sink(place))
    text = " ".join(written(path).text.split())
    assert place in text
    assert "float32 [53, 10, 8, 8]" in text
    store = shardmap.open_store(place)
    store.discard(2)
    text = " ".join(written(path).text.split())
    assert (
        f"1 of {store.header.units} units of the store are not written; `shardmap resume` computes "
        "them." in text
    )
    assert "46 of 53 rows are written" in text
    shutil.rmtree(place)
    assert "nothing there" in written(path).text


def test_damaged_outputs_are_said(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "results"
    path = run_folders.make(
        tmp_path / "run",
        torch.sin,
        batch(),
        config={"store": str(place)},
        sink=shardmap.MemmapSink(place),
    )
    (file,) = place.glob("*.npy")
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file.name} ends before row" in written(path).text
    (folder / "outputs.safetensors").write_bytes(b"\x08" + bytes(30))
    assert "outputs.safetensors is no safetensors file that can be read" in written(folder).text


def test_only_pngs_are_taken_for_pictures(folder: Path) -> None:
    (folder / "page.png").write_bytes(b"<svg onload='alert(1)'>")
    (folder / "empty.csv").write_text("")
    elements = written(folder)
    assert "page.png is no PNG." in elements.text
    assert "empty.csv is empty." in elements.text
    assert [
        attributes["alt"]
        for tag, attributes in elements.found
        if tag == "img" and "run's picture" in (attributes["alt"] or "")
    ] == ["The run's picture curve.png"]


def test_what_is_too_much_for_a_page_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "log.jsonl").open("a") as log:
        log.writelines(
            json.dumps({"event": "message", "level": level, "text": "again"}) + "\n"
            for level in ("info", "error") * 400
        )
    (folder / "wide.csv").write_text(",".join(map(str, range(73))) + "\n" + "x" * 5000)
    (folder / "long.csv").write_text('"' + "y" * 200_000)
    monkeypatch.setattr(files, "PICTURES_BYTES", 1000)
    elements = written(folder)
    text = " ".join(elements.text.split())
    lines = len((folder / "log.jsonl").read_text().splitlines())
    chunks = sum("chunk done" in line for line in (folder / "log.jsonl").read_text().splitlines())
    assert f"{lines - chunks - 2 * files.MOST_LINES} more lines are only in log.jsonl." in text
    assert "without the last 13 columns" in text
    assert "x" * 2000 + "…" in text
    assert "long.csv cannot be read: field larger than field limit" in text
    assert "1 picture is more than the page can hold, and only in the folder: curve.png." in text


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "there is no config.yaml in it"),
        (tmp_path / "no", "it is not there"),
        (tmp_path / "file", "that is a file"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            ConfigError,
            match=rf"^report '{path}': this is no run folder, {why}; name a folder that `shardmap "
            r"run` has written$",
        ):
            page.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "nothing was written"


def test_the_page_goes_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "a page.html"
    assert page.write(folder, target) == target
    assert not (folder / "report.html").exists()
    assert target.read_text().startswith("<!DOCTYPE html>")
    for bad in (tmp_path / "no" / "page.html", folder):
        with pytest.raises(
            ConfigError,
            match="report: .* cannot be written .*name a file in a folder that can be written to",
        ):
            page.write(folder, bad)
    assert not list(tmp_path.glob(".*")) + list(folder.glob(".*"))


def test_strings_of_a_run_are_text(tmp_path: Path) -> None:
    elements = written(evil(tmp_path / "<b onclick=alert(1)>"))
    assert elements.text.count(EVIL) >= 12
    assert {tag for tag, _ in elements.found} <= set(
        "html head meta title link style body header h1 h2 h3 p dl dt dd div nav ul li a main "
        "section details summary pre table caption "
        "thead tbody tr th td svg rect line polygon article figure figcaption img span i footer "
        "code".split()
    )
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")], tag
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/png;base64,")
        assert str(attributes.get("href", "#")).startswith(("#", "data:,"))


def test_headings_and_alternatives_are_there(folder: Path) -> None:
    elements = written(folder)
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:], strict=False))
    assert all(attributes.get("alt") for tag, attributes in elements.found if tag == "img")
    assert all(
        attributes.get("role") == "img" and attributes.get("aria-label")
        for tag, attributes in elements.found
        if tag == "svg"
    )
    assert all(
        attributes.get("scope") in ("col", "row")
        for tag, attributes in elements.found
        if tag == "th"
    )
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for tag, attributes in elements.found if tag == "a"}
    assert links <= set(ids)
