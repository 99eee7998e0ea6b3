"""Small image-to-image networks that attacks train, and how their weights are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.seeds import global_stream


class EncoderDecoder(nn.Module):
    """Convolutions down to an eighth of the image and up again: [B, inputs, H, W] to [B, outputs, H, W].

    `base` channels at full size, doubled at each of two further levels. The outputs are not squashed.
    """

    def __init__(self, inputs: int, outputs: int, base: int = 32) -> None:
        super().__init__()
        widths = (base, 2 * base, 4 * base)
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((inputs, *widths), widths, strict=False))
        self.middle = _block(widths[-1], widths[-1])
        self.up = nn.ModuleList(_block(a, b) for a, b in zip(widths[::-1], (*widths[-2::-1], base), strict=False))
        self.out = nn.Conv2d(base, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = []
        for block in self.down:
            x = block(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for block, size in zip(self.up, reversed(sizes), strict=True):
            x = block(F.interpolate(x, size, mode="bilinear"))
        return self.out(x)


def centred(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 255], uint8 or float, to float32 in [-1, 1]: what these networks see, whatever the data set."""
    return pixels.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1


def uncentred(images: torch.Tensor) -> torch.Tensor:
    """The way back, not cut."""
    return (images + 1) * 127.5


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


def fresh(inputs: int, outputs: int, base: int, seed: int, stream: str, device: torch.device) -> EncoderDecoder:
    """An untrained network, initialised from a stream."""
    with global_stream(seed, stream):
        return EncoderDecoder(inputs, outputs, base).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def packed(name: str, network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights as tensors named `<name>.<weight>`, on the CPU."""
    return {f"{name}.{key}": value.detach().cpu() for key, value in network.state_dict().items()}


def unpacked(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that `packed` put there."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def restored(name: str, tensors: Mapping[str, torch.Tensor], device: torch.device) -> EncoderDecoder:
    """The network that `packed` put there, its size read off the weights; in eval mode and frozen."""
    state = unpacked(name, tensors)
    base, inputs = state["down.0.0.weight"].shape[:2]
    network = EncoderDecoder(inputs, len(state["out.weight"]), base)
    network.load_state_dict(state)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
