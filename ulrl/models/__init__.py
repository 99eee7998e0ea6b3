"""Building and loading a network by its architecture's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ulrl.errors import UserError
from ulrl.models.architectures import ARCHITECTURES, Architecture
from ulrl.models.imagenet import load_imagenet
from ulrl.registry import nearest
from ulrl.seeds import global_stream


def build_model(
    name: str,
    num_classes: int,
    channels: int = 3,
    width: int | None = None,
    *,
    pretrained: bool = False,
    seed: int = 0,
    stream: str = "initialisation",
) -> nn.Module:
    """A fresh network on the CPU, in channels-last memory, initialised from a stream of `seed`.

    width: see `Architecture`; the standard network's when not given. pretrained: all but the head starts from
    torchvision's ImageNet weights.

    Raises:
        UserError: as `architecture_of`.
    """
    architecture, width = architecture_of(name, width, pretrained=pretrained)
    with global_stream(seed, stream):
        model = architecture.build(num_classes, channels, width)
    if pretrained:
        load_imagenet(model, name, architecture, num_classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def architecture_of(name: str, width: int | None = None, *, pretrained: bool = False) -> tuple[Architecture, int]:
    """What `build_model` builds from, and how wide: to be asked before any work.

    Raises:
        UserError: unknown name, a width that it cannot have, weights that there are not.
    """
    architecture = _architecture(name)
    if width is None:
        width = architecture.width
    elif width != architecture.width and architecture.step is None:
        raise UserError(f"--width {width}: {name} comes in one width only; leave it out")
    elif width % (architecture.step or 1):
        raise UserError(f"--width {width}: {name} takes multiples of {architecture.step}")
    if pretrained and not (architecture.imagenet and width == architecture.width):
        known = ", ".join(k for k, a in ARCHITECTURES.items() if a.imagenet)
        raise UserError(f"--pretrained: there are no weights for {name} of width {width}; there are for {known}, "
                        "without --width")  # fmt: skip
    return architecture, width


def load_model(
    name: str, num_classes: int, state_dict: Mapping[str, torch.Tensor], channels: int | None = None
) -> nn.Module:
    """A network with the given weights, copied and loaded strictly; its width and input channels are read off them.

    The weights may be a stranger's, so their shapes are compared before memory is taken for a network.
    Nothing is downloaded.

    Raises:
        UserError: unknown name, weights of another architecture, or not of `channels` where those are given.
    """
    architecture = _architecture(name)
    key = f"{architecture.first}.weight"
    first = state_dict.get(key)
    if first is None or first.ndim != 4:
        raise UserError(f"the weights are not those of {name}: no convolution named {key!r}")
    if channels is not None and first.shape[1] != channels:
        raise UserError(f"the weights are for images of {first.shape[1]} channels, not of {channels}")
    narrow = architecture.step is not None and first.shape[0] > 0 and first.shape[0] % architecture.step == 0
    width = first.shape[0] if narrow else architecture.width
    try:
        with torch.device("meta"):
            model = architecture.build(num_classes, first.shape[1], width)
    except RuntimeError as error:  # sizes beyond all numbers
        raise UserError(f"the weights do not fit {name}: see {key} of shape {tuple(first.shape)} ({error})") from None
    expected = model.state_dict()
    wrong = [k for k in {**expected, **state_dict} if _shape(expected.get(k)) != _shape(state_dict.get(k))]
    if wrong:
        raise UserError(f"the weights do not fit {name} with {num_classes} classes: see {', '.join(sorted(wrong)[:4])}")
    # In place of the meta tensors, so that no random weights are drawn only to be replaced.
    copies = {k: w.detach().to("cpu", expected[k].dtype, copy=True) for k, w in state_dict.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise UserError(f"unknown model {name!r}{nearest(name, list(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def _shape(weight: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)
