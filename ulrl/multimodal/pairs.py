"""Pairs of image and caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ulrl.data.imageset import ImageSet
from ulrl.multimodal.captions import tokenise


@dataclass(frozen=True)
class Pairs:
    """N images, each with a caption as words' numbers.

    data: whose labels are the pairs' own places, so that a batch of it finds its captions. tokens: int64 [N, LENGTH] on
    the same device.
    """

    data: ImageSet
    tokens: torch.Tensor

    @classmethod
    def of(cls, data: ImageSet, captions: Sequence[str]) -> Pairs:
        return cls.placed(data, tokenise(captions).to(data.device))

    @classmethod
    def placed(cls, data: ImageSet, tokens: torch.Tensor) -> Pairs:
        return cls(replace(data, labels=torch.arange(len(data), device=data.device)), tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, indices: torch.Tensor) -> Pairs:
        """The pairs at `indices` (int64 [n]), in that order."""
        return self.placed(self.data.subset(indices), self.tokens[indices.to(self.tokens.device)])
