"""Writing a repaired model's weights, without losing any that are there."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from ulrl.errors import UserError
from ulrl.files import check_output, save_torch, whole_file

SUFFIXES = (".safetensors", ".pt", ".pth")


def check_weights_output(path: Path, *, overwrite: bool, given: Path | None = None, flag: str = "") -> None:
    """Before the work: whether weights can be written there. given: the file that the model's own weights are in.

    Raises:
        UserError: a name that ends otherwise, a missing folder, a file that is there, the file that was given.
    """
    check_output(path, flag, SUFFIXES)
    if given is not None and path.exists() and given.exists() and path.samefile(given):
        raise UserError(f"{flag} {path} is the file of the given weights, which are kept; name another".strip())
    if path.exists() and not overwrite:
        how = "pass --overwrite" if flag else "give overwrite=True"
        raise UserError(f"{flag} {path} exists; {how} to replace it, or name another".strip())


def save_weights(model: nn.Module, path: Path, *, overwrite: bool = False) -> None:
    """Write the weights, whole or not at all: as safetensors or, by the name, as a pickled state_dict.

    Raises:
        UserError: as `check_weights_output`.
    """
    check_weights_output(path, overwrite=overwrite)
    with whole_file(path) as partial:
        if path.suffix != ".safetensors":
            held = model.state_dict().items()
            save_torch({k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in held}, partial)
            return
        try:
            safetensors.torch.save_model(model, str(partial))  # weights that are shared are written once
        except safetensors.SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from None
