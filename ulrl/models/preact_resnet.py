"""PreAct-ResNet18 (He et al., arXiv 1603.05027) for small images, with BackdoorBench's state_dict keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice; the shortcut, where there is one, starts after the first BN-ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(_Pointwise(channels_in, channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + kept


class _Pointwise(nn.Conv2d):
    """A convolution of 1x1. Of a narrow net it takes the pixels of its stride first, which gives the same.

    On a CPU the gradient of such a weight with a stride, of fewer than 16 input channels that are last in memory, is
    written past its buffer, which crashes or is wrong (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_channels < 16 and x.device.type == "cpu":
            return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)
        return super().forward(x)


class PreActResNet18(nn.Module):
    """[B, channels, H, W] normalised images to [B, num_classes] logits.

    `width` is the first layer's number of channels; 64 is the standard net, 16 one for a laptop's CPU.
    There is no BatchNorm after the last block: BackdoorBench's net has none.
    """

    def __init__(self, num_classes: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(channels_in, channels, stride), PreActBlock(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.avgpool(out).flatten(1))
