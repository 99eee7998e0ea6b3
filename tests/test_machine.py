"""How runs share the machine: threads that sleep while they wait, and one thread where images are tiny."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ulrl
from ulrl import machine
from ulrl.machine import TINY, environment, threads_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing set by the user, on an idle machine of two cores."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("pixels", "given", "threads"), [(64, None, 1), (TINY + 1, None, 2), (64, "2", 2)])
def test_tiny_images_have_one_thread_unless_the_user_said_otherwise(
    pixels: int, given: str | None, threads: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(KeyError), threads_for(pixels, CPU):
        assert torch.get_num_threads() == environment(CPU)["threads"] == threads
        raise KeyError
    assert torch.get_num_threads() == 2, "as it was, however the run ended"


def test_a_busy_machine_is_said_where_threads_would_wait(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cases = ((0.5, 1024, CPU, 0), (3.0, 1024, CPU, 1), (3.0, 64, CPU, 0), (3.0, 1024, GPU, 0))
    for load, pixels, device, said in cases:
        caplog.clear()
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        with threads_for(pixels, device):
            pass
        assert caplog.text.count("try OMP_NUM_THREADS=1") == said


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, None)],
)
def test_threads_sleep_while_they_wait_unless_the_user_said_otherwise(
    given: dict[str, str], policy: str | None
) -> None:
    """Set before torch is there to read it."""
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    code = "import os, sys, ulrl; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    said = subprocess.run([sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", str(policy)]


def test_bf16_is_used_only_where_torch_may_use_avx512() -> None:
    """Attention in bf16 fails on a processor that has AVX-512 where torch was told to do without."""
    code = """
import torch
from torch import nn
from ulrl.machine import autocast, has_bf16
cpu, x = torch.device("cpu"), torch.rand(4, 2, 64, 8)
with autocast(cpu, True):
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
print(has_bf16(cpu))
"""
    narrow = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    said = subprocess.run([sys.executable, "-c", code], env=narrow, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]


def test_what_is_cast_without_a_gradient_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with machine.autocast(torch.device("cpu"), True):
        assert not torch.is_autocast_cache_enabled(), "where torch's own cure is missing"
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_a_model_of_the_users_shares_the_machine_too(two_threads: None) -> None:
    """As runs on records do."""
    seen: list[int] = []

    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Linear(16, 2))
    images = torch.randn(24, 1, 4, 4)
    labels = model(images).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ulrl.Note)
        for work in (functools.partial(ulrl.purify, method="ulrl"), ulrl.suspect):
            seen.clear()
            work(model, images, labels, unlearning_epochs=1)
            assert seen[-1] == 1
    assert torch.get_num_threads() == 2
