"""The weights of a model in a stranger's file: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import safetensors
import torch

from ulrl.errors import UserError
from ulrl.untrusted.opening import MIB, opened
from ulrl.untrusted.torchfiles import MOST, Other, load_torch

WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "network")
TIED = 16  # weights that may be the same bytes
TENSORS = 30_000  # that a safetensors file may hold; a large model has a tenth
HEADER = 16 * MIB  # bytes of JSON in it, of which thirty times as much memory can be made


def load_weights(file: Path, most: int = MOST) -> dict[str, torch.Tensor]:
    """Name, without DataParallel's `module.`, to CPU tensor.

    The file may hold them under one of WRAPPINGS, as training scripts write them, BackdoorBench's among them.

    Args:
        most: bytes that the file may have.

    Raises:
        UserError: as `load_torch`; it holds no state_dict of real, finite numbers.
    """
    weights: Any
    if file.suffix == ".safetensors":
        _, weights = load_safetensors(file, most)
    else:
        weights = load_torch(file, most=most)
    while isinstance(weights, dict) and (inner := [k for k in WRAPPINGS if isinstance(weights.get(k), dict)]):
        weights = weights[inner[0]]
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{file} holds no state_dict, name to tensor; save model.state_dict()")
    return check_weights(file, {plain_name(str(name)): w for name, w in weights.items()}, len(weights))


def load_safetensors(
    file: Path, most: int, inside: Path | None = None
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a safetensors file; `most` and `inside` as for `opened`.

    Raises:
        UserError: it cannot be read, or holds more than TENSORS.
    """
    with opened(file, most, inside) as raw:
        try:
            if (header := int.from_bytes(raw.read(8), "little")) > HEADER:
                raise ValueError(f"a header of {header} bytes, more than {HEADER}")
            with safetensors.safe_open(str(file), "pt") as content:
                metadata, names = content.metadata() or {}, content.keys()
                tensors = {name: content.get_tensor(name) for name in names} if len(names) <= TENSORS else {}
        except Exception as error:  # whatever it makes of a stranger's bytes
            raise UserError(f"{file} is damaged, or no safetensors file ({error}); fetch it again") from None
    if len(names) > TENSORS:
        raise UserError(f"{file} holds {len(names)} tensors, more than the {TENSORS} of any model; do not trust it")
    return metadata, tensors


def plain_name(name: str) -> str:
    """Without what DataParallel and torch.compile put before it, in any order."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def check_weights(file: Path, weights: dict[str, Any], count: int) -> dict[str, torch.Tensor]:
    """`weights` themselves, if they are what a model can have. count: how many there were with their full names.

    Raises:
        UserError: another value than a tensor of real, finite numbers; a variance below 0; a name that is there twice;
            the same bytes as more than TIED weights.
    """
    stored: dict[int, int] = {}
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or weight.is_complex():
            found = weight.what if isinstance(weight, Other) else f"a {type(weight).__name__}"
            raise _no_weights(file, name, found)
        if not name.isprintable():
            raise _no_weights(file, name, "no text")
        stored[weight.untyped_storage().data_ptr()] = weight.untyped_storage().nbytes()
    if sum(weight.nbytes for weight in weights.values()) > TIED * sum(stored.values()):
        raise UserError(f"{file} gives over {TIED} weights the same bytes, as no model does; do not trust it")
    for name, weight in weights.items():
        try:
            finite = bool(weight.float().isfinite().all())  # as a model has it, of float32
        except RuntimeError:  # a type or a shape that torch can hold, and not compute with
            raise _no_weights(file, name, f"of {str(weight.dtype)[6:]} {list(weight.shape)}") from None
        if not finite:
            raise UserError(
                f"{file}: {name[:80]} holds NaN or infinity, with which no model works; get the weights from an "
                "earlier epoch"
            )
        if name.endswith("running_var") and bool((weight.float() < 0).any()):
            raise UserError(f"{file}: {name[:80]} holds a variance below 0, of which the net makes NaN; fetch it again")
    if len(weights) < count:
        raise UserError(f"{file} has a weight both with and without the prefix module.; save it again without one")
    return weights


def _no_weights(file: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{file} holds no state dict, names to dense CPU tensors of real numbers: {name[:80]!r} is {found}; "
        "save model.state_dict()"
    )
