"""Run folders and the pages that are made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from shardmap.jobs.report import page
from tests import browser, run_folders

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&"


def mapped(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of every sort from one sample, [8, 8]."""
    return {
        "total": x.sum(),
        "vector": x.mean(-1),
        "jacobian": torch.stack([x * i for i in range(10)]),
        "mask": x > 0,
        "count": (5 * x).to(torch.int64),
        "half": x.bfloat16(),
        "wave": torch.complex(x, x * x),
        "holes": torch.where(x > 1, x / 0, torch.where(x < -1, (x - x) / 0, x)),
        "empty": x[:0],
        "constant": 0 * x.sum() + 3,
    }


def batch(samples: int = 53) -> list[torch.Tensor]:
    """The same samples each time, whichever tests ask for them before."""
    return [torch.randn(samples, 8, 8, generator=torch.Generator().manual_seed(7))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it, on two lanes, with a chunk that was computed again."""
    folder = run_folders.make(
        tmp_path_factory.mktemp("runs") / "digits",
        mapped,
        batch(),
        devices=["cpu", "cpu"],
        fails=True,
    )
    figure = matplotlib.figure.Figure(figsize=(3, 2))
    figure.subplots().plot([1, 3, 2])
    figure.savefig(folder / "curve.png")
    rows = "".join(f"{i},{7 * i % 53},name {i}\n" for i in range(40))
    (folder / "ranking.csv").write_text(f"rank,sample,name\n{rows}")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy, to take things away from."""
    return shutil.copytree(finished, tmp_path / "digits")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browse(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path) -> Elements:
    return Elements(page.write(folder).read_text(encoding="utf-8"))


def count(elements: Elements, tag: str, kind: str) -> int:
    return sum(
        found == tag and kind in (attributes.get("class") or "").split()
        for found, attributes in elements.found
    )


def evil(path: Path) -> Path:
    """A run folder in which every string is an attack."""
    config = {"function": {"path": EVIL, "init_args": {EVIL: EVIL}}, "task": EVIL}
    folder = run_folders.make(
        path,
        lambda x: {EVIL: x, "</style>": x.sum()},
        batch(5),
        config=config,
        summary={EVIL: EVIL, "b": {EVIL: [EVIL]}},
    )
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "call": EVIL, "explain": EVIL}))
    for name in ("plan.json", "measured.json", "timeline.json"):
        text = (folder / name).read_text().replace('"cpu"', json.dumps(EVIL))
        (folder / name).write_text(text)
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": EVIL, "time": 1e9, "level": "warning", "text": EVIL}) + "\n")
        log.write(json.dumps({"event": EVIL, "time": 1e9, "level": EVIL, EVIL: EVIL}) + "\n")
    (folder / "table.csv").write_text(f'"{EVIL}"\n{EVIL}\n')
    shutil.copy(folder / "table.csv", folder / "<img src=x onerror=alert(1)>.csv")
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    figure.savefig(folder / "x\" onerror='alert(1)'.png")
    return folder
