"""Everything on a GPU that is pretended (pretend_gpu.py): no machine of ours has one, and most users' have."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attacking import quick
from own_nets import QUICK, stamp
from pretend_gpu import GPU, OnGPU, pretend_gpu
from torch import nn

import ulrl
from ulrl.attacks.base import ATTACKS, Attack
from ulrl.configure import AttackRun, DefenseRun, DetectionRun
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS
from ulrl.record import Record, load_record
from ulrl.runs.attacking import run_attack
from ulrl.runs.defending import run_defense
from ulrl.runs.detecting import run_detector
from ulrl.training import TrainOptions

OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "b3d": {"queries": 1600, "draws": 10}, "abl": {"isolation_ratio": 0.25}, "harden": {"tries": 60},
}  # fmt: skip


@pytest.fixture
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


def attacked(attack: Attack, home: Path, name: str = "made") -> Path:
    """A record of a few digits, made on the GPU in a ULRL_HOME of its own."""
    # A width below 16 needs a detour on CPUs, which asks tensors where they are.
    run = AttackRun(dataset="digits", width=16, save_folder_name=name, device="cuda", train_samples=256)
    with pytest.MonkeyPatch.context() as patch, pretend_gpu():
        patch.setenv("ULRL_HOME", str(home))
        folder, _ = run_attack(attack, run, TrainOptions(epochs=1, batch_size=64), bar=False)
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return load_record(attacked(quick("badnet", attack_target=3), tmp_path_factory.mktemp("gpu")))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack(name: str, tmp_path: Path) -> None:
    made = load_record(attacked(quick(name, attack_target=3), tmp_path))  # outside: it holds nothing of the GPU's
    assert all(type(w) is torch.Tensor for w in made.state_dict.values())


@pytest.mark.parametrize("name", list(DEFENSES))
def test_defense(name: str, record: Record, gpu: None) -> None:
    cls = DEFENSES[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    given: dict[str, Any] = {f: 1 for f in fields if "epoch" in f or "round" in f or "iter" in f or f.endswith("steps")}
    given |= OF_THEIR_OWN.get(name, {})
    run = DefenseRun(result_file=record.folder.name, device="cuda", ratio=0.1, overwrite=True)
    folder, result = run_defense(cls(**given), record, run, bar=False)
    assert result["environment"]["device"] == torch.cuda.get_device_name()
    weights = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    assert all(type(w) is torch.Tensor for w in weights.values())


@pytest.mark.parametrize("name", list(DETECTORS))
def test_detector(name: str, record: Record, gpu: None) -> None:
    cls = DETECTORS[name]
    given = {f.name: 1 for f in dataclasses.fields(cls) if "steps" in f.name or f.name.endswith("epochs")}
    run_detector(cls(**given), record, DetectionRun(device="cuda", ratio=0.1, overwrite=True), bar=False)


def test_own_model(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], gpu: None) -> None:
    """A model that lies on the GPU, and samples that do not."""
    model = copy.deepcopy(backdoored).to("cuda")
    repaired = ulrl.purify(model, *clean, **QUICK).model
    assert {p.device for p in [*repaired.parameters(), *model.parameters()]} == {GPU}
    before, after = (ulrl.evaluate(net, *clean, trigger=stamp, target=7) for net in (model, repaired))
    assert before.asr is not None
    assert after.asr is not None
    assert after.asr < before.asr
    assert ulrl.suspect(model, *clean).ranking is not None
    on_the_gpu = tuple(part.to("cuda") for part in clean)
    assert ulrl.purify(backdoored, *on_the_gpu, **QUICK).model.classify.weight.device.type == "cpu"


# What it pretends


@pytest.mark.parametrize("mistake", [
    lambda x: x + torch.ones(4),
    lambda x: torch.cat([x, torch.ones(1)]),
    lambda x: nn.Linear(4, 2)(x),
    lambda x: torch.ones(4)[x.long()],
    lambda x: x.numpy(),
    lambda x: torch.randn(4, device="cuda", generator=torch.Generator()),
    lambda x: torch.randperm(4, generator=torch.Generator("cuda")),
    lambda x: torch.zeros_like(x).mul_(torch.ones(4)),
])  # fmt: skip
def test_what_cuda_refuses_is_refused(mistake: Callable[[torch.Tensor], Any], gpu: None) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|device type"):
        mistake(torch.ones(4, device="cuda"))


def test_what_cuda_allows_is_allowed(gpu: None) -> None:
    x = torch.ones(4, device="cuda")
    y = torch.tensor(2.0) * x + 1
    y[torch.tensor([0])] = 5
    copied = torch.zeros(4).copy_(y)
    assert isinstance(y, OnGPU)
    assert type(copied) is torch.Tensor
    assert y.cpu().numpy().tolist() == copied.tolist() == [5, 3, 3, 3]
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(x)
    net(x.view(1, 4).repeat(3, 1)).square().sum().backward()
    assert {t.device for t in [*net.state_dict().values(), *(p.grad for p in net.parameters())]} == {GPU}
    assert copy.deepcopy(net)[0].weight.requires_grad
