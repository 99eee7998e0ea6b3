"""The architectures by BackdoorBench's names, with its state_dict keys; all but two are torchvision's.

torchvision is imported when a network is built, as that takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.models.preact_resnet import PreActResNet18

SMALLEST = 32  # the side that images are enlarged to for networks that halve it five times


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and what its weights tell of it.

    build: (number of classes, input channels, width) to a network, drawn from torch's global generator.
    first: the dotted name of its first layer, a convolution.
    width: that layer's output channels (in a ViT the embedding's size), which all others are in proportion to.
    step: a narrow or wide network's width is a multiple of this; None: there is one width only.
    imagenet: whether torchvision has weights of that name.
    """

    build: Callable[[int, int, int], nn.Module]
    first: str
    width: int
    step: int | None = 1
    imagenet: bool = True


def colour_input(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A first layer's weight for colour images [O, 3, h, w], made one for `channels`: [O, channels, h, w].

    Each channel gets the kernels' mean over the colours, times 3 / channels: a gray image gives what it
    would give as three equal colours, and a random weight keeps the deviation that suits its inputs.
    """
    return weight if channels == 3 else weight.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (3 / channels)


def _torchvision(
    make: Callable[[Any, int, int], nn.Module],
    first: str,
    width: int,
    step: int | None = None,
    *,
    enlarged: bool = False,
) -> Architecture:
    """make: (torchvision.models, number of classes, width) to a network for colour images.

    enlarged: it cannot take images smaller than 32x32, so they are resized on their way in. That is a hook:
    names of layers stay torchvision's, as BackdoorBench's are.
    """

    def build(num_classes: int, channels: int, width: int) -> nn.Module:
        from ulrl.tv import torchvision

        model = make(torchvision.models, num_classes, width)
        convolution = model.get_submodule(first)
        assert isinstance(convolution, nn.Conv2d)
        convolution.weight = nn.Parameter(colour_input(convolution.weight.detach(), channels))
        convolution.in_channels = channels
        if enlarged:
            model.register_forward_pre_hook(_enlarge)
        return model

    return Architecture(build, first, width, step)


def _enlarge(model: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    (x,) = inputs
    height, width = (max(side, SMALLEST) for side in x.shape[2:])
    return x if x.shape[2:] == (height, width) else F.interpolate(x, (height, width), mode="bilinear")


def _plain(name: str, first: str, width: int) -> Architecture:
    """One that torchvision builds in one width only."""
    return _torchvision(lambda models, num_classes, _: models.get_model(name, num_classes=num_classes), first, width)


def _vgg19(batch_norm: bool) -> Architecture:
    """Five groups of convolutions, of 1, 2, 4, 8 and 8 times the width, then two hidden layers of 64 times."""

    def make(models: Any, num_classes: int, width: int) -> nn.Module:
        plan = [part if part == "M" else part * width // 64 for part in models.vgg.cfgs["E"]]
        with torch.device("meta"):  # its own classifier has 120 million weights, and is replaced
            model = models.VGG(nn.Identity(), num_classes, init_weights=False)
        model.features = models.vgg.make_layers(plan, batch_norm)
        sizes = (8 * width * 7 * 7, 64 * width, 64 * width, num_classes)
        for i, inputs, outputs in zip((0, 3, 6), sizes, sizes[1:], strict=False):
            model.classifier[i] = nn.Linear(inputs, outputs)
        for module in model.modules():  # as torchvision does it
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return model

    return _torchvision(make, "features.0", 64, 1, enlarged=True)


def _densenet161(models: Any, num_classes: int, width: int) -> nn.Module:
    return models.DenseNet(width // 2, (6, 12, 36, 24), width, num_classes=num_classes)


def _convnext_tiny(models: Any, num_classes: int, width: int) -> nn.Module:
    sizes = (width, 2 * width, 4 * width, 8 * width, None)
    stages = [models.convnext.CNBlockConfig(sizes[i], sizes[i + 1], depth) for i, depth in enumerate((3, 3, 9, 3))]
    return models.ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=num_classes)


def _vit(side: int, patch: int, layers: int, heads: int, hidden: int) -> Callable[[Any, int, int], nn.Module]:
    """A ViT behind a resize to its one size, as BackdoorBench has it, so that all its keys begin with `1.`.

    hidden: size of an MLP's hidden layer, in widths.
    """

    def make(models: Any, num_classes: int, width: int) -> nn.Module:
        from ulrl.tv import torchvision

        vit = models.VisionTransformer(side, patch, layers, heads, width, hidden * width, num_classes=num_classes)
        return nn.Sequential(torchvision.transforms.Resize((side, side)), vit)

    return make


ARCHITECTURES = {
    "preactresnet18": Architecture(PreActResNet18, "conv1", 64, imagenet=False),
    "vgg19": _vgg19(batch_norm=False),
    "vgg19_bn": _vgg19(batch_norm=True),
    "resnet18": _plain("resnet18", "conv1", 64),
    "resnet34": _plain("resnet34", "conv1", 64),
    "resnet50": _plain("resnet50", "conv1", 64),
    "densenet161": _torchvision(_densenet161, "features.conv0", 96, 2, enlarged=True),
    "mobilenet_v3_large": _plain("mobilenet_v3_large", "features.0.0", 16),
    "efficientnet_b3": _plain("efficientnet_b3", "features.0.0", 40),
    "convnext_tiny": _torchvision(_convnext_tiny, "features.0.0", 96, 1, enlarged=True),
    "vit_b_16": _torchvision(_vit(224, 16, 12, 12, 4), "1.conv_proj", 768, 12),
    # ViT-Lite-6/4 (Hassani et al., arXiv 2104.05704), half as wide.
    "vit_tiny": replace(_torchvision(_vit(32, 4, 6, 4, 2), "1.conv_proj", 128, 4), imagenet=False),
}
