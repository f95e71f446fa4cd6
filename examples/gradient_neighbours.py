"""Find the training sample that teaches a network the most about a new one.

It is the nearest neighbour by gradient.

To first order, a step along the gradient of one sample changes the loss of another by the inner
product of their gradients (TracIn, Pruthi et al. 2020). So the training samples whose gradients
point the way of a new sample's are those that the network would learn it from, which need not be
those that look like it. Two networks of about 100,000 parameters, each trained on one half of its
data:

- a convolutional network that tells scikit-learn's 1,797 handwritten digits apart;
- a transformer that writes the documentation of scikit-learn, a character at a time: sentences of
  the docstrings of eight subpackages.

All per-sample gradients, 700 MB and 500 MB, go to a zarr store on disk, and are read back block by
block. The claim is then put to the test: for the new samples with the highest loss, a step is taken
along the gradient of one training sample, the neighbour by gradient, the neighbour by looks
(pixels, or three-letter groups), or any. And a picture shows them.

    python examples/gradient_neighbours.py                  # half a minute on two idle cores
    python examples/gradient_neighbours.py --devices ray    # on two workers, at most 1 GiB each
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from neighbours.tasks import PACKAGES, Task, digits, sentences
from torch import Tensor
from torch.func import functional_call

import shardmap
from shardmap.store import Store

INK, FAINT, SAME, OTHER = "#1f2430", "#8a90a0", "#2a6fb0", "#c8321f"


BLOCK = 128  # gradients in memory at a time, twice: 2 x 51 MB


def gradients(task: Task, folder: Path, devices: Any) -> Store:
    """All per-sample gradients, [N, parameters], in a zarr store."""
    parameters = tuple(task.model.parameters())

    def gradient(*sample: Tensor) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(task.loss(task.model, *sample), parameters)]
        )

    shardmap.vmap(gradient, devices=devices, memory_budget="1GiB", out=shardmap.ZarrSink(folder))(
        *task.batch
    )
    return shardmap.open_store(folder)


def cosines(store: Store, rows: range, columns: range) -> Tensor:
    """Cosines between the gradients of two ranges of samples, [rows, columns].

    Two blocks of gradients are in memory at a time.
    """
    found = torch.empty(len(rows), len(columns))
    for i in range(0, len(rows), BLOCK):
        here = unit(store, rows[i : i + BLOCK])
        for j in range(0, len(columns), BLOCK):
            there = columns[j : j + BLOCK]
            found[i : i + BLOCK, j : j + BLOCK] = here @ unit(store, there).T
    return found


def unit(store: Store, rows: range) -> Tensor:
    """Gradients of consecutive samples, each of length one."""
    return F.normalize(store.read(0, rows.start, rows.stop), dim=1)


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of each new sample among those that the network was trained on."""

    losses: Tensor
    """[new]."""
    gradient: Tensor
    """Cosines of gradients, [new, taught]."""
    looks: Tensor
    """Cosines of looks, [new, taught]."""
    hardest: Tensor
    """The tenth of the new samples with the highest loss, highest first."""


def neighbours(task: Task, store: Store) -> Neighbours:
    """The similarity of each training sample to each new one, by gradient and by looks."""
    new = range(task.taught, len(task.labels))
    looks = F.normalize(task.looks, dim=1)
    losses = shardmap.vmap(lambda *sample: task.loss(task.model, *sample).detach())(
        *[column[new.start :] for column in task.batch]
    )
    hardest = losses.argsort(descending=True)[: max(1, len(new) // 10)]
    return Neighbours(
        losses,
        cosines(store, new, range(task.taught)),
        looks[new.start :] @ looks[: new.start].T,
        hardest,
    )


def after_a_step(
    task: Task, store: Store, samples: Tensor, teachers: Tensor, length: float
) -> Tensor:
    """The loss of each sample after a step down the gradient of its teacher, [samples]."""
    names, parameters = zip(*task.model.named_parameters(), strict=True)

    def stepped(direction: Tensor, *sample: Tensor) -> Tensor:
        parts = direction.split([p.numel() for p in parameters])
        moved = {
            name: p.detach() - length * part.view_as(p)
            for name, p, part in zip(names, parameters, parts, strict=True)
        }
        return task.loss(lambda inputs: functional_call(task.model, moved, (inputs,)), *sample)

    found = torch.empty(len(samples))
    for start in range(
        0, task.taught, BLOCK
    ):  # a block of teachers is read once for all its learners
        block = range(start, min(start + BLOCK, task.taught))
        learning = ((teachers >= block.start) & (teachers < block.stop)).nonzero().flatten()
        if len(learning):
            directions = unit(store, block)[teachers[learning] - start]  # [learning, parameters]
            found[learning] = shardmap.vmap(stepped)(
                directions, *[column[samples[learning]] for column in task.batch]
            ).detach()
    return found


LENGTH = 0.1
"""The step's length; that of all parameters is 14 for the digits, 84 for the sentences."""


@dataclass(frozen=True)
class Lesson:
    """The effect of one way to choose a teacher."""

    teacher: str
    after: float
    """Mean loss of the hardest new samples after the step."""
    helped: float
    """Share of them whose loss has fallen."""
    alike: float
    """Share of all new samples whose teacher has their label."""


def lessons(task: Task, store: Store, near: Neighbours) -> list[Lesson]:
    """Take a step for each of the hardest new samples, along one training sample's gradient.

    The training sample is chosen in four ways.
    """
    old, new = task.labels[: task.taught], task.labels[task.taught :]
    own = near.looks.masked_fill(old != new.unsqueeze(1), -torch.inf)
    anyone = torch.randint(task.taught, (len(new),), generator=torch.Generator().manual_seed(0))
    teachers = {
        "neighbour by gradient": near.gradient.argmax(1),
        "neighbour by looks": near.looks.argmax(1),
        "by looks, of its own label": own.argmax(1),
        "any training sample": anyone,
    }
    found = []
    for name, chosen in teachers.items():
        after = after_a_step(task, store, task.taught + near.hardest, chosen[near.hardest], LENGTH)
        helped, alike = (
            (after < near.losses[near.hardest]).double().mean(),
            (old[chosen] == new).double().mean(),
        )
        found.append(Lesson(name, float(after.mean()), float(helped), float(alike)))
    return found


def table(title: str, near: Neighbours, found: list[Lesson]) -> str:
    """The lessons as text."""
    before = float(near.losses[near.hardest].mean())
    lines = [
        f"{title}: the {len(near.hardest)} new samples with the highest loss, mean {before:.2f}; "
        f"label: of all {len(near.losses)}",
        f"{'a step along the gradient of':>30}  {'loss after':>10}  {'fell for':>8}  "
        f"{'has its label':>13}",
    ]
    lines += [
        f"{lesson.teacher:>30}  {lesson.after:10.2f}  {lesson.helped:8.0%}  {lesson.alike:13.0%}"
        for lesson in found
    ]
    return "\n".join(lines)


def shown(task: Task, near: Neighbours, count: int) -> list[int]:
    """New samples for the picture.

    The hardest of each label, of those that have a neighbour by gradient worth the name.
    """
    first: dict[int, int] = {}
    for row in near.hardest[near.gradient[near.hardest].amax(1) > 0.4].tolist():
        first.setdefault(int(task.labels[task.taught + row]), row)
    return list(first.values())[:count]


def draw_digits(figure: Any, task: Task, near: Neighbours) -> None:
    """Each digit, its neighbours by gradient, and those by pixels."""
    rows, count = shown(task, near, 6), min(5, task.taught)
    grid = figure.subplots(
        max(1, len(rows)),
        2 * count + 3,
        squeeze=False,
        width_ratios=[1, 0.25] + [1] * count + [0.25] + [1] * count,
    )
    figure.subplots_adjust(left=0.03, right=0.985, top=0.85, bottom=0.05, hspace=0.42, wspace=0.1)
    for axes in grid.flat:
        axes.set_axis_off()
    images, labels = task.batch[0], task.labels
    with torch.no_grad():
        predicted = task.model(images).argmax(1)

    def tile(axes: Any, row: int, text: str, color: str) -> None:
        axes.set_axis_on()
        axes.imshow(images[row, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(text, fontsize=8.5, color=color, labelpad=3)
        for spine in axes.spines.values():
            spine.set(
                color=color if color != INK else "#d5d8df", linewidth=1.6 if color != INK else 0.8
            )

    for line, row in zip(grid, rows, strict=False):
        sample = task.taught + row
        tile(line[0], sample, f"a {int(labels[sample])}, read as {int(predicted[sample])}", INK)
        for first, near_by in ((2, near.gradient), (3 + count, near.looks)):
            values, teachers = near_by[row].topk(count)
            for axes, value, teacher in zip(
                line[first:], values.tolist(), teachers.tolist(), strict=False
            ):
                same = labels[teacher] == labels[sample]
                tile(
                    axes, teacher, f"{int(labels[teacher])}   {value:.2f}", SAME if same else OTHER
                )
    for axes, text in (
        (grid[0, 0], "new"),
        (grid[0, 2], "nearest training samples by gradient"),
        (grid[0, 3 + count], "by pixels"),
    ):
        axes.set_title(text, fontsize=10, color=INK, loc="left", weight="bold", pad=6)


def draw_sentences(figure: Any, task: Task, texts: list[str], near: Neighbours) -> None:
    """Each sentence, its neighbours by gradient, and those by three-letter groups."""
    axes = figure.subplots()
    figure.subplots_adjust(left=0.03, right=0.985, top=0.87, bottom=0.01)
    axes.set_axis_off()
    rows, count = shown(task, near, 6), min(3, task.taught)
    axes.set(xlim=(0, 1), ylim=(6 * (count + 1.6), -1))
    columns = (
        (0.0, "nearest training samples by gradient", near.gradient),
        (0.5, "by three-letter groups", near.looks),
    )
    for x, title, _ in columns:
        axes.text(x, -1, title, fontsize=10, color=INK, weight="bold", va="center")
    for number, row in enumerate(rows):
        at, sample = number * (count + 1.6) + 0.3, task.taught + row
        axes.axhspan(at - 0.5, at + 0.5, color="#eef0f4")
        axes.text(0.003, at, f"{texts[sample]}", fontsize=8, color=INK, weight="bold", va="center")
        axes.text(
            0.997,
            at,
            f"{PACKAGES[int(task.labels[sample])]}",
            fontsize=8,
            color=FAINT,
            va="center",
            ha="right",
        )
        for x, _, near_by in columns:
            values, teachers = near_by[row].topk(count)
            for rank, (value, teacher) in enumerate(
                zip(values.tolist(), teachers.tolist(), strict=True), start=1
            ):
                color = SAME if task.labels[teacher] == task.labels[sample] else OTHER
                axes.text(
                    x + 0.003, at + rank, f"{value:.2f}", fontsize=7.5, color=color, va="center"
                )
                axes.text(
                    x + 0.032, at + rank, texts[teacher], fontsize=7.5, color=INK, va="center"
                )


def headline(figure: Any, title: str, near: Neighbours, found: list[Lesson]) -> None:
    """Write the title and the result above the pictures."""
    gradient, looks, own, anyone = found
    before = float(near.losses[near.hardest].mean())
    text = (
        "One small step along the gradient of one training sample takes the mean loss of the "
        f"{len(near.hardest)} hardest new samples from {before:.2f} to\n{gradient.after:.2f} (its "
        f"neighbour by gradient), {looks.after:.2f} (by looks), {own.after:.2f} (by looks, of its "
        f"own label), {anyone.after:.2f} (any).   Numbers below are cosines; blue: the same label, "
        "red: another."
    )
    figure.text(0.03, 0.985, title, fontsize=13, color=INK, weight="bold", va="top")
    figure.text(0.03, 0.95, text, fontsize=8.5, color=FAINT, va="top", linespacing=1.4)


def main() -> None:
    """Train, take all gradients, compare, draw, and say what came out."""
    parser = argparse.ArgumentParser(
        description="Nearest neighbours by gradient: digits and sentences."
    )
    parser.add_argument(
        "--devices", default="cpu", help="as shardmap.vmap takes them; ray: two workers"
    )
    parser.add_argument("--samples", type=int, default=1797, help="at most so many of each kind")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the gradients are kept, 1.2 GB; a temporary folder if left out",
    )
    parser.add_argument("--picture", type=Path, default=Path("gradient_neighbours.png"))
    options = parser.parse_args()
    if options.samples < 20:
        parser.error(
            f"--samples {options.samples}: give at least 20, of which half are for training"
        )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            run(options, options.folder or Path(temporary))
        except shardmap.errors.ShardmapError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Do all of it, with the gradients in `folder`."""
    devices = shardmap.Ray(workers=2) if options.devices == "ray" else options.devices
    figure = Figure(figsize=(12.5, 14.2), facecolor="white")
    panels: Any = figure.subfigures(2, 1, height_ratios=[7.4, 6.8])
    upper, lower = panels

    task = digits(options.samples, epochs=6)
    store = gradients(task, folder / "digits", devices)
    near = neighbours(task, store)
    found = lessons(task, store, near)
    print(table("digits", near, found))
    headline(
        upper,
        "Handwritten digits: which training samples would teach the network to read these?",
        near,
        found,
    )
    draw_digits(upper, task, near)

    task, texts = sentences(options.samples, epochs=15)
    store = gradients(task, folder / "sentences", devices)
    near = neighbours(task, store)
    found = lessons(task, store, near)
    print("\n" + table("sentences", near, found))
    headline(
        lower,
        "Documentation: which training sentences would teach the network to write these?",
        near,
        found,
    )
    draw_sentences(lower, task, texts, near)

    figure.savefig(options.picture, dpi=130)
    print(
        "\nThe gradient of a digit knows its label, that of a sentence nothing of its subpackage. "
        f"Picture: {options.picture}"
    )


if __name__ == "__main__":
    main()
