"""A recurrent network that learns from sentences of unequal lengths, without padding.

Batches of text are usually padded to the longest sentence, and everything that reads them must then
leave the padding out: a network that does not know of it silently computes something else. A
`shardmap.Ragged` holds the sentences as they are; each is computed as by itself, and those of one
length together. Here a GRU of about 40,000 parameters, written for one sentence, learns whether it
stands in the documentation of scikit-learn, of PyTorch or of NumPy. Its gradient norms are then
compared with those of a loop over the sentences, and with what padding would have made of them.

    python examples/ragged_text.py
    python examples/ragged_text.py --sentences 300 --steps 10
"""

from __future__ import annotations

import argparse
import collections
import importlib
import inspect
import re
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardmap

SOURCES = {
    "scikit-learn": "sklearn.cluster sklearn.decomposition sklearn.ensemble sklearn.linear_model "
    "sklearn.metrics sklearn.preprocessing",
    "PyTorch": "torch torch.nn torch.optim torch.nn.functional torch.linalg torch.distributions "
    "torch.special",
    "NumPy": "numpy numpy.linalg numpy.fft numpy.ma numpy.random numpy.polynomial",
}
LONGEST = 24  # words


def load(most: int) -> tuple[list[list[str]], Tensor]:
    """Sentences of 4 to 24 words, and whose each is, 0 to 2.

    Equally many of each, in random order.
    """
    found: list[list[tuple[str, ...]]] = []
    for modules in SOURCES.values():
        own: dict[tuple[str, ...], None] = {}  # a set that keeps its order
        for module in map(importlib.import_module, modules.split()):
            for name in sorted(dir(module)):
                text = (
                    (inspect.getdoc(getattr(module, name)) or "")
                    if not name.startswith("_")
                    else ""
                )
                for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split())):
                    words = tuple(re.findall(r"[a-z]+", sentence.lower()))
                    if (
                        re.fullmatch(r"[A-Z][a-z]+(?: [\w,`'()]+(?:-\w+)?)+\.", sentence)
                        and 4 <= len(words) <= LONGEST
                    ):
                        own[words] = None
        found.append(list(own))
    each = min(most // len(found), *map(len, found))
    rows = [
        (w, owner)
        for owner, own in enumerate(found)
        for w in [own[i] for i in torch.randperm(len(own))[:each].tolist()]
    ]
    rows = [rows[i] for i in torch.randperm(len(rows)).tolist()]
    return [list(w) for w, _ in rows], torch.tensor([owner for _, owner in rows])


def encode(sentences: list[list[str]], taught: int) -> list[Tensor]:
    """Words as numbers, [T] each.

    Those that occur twice in the sentences taught have one of their own, the others share 1.
    """
    counts = collections.Counter(word for sentence in sentences[:taught] for word in sentence)
    known = {
        word: number for number, word in enumerate((w for w, n in counts.items() if n > 1), start=2)
    }
    return [torch.tensor([known.get(word, 1) for word in sentence]) for sentence in sentences]


class Reader(nn.Module):
    """Reads the words of one sentence, [T], and returns three logits.

    [N, T] and [N, 3] if they are of one length.
    """

    def __init__(self, words: int, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, len(SOURCES))

    def forward(self, words: Tensor) -> Tensor:
        """Whose the sentence is, from the state after its last word."""
        return self.out(self.gru(self.words(words))[0][..., -1, :])


def train(model: nn.Module, sentences: shardmap.Ragged, labels: Tensor, steps: int) -> None:
    """Adam on the mean gradient of all sentences."""
    gradients = shardmap.per_sample_grad(model, F.cross_entropy, reduce="mean", trace="once")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for name, gradient in gradients(sentences, labels).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()


def main() -> None:
    """Train, read new sentences, and compare with the loop and with padding."""
    parser = argparse.ArgumentParser(
        description="A recurrent network on sentences of unequal lengths."
    )
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    texts, labels = load(options.sentences)
    taught = len(texts) * 3 // 4
    codes = encode(texts, taught)
    model = Reader(1 + max(int(c.max()) for c in codes))
    train(model, shardmap.Ragged(codes[:taught]), labels[:taught], options.steps)
    with torch.no_grad():
        read = shardmap.vmap(model)(shardmap.Ragged(codes[taught:])).argmax(1)
    right = float((read == labels[taught:]).double().mean())
    lengths = sorted({len(code) for code in codes})
    print(
        f"{len(codes):,} sentences of {lengths[0]} to {lengths[-1]} words; of new ones it knows "
        f"{right:.1%}, chance 33%"
    )

    norms = shardmap.per_sample_grad(
        model, F.cross_entropy, reduce=shardmap.reduce.norm(), trace="once"
    )
    start = time.perf_counter()
    norms(shardmap.Ragged(codes), labels)
    again = time.perf_counter()
    ragged = norms(shardmap.Ragged(codes), labels)
    middle = time.perf_counter()
    parameters = list(model.parameters())
    loop = []
    for code, label in zip(codes, labels, strict=True):
        loop.append(
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(F.cross_entropy(model(code), label), parameters)
                ]
            ).norm()
        )
    end = time.perf_counter()
    difference = float((ragged - torch.stack(loop)).abs().max() / ragged.max())
    padded = norms(nn.utils.rnn.pad_sequence(codes, batch_first=True), labels)
    changed = float(((padded / ragged - 1).abs() > 0.1).double().mean())
    print(
        f"Gradient norms of all sentences: {again - start:.2f} s with a recording for each of "
        f"{len(lengths)} lengths, then "
        f"{middle - again:.2f} s; a loop over them {end - middle:.2f} s."
    )
    print(
        f"They differ by {difference:.0e} of the largest at most; padding would have changed "
        f"{changed:.0%} of them by more than a tenth."
    )


if __name__ == "__main__":
    main()
