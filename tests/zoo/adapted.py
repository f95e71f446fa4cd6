"""Models changed after they are built: LoRA, quantisation-aware, normalised weights, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo import SAMPLES, Model, entry
from tests.zoo.language import WORDS, next_token, tokens
from tests.zoo.physics import mlp, rows, squared


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's own output."""
    return module(x)


def tiny_gpt2() -> nn.Module:
    """GPT-2 with one layer."""
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_llama() -> nn.Module:
    """Llama with two layers."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


def adapter(
    name: str,
    config: str,
    base: Any = tiny_gpt2,
    precision: torch.dtype = torch.float64,
    **settings: Any,
) -> None:
    """Register an adapter of the peft package; what it freezes has no gradient."""

    @entry(name, "peft")
    def build() -> Model:
        import peft

        made = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
        module = peft.get_peft_model(base(), made).double().eval()
        with torch.no_grad():  # fresh adapters have zeros, which leave half of the gradients 0
            for p in module.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) / 10)
        return Model(module, next_token, (tokens(),), precision=precision)


adapter("lora", "LoraConfig", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
adapter("lora_llama", "LoraConfig", tiny_llama, torch.float32, r=4, target_modules="all-linear")
adapter(
    "rslora",
    "LoraConfig",
    tiny_llama,
    torch.float32,
    r=4,
    use_rslora=True,
    target_modules=["q_proj", "v_proj"],
)
adapter(
    "dora",
    "LoraConfig",
    tiny_llama,
    torch.float32,
    r=4,
    use_dora=True,
    target_modules=["q_proj", "v_proj"],
)
adapter(
    "ia3",
    "IA3Config",
    tiny_llama,
    torch.float32,
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
)
adapter("prompt_tuning", "PromptTuningConfig", num_virtual_tokens=3)
adapter("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=3)
adapter("p_tuning", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8)
adapter("loha", "LoHaConfig", tiny_llama, torch.float32, r=4, target_modules=["q_proj", "v_proj"])
adapter("lokr", "LoKrConfig", tiny_llama, torch.float32, r=4, target_modules=["q_proj", "v_proj"])
adapter(
    "adalora",
    "AdaLoraConfig",
    tiny_llama,
    torch.float32,
    init_r=4,
    target_r=2,
    total_step=10,
    tinit=1,
    tfinal=1,
    target_modules=["q_proj", "v_proj"],
)
adapter("vera", "VeraConfig", tiny_llama, torch.float32, r=4, target_modules=["q_proj"])
adapter(
    "boft",
    "BOFTConfig",
    tiny_llama,
    torch.float32,
    boft_block_size=4,
    target_modules=["q_proj", "v_proj"],
)
adapter(
    "oft",
    "OFTConfig",
    tiny_llama,
    torch.float32,
    oft_block_size=4,
    r=0,
    target_modules=["q_proj", "v_proj"],
)
adapter(
    "fourierft",
    "FourierFTConfig",
    tiny_llama,
    torch.float32,
    n_frequency=20,
    target_modules=["q_proj", "v_proj"],
)


@entry("lora_classifier", "peft")
def lora_classifier() -> Model:
    """LoRA of BERT, with a head that is trained whole."""
    import peft
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    made = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    module = (
        peft.get_peft_model(transformers.BertForSequenceClassification(config), made)
        .double()
        .eval()
    )

    def loss(module: nn.Module, ids: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return module(input_ids=ids[None], labels=label[None]).loss

    return Model(module, loss, (tokens(), torch.randint(2, (SAMPLES,))))


def convolutions() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def image_loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The squared distance of a batch of one from a target."""
    return (module(x[None])[0] - y).square().mean()


def of_images(module: nn.Module) -> Model:
    """A model of small images."""
    return Model(module, image_loss, (rows(2, 8, 8), rows(3)), lambda m, x: m(x[None])[0])


def each_layer(module: nn.Module, function: Any) -> nn.Module:
    """Apply a function to the linear layers and convolutions."""
    for layer in module:  # pyright: ignore
        if isinstance(layer, nn.Linear | nn.Conv2d):
            function(layer)
    return module


@entry("weight_norm")
def weight_norm() -> Model:
    """Weight norm as a parametrisation."""
    return of_images(each_layer(convolutions(), nn.utils.parametrizations.weight_norm).double())


@entry("weight_norm_by_hook")
def weight_norm_by_hook() -> Model:
    """Weight norm as it was before parametrisations."""
    return of_images(each_layer(convolutions().double(), nn.utils.weight_norm))


@entry("spectral_norm")
def spectral_norm() -> Model:
    """Spectral norm as a parametrisation, in evaluation: its vectors stay."""
    return of_images(
        each_layer(convolutions(), nn.utils.parametrizations.spectral_norm).double().eval()
    )


@entry("spectral_norm_by_hook")
def spectral_norm_by_hook() -> Model:
    """Spectral norm as it was before parametrisations, in evaluation."""
    return of_images(each_layer(convolutions().double(), nn.utils.spectral_norm).eval())


@entry("orthogonal")
def orthogonal() -> Model:
    """Orthogonal weights as a parametrisation."""
    module = mlp(4, 4, 3).double()
    each_layer(module, nn.utils.parametrizations.orthogonal)
    return Model(module, squared, (rows(4), rows(3)), forward)


@entry("pruned")
def pruned() -> Model:
    """Pruned weights: masks by hooks."""
    from torch.nn.utils import prune

    module = convolutions().double()
    each_layer(module, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5))
    return of_images(module)


@entry("checkpointed")
def checkpointed() -> Model:
    """Layers that are computed again in the backward pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)  # pyright: ignore
            return x

    return Model(Net().double(), squared, (rows(6), rows(6)), forward)


@entry("checkpointed_gpt2", "transformers")
def checkpointed_gpt2() -> Model:
    """GPT-2 with the package's gradient checkpointing, which needs the training mode."""
    module = tiny_gpt2().double()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    module.gradient_checkpointing_enable()  # pyright: ignore
    return Model(module.train(), next_token, (tokens(),))


@entry("checkpointed_sequence")
def checkpointed_sequence() -> Model:
    """`checkpoint_sequential` over two segments."""
    from torch.utils.checkpoint import checkpoint_sequential

    module = mlp(6, 8, 8, 3).double()

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = checkpoint_sequential(module, 2, x, use_reentrant=False)  # pyright: ignore
        return (out - y).square().mean()

    return Model(module, loss, (rows(6), rows(3)))


class Fake(nn.Module):
    """Torch's own fake quantisation of activations, its scale fixed."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.05]), requires_grad=learned)
        self.learned = learned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(1)
        if self.learned:
            return torch._fake_quantize_learnable_per_tensor_affine(
                x, self.scale, zero, -128, 127, 1.0
            )
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)


class FakeWeights(nn.Module):
    """A parametrisation: fake quantisation of each output channel's weights."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.detach().flatten(1).abs().amax(1) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127)


def quantised(learned: bool) -> Model:
    """A network with fake quantisation of weights and activations, in float32."""
    module = nn.Sequential(
        nn.Linear(6, 8), Fake(learned), nn.ReLU(), nn.Linear(8, 3), Fake(learned)
    )
    for layer in (module[0], module[3]):
        nn.utils.parametrize.register_parametrization(layer, "weight", FakeWeights())
    batch = (rows(6).float(), rows(3).float())
    return Model(module, squared, batch, precision=torch.float32)


entry("quantisation_aware")(lambda: quantised(False))
entry("learned_step")(lambda: quantised(True))


@entry("qat_eager")
def qat_eager() -> Model:
    """Torch's eager quantisation-aware training, with separate parts and frozen observers."""
    from torch.ao import quantization as ao

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = ao.QuantStub(), ao.DeQuantStub()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(self.net(self.enter(x)))

    module = Net().train()
    module.qconfig = ao.get_default_qat_qconfig(version=0)  # pyright: ignore
    ao.prepare_qat(module, inplace=True)
    batch = (rows(6).float(), rows(3).float())
    for _ in range(3):
        module(batch[0])
    module.apply(ao.disable_observer)

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (module(x[None])[0] - y).square().mean()

    return Model(module, loss, batch, precision=torch.float32)


@entry("straight_through")
def straight_through() -> Model:
    """Binary weights with a straight-through gradient of one's own."""

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(w)
            return w.sign()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (w,) = ctx.saved_tensors
            return g * (w.abs() <= 1)

    class Binary(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, Sign.apply(self.weight), self.bias)

    module = nn.Sequential(Binary(6, 8), nn.Hardtanh(), Binary(8, 3)).double()
    return Model(module, squared, (rows(6), rows(3)), forward)


@entry("hypernetwork")
def hypernetwork() -> Model:
    """Weights that a network makes of each sample, called by `functional_call`."""
    from torch.func import functional_call

    inner = nn.Linear(4, 3).double().requires_grad_(False)

    def loss(module: nn.Module, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        made = module(context)
        weights = {"weight": made[:12].view(3, 4), "bias": made[12:]}
        return functional_call(inner, weights, (x,)).square().sum()

    return Model(mlp(5, 8, 15).double(), loss, (rows(4), rows(5)))


@entry("maml")
def maml() -> Model:
    """A meta-gradient through an inner step on each sample's own task."""
    from torch.func import functional_call

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = dict(module.named_parameters())
        inner = (functional_call(module, weights, (x[:3],)) - y[:3]).square().mean()
        slopes = torch.autograd.grad(inner, tuple(weights.values()), create_graph=True)
        moved = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), slopes, strict=True)}
        return (functional_call(module, moved, (x[3:],)) - y[3:]).square().mean()

    return Model(mlp(2, 8, 1).double(), loss, (rows(6, 2), rows(6, 1)))


@entry("ctc")
def ctc() -> Model:
    """CTC on a recurrent network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(4, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(x)[0]).log_softmax(-1)

    def loss(module: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = module(x)
        return nn.functional.ctc_loss(scores, labels, torch.tensor([len(x)]), torch.tensor([3]))

    return Model(Net().double(), loss, (rows(9, 4), torch.randint(1, 5, (SAMPLES, 3))))
