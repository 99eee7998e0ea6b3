"""A trigger image that the user names."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ulrl.errors import UserError
from ulrl.files import find_input


def read_image(
    path: str, flag: str, channels: int, height: int, width: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> torch.Tensor:
    """The image at `path`, resized: uint8 [channels, height, width].

    Raises:
        UserError: naming `flag`, when there is no readable image.
    """
    file = find_input(path)
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L").resize((width, height), resample))
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{flag}: cannot read the image {file} ({error})") from None
    return torch.from_numpy(pixels.copy()).reshape(height, width, channels).permute(2, 0, 1)
