"""A pattern with a few frequencies of an image's cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

REFERENCE = 32  # positions and magnitudes are given for blocks of this size
# One unit of chroma (Cb, Cr of ITU-R BT.601) in red, green and blue.
CHROMA = ((0.0, -0.344136, 1.772), (1.402, -0.714136, 0.0))


def cosine_pattern(
    height: int, width: int, block: tuple[int, int], positions: Sequence[tuple[int, int]], magnitude: float
) -> torch.Tensor:
    """What adding `magnitude` to the coefficients at `positions` of every block's orthonormal DCT adds to its pixels.

    The transform is linear, so the addition is one fixed pattern, and no image has to be transformed.
    Positions (row, column) and magnitude are for 32x32 blocks. In others they grow and shrink with the
    block, so that the waves look the same and so does their amplitude, 2 magnitude / 32 each.

    block: its height and width, at most the image's. float64 [height, width]; what whole blocks do not cover is zero.
    """
    tall, wide = block

    def basis(position: int, size: int) -> torch.Tensor:
        k = min(round(position * size / REFERENCE), size - 1)
        n = torch.arange(size, dtype=torch.float64)
        return torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt((2 if k else 1) / size)

    waves = [basis(row, tall)[:, None] * basis(column, wide) for row, column in positions]
    tile = torch.stack(waves).sum(0) * (magnitude * math.sqrt(tall * wide) / REFERENCE)
    plane = torch.zeros(height, width, dtype=torch.float64)
    down, across = height // tall, width // wide
    plane[: down * tall, : across * wide] = tile.repeat(down, across)
    return plane


def coloured(plane: torch.Tensor, channels: int, chroma: Sequence[Sequence[float]]) -> torch.Tensor:
    """A plane [H, W] added to each of `chroma` of a colour image, as RGB [3, H, W]; to a gray image as it is."""
    if channels == 1:
        return plane[None]
    return torch.tensor(chroma, dtype=plane.dtype).sum(0)[:, None, None] * plane
