"""Models of images, sound and series of the transformers package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry
from tests.zoo.language import WORDS, tokens


def image_class(module: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The model's own loss of one image."""
    return module(pixel_values=image[None], labels=label[None]).loss


def image_logits(module: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The scores of one image."""
    return module(pixel_values=image[None]).logits[0]


def images(size: int = 16, channels: int = 3) -> torch.Tensor:
    """Images of noise."""
    return torch.randn(SAMPLES, channels, size, size, dtype=torch.float64)


def classifier(
    name: str,
    config: str,
    model: str,
    size: int = 16,
    precision: torch.dtype = torch.float64,
    jacobian: bool = True,
    **settings: Any,
) -> None:
    """Register a classifier of images."""

    @entry(name, "transformers")
    def build() -> Model:
        import transformers

        made = getattr(transformers, config)(**{"num_labels": 3} | settings)
        module = getattr(transformers, model)(made).double().eval()
        batch = (images(size), torch.randint(3, (SAMPLES,)))
        return Model(module, image_class, batch, image_logits if jacobian else None, precision)


PATCHES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
classifier("vit", "ViTConfig", "ViTForImageClassification", **PATCHES)
classifier("deit", "DeiTConfig", "DeiTForImageClassification", **PATCHES)
classifier(
    "beit", "BeitConfig", "BeitForImageClassification", **PATCHES, use_relative_position_bias=True
)
classifier("dinov2", "Dinov2Config", "Dinov2ForImageClassification", **PATCHES, mlp_ratio=2)
classifier(
    "swin",
    "SwinConfig",
    "SwinForImageClassification",
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=4,
)
classifier(
    "swinv2",
    "Swinv2Config",
    "Swinv2ForImageClassification",
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=4,
)
classifier(
    "convnext",
    "ConvNextConfig",
    "ConvNextForImageClassification",
    image_size=16,
    patch_size=2,
    hidden_sizes=[8, 12],
    depths=[1, 1],
    num_stages=2,
)
classifier(
    "convnextv2",
    "ConvNextV2Config",
    "ConvNextV2ForImageClassification",
    image_size=16,
    patch_size=2,
    hidden_sizes=[8, 12],
    depths=[1, 1],
    num_stages=2,
)
classifier(
    "segformer",
    "SegformerConfig",
    "SegformerForImageClassification",
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[8, 12],
    patch_sizes=[3, 3],
    strides=[2, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=8,
)
classifier(
    "poolformer",
    "PoolFormerConfig",
    "PoolFormerForImageClassification",
    hidden_sizes=[8, 12],
    depths=[1, 1],
    patch_sizes=[3, 3],
    strides=[2, 2],
    padding=[1, 1],
    num_encoder_blocks=2,
)
classifier(
    "mobilevit",
    "MobileViTConfig",
    "MobileViTForImageClassification",
    jacobian=False,
    size=32,
    image_size=32,
    hidden_sizes=[8, 12, 16],
    neck_hidden_sizes=[4, 8, 8, 8, 8, 8, 8],
    num_attention_heads=2,
)
classifier(
    "resnet_hf",
    "ResNetConfig",
    "ResNetForImageClassification",
    size=32,
    embedding_size=8,
    hidden_sizes=[8, 12],
    depths=[1, 1],
    layer_type="basic",
)
classifier(
    "regnet",
    "RegNetConfig",
    "RegNetForImageClassification",
    size=32,
    embedding_size=8,
    hidden_sizes=[8, 12],
    depths=[1, 1],
    groups_width=4,
)
classifier(
    "efficientnet_hf",
    "EfficientNetConfig",
    "EfficientNetForImageClassification",
    jacobian=False,
    size=32,
    image_size=32,
    width_coefficient=0.25,
    depth_coefficient=0.2,
    hidden_dim=320,
)
classifier(
    "bit",
    "BitConfig",
    "BitForImageClassification",
    size=32,
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    num_groups=4,
)
classifier(
    "pvt_v2",
    "PvtV2Config",
    "PvtV2ForImageClassification",
    jacobian=False,
    size=32,
    image_size=32,
    hidden_sizes=[8, 8, 8, 8],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    mlp_ratios=[1, 1, 1, 1],
)
classifier(
    "perceiver",
    "PerceiverConfig",
    "PerceiverForImageClassificationConvProcessing",
    jacobian=False,
    size=32,
    num_latents=4,
    d_latents=16,
    d_model=322,
    num_blocks=1,
    num_self_attends_per_block=1,
    num_self_attention_heads=2,
    num_cross_attention_heads=2,
    image_size=32,
)


@entry("clip", "transformers")
def clip() -> Model:
    """The match of one caption and one image against a second caption."""
    import transformers

    half = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
    )
    config = transformers.CLIPConfig(
        text_config=half | dict(vocab_size=WORDS, max_position_embeddings=16, eos_token_id=1, bos_token_id=0, pad_token_id=2),
        vision_config=half | dict(image_size=16, patch_size=8), projection_dim=8,
    )  # fmt: skip
    module = transformers.CLIPModel(config).double().eval()

    def loss(module: nn.Module, image: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        scores = module(input_ids=captions, pixel_values=image[None]).logits_per_image[0]
        return nn.functional.cross_entropy(scores, torch.tensor(0))

    captions = torch.stack([tokens(), tokens()], 1)
    captions[..., -1] = 1
    return Model(module, loss, (images(), captions))


@entry("siglip", "transformers")
def siglip() -> Model:
    """SigLIP's own loss of one image and one caption."""
    import transformers

    half = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=half | dict(vocab_size=WORDS, max_position_embeddings=16, projection_size=16, eos_token_id=1, bos_token_id=0, pad_token_id=2),
        vision_config=half | dict(image_size=16, patch_size=8),
    )  # fmt: skip
    module = transformers.SiglipModel(config).double().eval()

    def loss(module: nn.Module, image: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        return module(input_ids=caption[None], pixel_values=image[None], return_loss=True).loss

    return Model(module, loss, (images(), tokens()))


@entry("vit_mae", "transformers")
def vit_mae() -> Model:
    """A masked autoencoder whose masks come from noise that is passed in."""
    import transformers

    config = transformers.ViTMAEConfig(
        **PATCHES,
        decoder_hidden_size=16,
        decoder_intermediate_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        mask_ratio=0.5,
    )
    module = transformers.ViTMAEForPreTraining(config).double().eval()

    def loss(module: nn.Module, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return module(pixel_values=image[None], noise=noise[None]).loss

    return Model(module, loss, (images(), torch.rand(SAMPLES, 4, dtype=torch.float64)))


@entry("whisper", "transformers")
def whisper() -> Model:
    """Words from a spectrogram."""
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8, max_target_positions=16, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    module = transformers.WhisperForConditionalGeneration(config).double().eval()

    def loss(module: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return module(input_features=features[None], labels=labels[None]).loss

    return Model(module, loss, (torch.randn(SAMPLES, 8, 16, dtype=torch.float64), tokens()))


def sounds(length: int = 120) -> torch.Tensor:
    """Waves of noise."""
    return torch.randn(SAMPLES, length, dtype=torch.float64)


SOUND = dict(
    vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, conv_dim=(8, 8), conv_kernel=(5, 3),
    conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=2,
    ctc_loss_reduction="mean",
)  # fmt: skip


def speech(name: str, config: str, model: str, labelled: str = "words", **settings: Any) -> None:
    """Register a model of sound, for words by CTC or for a class."""

    @entry(name, "transformers")
    def build() -> Model:
        import transformers

        module = (
            getattr(transformers, model)(getattr(transformers, config)(**SOUND | settings))
            .double()
            .eval()
        )

        def loss(module: nn.Module, sound: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return module(input_values=sound[None], labels=labels[None]).loss

        def scores(module: nn.Module, sound: torch.Tensor) -> torch.Tensor:
            return module(input_values=sound[None]).logits[0]

        labels = tokens(3) if labelled == "words" else torch.randint(2, (SAMPLES,))
        return Model(module, loss, (sounds(), labels), scores)


speech("wav2vec2_ctc", "Wav2Vec2Config", "Wav2Vec2ForCTC")
speech(
    "wav2vec2",
    "Wav2Vec2Config",
    "Wav2Vec2ForSequenceClassification",
    "class",
    num_labels=2,
    classifier_proj_size=8,
)
speech(
    "wav2vec2_stable",
    "Wav2Vec2Config",
    "Wav2Vec2ForSequenceClassification",
    "class",
    num_labels=2,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
)
speech("hubert", "HubertConfig", "HubertForSequenceClassification", "class", num_labels=2)
speech("wavlm", "WavLMConfig", "WavLMForSequenceClassification", "class", num_labels=2)


@entry("audio_spectrogram", "transformers")
def audio_spectrogram() -> Model:
    """The audio spectrogram transformer."""
    import transformers

    config = transformers.ASTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=16,
        num_mel_bins=8,
        num_labels=3,
    )
    module = transformers.ASTForAudioClassification(config).double().eval()

    def loss(module: nn.Module, sound: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return module(input_values=sound[None], labels=label[None]).loss

    return Model(
        module,
        loss,
        (torch.randn(SAMPLES, 16, 8, dtype=torch.float64), torch.randint(3, (SAMPLES,))),
        lambda m, x: m(input_values=x[None]).logits[0],
    )


def forecaster(module: nn.Module) -> Model:
    """A model that continues series of two channels by four steps."""

    def loss(module: nn.Module, past: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        return module(past_values=past[None], future_values=future[None]).loss

    series = torch.randn(SAMPLES, 20, 2, dtype=torch.float64).cumsum(1)
    return Model(
        module.double().eval(),
        loss,
        (series[:, :16], series[:, 16:]),
        lambda m, x: m(past_values=x[None]).prediction_outputs[0],
    )


WINDOW = dict(
    num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4
)


@entry("patchtst", "transformers")
def patchtst() -> Model:
    """PatchTST, of a series of two channels."""
    import transformers

    config = transformers.PatchTSTConfig(
        **WINDOW,
        d_model=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        scaling="std",
    )
    return forecaster(transformers.PatchTSTForPrediction(config))


@entry("patchtsmixer", "transformers")
def patchtsmixer() -> Model:
    """PatchTSMixer, of a series of two channels."""
    import transformers

    config = transformers.PatchTSMixerConfig(
        **WINDOW,
        d_model=8,
        num_layers=2,
        scaling="mean",
        gated_attn=True,
    )
    return forecaster(transformers.PatchTSMixerForPrediction(config))
