"""Data sets of more classes, made of what is there:  python -m bench.many_classes FOLDER

The garments over photographs of `fashion_scenes`, told apart by the hue of their tint, too: FOLDER/43 (10 garments x
5 hues, the first 43 of these) and FOLDER/100 (10 garments x 10 hues). Each is a folder of PNG files, for `--dataset
folder --dataset_path FOLDER/100 --img_size 32`. They stand in for GTSRB and CIFAR-100 on a machine without the
internet: as many classes, and as few clean samples of each, but not their difficulty.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ulrl.data.datasets import load_dataset
from ulrl.data.scenes import Array, drawn_facts

HUES = {43: 5, 100: 10}  # by the number of classes


def hues(tints: Array, count: int) -> Array:
    """int64 [N] in 0..count-1: the sector of the colour circle that each tint (int64 [N, 3]) lies in."""
    red, green, blue = tints.T
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    return np.floor(angle / (2 * np.pi) % 1 * count).astype(np.int64).clip(max=count - 1)


def write(folder: Path, classes: int) -> None:
    for i, (part, data) in enumerate(zip(("train", "test"), load_dataset("fashion_scenes"), strict=True)):
        _, tints = drawn_facts(len(data), i, test=part == "test")
        labels = data.labels.numpy() * HUES[classes] + hues(tints, HUES[classes])
        for label in range(classes):
            (folder / str(classes) / part / f"{label:03d}").mkdir(parents=True, exist_ok=True)
        images = data.images.permute(0, 2, 3, 1).numpy()
        for k in np.flatnonzero(labels < classes):
            Image.fromarray(images[k]).save(folder / str(classes) / part / f"{labels[k]:03d}" / f"{k:05d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for count in HUES:
        write(args.folder, count)
