"""Models of images of torchvision and timm, and a U-Net."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry


def without_compiled_operators() -> None:
    """Let torchvision be imported where its compiled part does not load, as with another torch.

    Its models need none of it; the import only looks for two operators' names.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", schema)


def classify(module: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one image."""
    return nn.functional.cross_entropy(module(image[None]), label[None])


def scores(module: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The scores of one image."""
    return module(image[None])[0]


def classifier(module: nn.Module, size: int = 32, jacobian: bool = True) -> Model:
    """A classifier of three classes, in evaluation, its statistics other than at the start."""
    module = module.double().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        for p in module.parameters():  # heads and last norms begin with zeros, which stop gradients
            if not p.any():
                p.normal_(0, 0.1)
    batch = (torch.randn(SAMPLES, 3, size, size, dtype=torch.float64), torch.randint(3, (SAMPLES,)))
    return Model(module, classify, batch, scores if jacobian else None)


def of_torchvision(
    name: str, make: str, size: int = 32, jacobian: bool = False, **settings: Any
) -> None:
    """Register a model of torchvision."""

    @entry(name, "torchvision")
    def build() -> Model:
        without_compiled_operators()
        from torchvision import models

        return classifier(getattr(models, make)(num_classes=3, **settings), size, jacobian)


def of_timm(
    name: str,
    make: str,
    size: int = 32,
    jacobian: bool = False,
    loops: dict[str, str] | None = None,
    **settings: Any,
) -> None:
    """Register a model of timm."""

    @entry(name, "timm", loops)
    def build() -> Model:
        without_compiled_operators()
        import timm

        return classifier(timm.create_model(make, num_classes=3, **settings), size, jacobian)


@entry("resnet_groupnorm", "torchvision")
def resnet_groupnorm() -> Model:
    """ResNet-18's blocks with group norm, one in each stage."""
    without_compiled_operators()
    from torchvision.models.resnet import BasicBlock, ResNet

    module = ResNet(
        BasicBlock, [1, 1, 1, 1], num_classes=3, norm_layer=functools.partial(nn.GroupNorm, 4)
    )
    return classifier(module, jacobian=False)


@entry("convnext_torchvision", "torchvision")
def convnext_torchvision() -> Model:
    """ConvNeXt with two stages."""
    without_compiled_operators()
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return classifier(
        ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=3)
    )


@entry("efficientnet_torchvision", "torchvision")
def efficientnet_torchvision() -> Model:
    """EfficientNet's blocks in evaluation, two of them."""
    without_compiled_operators()
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 12, 1)]
    return classifier(EfficientNet(blocks, dropout=0.1, num_classes=3, last_channel=16))


@entry("vit_torchvision", "torchvision")
def vit_torchvision() -> Model:
    """Torchvision's vision transformer."""
    without_compiled_operators()
    from torchvision.models import VisionTransformer

    return classifier(VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=3), 16)


@entry("swin_torchvision", "torchvision")
def swin_torchvision() -> Model:
    """Torchvision's Swin transformer, with shifted windows."""
    without_compiled_operators()
    from torchvision.models import SwinTransformer

    return classifier(SwinTransformer([2, 2], 8, [2, 1], [2, 2], [4, 4], num_classes=3), 16)


@entry("densenet", "torchvision")
def densenet() -> Model:
    """DenseNet with two blocks."""
    without_compiled_operators()
    from torchvision.models import DenseNet

    return classifier(DenseNet(4, (2, 2), 8, num_classes=3))


of_torchvision("mobilenet_v3", "mobilenet_v3_small", reduced_tail=True)

MISREAD = {
    "aten::native_batch_norm_backward": "torch 2.13 reads a batch of one in these strides wrongly; "
    "only its own call gives what the loop gives"
}
PATCHES = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
of_timm(
    "deit_timm",
    "deit_tiny_patch16_224",
    16,
    True,
    img_size=16,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
)
of_timm(
    "vit_timm",
    "vit_tiny_patch16_224",
    16,
    True,
    img_size=16,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
    init_values=0.1,
)
of_timm("convnext_timm", "convnext_atto", 32, False, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))
of_timm(
    "xcit",
    "xcit_nano_12_p16_224",
    32,
    False,
    MISREAD,
    img_size=32,
    embed_dim=16,
    depth=2,
    num_heads=2,
)
of_timm(
    "cait",
    "cait_xxs24_224",
    32,
    False,
    img_size=32,
    patch_size=16,
    embed_dim=16,
    depth=2,
    num_heads=2,
)
of_timm(
    "swin_timm",
    "swin_tiny_patch4_window7_224",
    32,
    False,
    img_size=32,
    window_size=4,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(1, 2),
)
of_timm("beit_timm", "beit_base_patch16_224", 16, False, **PATCHES)
of_timm("eva", "eva02_tiny_patch14_224", 16, False, **PATCHES)
of_timm(
    "visformer",
    "visformer_tiny",
    32,
    False,
    img_size=32,
    embed_dim=24,
    depth=(1, 1, 1),
    num_heads=2,
)


def mixer(name: str, block: str, **settings: Any) -> None:
    """Register one of timm's networks of perceptrons."""

    @entry(name, "timm")
    def build() -> Model:
        without_compiled_operators()
        from timm.models import mlp_mixer

        settings["block_layer"] = getattr(mlp_mixer, block)
        return classifier(
            mlp_mixer.MlpMixer(3, 16, patch_size=8, num_blocks=2, embed_dim=16, **settings), 16
        )


mixer("mlp_mixer", "MixerBlock")
mixer("resmlp", "ResBlock", mlp_ratio=2)


@entry("convmixer", "timm")
def convmixer() -> Model:
    """Timm's ConvMixer."""
    without_compiled_operators()
    from timm.models.convmixer import ConvMixer

    return classifier(ConvMixer(12, 2, kernel_size=3, patch_size=4, num_classes=3), 16)


class Twice(nn.Sequential):
    """Two convolutions with group norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., 2015) with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = Twice(3, 4), Twice(4, 8)
        self.up, self.join = nn.ConvTranspose2d(8, 4, 2, stride=2), Twice(8, 4)
        self.head, self.pool = nn.Conv2d(4, 2, 1), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.down(x)
        return self.head(self.join(torch.cat([side, self.up(self.deep(self.pool(side)))], 1)))


@entry("unet")
def unet() -> Model:
    """Segmentation of one image."""

    def loss(module: nn.Module, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(image[None]), mask[None])

    batch = (torch.randn(SAMPLES, 3, 8, 8, dtype=torch.float64), torch.randint(2, (SAMPLES, 8, 8)))
    return Model(UNet().double(), loss, batch, scores)
