"""Models that users have, in plain PyTorch: each maps a batch of inputs to a batch of outputs."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import sinusoids

VOCABULARY, TOKENS, CLASSES = 512, 32, 10
ODE_STEPS, ODE_WIDTH = 20, 64
ATOMS, CUTOFF = 8, 3.0


class LogitsOf(nn.Module):
    """A model of the transformers package that returns its logits only."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits."""
        return self.net(input_ids=tokens).logits


class CausalBlock(nn.Module):
    """A pre-norm decoder layer as in GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, W] to [B, T, W]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """GPT-2 without the transformers package: learned positions, a head tied to the embedding."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*[CausalBlock(width, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, T, V]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.ln_f(self.blocks(self.wte(tokens) + self.wpe(positions))))


def gpt2() -> nn.Module:
    """Build GPT-2 with 6 layers, 256 wide; a twin of it where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return Decoder(256, 4, 6)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=256, n_layer=6, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LogitsOf(GPT2LMHeadModel(config)).eval()


class Encoder(nn.Module):
    """BERT without the transformers package: post-norm layers and a classifier of the first token."""

    def __init__(self, width: int, heads: int, layers: int, hidden: int):
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, 0.0, F.gelu, batch_first=True)
            for _ in range(layers)
        )
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, 2]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(positions))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.pooler(x[:, 0]).tanh())


def bert() -> nn.Module:
    """Build BERT with 4 layers, 256 wide; a twin of it where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return Encoder(256, 4, 4, 1024)
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=64,
    )  # fmt: skip
    return LogitsOf(BertForSequenceClassification(config)).eval()


class SmallTransformer(nn.Module):
    """The text classifier of tutorials: `nn.TransformerEncoder` over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, CLASSES)
        self.register_buffer("positions", sinusoids())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, 10]."""
        x = self.embedding(tokens) + self.get_buffer("positions")
        return self.head(self.encoder(x).mean(1))


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(8, after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, before, H, W] to [B, after, H / stride, W / stride]."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """Build ResNet-18 with group norm, its stem that of ImageNet, for 3x64x64 images."""
    widths = (64, 64, 128, 256, 512)
    blocks = [
        block
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        for block in (Residual(a, b, 1 if i == 0 else 2), Residual(b, b, 1))
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


class LastOfLSTM(nn.Module):
    """A sequence classifier: two LSTM layers, a linear layer on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 64, 2, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, 16] to logits [B, 10]."""
        return self.head(self.lstm(x)[0][:, -1])


class ViT(nn.Module):
    """A vision transformer: 4x4 patches of 3x32x32 images, a class token, 4 layers, 128 wide."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 10]."""
        x = self.patches(images).flatten(2).mT  # [B, 64, W]
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class NeuralODE(nn.Module):
    """The flow of a small net for one unit of time, by 20 Runge-Kutta steps (Chen et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, ODE_WIDTH), nn.Tanh(), nn.Linear(ODE_WIDTH, ODE_WIDTH), nn.Tanh(),
            nn.Linear(ODE_WIDTH, 8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map states [B, 8] to states [B, 8]."""
        step = 1 / ODE_STEPS
        for _ in range(ODE_STEPS):
            a = self.net(x)
            b = self.net(x + step / 2 * a)
            c = self.net(x + step / 2 * b)
            d = self.net(x + step * c)
            x = x + step / 6 * (a + 2 * b + 2 * c + d)
        return x


def symmetric_matrices() -> Tensor:
    """Return an orthonormal basis [5, 3, 3] of the symmetric matrices without trace."""
    basis = torch.zeros(5, 3, 3, dtype=torch.float64)
    for index, (i, j) in enumerate(((0, 1), (1, 2), (0, 2))):
        basis[index, i, j] = basis[index, j, i] = 1 / math.sqrt(2)
    basis[3] = torch.diag(torch.tensor([1.0, -1.0, 0.0])) / math.sqrt(2)
    basis[4] = torch.diag(torch.tensor([-1.0, -1.0, 2.0])) / math.sqrt(6)
    return basis


def couplings() -> dict[tuple[int, int, int], Tensor]:
    """Return the bilinear maps of degrees up to 2 that commute with rotations.

    Each is [2 l1 + 1, 2 l2 + 1, 2 l3 + 1], unique up to its scale, which is set to norm
    sqrt(2 l3 + 1): Clebsch-Gordan coefficients in the basis of `symmetric_matrices`.
    """
    m = symmetric_matrices()
    levi_civita = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        levi_civita[i, j, k], levi_civita[i, k, j] = 1.0, -1.0
    eye = [torch.eye(2 * degree + 1, dtype=torch.float64) for degree in range(3)]
    found = {(0, a, a): eye[a][None] for a in range(3)} | {
        (a, 0, a): eye[a][:, None] for a in (1, 2)
    }
    found |= {(a, a, 0): eye[a][..., None] for a in (1, 2)}
    found[1, 1, 1] = levi_civita
    found[1, 1, 2] = torch.einsum("cij->ijc", m)
    found[1, 2, 1], found[2, 1, 1] = torch.einsum("bij->ibj", m), torch.einsum("aij->aij", m)
    found[2, 2, 1] = torch.einsum("aij,bjk,ikc->abc", m, m, levi_civita)
    found[1, 2, 2] = torch.einsum("ijk,bjl,ckl->ibc", levi_civita, m, m)
    found[2, 1, 2] = torch.einsum("aij,jkl,cil->akc", m, levi_civita, m)
    found[2, 2, 2] = torch.einsum("aij,bjk,cki->abc", m, m, m)
    return {key: c * math.sqrt(2 * key[2] + 1) / c.norm() for key, c in found.items()}


def harmonics(directions: Tensor) -> list[Tensor]:
    """Return the real spherical harmonics of degrees 0, 1 and 2 of unit vectors [..., 3]."""
    outer = directions[..., :, None] * directions[..., None, :]
    basis = symmetric_matrices().to(directions)
    return [
        torch.ones_like(directions[..., :1]),
        directions * math.sqrt(3),
        torch.einsum("...ij,mij->...m", outer, basis) * math.sqrt(7.5),
    ]


class TensorProduct(nn.Module):
    """Messages along edges: products of features and harmonics of every degree (e3nn, MACE)."""

    def __init__(self, channels: int, degrees: tuple[int, ...]):
        super().__init__()
        found = {path: c for path, c in couplings().items() if path[0] in degrees}
        self.paths = list(found)
        for (a, b, c), coupling in found.items():
            self.register_buffer(f"c{a}{b}{c}", coupling.float(), persistent=False)
        self.mix = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(3))

    def forward(self, features: list[Tensor], edges: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Sum messages to every atom t from every atom s.

        Args:
            features: Of degree l, [B, s, C, 2 l + 1].
            edges: Harmonics of degree l, [B, t, s, 2 l + 1].
            weights: Of every path and channel, [B, t, s, P, C].
        """
        sums: list[list[Tensor]] = [[], [], []]
        for index, (a, b, c) in enumerate(self.paths):
            coupling = self.get_buffer(f"c{a}{b}{c}")
            message = torch.einsum("btsj,ijk->btsik", edges[b], coupling)
            weighted = torch.einsum("btsc,bsci->btsci", weights[..., index, :], features[a])
            sums[c].append(torch.einsum("btsci,btsik->btck", weighted, message))
        return [
            layer(sum(of_degree[1:], of_degree[0]).mT).mT
            for layer, of_degree in zip(self.mix, sums, strict=True)
        ]


class Equivariant(nn.Module):
    """The energy of a molecule, the same however it is turned: two layers of tensor products."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.species = nn.Parameter(torch.randn(ATOMS, channels))
        self.layers = nn.ModuleList(
            [TensorProduct(channels, (0,)), TensorProduct(channels, (0, 1, 2))]
        )
        self.radial = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, len(layer.paths) * channels))
            for layer in self.layers
            if isinstance(layer, TensorProduct)
        )
        self.gates = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in range(2))
        self.energy = nn.Sequential(nn.Linear(3 * channels, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions [B, A, 3] to energies [B]."""
        apart = positions[:, :, None] - positions[:, None]  # [B, A, A, 3]
        same = torch.eye(ATOMS, dtype=positions.dtype, device=positions.device)[..., None]
        distance = (apart.square().sum(-1, keepdim=True) + same).sqrt()
        edges = harmonics(apart / distance)
        centres = torch.linspace(0, CUTOFF, 8, dtype=positions.dtype, device=positions.device)
        near = (1 - same) * torch.exp(-4 * (distance - centres).square())  # [B, A, A, 8]
        features = [self.species.expand(len(positions), -1, -1)[..., None]]
        for layer, radial, gate in zip(self.layers, self.radial, self.gates, strict=True):
            weights = (radial(near) * (1 - same)).unflatten(-1, (-1, features[0].shape[2]))
            scalars, vectors, tensors = layer(features, edges, weights)
            open_1, open_2 = gate(scalars[..., 0]).sigmoid()[..., None].chunk(2, 2)
            features = [F.silu(scalars), vectors * open_1, tensors * open_2]
        invariants = torch.cat(
            [features[0][..., 0], *[f.square().sum(-1) for f in features[1:]]], -1
        )
        return self.energy(invariants).sum((1, 2))
