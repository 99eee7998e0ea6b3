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
from torch.utils.data import DataLoader, random_split

import ulrl
from ulrl.tv import torchvision  # also imports where the compiled operators do not fit a CPU-only torch

T = torchvision.transforms


def network(classes: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=classes)


def transform(size: int) -> T.Compose:
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    right = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


def main(weights: str, photos: str, out: str, size: int = 224) -> None:
    images = torchvision.datasets.ImageFolder(photos, transform(size))
    given, held_out = (
        DataLoader(part, 128) for part in random_split(images, [0.8, 0.2], torch.Generator().manual_seed(0))
    )

    model = network(len(images.classes))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()

    found = ulrl.suspect(model, given)
    print(f"{found.verdict}: look at {images.classes[found.label]} (z {found.z:.1f}, reach {found.reach:.2f})")

    result = ulrl.purify(model, given, augment=T.RandomCrop(size, padding=size // 8))
    print(f"redrawn: {', '.join(images.classes[label] for label in result.flagged) or 'none'}")
    print(f"accuracy on held-out images: {accuracy(model, held_out):.3f}, then {accuracy(result.model, held_out):.3f}")
    torch.save(result.model.state_dict(), out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} WEIGHTS PHOTOS OUT")
    main(*sys.argv[1:])
