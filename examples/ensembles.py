"""An ensemble of networks, trained in one mapped call, that says when it does not know.

Networks are trained on scikit-learn's handwritten digits from 0 to 7, all at once: their parameters
are stacked by `torch.func.stack_module_state`, and each step maps the gradient over the stack, each
network with a bootstrap of the data of its own. Then they read digits that they have not seen,
among them eights and nines, which nothing has taught them. The uncertainty of a network is the
entropy of its prediction, that of an ensemble the entropy of the mean prediction (Lakshminarayanan
et al. 2017). A part of it is what the members disagree about: the entropy of the mean less the mean
of the entropies (Smith and Gal 2018).

    python examples/ensembles.py
    python examples/ensembles.py --networks 100
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state

import shardmap


def load() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Half of the digits from 0 to 7 to train with, pixels and labels, then the others.

    And all eights and nines, pixels only.
    """
    bunch: Any = load_digits()
    order = torch.randperm(len(bunch.target))
    pixels, labels = (
        torch.tensor(bunch.data, dtype=torch.float32)[order] / 16,
        torch.tensor(bunch.target)[order],
    )
    known = labels < 8
    half = int(known.sum()) // 2
    return (
        (pixels[known][:half], labels[known][:half]),
        pixels[known][half:],
        labels[known][half:],
        pixels[~known],
    )


def train(
    networks: int, pixels: Tensor, labels: Tensor, steps: int, rate: float = 0.3
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The architecture, and the trained parameters of all networks, stacked: {name.

    [networks, ...]}.
    """
    models = [
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        for _ in range(networks)
    ]
    skeleton = copy.deepcopy(models[0]).to("meta")
    parameters, _ = stack_module_state(models)  # pyright: ignore[reportArgumentType]  its stub wants a list of exactly nn.Module
    parameters = {name: value.detach() for name, value in parameters.items()}

    def loss(parameters: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
        """The loss of one network on its own batch."""
        return F.cross_entropy(functional_call(skeleton, parameters, (pixels,)), labels)

    slopes = shardmap.vmap(grad(loss), trace="once")
    own = torch.randint(len(labels), (networks, len(labels)))  # a bootstrap of the data for each
    for step in range(steps):
        rows = own.gather(1, torch.randint(len(labels), (networks, 64)))  # [networks, 64]
        slope = slopes(parameters, pixels[rows], labels[rows])
        pace = rate * (1 - step / steps)
        parameters = {name: value - pace * slope[name] for name, value in parameters.items()}
    return skeleton, parameters


def predict(skeleton: nn.Module, parameters: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Probabilities of the classes, [networks, N, 8]."""
    logits = shardmap.vmap(lambda own: functional_call(skeleton, own, (pixels,)))(parameters)
    return logits.softmax(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Nats, over the last dimension."""
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)


def separation(unknown: Tensor, known: Tensor) -> float:
    """The share of pairs in which an unknown digit is less certain than a known one.

    The area under the ROC curve.
    """
    above = (unknown.unsqueeze(1) > known).double() + (unknown.unsqueeze(1) == known).double() / 2
    return float(above.mean())


def main() -> None:
    """Train, read, and tell what was never taught."""
    parser = argparse.ArgumentParser(
        description="An ensemble of networks by vmap over stacked parameters."
    )
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    taught, pixels, labels, strange = load()
    trained = train(options.networks, *taught, options.steps)
    here, there = predict(*trained, pixels), predict(*trained, strange)  # [networks, N, 8] each
    alone = [float((one.argmax(-1) == labels).double().mean()) for one in here]
    single = [separation(entropy(b), entropy(a)) for a, b in zip(here, there, strict=True)]
    unsure, unsure_there = entropy(here.mean(0)), entropy(there.mean(0))
    split, split_there = unsure - entropy(here).mean(0), unsure_there - entropy(there).mean(0)
    right = here.mean(0).argmax(-1) == labels
    certain = unsure.argsort()[: len(labels) // 2]
    print(
        f"{options.networks} networks, {len(labels)} new digits from 0 to 7: one alone reads "
        f"{sum(alone) / len(alone):.1%} right,"
    )
    print(
        f"all together {right.double().mean():.1%}, and of the half that they are surest of "
        f"{right[certain].double().mean():.1%}."
    )
    print(
        "Of a digit never taught, beside one of 0 to 7: one network is less sure "
        f"{sum(single) / len(single):.1%} of the time,"
    )
    print(
        f"members disagree more {separation(split_there, split):.1%}, and the ensemble is less "
        f"sure {separation(unsure_there, unsure):.1%}."
    )


if __name__ == "__main__":
    main()
