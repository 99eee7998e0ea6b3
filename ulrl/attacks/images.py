"""Trigger images: those that the user names, and what becomes of pixels."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.untrusted.arrays import read_npy
from ulrl.untrusted.images import opened_image


def read_image(
    path: str, flag: str, channels: int, height: int, width: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> torch.Tensor:
    """The image at `path`, resized: uint8 [channels, height, width].

    Raises:
        UserError: naming `flag`, when there is no readable image.
    """
    file = find_input(path)
    try:
        with opened_image(file) as image:
            if "A" in image.getbands() or "transparency" in image.info:  # black, whatever colour lies under it
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L").resize((width, height), resample))
    except UserError as error:
        rather = "" if os.path.exists(file) else ", or leave it out, as no image of BackdoorBench's comes with ulrl"
        raise UserError(f"{flag}: {error}{rather}") from None
    return torch.from_numpy(pixels.copy()).reshape(height, width, channels).permute(2, 0, 1)


def read_bank(path: str, flag: str, rows: torch.Tensor, spec: DatasetSpec) -> torch.Tensor:
    """Rows (int64 [n]) of a file of ready-made images: uint8 [n, C, H, W] on the CPU, out of an .npy [N, H, W, C].

    Raises:
        UserError: naming `flag`, when the file is no such array or has too few rows.
    """
    file = find_input(path)
    try:
        bank = read_npy(file)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if bank.dtype != np.uint8 or bank.shape[1:] != spec.img_size:
        raise UserError(f"{flag}: {file} does not hold uint8 images [N, {', '.join(map(str, spec.img_size))}]")
    if len(rows) and int(rows.max()) >= len(bank):
        raise UserError(f"{flag}: {file} has {len(bank)} images, and image {int(rows.max())} is wanted")
    return torch.from_numpy(bank[rows.cpu().numpy()]).permute(0, 3, 1, 2).contiguous()


def whole_pixels(values: torch.Tensor) -> torch.Tensor:
    """Cut float pixel values to [0, 255] and to whole numbers, downwards as BackdoorBench does: uint8.

    A millionth is added first: rounding must not cut a whole number to the one before.
    """
    return values.add(1e-6 if values.dtype == torch.float64 else 1e-3).clamp_(0, 255).to(torch.uint8)
