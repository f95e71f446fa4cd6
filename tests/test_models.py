"""Per-sample gradients of plain modules, written with `torch.autograd.grad`, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardmap
from tests import oracle

MODELS: dict[
    str, Callable[[], tuple[nn.Module, Callable[..., torch.Tensor], list[torch.Tensor]]]
] = {}
"""Name to a builder of the model, its loss of one sample, and a batch of three samples."""


def squared(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The usual loss: of the first output, where there are several."""
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    return ((out - y.reshape(-1)[: out.numel()].reshape(out.shape)) ** 2).mean()


def model(
    name: str,
    make: Callable[[], nn.Module],
    *shape: int,
    loss: Callable[..., torch.Tensor] = squared,
    tokens: int = 0,
) -> None:
    """Registers a model.

    `shape` is one sample's, `tokens` the vocabulary where samples are indices.
    """

    def build() -> tuple[nn.Module, Callable[..., torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(1)
        module = make().double().eval()
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        x = (
            torch.randint(tokens, (3, *shape))
            if tokens
            else torch.randn(3, *shape, dtype=torch.float64)
        )
        return module, loss, [x, torch.randn(3, 512, dtype=torch.float64)]

    MODELS[name] = build


class Attention(nn.Module):
    """Projections around `scaled_dot_product_attention`."""

    def __init__(self, heads: int, causal: bool = False, mask: str = "") -> None:
        super().__init__()
        self.qkv, self.heads, self.causal, self.mask = nn.Linear(8, 24), heads, causal, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.heads:  # [b, t, e] -> [b, heads, t, e / heads]
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        length = x.shape[-2]
        mask = None
        if self.mask == "bool":
            mask = torch.ones(length, length, dtype=torch.bool).tril(1)
        elif self.mask == "float":
            mask = torch.linspace(-1, 1, length * length, dtype=x.dtype).reshape(length, length)
        elif self.mask == "sample":
            mask = x.mean(-1)[..., None, None, :] if self.heads else x.mean(-1)[..., None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)


class Last(nn.Module):
    """Keeps the first result of a recurrent module, at its last step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0][..., -1, :]


class Shared(nn.Module):
    """Self-attention: one tensor as query, key and value."""

    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def seq(*modules: nn.Module) -> nn.Sequential:
    """Shorter."""
    return nn.Sequential(*modules)


model(
    "mlp", lambda: seq(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), 6
)
model(
    "cnn",
    lambda: seq(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.Flatten(0),
        nn.Linear(12, 3),
    ),
    2,
    8,
    8,
)
model(
    "cnn_batch_of_one",
    lambda: seq(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    1,
    2,
    6,
    6,
)
model(
    "cnn_strided",
    lambda: seq(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=(2, 1), dilation=(1, 2)),
    ),
    2,
    9,
    9,
)
model(
    "cnn_grouped",
    lambda: seq(nn.Conv2d(4, 8, 3, groups=2), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8, bias=False)),
    4,
    7,
    7,
)
model(
    "cnn_transposed",
    lambda: seq(
        nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, groups=2),
    ),
    3,
    4,
    4,
)
model(
    "cnn_1d",
    lambda: seq(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 2, 2)),
    3,
    10,
)
model("cnn_3d", lambda: seq(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Conv3d(3, 2, (1, 2, 2))), 2, 4, 4, 4)
model("layer_norm", lambda: seq(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), 5, 6)
model("group_norm", lambda: seq(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), 1, 2, 6, 6)
model(
    "instance_norm",
    lambda: seq(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
    1,
    2,
    6,
    6,
)
model("instance_norm_unbatched", lambda: nn.InstanceNorm1d(3, affine=True), 3, 6)
model(
    "batch_norm_eval",
    lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
    1,
    2,
    6,
    6,
)
model("batch_norm_1d_eval", lambda: seq(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 2, 6)
model("rms_norm", lambda: seq(nn.Linear(6, 8), nn.RMSNorm(8)), 5, 6)
model("lstm", lambda: Last(nn.LSTM(4, 5, batch_first=True)), 6, 4)
model(
    "lstm_batched_two_layers", lambda: Last(nn.LSTM(4, 5, num_layers=2, batch_first=True)), 1, 6, 4
)
model("gru", lambda: Last(nn.GRU(4, 5, batch_first=True)), 6, 4)
model("rnn_bidirectional", lambda: Last(nn.RNN(4, 5, bidirectional=True, batch_first=True)), 6, 4)
model(
    "lstm_bidirectional", lambda: Last(nn.LSTM(4, 3, bidirectional=True, batch_first=True)), 1, 5, 4
)
model("lstm_cell", lambda: nn.LSTMCell(4, 5), 4)
model("embedding", lambda: seq(nn.Embedding(7, 5, padding_idx=0), nn.Linear(5, 2)), 6, tokens=7)
model(
    "embedding_bag",
    lambda: seq(nn.EmbeddingBag(7, 5, mode="mean"), nn.Linear(5, 2)),
    2,
    4,
    tokens=7,
)
model("embedding_bag_sum", lambda: nn.EmbeddingBag(7, 5, mode="sum"), 2, 4, tokens=7)
model(
    "transformer_layer",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    1,
    5,
    8,
)
model(
    "transformer_layer_unbatched_norm_first",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, activation="gelu"),
    5,
    8,
)
model("multihead_attention", lambda: Shared(nn.MultiheadAttention(8, 2, batch_first=True)), 1, 5, 8)
model("attention_3d", lambda: Attention(0), 2, 5, 8)
model("attention_4d", lambda: Attention(2), 2, 5, 8)
model("attention_4d_causal", lambda: Attention(2, causal=True), 2, 5, 8)
model("attention_3d_causal", lambda: Attention(0, causal=True), 2, 5, 8)
for _mask in ("bool", "float", "sample"):
    model(f"attention_4d_{_mask}_mask", lambda mask=_mask: Attention(2, mask=mask), 2, 5, 8)
    model(f"attention_3d_{_mask}_mask", lambda mask=_mask: Attention(0, mask=mask), 2, 5, 8)


def language_loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy of one sequence."""
    del y
    logits = module(input_ids=x[None]).logits[0]
    return F.cross_entropy(logits[:-1], x[1:])


def gpt2() -> nn.Module:
    """GPT-2 as the package has it, tiny, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17,
        bos_token_id=0,
        eos_token_id=1,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """BERT as the package has it, tiny, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


model("gpt2", gpt2, 6, loss=language_loss, tokens=17)
model("bert", bert, 6, loss=language_loss, tokens=17)


def setting(name: str, **options: Any) -> Callable[[], oracle.Setting]:
    """Per-sample gradients of one model."""

    def build() -> oracle.Setting:
        module, loss, batch = MODELS[name]()
        parameters = tuple(p for p in module.parameters() if p.requires_grad)

        def gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(loss(module, x, y), parameters)

        return oracle.Setting(
            lambda vmap: vmap(gradient, **options)(*batch),
            batch,
            [*module.parameters(), *module.buffers()],
        )

    return build


def assert_right(name: str, **options: Any) -> None:
    """Compares with the loop, which must itself have an answer."""
    verdict = oracle.compare(setting(name, **options), shardmap.vmap)
    assert verdict.kind == "right", verdict.detail


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients(name: str) -> None:
    """Three different samples at once."""
    assert_right(name)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 2}, {"devices": ["cpu", "cpu"]}], ids=["chunks", "two_shards"]
)
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lstm", "embedding_bag", "transformer_layer", "gpt2"]
)
def test_chunks_and_shards(name: str, options: dict[str, Any]) -> None:
    """The same numbers from pieces."""
    assert_right(name, **options)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_that_are_differentiated_again(name: str) -> None:
    """Per-sample gradient norms as a regulariser.

    The outer gradient flows through the inner one.
    """

    def build() -> oracle.Setting:
        module, loss, batch = MODELS[name]()
        batch = [t.requires_grad_() if t.is_floating_point() else t for t in batch]
        parameters = tuple(module.parameters())

        def norm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            grads = torch.autograd.grad(loss(module, x, y), parameters, create_graph=True)
            return torch.stack([(g**2).sum() for g in grads]).sum()

        return oracle.Setting(lambda vmap: vmap(norm)(*batch), batch, list(parameters))

    verdict = oracle.compare(build, shardmap.vmap)
    assert verdict.kind == "right", verdict.detail
    assert verdict.gradient == "first" or "not implemented" in verdict.gradient, (
        "autograd can, so the gradients must have been compared"
    )
