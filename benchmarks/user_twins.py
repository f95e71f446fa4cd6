"""Twins in JAX of the models that users have: each maps one sample, with torch's parameters by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import models, user_models
from benchmarks.models import JaxParams


def cross_entropy(forward: models.JaxForward) -> Callable[..., Any]:
    """Make the loss of one sample from a model of one sample."""

    def loss(parameters: Mapping[str, Any], x: Any, y: Any) -> Any:
        import jax

        return -jax.nn.log_softmax(forward(parameters, x))[y]

    return loss


def next_token(forward: models.JaxForward) -> Callable[..., Any]:
    """Make the mean cross entropy of the next token from a language model."""

    def loss(parameters: Mapping[str, Any], tokens: Any, _: Any) -> Any:
        import jax
        import jax.numpy as jnp

        found = jax.nn.log_softmax(forward(parameters, tokens)[:-1])
        return -found[jnp.arange(len(tokens) - 1), tokens[1:]].mean()

    return loss


def squared(forward: models.JaxForward) -> Callable[..., Any]:
    """Make the squared difference to a target from a model of one sample."""
    return lambda parameters, x, y: ((forward(parameters, x) - y) ** 2).sum()


def linear(p: JaxParams, name: str, x: Any) -> Any:
    """Apply a linear layer; its bias if it has one."""
    bias = p.get(f"{name}.bias")
    y = x @ p[f"{name}.weight"].T
    return y if bias is None else y + bias


def layer_norm(p: JaxParams, name: str, x: Any, eps: float = 1e-5) -> Any:
    """Apply a layer norm over the last dimension."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / (variance + eps) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(q: Any, k: Any, v: Any, heads: int, causal: bool = False) -> Any:
    """Mix the values [T, W] of one sequence by heads of equal width."""
    import jax
    import jax.numpy as jnp

    tokens = len(q)
    q, k, v = (part.reshape(tokens, heads, -1) for part in (q, k, v))
    scores = jnp.einsum("thw,shw->hts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -jnp.inf)
    return jnp.einsum("hts,shw->thw", jax.nn.softmax(scores), v).reshape(tokens, -1)


def encoder_layer(p: JaxParams, name: str, x: Any, heads: int, first: bool, gelu: bool) -> Any:
    """Apply `nn.TransformerEncoderLayer`, normed first or last, with gelu or relu."""
    import jax
    import jax.numpy as jnp

    def mixed(x: Any) -> Any:
        inside = f"{name}.self_attn"
        whole = x @ p[f"{inside}.in_proj_weight"].T + p[f"{inside}.in_proj_bias"]
        return linear(p, f"{inside}.out_proj", attention(*jnp.split(whole, 3, -1), heads=heads))

    def fed(x: Any) -> Any:
        hidden = linear(p, f"{name}.linear1", x)
        hidden = jax.nn.gelu(hidden, approximate=False) if gelu else jax.nn.relu(hidden)
        return linear(p, f"{name}.linear2", hidden)

    if first:
        x = x + mixed(layer_norm(p, f"{name}.norm1", x))
        return x + fed(layer_norm(p, f"{name}.norm2", x))
    x = layer_norm(p, f"{name}.norm1", x + mixed(x))
    return layer_norm(p, f"{name}.norm2", x + fed(x))


def small_transformer(p: JaxParams, tokens: Any) -> Any:
    """Apply `user_models.SmallTransformer` to one sequence [T]."""
    x = p["embedding.weight"][tokens] + models.sinusoids().numpy()
    for index in range(2):
        x = encoder_layer(p, f"encoder.layers.{index}", x, 4, first=False, gelu=False)
    return linear(p, "head", x.mean(0))


def vit(p: JaxParams, image: Any) -> Any:
    """Apply `user_models.ViT` to one image [3, 32, 32]."""
    import jax.numpy as jnp

    x = convolved(p, "patches", image, 4, 0)
    x = x.reshape(len(x), -1).T + p["patches.bias"]
    x = jnp.concatenate([p["first"][0], x]) + p["positions"][0]
    for index in range(4):
        x = encoder_layer(p, f"layers.{index}", x, 4, first=True, gelu=True)
    return linear(p, "head", layer_norm(p, "norm", x)[0])


def gpt2(p: JaxParams, tokens: Any) -> Any:
    """Apply the transformers package's GPT-2 of `user_models.gpt2` to one sequence [T]."""
    import jax
    import jax.numpy as jnp

    def conv1d(name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    net = "net.transformer"
    x = p[f"{net}.wte.weight"][tokens] + p[f"{net}.wpe.weight"][: len(tokens)]
    for index in range(6):
        block = f"{net}.h.{index}"
        whole = conv1d(f"{block}.attn.c_attn", layer_norm(p, f"{block}.ln_1", x))
        heads = attention(*jnp.split(whole, 3, -1), heads=4, causal=True)
        x = x + conv1d(f"{block}.attn.c_proj", heads)
        hidden = conv1d(f"{block}.mlp.c_fc", layer_norm(p, f"{block}.ln_2", x))
        x = x + conv1d(f"{block}.mlp.c_proj", jax.nn.gelu(hidden, approximate=True))
    return layer_norm(p, f"{net}.ln_f", x) @ p[f"{net}.wte.weight"].T


def bert(p: JaxParams, tokens: Any) -> Any:
    """Apply the transformers package's BERT of `user_models.bert` to one sequence [T]."""
    import jax
    import jax.numpy as jnp

    def norm(name: str, x: Any) -> Any:
        return layer_norm(p, f"{name}.LayerNorm", x, 1e-12)

    words, net = "net.bert.embeddings", "net.bert.encoder.layer"
    x = p[f"{words}.word_embeddings.weight"][tokens]
    x = x + p[f"{words}.position_embeddings.weight"][: len(tokens)]
    x = norm(words, x + p[f"{words}.token_type_embeddings.weight"][0])
    for index in range(4):
        layer = f"{net}.{index}"
        parts = [linear(p, f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value")]
        mixed = linear(p, f"{layer}.attention.output.dense", attention(*parts, heads=4))
        x = norm(f"{layer}.attention.output", x + mixed)
        hidden = jax.nn.gelu(linear(p, f"{layer}.intermediate.dense", x), approximate=False)
        x = norm(f"{layer}.output", x + linear(p, f"{layer}.output.dense", hidden))
    return linear(p, "net.classifier", jnp.tanh(linear(p, "net.bert.pooler.dense", x[0])))


def convolved(p: JaxParams, name: str, x: Any, stride: int, padding: int) -> Any:
    """Convolve one image [C, H, W], without the bias."""
    from jax import lax

    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(
        x[None], p[f"{name}.weight"], (stride, stride), pads,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )[0]  # fmt: skip


def group_norm(p: JaxParams, name: str, x: Any) -> Any:
    """Apply a group norm of 8 groups to one image [C, H, W]."""
    grouped = x.reshape(8, -1)
    mean, variance = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    normal = ((grouped - mean) / (variance + 1e-5) ** 0.5).reshape(x.shape)
    return normal * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def resnet18(p: JaxParams, image: Any) -> Any:
    """Apply `user_models.resnet18` to one image [3, 64, 64]."""
    import jax
    from jax import lax

    x = jax.nn.relu(group_norm(p, "1", convolved(p, "0", image, 2, 3)))
    window = (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1))
    x = lax.reduce_window(x, -math.inf, lax.max, *window)
    for index in range(4, 12):
        stride = 2 if index in (6, 8, 10) else 1
        y = jax.nn.relu(
            group_norm(p, f"{index}.norm1", convolved(p, f"{index}.conv1", x, stride, 1))
        )
        y = group_norm(p, f"{index}.norm2", convolved(p, f"{index}.conv2", y, 1, 1))
        if stride == 2:
            short = convolved(p, f"{index}.shortcut.0", x, 2, 0)
            x = group_norm(p, f"{index}.shortcut.1", short)
        x = jax.nn.relu(y + x)
    return linear(p, "14", x.mean((1, 2)))


def lstm(p: JaxParams, x: Any) -> Any:
    """Apply `user_models.LastOfLSTM` to one sequence [T, 16]."""
    import jax
    import jax.numpy as jnp

    for layer in ("l0", "l1"):
        w, u = p[f"lstm.weight_ih_{layer}"], p[f"lstm.weight_hh_{layer}"]
        bias = p[f"lstm.bias_ih_{layer}"] + p[f"lstm.bias_hh_{layer}"]

        def step(state: Any, row: Any, w: Any = w, u: Any = u, bias: Any = bias) -> Any:
            h, c = state
            i, f, g, o = jnp.split(w @ row + u @ h + bias, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(u.shape[1])
        _, x = jax.lax.scan(step, (zero, zero), x)
    return linear(p, "head", x[-1])


def ode(p: JaxParams, x: Any) -> Any:
    """Apply `user_models.NeuralODE` to one state [8]."""
    import jax
    import jax.numpy as jnp

    def slope(x: Any) -> Any:
        for index in (0, 2):
            x = jnp.tanh(linear(p, f"net.{index}", x))
        return linear(p, "net.4", x)

    size = 1 / user_models.ODE_STEPS

    def step(x: Any, _: Any) -> Any:
        a = slope(x)
        b = slope(x + size / 2 * a)
        c = slope(x + size / 2 * b)
        d = slope(x + size * c)
        return x + size / 6 * (a + 2 * b + 2 * c + d), None

    x, _ = jax.lax.scan(step, x, None, user_models.ODE_STEPS)
    return x


def equivariant(p: JaxParams, positions: Any) -> Any:
    """Apply `user_models.Equivariant` to one molecule [A, 3]."""
    import jax
    import jax.numpy as jnp

    basis = user_models.symmetric_matrices().float().numpy()
    apart = positions[:, None] - positions[None]  # [A, A, 3]
    same = jnp.eye(user_models.ATOMS)[..., None]
    distance = ((apart**2).sum(-1, keepdims=True) + same) ** 0.5
    unit = apart / distance
    edges = [
        jnp.ones_like(unit[..., :1]),
        unit * math.sqrt(3),
        jnp.einsum("tsi,tsj,mij->tsm", unit, unit, basis) * math.sqrt(7.5),
    ]
    centres = jnp.linspace(0, user_models.CUTOFF, 8)
    near = (1 - same) * jnp.exp(-4 * (distance - centres) ** 2)
    features = [p["species"][..., None]]
    for index, degrees in enumerate(((0,), (0, 1, 2))):
        found = {k: v for k, v in user_models.couplings().items() if k[0] in degrees}
        radial = linear(p, f"radial.{index}.2", jax.nn.silu(linear(p, f"radial.{index}.0", near)))
        weights = (radial * (1 - same)).reshape(*near.shape[:2], len(found), -1)
        sums = [0.0, 0.0, 0.0]
        for path, ((a, b, c), coupling) in enumerate(found.items()):
            message = jnp.einsum("tsj,ijk->tsik", edges[b], coupling.float().numpy())
            weighted = jnp.einsum("tsc,sci->tsci", weights[:, :, path], features[a])
            sums[c] = sums[c] + jnp.einsum("tsci,tsik->tck", weighted, message)
        scalars, vectors, tensors = [
            jnp.einsum("tck,dc->tdk", s, p[f"layers.{index}.mix.{degree}.weight"])
            for degree, s in enumerate(sums)
        ]
        gates = jax.nn.sigmoid(linear(p, f"gates.{index}", scalars[..., 0]))[..., None]
        open_1, open_2 = jnp.split(gates, 2, 1)
        features = [jax.nn.silu(scalars), vectors * open_1, tensors * open_2]
    squares = [(f**2).sum(-1) for f in features[1:]]
    invariants = jnp.concatenate([features[0][..., 0], *squares], -1)
    hidden = jax.nn.silu(linear(p, "energy.0", invariants))
    return linear(p, "energy.2", hidden).sum()
