"""The machine that a run is on: its device, precision, threads and memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT

log = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")  # those that are asked for by name
TINY = 16 * 16  # pixels of an image up to which a second thread gains little and, on a busy machine, loses much


class NoSuchDevice(UserError):
    """A device of a kind that is known, but that this machine lacks."""


def pick_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is the GPU where there is one.

    Raises:
        NoSuchDevice: this machine lacks it.
        UserError: it is not the name of a device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = name.split(",")[0]  # BackdoorBench's "cuda:0,1" asks for several; one is used here
    try:
        device = torch.device(first)
        if device.type not in DEVICES:
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {name}: devices are auto, cpu, cuda and cuda:N") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise NoSuchDevice(
            f"--device {name}: there is no such device on this machine; use --device cpu or auto"
        ) from None
    return device


def eval_batch(device: torch.device) -> int:
    """Images per step when nothing is learned; larger ones fall out of a CPU's cache and are slower (measured)."""
    return 128 if device.type == "cpu" else 1024


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware, so that autocast pays."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The processor's word alone is not enough: where ATEN_CPU_CAPABILITY keeps torch from AVX-512, its attention fails.
    return (
        device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """bf16 autocast where `amp` is asked for and the device has it; fp32 elsewhere.

    bf16 has fp32's range, so there is no loss scaling and no step is skipped for an overflow. Cast weights are not
    cached: before torch's pull request 165068 a weight that an attack within a step had cast without a gradient came
    from the cache where a gradient is wanted, and got none.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=amp and has_bf16(device), cache_enabled=False)


@contextlib.contextmanager
def threads_for(pixels: int, device: torch.device) -> Iterator[None]:
    """The threads of a run on images of so many pixels: inside the block one, where they are tiny.

    Threads wait for each other after every layer. On tiny images that is most of their time, and where another process
    has the core of one of them, all wait for that: two threads were often many times slower than one
    (bench/shared_machine.py). OMP_NUM_THREADS, where the user has set it, stands.
    """
    threads, cores, (load, _, _) = torch.get_num_threads(), os.cpu_count() or 1, os.getloadavg()
    if "OMP_NUM_THREADS" not in os.environ and threads > 1:
        if pixels <= TINY:
            torch.set_num_threads(1)
        elif load >= cores and device.type == "cpu":
            log.warning(
                "this machine is busy (load %.1f on %d cores), where %d threads are often slower than one: "
                "try OMP_NUM_THREADS=1", load, cores, threads,
            )  # fmt: skip
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside the block, or the function so decorated, a new tensor is float32 and on the CPU where nothing else is
    said, as in a fresh torch, whatever the caller has set.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # else not, as it looks at each call of torch
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Inside the block float32 is float32 on a GPU too, where convolutions are else computed in TF32, with 10 bits."""
    settings: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides its options."""
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "git": _git_commit(),
    }


class PeakMemory:
    """The most memory held since this was made: the process's on a CPU, the tensors' on a GPU.

    Linux can forget an earlier peak (/proc/self/clear_refs); elsewhere the process's own since its start is given.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def mb(self) -> float:
        """In MB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere


def _git_commit() -> str | None:
    if not (PACKAGE_ROOT / ".git").exists():  # installed: a repository around it would be another one
        return None
    command = ["git", "-C", str(PACKAGE_ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None
