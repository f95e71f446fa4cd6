"""The handwritten digits that scikit-learn bundles, and a small network that reads them.

There are 1,797 images of 8x8 pixels in ten classes; nothing is downloaded.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from shardmap.jobs import Bounds, Dataset, one_thread

logger = logging.getLogger(__name__)

CLASSES = 10


def load(*, flipped_fraction: Annotated[float, Bounds(0, 1)] = 0.0, flip_seed: int = 0) -> Dataset:
    """Load the digits, with a known share of the labels made wrong.

    Args:
        flipped_fraction: Share of the labels that are replaced by another class, drawn uniformly
            from the other nine.
        flip_seed: Which labels, and by what; independent of torch's own seed.

    Returns:
        Columns `image` ([N, 1, 8, 8], 0 to 1), `label` (as given, perhaps flipped), `true_label`,
        `flipped`.
    """
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0  # [N, 1, 8, 8]
    true_labels = torch.tensor(bunch.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(flip_seed)
    chosen = torch.randperm(len(images), generator=generator)[
        : round(flipped_fraction * len(images))
    ]
    shift = torch.randint(
        1, CLASSES, (len(chosen),), generator=generator
    )  # never 0: a flipped label is a wrong one
    labels = true_labels.clone()
    labels[chosen] = (true_labels[chosen] + shift) % CLASSES
    return Dataset(
        {
            "image": images,
            "label": labels,
            "true_label": true_labels,
            "flipped": labels != true_labels,
        }
    )


def train(
    dataset: Dataset,
    *,
    epochs: Annotated[int, Bounds(least=0)] = 15,
    batch_size: Annotated[int, Bounds(least=1)] = 64,
    learning_rate: Annotated[float, Bounds(above=0)] = 2e-3,
) -> nn.Module:
    """Train a small convolutional network on the labels as given.

    Plain PyTorch, nothing of shardmap in it.

    Args:
        dataset: Columns `image` and `label`.
        epochs: Passes over the data. Few, so that the network learns the digits before it learns
            the wrong labels by heart.
        batch_size: Images per step.
        learning_rate: Of Adam.

    Returns:
        The network, in eval mode; it takes one image ([1, 8, 8]) or a batch ([N, 1, 8, 8]).
    """
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(-3),
        nn.Linear(16 * 4 * 4, CLASSES),
    )
    images, labels = dataset["image"], dataset["label"]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    with one_thread():
        for epoch in range(1, epochs + 1):
            total, correct = 0.0, 0
            for rows in torch.randperm(len(dataset)).split(batch_size):
                logits = model(images[rows])
                loss = F.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
                correct += int((logits.argmax(1) == labels[rows]).sum())
            logger.info(
                "epoch %d of %d: loss %.3f, %.1f%% right",
                epoch,
                epochs,
                total / len(dataset),
                100 * correct / len(dataset),
            )
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def loss_gradient(model: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """The gradient of one sample's loss with respect to every parameter.

    Args:
        model: Takes one image.
        image: [1, 8, 8].
        label: A 0-dimensional class index.

    Returns:
        One gradient per parameter, in the order and with the shapes of `model.parameters()`.
    """
    loss = F.cross_entropy(model(image), label)
    return torch.autograd.grad(loss, tuple(model.parameters()))
