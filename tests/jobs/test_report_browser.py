"""Report pages in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap.jobs import cli
from shardmap.jobs.report import page
from tests import browser, run_folders
from tests.jobs.pages import batch, evil
from tests.jobs.pages import chromium as chromium
from tests.jobs.pages import finished as finished
from tests.jobs.pages import folder as folder

MEASURE = """
({
  images: Array.from(document.images, i => [i.naturalWidth, i.naturalHeight, i.width, i.height]),
  charts: Array.from(
    document.querySelectorAll('svg'),
    s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height]),
  bars: Array.from(
    document.querySelectorAll('.histogram svg'), s => s.querySelectorAll('rect').length),
  tables: Array.from(
    document.querySelectorAll('table'),
    t => [t.className, t.rows.length, t.getBoundingClientRect().height]),
  blocks: document.querySelectorAll('rect.chunk').length,
  marks: document.querySelectorAll('line.back').length,
  red: Array.from(document.querySelectorAll('.bad'), e => getComputedStyle(e).color),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  title: document.title,
  hacked: window.hacked ?? null,
})
"""


@pytest.mark.browser
@pytest.mark.parametrize(
    "options", [{}, {"width": 400}, {"dark": True}], ids=["wide", "narrow", "dark"]
)
def test_a_browser_shows_all_of_it(
    chromium: browser.Page, folder: Path, options: dict[str, Any]
) -> None:
    chromium.open(page.write(folder), **options)
    seen = chromium.ask(MEASURE)
    assert seen["title"] == "digits – shardmap"
    assert len(seen["images"]) == 8, "sheets of six outputs, one heat map, one picture of the run"
    assert all(side > 0 for image in seen["images"] for side in image)
    assert [300, 200] in [image[:2] for image in seen["images"]], (
        "the run's own picture has its size"
    )
    assert all(width > 0 and height > 0 for width, height in seen["charts"])
    assert len(seen["bars"]) == 8
    assert min(seen["bars"]) >= 2
    tables = {name: (rows, height) for name, rows, height in seen["tables"] if name != "log"}
    assert {name: rows for name, (rows, _) in tables.items()} == {
        "plan": 3,
        "failures": 2,
        "overview": 11,
        "csv": 21,
    }
    assert all(height > 20 * rows for rows, height in tables.values())
    assert seen["blocks"] > 0
    assert seen["marks"] == 1
    assert set(seen["red"]) == {"rgb(255, 122, 102)" if options.get("dark") else "rgb(192, 48, 29)"}
    assert seen["overflow"] == 0
    assert chromium.errors == []
    assert [url for url in chromium.requests if not url.startswith("data:")] == [
        (folder / "report.html").as_uri()
    ]


@pytest.mark.browser
def test_from_a_configuration_to_a_page_in_a_browser(
    chromium: browser.Page,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path = tmp_path / "jacobian"
    assert (
        cli.main(
            [
                "run",
                "configs/digits_jacobian/run.yaml",
                "--model.init_args.epochs",
                "1",
                "--output",
                str(path),
            ]
        )
        == 0
    )
    assert cli.main(["report", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"written to {path / 'report.html'}\n")
    chromium.open(path / "report.html")
    seen = chromium.ask(MEASURE)
    (sheet, picture) = seen["images"]
    assert sheet[:2] == [9 * 10 - 1, 9 * 6 - 1], (
        "ten images of 8x8 for each of six samples, a pixel between them"
    )
    assert min(picture) > 300
    assert [(name, rows) for name, rows, _ in seen["tables"] if name != "log"] == [
        ("plan", 2),
        ("overview", 2),
        ("csv", 21),
    ]
    shown = chromium.ask("document.querySelector('.output').innerText")
    jacobian = shardmap.open_store(path / "results.zarr").read(0, 0, 1797)
    assert "float32 [1797, 10, 1, 8, 8]" in shown or "float32 [1797, 10, 8, 8]" in shown
    for value in (jacobian.min(), jacobian.max()):
        assert page.number(value.item()) in shown
    accuracy = json.loads((path / "summary.json").read_text())["accuracy"]
    assert page.number(accuracy) in chromium.ask("document.querySelector('.numbers').innerText")
    assert chromium.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_many_lanes_and_outputs(
    chromium: browser.Page, tmp_path: Path, width: int
) -> None:
    def many(x: torch.Tensor) -> list[torch.Tensor]:
        return [(x * i).sin().cumsum(-1) if i % 2 else (x * i).cos().sum(-1) for i in range(1, 31)]

    path = run_folders.make(tmp_path / "many", many, batch(211), devices=["cpu"] * 8)
    chromium.open(page.write(path), width=width)
    seen = chromium.ask(MEASURE)
    assert len(seen["images"]) == len(seen["bars"]) == 30
    assert all(side > 0 for image in seen["images"] for side in image)
    assert chromium.ask("document.querySelectorAll('.lanes .who').length") == 8
    names = chromium.ask("Array.from(document.querySelectorAll('.output h3'), h => h.textContent)")
    assert names == [str(i) for i in range(30)]
    assert seen["overflow"] == 0
    assert chromium.errors == []


@pytest.mark.browser
def test_a_browser_runs_nothing_that_a_run_has_written(
    chromium: browser.Page, tmp_path: Path
) -> None:
    chromium.open(page.write(evil(tmp_path / "evil")))
    seen = chromium.ask(MEASURE)
    assert seen["hacked"] is None
    assert chromium.errors == []
    assert all(url.startswith(("data:", "file:///")) for url in chromium.requests)
    assert sum(url.startswith("file:") for url in chromium.requests) == 1
    assert chromium.ask("document.body.innerText").count("window.hacked") >= 12


@pytest.mark.browser
def test_the_browser_tells_of_requests_and_errors(chromium: browser.Page, tmp_path: Path) -> None:
    """The tests above rely on this."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>window.hacked = 1; console.error('hm'); throw "
        "new Error('oh')</script>"
    )
    chromium.open(path)
    assert "http://127.0.0.1:9/x.png" in chromium.requests
    assert [error for error in chromium.errors if "hm" in error]
    assert [error for error in chromium.errors if "Uncaught" in error]
    assert chromium.ask(MEASURE)["hacked"] == 1
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    path.write_text(policy + path.read_text())
    chromium.open(path)
    assert chromium.ask(MEASURE)["hacked"] is None
    assert any("Content Security Policy" in error for error in chromium.errors)


def test_without_a_browser_the_tests_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install chromium"), browser.browse(tmp_path):
        pass
