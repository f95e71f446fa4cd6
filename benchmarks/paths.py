"""Functions that ask for values, against the loop: `python -m benchmarks.paths`.

    python -m benchmarks.paths [--subjects NAME ...] [--rounds N] [--threads N] [--output PATH]

Each subject is mapped with default options (and with trace="once") and compared with what serves it
otherwise: the plain loop, or torch.func.vmap of a form without branches. Every sample is compared
before anything is timed; the maps have been called three times then.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardmap
from benchmarks import common

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """One function: what is timed, and how it must compare."""

    ours: dict[str, Call]
    baseline: str
    other: Call
    at_least: float
    """Target for the speed over the other's."""
    tolerance: float


def rows(function: Callable[..., Any], *columns: Sequence[Any]) -> Any:
    """The plain loop; stacked where the function returns one tensor."""
    found = [function(*row) for row in zip(*columns, strict=True)]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple([torch.stack(column) for column in zip(*found, strict=True)])


def newton() -> Subject:
    """Square roots of 10,000 numbers, 3 to 12 iterations each."""

    def root(a: Tensor) -> Tensor:
        x = a
        for _ in range(60):
            step = 0.5 * (x + a / x)
            if (step - x).abs() < 1e-6 * step:
                return step
            x = step
        return x

    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(10_000, generator=generator) * 1000 + 0.01
    return _against_the_loop(root, (numbers,), 30, 0)


def branches() -> Subject:
    """Two branches with gradients, 10,000 samples, against `where` under torch.func.vmap."""
    x = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def branch(r: Tensor) -> Tensor:
        return r.sin() * r if r.sum() > 0 else r.cos() * 2

    def where(r: Tensor) -> Tensor:
        return torch.where(r.sum() > 0, r.sin() * r, r.cos() * 2)

    def gradient(mapped: Callable[[Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(mapped(x).square().sum(), x)[0]

    ours = {"shardmap": gradient(shardmap.vmap(branch))}
    ours['trace="once"'] = gradient(shardmap.vmap(branch, trace="once"))
    other = gradient(torch.func.vmap(where))
    return Subject(ours, "torch.func.vmap of where", other, 1 / 2.5, 1e-5)


def adaptive_steps() -> Subject:
    """torchdiffeq's dopri5 on 256 initial values of a Van der Pol oscillator."""
    from torchdiffeq import odeint

    def slope(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])

    def solution(y: Tensor) -> Tensor:
        times = torch.tensor([0.0, 2.0], dtype=torch.float64)
        return odeint(slope, y, times, method="dopri5", rtol=1e-4, atol=1e-5)[-1]

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, 2, generator=generator, dtype=torch.float64)
    return _against_the_loop(solution, (start,), 5, 1e-9)


class LossOf(nn.Module):
    """A Hugging Face model's loss of one padded text."""

    def __init__(self, net: nn.Module, labels: Callable[[Tensor], Tensor]):
        super().__init__()
        self.net = net
        self.labels = labels

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss of one text."""
        labels = self.labels(tokens)[None]
        return self.net(input_ids=tokens[None], attention_mask=mask[None], labels=labels).loss


def _texts(loss: LossOf) -> Subject:
    """128 texts of 16 lengths, with a mask each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 512, (128, 32), generator=generator)
    lengths = (torch.arange(128) % 16 + 1) * 2
    mask = (torch.arange(32)[None] < lengths[:, None]).long()
    parameters = tuple(loss.parameters())

    def gradient(tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(tokens, mask), parameters)

    return _against_the_loop(gradient, (tokens, mask), 8, 1e-3)


def bert() -> Subject:
    """Per-sample gradients of a BERT of 4 layers, 128 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return _texts(
        LossOf(BertForSequenceClassification(config).eval(), lambda tokens: tokens[0] % 2)
    )


def gpt2() -> Subject:
    """Per-sample gradients of a GPT-2 of 4 layers, 128 wide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=4, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return _texts(LossOf(GPT2LMHeadModel(config).eval(), lambda tokens: tokens))


def sentences() -> Subject:
    """2,000 token sequences of 40 lengths through a small transformer's per-sample gradient."""
    torch.manual_seed(0)
    table = nn.Embedding(256, 32)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    parameters = (*table.parameters(), *layer.parameters())

    def gradient(tokens: Tensor) -> tuple[Tensor, ...]:
        loss = layer(table(tokens)[None]).square().mean()
        return torch.autograd.grad(loss, parameters)

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 256, (5 + i % 40,), generator=generator) for i in range(2000)]
    ours = {"shardmap": lambda: shardmap.vmap(gradient)(shardmap.Ragged(texts))}
    return Subject(ours, "the loop", lambda: rows(gradient, texts), 20, 1e-3)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "Newton": newton,
    "two branches": branches,
    "dopri5": adaptive_steps,
    "BERT, 16 lengths": bert,
    "GPT-2, 16 lengths": gpt2,
    "2,000 sentences": sentences,
}


def _against_the_loop(
    function: Callable[..., Any], columns: tuple[Tensor, ...], at_least: float, tolerance: float
) -> Subject:
    each, once = shardmap.vmap(function), shardmap.vmap(function, trace="once")
    ours = {"shardmap": lambda: each(*columns), 'trace="once"': lambda: once(*columns)}
    return Subject(ours, "the loop", lambda: rows(function, *columns), at_least, tolerance)


def check(name: str, subject: Subject) -> None:
    """Compare every sample, in the third call of each way.

    Raises:
        SystemExit: A value is wrong.
    """
    expected = subject.other()
    expected = expected if isinstance(expected, tuple) else (expected,)
    for way, call in subject.ours.items():
        for _ in range(3):
            found = call()
        found = found if isinstance(found, tuple) else (found,)
        # Of the largest gradient: that of a key's bias is 0 but for rounding.
        scale = max(b.abs().max().item() for b in expected)
        for a, b in zip(found, expected, strict=True):
            difference = (a - b).abs().max().item()
            if difference > subject.tolerance * scale:
                raise SystemExit(f"{name}, {way}: wrong by {difference:.3g} of {scale:.3g}")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paths", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    common.use_threads(options.threads)
    warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    lines, missed = [], False
    for name in options.subjects:
        subject = SUBJECTS[name]()
        check(name, subject)
        timer = common.Timer(rounds=options.rounds, warmup=1, settle_seconds=0.0)
        seconds = timer.run({subject.baseline: subject.other, **subject.ours})
        for way in subject.ours:
            faster = common.ratio(seconds, subject.baseline, way)
            passed = "pass" if faster.median >= subject.at_least else "FAIL"
            missed |= passed == "FAIL" and way == "shardmap"
            lines.append(
                [name, way, subject.baseline, faster.text(), f">= {subject.at_least:g}", passed]
            )
    header = ["subject", "way", "other", "other's time / ours", "target", ""]
    text = f"{common.markdown(header, lines)}\n\n{common.machine_line(common.machine())}\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
