"""Repair a torchvision model with a folder of clean images, from Python:

    python examples/purify_folder.py weights.pt photos/ repaired.pt

photos/ holds a subfolder per class, as for torchvision's ImageFolder. Adapt `network` and `transform` to how the
model was trained; a timm model is `timm.create_model("resnet18", num_classes=classes)`. Without code of your own,
`ulrl purify` does the same: see the README.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

import ulrl
from ulrl.tv import torchvision  # also imports where the compiled operators do not fit a CPU-only torch

T = torchvision.transforms


def network(classes: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=classes)


def transform(size: int) -> T.Compose:
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def main(weights: str, photos: str, out: str, size: int = 224) -> None:
    images = torchvision.datasets.ImageFolder(photos, transform(size))
    given = DataLoader(images, 128)

    model = network(len(images.classes))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()

    found = ulrl.suspect(model, given, progress=True)
    print(found)
    if found.label is not None:
        print(f"class {found.label} is {images.classes[found.label]}")

    # A fifth of the images is held out, and accuracy measured on them before and after.
    result = ulrl.purify(model, given, augment=T.RandomCrop(size, padding=size // 8), progress=True)
    print(result)
    print(f"redrawn: {', '.join(images.classes[label] for label in result.flagged) or 'none'}")
    result.save(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} WEIGHTS PHOTOS OUT")
    main(*sys.argv[1:])
