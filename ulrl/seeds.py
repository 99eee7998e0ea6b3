"""One seed per stream of randomness, so that adding a stream never shifts another."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for the named stream of a run seeded with `seed`."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for the named stream ("batches", "clean_subset", ...)."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream))


def drawn(size: int, count: int, stream: torch.Generator) -> torch.Tensor:
    """`count` of the whole numbers below `size` at random, ascending: int64 [count]."""
    return torch.randperm(size, generator=stream)[:count].sort().values


@contextlib.contextmanager
def global_stream(seed: int, stream: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators, the CPU's and that of `device`, inside the block, and put them back.

    For what draws from them and cannot be given another: the initialisation of `torch.nn` modules, dropout.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which seeds those of all other devices, too, and for good.
        torch.default_generator.manual_seed(stream_seed(seed, stream))
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(stream_seed(seed, stream))
        yield
