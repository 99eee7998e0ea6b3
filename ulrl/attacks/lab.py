"""What the runner lends to an attack that trains something of its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.files import save_torch, whole_file
from ulrl.seeds import generator
from ulrl.training import Monitor, Sam, TrainOptions, fit
from ulrl.untrusted.torchfiles import load_torch

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Lab:
    """The training images, the options of training, and a cache for what took long to compute.

    data: the training set on the device; clean while the attack learns, poisoned while it trains the
    model (but clean then too for an attack that controls the training).
    origin: int64 [N], where its images stand in the whole training split.
    new_model: an untrained network of the run's architecture on the device, initialised from a stream.
    given_clean_model: the one that the user named, if any.
    cache: a folder that outlives a killed run. key: gives what the cached tensors depend on.
    """

    data: ImageSet
    origin: torch.Tensor
    training: TrainOptions
    monitor: Monitor
    new_model: Callable[[str], nn.Module]
    given_clean_model: nn.Module | None
    cache: Path
    key: Callable[[], str]

    def fit(
        self,
        model: nn.Module,
        stage: str = "train",
        *,
        batches: Batches | None = None,
        epochs: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        **how: Any,
    ) -> None:
        """Train `model` by the run's options: on `data` for their epochs, unless told otherwise.

        how: further arguments of `training.fit`.
        """
        options = replace(self.training, epochs=epochs or self.training.epochs)  # where its schedule ends, too
        optimizer = optimizer or options.optimizer(model)
        fit(
            model, batches or self.batches(stage), options.epochs, optimizer,
            scheduler or options.scheduler(optimizer), self.monitor, stage,
            amp=options.amp, sam=Sam(options.sam_rho) if options.sam_rho else None, **how,
        )  # fmt: skip

    def batches(self, stage: str = "train", **how: Any) -> Batches:
        """Shuffled, augmented batches of `data` for a stage of training; how: arguments of `Batches`."""
        name = "batches" if stage == "train" else f"batches {stage}"
        stream = generator(self.training.random_seed, name, self.data.device)
        return Batches(self.data, self.training.batch_size, stream, drop_last=True, **how)

    def once(self, stage: str, compute: Callable[[], Tensors]) -> dict[str, torch.Tensor]:
        """What `compute` returns, on the device of `data`; from the cache where an earlier run left it."""
        file = self.cache / f"{stage}.pt"
        with contextlib.suppress(Exception):  # absent, or damaged: then it is computed
            held = load_torch(file)
            if held["key"] == self.key():
                log.info("%s: taken from an earlier run", stage)
                return {name: tensor.to(self.data.device) for name, tensor in held["tensors"].items()}
        tensors = {name: tensor.detach().cpu() for name, tensor in compute().items()}
        self.cache.mkdir(exist_ok=True)
        with whole_file(file) as partial:
            save_torch({"key": self.key(), "tensors": tensors}, partial)
        return {name: tensor.to(self.data.device) for name, tensor in tensors.items()}

    def clean_model(self) -> nn.Module:
        """A model without a backdoor, in eval mode and frozen: the user's, or one trained here."""
        model = self.given_clean_model
        if model is None:
            model = trained = self.new_model("clean model")

            def train() -> Tensors:
                self.fit(trained, "clean model")
                return trained.state_dict()

            model.load_state_dict(self.once("clean_model", train))
        return model.eval().requires_grad_(False)
