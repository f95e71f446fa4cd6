"""Remedies for a loss and for models as packages have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import shardmap
from tests import oracle
from tests.loop import loop
from tests.test_remedies import WAYS, batch, made, tables_are_put_back  # noqa: F401


def ctc(scores: Tensor, targets: Tensor) -> Tensor:
    """The loss of one sequence of six steps and two labels."""
    loss: Any = F.ctc_loss
    return loss(scores.log_softmax(-1), targets, [6], [2], reduction="none")


def test_ctc_with_a_rule_of_ones_own() -> None:
    """The operator takes whole batches itself: [B, T, 1, C] of samples are its [T, B, C]."""
    scores, targets = batch(6, 4), batch(2).abs().mul(9).long() % 3 + 1
    want = loop(ctc)(scores, targets)
    oracle.assert_same(shardmap.vmap(ctc, strict=True)(scores, targets), want, "as it comes")
    op = torch.ops.aten._ctc_loss.default

    def whole(p: Tensor, labels: Tensor, steps: Any, lengths: Any, *rest: Any) -> Any:
        count = len(p)
        losses, alphas = op(
            p[:, :, 0].movedim(0, 1), labels.view(count, 2), steps * count, lengths * count, *rest
        )
        return losses[:, None], alphas[:, None]

    served = []

    @shardmap.batching_rule(op, replace=True)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        served.append(eq)
        p, labels, steps, lengths, *rest = args
        return b.calls_several(
            whole, 2, b.batch(p), b.batch(labels), list(steps), list(lengths), *rest
        )

    got = shardmap.vmap(ctc, strict=True)(scores, targets)
    oracle.assert_same(got, want, "with a rule")
    assert served


def test_padding_masks_of_a_transformer() -> None:
    """A model that asks if a mask is all ones: asked by text, or answered by a mask of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = made(lambda: transformers.BertModel(config).eval())
    weight = model.get_parameter("encoder.layer.0.output.dense.weight")
    tokens = torch.arange(54).view(9, 6) * 7 % 17
    masks = (torch.arange(6) < torch.tensor([6, 3, 2, 6, 5, 4, 1, 6, 2])[:, None]).long()

    def loss(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        states = model(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0]
        total = (states * mask[:, None]).square().sum()
        return torch.autograd.grad(total, (weight,))

    want = loop(loss)(tokens, masks)[0]
    for way in WAYS.values():
        got = shardmap.vmap(loss, **way)(tokens, masks)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def additive(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """With the mask that is added to scores, [1, 1, T, T], which nothing asks."""
        added = (1 - mask.float()) * torch.finfo(torch.float32).min
        return loss_with(ids, mask, added.expand(1, 1, 6, 6))

    def loss_with(ids: Tensor, mask: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        states = model(input_ids=ids[None], attention_mask=added).last_hidden_state[0]
        total = (states * mask[:, None]).square().sum()
        return torch.autograd.grad(total, (weight,))

    (got,) = shardmap.vmap(additive, strict=True, max_paths=1)(tokens, masks)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
