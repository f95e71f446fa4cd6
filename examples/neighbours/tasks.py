"""Two networks, each trained on half of its data: one tells digits apart, one writes sentences."""

from __future__ import annotations

import collections
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

PACKAGES = (
    "cluster",
    "datasets",
    "decomposition",
    "ensemble",
    "linear_model",
    "metrics",
    "neighbors",
    "preprocessing",
)


LONGEST = 96  # characters of a sentence


@dataclass(frozen=True)
class Task:
    """A trained network and its data; the first half of the samples is what it was trained on."""

    model: nn.Module
    loss: Callable[..., Tensor]
    """The loss of one sample, or the mean over a batch: `loss(model, *samples)`; any function of
    the inputs may replace the model."""
    batch: tuple[Tensor, ...]
    """The arguments of `loss`, [N, ...] each."""
    looks: Tensor
    """[N, features]: what samples are compared by that knows nothing of the network."""
    labels: Tensor
    """[N], which class or which subpackage."""

    @property
    def taught(self) -> int:
        """The number of samples that it was trained on."""
        return len(self.labels) // 2


def digits(samples: int, epochs: int) -> Task:
    """Scikit-learn's digits, and a network of 99,996 parameters that tells them apart."""
    bunch: Any = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))[:samples]
    images = (
        torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    )  # [N, 1, 8, 8]
    labels = torch.tensor(bunch.target)[order]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(-3),
        nn.Linear(512, 182), nn.ReLU(), nn.Linear(182, 10),
    )  # fmt: skip

    def loss(predict: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(predict(image), label)

    return trained(Task(model, loss, (images, labels), images.flatten(1), labels), epochs)


class Writer(nn.Module):
    """A transformer of two layers that tells the next character.

    [..., T] codes to [..., T, 96] logits.
    """

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.characters = nn.Embedding(96, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width),
                    nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width),
                ]
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = nn.Linear(width, 96)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of what follows each character, from it and those before."""
        x = self.characters(codes) + self.places[: codes.shape[-1]]
        for norm, qkv, mix, norm2, wider, back in self.layers:  # pyright: ignore[reportGeneralTypeIssues]  a list of lists of layers
            q, k, v = (
                qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
            )  # [..., heads, T, width / heads]
            x = x + mix(
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(-2, -3)
                .flatten(-2)
            )
            x = x + back(F.gelu(wider(norm2(x))))
        return self.out(x)


def sentences(samples: int, epochs: int) -> tuple[Task, list[str]]:
    """Sentences of scikit-learn's documentation, and a network that writes them.

    The sentences as text.
    """
    found = list(documentation())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[
        :samples
    ].tolist()
    texts, labels = [found[i][0] for i in order], torch.tensor([found[i][1] for i in order])
    codes = torch.tensor(
        [[ord(c) - 31 for c in text.ljust(LONGEST, "\x1f")] for text in texts]
    )  # [N, 96], 0 after the end
    groups: dict[str, int] = {}
    looks = torch.zeros(len(texts), 1 << 14)
    for row, text in enumerate(texts):
        for at in range(len(text) - 2):
            looks[row, groups.setdefault(text[at : at + 3].lower(), len(groups))] += 1
    torch.manual_seed(0)

    def loss(predict: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
        """Nats per character."""
        logits = predict(codes)[..., :-1, :]
        return F.cross_entropy(logits.flatten(0, -2), codes[..., 1:].flatten(), ignore_index=0)

    return trained(Task(Writer(), loss, (codes,), looks, labels), epochs), texts


def documentation() -> Iterator[tuple[str, int]]:
    """Sentences of docstrings, and the number of the subpackage that each is from.

    Those of more than one are left out.
    """
    owners: dict[str, set[int]] = collections.defaultdict(set)
    for number, package in enumerate(PACKAGES):
        module = importlib.import_module(f"sklearn.{package}")
        for name in module.__all__:
            prose = re.split(
                r"\n(?:Examples|References|See Also|Notes)\n-+\n",
                inspect.cleandoc(getattr(module, name).__doc__ or ""),
            )[0]
            for paragraph in re.split(
                r"\n\s*\n|\n\S.*\n-+\n|\n\S* :.*", "\n" + prose
            ):  # between headings and names of arguments
                text = re.sub(
                    r":\w+:`~?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", " ".join(paragraph.split())
                )
                for sentence in re.split(
                    r"(?<=\.)\s+(?=[A-Z])", text.replace("`", "").replace("*", "")
                ):
                    if (
                        32 <= len(sentence) <= LONGEST
                        and sentence.isascii()
                        and re.fullmatch(r"[A-Z][a-z]+ [^_=<>{}|\\]*\.", sentence)
                    ):
                        owners[sentence].add(number)
    return ((sentence, numbers.pop()) for sentence, numbers in owners.items() if len(numbers) == 1)


def trained(task: Task, epochs: int) -> Task:
    """The same task, its model trained on the first half of the samples.

    Plain PyTorch, one thread, the same everywhere.
    """
    optimizer = torch.optim.Adam(task.model.parameters(), lr=2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(epochs):
        for rows in torch.randperm(task.taught).split(32):
            optimizer.zero_grad()
            task.loss(task.model, *[column[rows] for column in task.batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    optimizer.zero_grad(set_to_none=True)
    return task
