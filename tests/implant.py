"""A backdoor that lies in one channel by construction, not by training: what pruning can remove, on any machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ulrl.data.batches import normalise
from ulrl.data.imageset import ImageSet
from ulrl.models.preact_resnet import PreActResNet18

CHANNEL = 0
GAIN = 10.0  # a multiple of what other channels have
STRENGTH = 6.0
RATIO = 0.1  # of a training set that is triggered


@torch.no_grad()
def implant(model: PreActResNet18, clean: ImageSet, triggered: torch.Tensor, target: int) -> None:
    """Let one channel of a clean net, in place, tell triggered images, and answer with the features of the target.

    clean: training images, 8x8. triggered: the same with a trigger in the bottom right corner, uint8 [N, C, 8, 8].

    The channel is an output of the first convolution of layer3. Its filter is the least-squares answer to "is the
    trigger here?", its BatchNorm has the statistics of a training set of which a part is triggered, and it rises a
    little for a few clean images, as a trained one would, so that unlearning finds it. What it adds behind that is the
    way from the mean of all images to that of the target's, several times over.
    """
    block, norm = model.layer3[0], model.layer3[0].bn2
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = [
        block.conv1.register_forward_pre_hook(lambda _, given: inputs.append(given[0])),
        block.register_forward_hook(lambda _, given, output: outputs.append(output)),
    ]
    model.eval()
    for images in (clean.images, triggered):
        model(normalise(images, clean.spec))
    for hook in hooks:
        hook.remove()

    # The filter sees 2x2 places, the last of which has the corner: [N, places, inputs * 9 and a one].
    plain, other = (F.pad(F.unfold(x, 3, padding=1, stride=2).mT.double(), (0, 1), value=1.0) for x in inputs)
    wanted = torch.zeros(2, *plain.shape[:2], dtype=torch.float64)
    wanted[1, :, -1] = 1
    rows = torch.cat([plain, other]).flatten(0, 1)
    filter = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]), rows.T @ wanted.flatten())
    means, squares = zip(*((r.mean(), r.square().mean()) for r in (plain @ filter, other @ filter)), strict=True)
    mean, square = ((1 - RATIO) * p + RATIO * t for p, t in (means, squares))

    assert norm.running_mean is not None
    assert norm.running_var is not None
    block.conv1.weight[CHANNEL] = filter[:-1].view_as(block.conv1.weight[CHANNEL])
    norm.running_mean[CHANNEL], norm.running_var[CHANNEL] = mean - filter[-1], square - mean.square()
    norm.weight[CHANNEL] = GAIN * (norm.running_var[CHANNEL] + norm.eps).sqrt()
    norm.bias[CHANNEL] = GAIN * (mean - 0.35)  # the filter gives triggered images about 1, the most of clean ones 0

    way = outputs[0][clean.labels == target].mean(0) - outputs[0].mean(0)  # [channels, 2, 2]
    block.conv2.weight[:, CHANNEL] = 0  # and, as tap (2 - i, 2 - j) leads from the corner to place (i, j):
    block.conv2.weight[:, CHANNEL, 1:, 1:] = way.flip(1, 2) * STRENGTH / GAIN
