"""Starting from torchvision's ImageNet weights: those of its cache, else downloaded."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import torch
from torch import nn

from ulrl.data.datasets import DOWNLOAD_TIMEOUT
from ulrl.errors import UserError
from ulrl.models.architectures import Architecture, colour_input
from ulrl.models.head import find_head


def load_imagenet(model: nn.Module, name: str, architecture: Architecture, num_classes: int) -> None:
    """Give a new network all of torchvision's weights (IMAGENET1K_V1) but the head, which stays as it is.

    The first layer is adapted to the network's input channels, see `colour_input`.

    Raises:
        UserError: the weights are neither cached nor to be had.
    """
    head, first = find_head(model, num_classes)[0], f"{architecture.first}.weight"
    prefix = "1." if isinstance(model, nn.Sequential) else ""  # a ViT stands behind its resize
    # DenseNet's file has the names of an older torchvision (norm.1 for norm1).
    weights = {prefix + re.sub(r"(norm|conv)\.([12])\.", r"\1\2.", k): w for k, w in _weights(name).items()}
    weights |= {k: w for k, w in model.state_dict().items() if k in (f"{head}.weight", f"{head}.bias")}
    weights[first] = colour_input(weights[first], model.get_parameter(first).shape[1])
    model.load_state_dict(weights, strict=True)


def _weights(name: str) -> dict[str, torch.Tensor]:
    from ulrl.tv import torchvision

    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except Exception as error:  # of the network, the disk, or whatever torch makes of a damaged file
        reason = " ".join(str(error).split())
        problem = "is damaged" if file.exists() else "is missing, and the download failed"
        raise UserError(
            f"--pretrained: {file} {problem} ({reason}); put {weights.url} there, or leave --pretrained out"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
