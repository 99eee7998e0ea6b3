"""How sure of a class an input without any content can make a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.perturbation import still
from ulrl.machine import autocast, eval_batch
from ulrl.seeds import generator
from ulrl.training import Stage

CLIMB = 40  # steps
_STARTS, _ALTOGETHER, _RATE = 10, 200, 0.02


def margins_from_noise(
    model: nn.Module, data: ImageSet, progress: Stage, *, amp: bool, random_seed: int
) -> torch.Tensor:
    """Per class the mean margin that noise can be given: float [K], on the device.

    The margin of a class is its logit less the largest other. Ten images of uniform noise (fewer, where there are more
    than twenty classes), in the range that `data` has in each channel, climb it by CLIMB steps of Adam, each a fiftieth
    of the range. The class of a backdoor often has by far the largest, whatever its trigger looks like, as poisoned
    images taught the model to be sure of it whatever else they show (MM-BD, arXiv 2205.06900). That paper climbs to the
    end, from 30 images, and takes the highest; by then a class that is easily told from the others is often as high as
    the backdoor's, which it is not after a few steps (docs/verdicts.md). `progress` is told of each step.
    """
    (x, _), *_ = Batches(data, len(data))
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    count = data.spec.num_classes
    starts = max(1, min(_STARTS, _ALTOGETHER // count))
    drawn = torch.rand((starts, *x.shape[1:]), generator=generator(random_seed, "margin")).to(x.device)
    noise = drawn.expand(count, *drawn.shape).flatten(0, 1).clone().requires_grad_()
    wanted = torch.arange(count, device=x.device).repeat_interleave(starts)
    margins = torch.empty(len(wanted), device=x.device)
    optimizer = torch.optim.Adam([noise], _RATE)
    with still(model):
        for _ in range(CLIMB):
            optimizer.zero_grad()
            for part in torch.arange(len(wanted), device=x.device).split(eval_batch(x.device)):
                inputs = (low + noise[part] * (high - low)).contiguous(memory_format=torch.channels_last)
                with autocast(x.device, amp):
                    logits = model(inputs).float()
                others = logits.masked_fill(F.one_hot(wanted[part], logits.shape[1]).bool(), -torch.inf)
                margin = logits.gather(1, wanted[part, None]).squeeze(1) - others.amax(1)
                (-margin).sum().backward()
                margins[part] = margin.detach()
            optimizer.step()
            with torch.no_grad():
                noise.clamp_(0, 1)
            progress.step()
    return margins.view(count, starts).mean(1)
