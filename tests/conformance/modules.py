"""Modules of `torch.nn` with captured parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.conformance.suite import Cases

Tensor = torch.Tensor
case = Cases()


def built(module: nn.Module) -> nn.Module:
    """A module in eval mode with weights of its own seed."""
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.4
    return module.eval()


def of(module: nn.Module) -> list[Tensor]:
    """The parameters."""
    return list(module.parameters())


mlp = built(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)))
conv1 = built(nn.Conv1d(2, 3, 2, padding=1))
conv2 = built(nn.Conv2d(1, 2, 3, padding=1))
deconv = built(nn.ConvTranspose1d(2, 2, 3, stride=2))
lstm = built(nn.LSTM(3, 4))
gru = built(nn.GRU(3, 4, bidirectional=True))
cell = built(nn.GRUCell(3, 4))
attention = built(nn.MultiheadAttention(4, 2, batch_first=True))
encoder = built(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True))
layer_norm = built(nn.LayerNorm(4))
group_norm = built(nn.GroupNorm(2, 4))
batch_norm = built(nn.BatchNorm1d(4))
instance_norm = built(nn.InstanceNorm1d(2, affine=True))
rms_norm = built(nn.RMSNorm(4))
embedding = built(nn.Embedding(5, 3))
bag = built(nn.EmbeddingBag(5, 3, mode="sum"))
bilinear = built(nn.Bilinear(4, 4, 3))
prelu = built(nn.PReLU(4))
tied = built(nn.Linear(4, 4, bias=False))
experts = built(nn.ModuleList([nn.Linear(4, 3) for _ in range(3)]))
normed = built(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))


@case(weights=of(mlp))
def a_perceptron(r):
    return mlp(r)


@case(weights=of(mlp))
def a_loss_with_a_target(r):
    return F.cross_entropy(mlp(r), torch.tensor(1))


@case(weights=of(mlp))
def called_functionally(r):
    halved = {k: p * 0.5 for k, p in mlp.named_parameters()}
    return torch.func.functional_call(mlp, halved, (r,))


@case(2, 5, weights=of(conv1))
def convolution_of_a_line(r):
    return conv1(r).relu()


@case(1, 4, 4, weights=of(conv2))
def convolution_and_pool(r):
    return F.max_pool2d(conv2(r), 2).flatten()


@case(2, 4, weights=of(deconv))
def transposed_convolution(r):
    return deconv(r)


@case(5, 3, weights=of(lstm))
def an_lstm(r):
    out, (h, c) = lstm(r)
    return out, h, c


@case(5, 3, weights=of(gru))
def a_gru_both_ways(r):
    return gru(r)[0]


@case(5, 3, weights=of(cell))
def a_cell_until_its_end(r):
    h = torch.zeros(4)
    for t in range(int((r[:, 0] > 0).sum()) + 1):
        h = cell(r[t % 5], h)
    return h


@case(3, 4, weights=of(attention))
def attends_to_itself(r):
    return attention(r, r, r)[0]


@case(3, 4, weights=of(attention))
def attends_with_a_padding_mask(r):
    padding = torch.arange(3) > (r[:, 0] > 0).sum()
    return attention(r, r, r, key_padding_mask=padding)[0]


@case(3, 4, weights=of(encoder), orders=1)
def an_encoder_layer(r):
    return encoder(r)


@case(3, 4)
def scaled_dot_product(r):
    return F.scaled_dot_product_attention(r[None], r[None], r[None], is_causal=True)


@case(3, 4, weights=of(layer_norm))
def a_layer_norm(r):
    return layer_norm(r)


@case(1, 4, weights=of(group_norm))
def a_group_norm(r):
    return group_norm(r)


@case(3, 4, weights=of(batch_norm))
def a_batch_norm_in_eval(r):
    return batch_norm(r)


@case(2, 4, weights=of(instance_norm))
def an_instance_norm(r):
    return instance_norm(r)


@case(3, 4, weights=of(rms_norm))
def an_rms_norm(r):
    return rms_norm(r)


@case(3, dtype=torch.int64, positive=True, orders=0, weights=of(embedding))
def embedded(r):
    return embedding(r)


@case(weights=of(embedding))
def embedded_by_rank(r):
    return embedding(r.argsort()) * r[:, None]


@case(weights=of(bag), orders=1)
def a_bag(r):
    return bag((r > 0).long()[None])[0] * r.sum()


@case(weights=of(bilinear))
def a_bilinear_layer(r):
    return bilinear(r, r.flip(0))


@case(3, 4, weights=of(prelu))
def a_prelu(r):
    return prelu(r)


@case(weights=of(tied))
def tied_weights(r):
    return F.linear(tied(r).tanh(), tied.weight.t())


@case(weights=of(experts))
def one_expert_of_three(r):
    return experts[int(r[:3].argmax())](r)


@case(weights=of(experts))
def two_experts_mixed(r):
    gate, which = r[:3].softmax(0).topk(2)
    stacked = torch.stack([e(r) for e in experts])
    return (gate[:, None] * stacked[which]).sum(0)


@case(weights=of(normed))
def a_weight_norm(r):
    return normed(r)


@case(weights=of(mlp))
def layers_left_by_confidence(r):
    h = mlp[1](mlp[0](r))
    return mlp[3](h) if h.max() > 0.8 else h[:2]


@case(weights=of(mlp))
def a_forward_hook(r):
    handle = mlp[0].register_forward_hook(lambda m, i, o: o * 2)
    try:
        return mlp(r)
    finally:
        handle.remove()


@case(4, 5)
def losses(r):
    target = torch.tensor([0, 2, 1, 4])
    return F.cross_entropy(r, target) + F.nll_loss(r.log_softmax(1), target, reduction="sum")


@case()
def losses_of_numbers(r):
    z = torch.zeros(4)
    pair = F.mse_loss(r, z) + F.smooth_l1_loss(r, z) + F.huber_loss(r, z, delta=0.5)
    return pair + F.binary_cross_entropy_with_logits(r, z)


@case(positive=True)
def gaussian_loss(r):
    return F.gaussian_nll_loss(torch.zeros(4), r, r)


@case()
def activations(r):
    return F.gelu(r) + F.silu(r) + F.elu(r) + F.softplus(r) + F.mish(r) + F.hardtanh(r)
