"""Language models of the transformers package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry

WORDS = 19
"""Size of the vocabulary."""
LENGTH = 6


def next_token(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's own loss of one sequence, which is label and input."""
    return module(input_ids=ids[None], labels=ids[None]).loss


def next_token_uncached(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same, for models whose states cannot be kept while gradients are wanted."""
    return module(input_ids=ids[None], labels=ids[None], use_cache=False).loss


def to_other(module: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The model's own loss of one pair of sequences."""
    return module(input_ids=ids[None], labels=labels[None]).loss


def masked(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The model's own loss of one padded sequence; what is padded has no label."""
    labels = torch.where(mask.bool(), ids, -100)
    return module(input_ids=ids[None], attention_mask=mask[None], labels=labels[None]).loss


def tokens(length: int = LENGTH, first: int = 3) -> torch.Tensor:
    """Sequences of words that are no special tokens."""
    return torch.randint(first, WORDS, (SAMPLES, length))


def padding(length: int = LENGTH) -> torch.Tensor:
    """Masks of sequences of unequal lengths, the first as short as the others."""
    lengths = torch.arange(SAMPLES) % 3 + length - 3
    return (torch.arange(length) < lengths[:, None]).long()


def causal(
    name: str,
    config: str,
    model: str,
    precision: torch.dtype = torch.float64,
    loops: dict[str, str] | None = None,
    loss: Any = next_token,
    dtype: torch.dtype = torch.float64,
    options: tuple[tuple[str, Any], ...] = (),
    **settings: Any,
) -> None:
    """Register a model that predicts the next token."""

    @entry(name, "transformers", loops)
    def build() -> Model:
        import transformers

        made = getattr(transformers, config)(
            **{"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
            | settings
        )
        module = getattr(transformers, model)(made).to(dtype).eval()
        return Model(module, loss, (tokens(),), precision=precision, options=options)


SMALL = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
"""The names that most configurations have, with grouped queries."""
ROUNDED = torch.float32
"""Rotary angles, normalisation or softmax are computed in float32 whatever the weights are."""

causal("gpt2", "GPT2Config", "GPT2LMHeadModel", n_positions=16, n_embd=16, n_layer=2, n_head=2)
causal(
    "gpt_neo",
    "GPTNeoConfig",
    "GPTNeoForCausalLM",
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=32,
)
causal(
    "gpt_neox",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    precision=ROUNDED,
)
causal(
    "gptj",
    "GPTJConfig",
    "GPTJForCausalLM",
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    rotary_dim=4,
    precision=ROUNDED,
)
causal(
    "opt",
    "OPTConfig",
    "OPTForCausalLM",
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    word_embed_proj_dim=16,
    max_position_embeddings=32,
)
causal(
    "bloom",
    "BloomConfig",
    "BloomForCausalLM",
    hidden_size=16,
    n_layer=2,
    n_head=2,
    precision=ROUNDED,
)
causal("llama", "LlamaConfig", "LlamaForCausalLM", **SMALL, precision=ROUNDED)
causal(
    "mistral", "MistralConfig", "MistralForCausalLM", **SMALL, sliding_window=4, precision=ROUNDED
)
causal("qwen2", "Qwen2Config", "Qwen2ForCausalLM", **SMALL, precision=ROUNDED)
causal("qwen3", "Qwen3Config", "Qwen3ForCausalLM", **SMALL, head_dim=4, precision=ROUNDED)
causal("gemma", "GemmaConfig", "GemmaForCausalLM", **SMALL, head_dim=4, precision=ROUNDED)
causal(
    "gemma2",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    **SMALL,
    head_dim=4,
    sliding_window=4,
    precision=ROUNDED,
)
causal(
    "gemma3",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    **SMALL,
    head_dim=4,
    sliding_window=4,
    precision=ROUNDED,
)
causal("phi3", "Phi3Config", "Phi3ForCausalLM", **SMALL, precision=ROUNDED)
causal("phi", "PhiConfig", "PhiForCausalLM", **SMALL, precision=ROUNDED)
causal("olmo2", "Olmo2Config", "Olmo2ForCausalLM", **SMALL, precision=ROUNDED)
causal(
    "falcon",
    "FalconConfig",
    "FalconForCausalLM",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    precision=ROUNDED,
)
causal("mpt", "MptConfig", "MptForCausalLM", d_model=16, n_heads=2, n_layers=2, max_seq_len=16)
causal("cohere", "CohereConfig", "CohereForCausalLM", **SMALL, precision=ROUNDED)
causal("stablelm", "StableLmConfig", "StableLmForCausalLM", **SMALL, precision=ROUNDED)
causal(
    "mixtral",
    "MixtralConfig",
    "MixtralForCausalLM",
    **SMALL,
    num_local_experts=4,
    num_experts_per_tok=2,
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal(
    "qwen3_moe",
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    **SMALL,
    head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal(
    "gpt_oss",
    "GptOssConfig",
    "GptOssForCausalLM",
    **SMALL,
    head_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal(
    "olmoe",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    **SMALL,
    num_experts=4,
    num_experts_per_tok=2,
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal(
    "deepseek_v3",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    **(SMALL | dict(num_key_value_heads=4)),
    moe_intermediate_size=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=4,
    first_k_dense_replace=1,
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal(
    "mamba",
    "MambaConfig",
    "MambaForCausalLM",
    hidden_size=16,
    state_size=4,
    num_hidden_layers=2,
    precision=ROUNDED,
)
causal(
    "mamba2",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    hidden_size=16,
    state_size=4,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=8,
    n_groups=2,
    chunk_size=4,
    precision=ROUNDED,
)
causal(
    "falcon_mamba",
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    hidden_size=16,
    state_size=4,
    num_hidden_layers=2,
    precision=ROUNDED,
)
causal(
    "rwkv",
    "RwkvConfig",
    "RwkvForCausalLM",
    loss=next_token_uncached,
    hidden_size=16,
    attention_hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    context_length=32,
    precision=ROUNDED,
)
causal(
    "recurrent_gemma",
    "RecurrentGemmaConfig",
    "RecurrentGemmaForCausalLM",
    loss=next_token_uncached,
    **SMALL,
    head_dim=4,
    lru_width=16,
    attention_window_size=8,
    precision=ROUNDED,
    options=(("check", "off"),),  # it keeps its states as attributes, and reads none of them
)
causal(
    "qwen3_next",
    "Qwen3NextConfig",
    "Qwen3NextForCausalLM",
    **SMALL,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=12,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    layer_types=["linear_attention", "full_attention"],
    precision=ROUNDED,
    dtype=ROUNDED,
)
causal("xlnet", "XLNetConfig", "XLNetLMHeadModel", d_model=16, n_layer=2, n_head=2, d_inner=24)
causal(
    "jamba",
    "JambaConfig",
    "JambaForCausalLM",
    **SMALL,
    num_experts=2,
    num_experts_per_tok=1,
    mamba_d_state=4,
    mamba_expand=2,
    mamba_dt_rank=4,
    attn_layer_period=2,
    attn_layer_offset=1,
    use_mamba_kernels=False,
    precision=ROUNDED,
    dtype=ROUNDED,
)


def other(
    name: str,
    config: str,
    model: str,
    precision: torch.dtype = torch.float64,
    loss: Any = to_other,
    batch: Any = lambda: (tokens(), tokens()),
    dtype: torch.dtype = torch.float64,
    unused: bool = False,
    loops: dict[str, str] | None = None,
    **settings: Any,
) -> None:
    """Register a model of one sequence with labels of another, or with a mask of its padding."""

    @entry(name, "transformers", loops)
    def build() -> Model:
        import transformers

        defaults = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        made = getattr(transformers, config)(**defaults | settings)
        module = getattr(transformers, model)(made).to(dtype).eval()
        return Model(module, loss, batch(), precision=precision, unused=unused)


ENCODER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
PADDED = dict(loss=masked, batch=lambda: (tokens(), padding()))


def clause(module: nn.Module, ids: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """A sequence's class."""
    return module(input_ids=ids[None], labels=label[None]).loss


CLASSES = dict(loss=clause, batch=lambda: (tokens(), torch.randint(2, (SAMPLES,))))

other("bert", "BertConfig", "BertForMaskedLM", **ENCODER)
other("bert_padded", "BertConfig", "BertForMaskedLM", **ENCODER, **PADDED)
other("bert_classifier", "BertConfig", "BertForSequenceClassification", **ENCODER, **CLASSES)
other("bert_eager", "BertConfig", "BertForMaskedLM", **ENCODER, attn_implementation="eager")
other("roberta", "RobertaConfig", "RobertaForMaskedLM", **ENCODER)
other("roberta_padded", "RobertaConfig", "RobertaForMaskedLM", **ENCODER, **PADDED)
other(
    "distilbert",
    "DistilBertConfig",
    "DistilBertForMaskedLM",
    dim=16,
    hidden_dim=24,
    n_layers=2,
    n_heads=2,
    max_position_embeddings=32,
)
other("albert", "AlbertConfig", "AlbertForMaskedLM", **ENCODER, embedding_size=8)
other("electra", "ElectraConfig", "ElectraForMaskedLM", **ENCODER, embedding_size=8)
other(
    "deberta",
    "DebertaV2Config",
    "DebertaV2ForMaskedLM",
    **ENCODER,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    precision=ROUNDED,
)
other(
    "modernbert",
    "ModernBertConfig",
    "ModernBertForMaskedLM",
    **ENCODER,
    global_attn_every_n_layers=2,
    local_attention=4,
    cls_token_id=0,
    sep_token_id=1,
    precision=ROUNDED,
)
other(
    "convbert",
    "ConvBertConfig",
    "ConvBertForMaskedLM",
    **ENCODER,
    embedding_size=8,
    conv_kernel_size=3,
)
other("fnet", "FNetConfig", "FNetForMaskedLM", **ENCODER)
other(
    "mobilebert",
    "MobileBertConfig",
    "MobileBertForMaskedLM",
    **ENCODER,
    embedding_size=8,
    intra_bottleneck_size=8,
    true_hidden_size=8,
)
other(
    "longformer",
    "LongformerConfig",
    "LongformerForMaskedLM",
    **ENCODER,
    attention_window=4,
    sep_token_id=1,
    batch=lambda: (tokens(8), tokens(8)),
)
other(
    "nystromformer",
    "NystromformerConfig",
    "NystromformerForMaskedLM",
    **ENCODER,
    segment_means_seq_len=8,
    num_landmarks=4,
    batch=lambda: (tokens(8), tokens(8)),
)
other("big_bird", "BigBirdConfig", "BigBirdForMaskedLM", **ENCODER)
other("roformer", "RoFormerConfig", "RoFormerForMaskedLM", **ENCODER)
other(
    "squeezebert",
    "SqueezeBertConfig",
    "SqueezeBertForMaskedLM",
    **ENCODER,
    embedding_size=16,
    q_groups=2,
    k_groups=2,
    v_groups=2,
    post_attention_groups=1,
    intermediate_groups=2,
    output_groups=2,
)
other(
    "funnel",
    "FunnelConfig",
    "FunnelForMaskedLM",
    block_sizes=[1, 1],
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=24,
    num_decoder_layers=1,
)
T5 = dict(
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=2,
)
other("t5", "T5Config", "T5ForConditionalGeneration", **T5)
other("mt5", "MT5Config", "MT5ForConditionalGeneration", **T5)
other(
    "switch_transformers",
    "SwitchTransformersConfig",
    "SwitchTransformersForConditionalGeneration",
    **T5,
    num_experts=3,
    unused=True,
    loops={"the function itself": "each sample uses experts of its own, and few go one way"},
    dtype=ROUNDED,
    precision=ROUNDED,
)
PAIR = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    decoder_start_token_id=2,
)
other("bart", "BartConfig", "BartForConditionalGeneration", **PAIR)
other("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", **PAIR)
other("marian", "MarianConfig", "MarianMTModel", **PAIR)
other("m2m_100", "M2M100Config", "M2M100ForConditionalGeneration", **PAIR)
