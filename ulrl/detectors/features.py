"""What the detectors share that look at the features of each class: those that the classifier head is given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.models.head import find_head
from ulrl.training import head_inputs

FEWEST = 4  # images of a class that can be told apart at all


def features_by_class(
    model: nn.Module, suspects: ImageSet, amp: bool
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Per label with at least FEWEST images: the class, where its images are, int64 [n], and their features, [n, D]."""
    _, head = find_head(model, suspects.spec.num_classes)
    features = head_inputs(model, head, suspects, amp)
    for k in range(suspects.spec.num_classes):
        at = (suspects.labels == k).nonzero().flatten()
        if len(at) >= FEWEST:
            yield k, at, features[at]
