"""Sentences of scikit-learn's documentation, and a recurrent network that reads them."""

from __future__ import annotations

import collections
import importlib
import inspect
import logging
import re
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardmap import Ragged
from shardmap.jobs import Bounds, Dataset, one_thread

logger = logging.getLogger(__name__)

TOPICS = (
    "cluster",
    "datasets",
    "decomposition",
    "ensemble",
    "linear_model",
    "metrics",
    "neighbors",
    "preprocessing",
)
"""Subpackages of scikit-learn."""
LEAST, MOST = 4, 24
"""Words of a sentence."""
RARE, END = 1, 0
"""Numbers of words: one for all that are rare, and one that fills up behind the last."""


def load(*, sentences: Annotated[int, Bounds(least=1)] = 1000) -> Dataset:
    """Sentences of scikit-learn's documentation, in random order.

    Those that several subpackages share are left out.

    Args:
        sentences: At most how many.

    Returns:
        Columns `words` (for each sentence the numbers of its words, [T]) and `topic` ([N], the
        subpackage).
    """
    owners: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
    for topic, package in enumerate(TOPICS):
        module = importlib.import_module(f"sklearn.{package}")
        for name in module.__all__:
            text = " ".join((inspect.getdoc(getattr(module, name)) or "").split())
            for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", text):
                words = tuple(re.findall(r"[a-z]+", sentence.lower()))
                if LEAST <= len(words) <= MOST and re.fullmatch(
                    r"[A-Z][a-z]+(?: [\w,`'()]+(?:-\w+)?)+\.", sentence
                ):
                    owners[words].add(topic)
    found = [(words, topics.pop()) for words, topics in owners.items() if len(topics) == 1]
    found = [found[i] for i in torch.randperm(len(found))[:sentences].tolist()]
    counts = collections.Counter(word for words, _ in found for word in words)
    numbers = {
        word: number
        for number, word in enumerate(sorted(w for w, n in counts.items() if n > 1), start=RARE + 1)
    }
    words = [torch.tensor([numbers.get(word, RARE) for word in words]) for words, _ in found]
    topics = torch.tensor([topic for _, topic in found])
    return Dataset({"words": Ragged(words), "topic": topics})


def padded(words: Ragged) -> tuple[Tensor, Tensor]:
    """Sentences padded to the longest one, [N, T], and how many words each has, [N]."""
    lengths = torch.tensor([len(sentence) for sentence in words])
    return nn.utils.rnn.pad_sequence(list(words), True, END), lengths


class Reader(nn.Module):
    """A recurrent network that tells what a sentence is about, from its state after the last word.

    Args:
        vocabulary: How many numbers of words there are.
        width: Of embeddings and state.
    """

    def __init__(self, vocabulary: int, width: int = 24):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, len(TOPICS))

    def forward(self, words: Tensor, length: Tensor | None = None) -> Tensor:
        """Logits of the topics.

        Args:
            words: [T]; or [N, T], padded: what stands behind the last word changes nothing.
            length: How many of them are words, a number, or [N]; by default all.
        """
        states = self.recurrent(self.embedding(words))[0]  # [..., T, width]
        if length is None:
            return self.out(states[..., -1, :])
        last = (length - 1)[..., None, None].expand(*length.shape, 1, states.shape[-1])
        return self.out(states.gather(-2, last).squeeze(-2))


def train(
    dataset: Dataset,
    *,
    epochs: Annotated[int, Bounds(least=0)] = 12,
    learning_rate: Annotated[float, Bounds(above=0)] = 1e-2,
    width: Annotated[int, Bounds(least=1)] = 24,
) -> nn.Module:
    """Train a `Reader` on the first three quarters of the sentences: plain PyTorch.

    Args:
        dataset: Columns `words` and `topic`. Only here, where batches are trained on, sentences are
            padded.
        epochs: Passes over them.
        learning_rate: Of Adam.
        width: Of the network.

    Returns:
        The network, in eval mode.
    """
    (words, length), topic = padded(dataset["words"]), dataset["topic"]
    model = Reader(1 + int(words.max()), width)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    with one_thread():
        for epoch in range(1, epochs + 1):
            total = 0.0
            for rows in torch.randperm(taught(dataset)).split(64):
                loss = F.cross_entropy(model(words[rows], length[rows]), topic[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            logger.info("epoch %d of %d: loss %.3f", epoch, epochs, total / max(1, taught(dataset)))
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def taught(dataset: Dataset) -> int:
    """The number of sentences, from the first, that the network is trained on."""
    return len(dataset) * 3 // 4


def loss_gradient(
    model: nn.Module, words: Tensor, topic: Tensor, length: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of one sentence's loss.

    Args:
        model: A `Reader`.
        words: [T].
        topic: A number, as a tensor.
        length: How many of `words` are words, as a tensor; by default all.

    Returns:
        One gradient per parameter, by name.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(words, length), topic)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
