"""Kept judgements: judged once, anew for anything else, and never taken on trust."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ulrl.data.datasets import dataset_spec
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import Trigger
from ulrl.metrics import Judgement
from ulrl.runs import triggers
from ulrl.runs.common import EpochJudge
from ulrl.runs.judgements import kept
from ulrl.training import Monitor

SPEC = dataset_spec("digits")
FIGURES = Judgement(0.75, 0.5, 0.25, 4, 2)


class Case:
    """A model and its data, and how often it was judged."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 3)
        images = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
        self.clean = ImageSet(images, torch.arange(4), SPEC)
        zeros = torch.zeros(2, dtype=torch.int64)
        self.poisoned = PoisonedSet(images[:2].clone(), zeros, SPEC, zeros + 1, zeros)
        self.judged = 0

    def __call__(self, name: str = "net", amp: bool = False) -> Judgement:
        def judge() -> Judgement:
            self.judged += 1
            return FIGURES

        return kept(judge, name, self.model, self.clean, self.poisoned, amp)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case()
    assert case() == FIGURES
    return case


def test_the_same_model_on_the_same_data_is_judged_once(case: Case) -> None:
    assert case() == FIGURES
    assert case.judged == 1


def test_anything_else_is_judged_anew(case: Case) -> None:
    with torch.no_grad():
        case.model.weight[0, 0] += 1e-6
    case()
    case.clean.images[3, 0, 0, 0] += 1
    case()
    case.poisoned.labels[0] += 1
    case()
    case.poisoned.original_labels[0] += 1
    case()
    case("another architecture")
    assert case.judged == 6


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"acc": 0.5}', '{"acc":0.75,"asr":7,"ra":0.25,"n_clean":4,"n_poisoned":2}',
                '{"acc":0.75,"asr":0.5,"ra":0.25,"n_clean":5,"n_poisoned":2}']
)  # fmt: skip
def test_a_damaged_one_is_judged_anew(case: Case, tmp_path: Path, content: str) -> None:
    (file,) = (tmp_path / "ulrl" / "judgements").iterdir()
    file.write_text(content)
    assert case() == FIGURES
    assert case.judged == 2
    case()
    assert case.judged == 2


def test_without_a_place_to_keep_it_a_run_goes_on(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert case() == FIGURES
    assert case.judged == 2


def test_a_found_trigger_is_compared_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than BATCH images as float32 at once; the last part is a smaller one."""
    draw = torch.Generator().manual_seed(0)
    clean = ImageSet(torch.randint(200, (43, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(43) % 3, SPEC)
    at = torch.arange(1, 43, 3)
    images = clean.images[at].clone()
    images[:, :, -2:, -2:] = 255
    images[0, 0, 0, 0] += 1  # in less than a tenth of the images, so it is not of the mask
    poisoned = PoisonedSet(images, torch.zeros_like(at), SPEC, clean.labels[at], at)
    mask = torch.zeros(1, 8, 8)
    mask[:, -2:, -1:] = 1
    seen: list[int] = []

    def predict(model: nn.Module, data: ImageSet, amp: bool) -> torch.Tensor:
        assert (data.images[:, 0, -2:, -1] == 255).all()
        seen.append(len(data))
        return (data.labels == 1).long() * 2  # class 1 is not turned, class 2 is

    monkeypatch.setattr(triggers, "predict", predict)
    monkeypatch.setattr(triggers, "BATCH", 5)
    found = {0: Trigger(mask, torch.ones(1, 8, 8))}
    judged = triggers.judge_trigger(nn.Identity(), found, [2], clean, poisoned, False, tmp_path / "found.npz")
    assert judged is not None
    true, change = (images.float() - clean.images[at]).mean(0), (mask * (255 - clean.images[at].float())).mean(0)
    cosine = (true * change).sum() / true.norm() / change.norm()
    assert judged == {"class": 0, "cosine": pytest.approx(cosine.item(), rel=1e-4), "iou": 0.5, "turned": 0.5}
    assert seen == [5, 5, 5, 5, 5, 3]


def test_a_stage_that_comes_again_keeps_the_figures_of_each_time(case: Case) -> None:
    class Says(nn.Module):
        """A class of its own, for every image."""

        def __init__(self, k: int) -> None:
            super().__init__()
            self.register_buffer("answer", torch.eye(4)[k])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.answer.expand(len(x), -1)

    clean = case.clean.subset(torch.tensor([0, 0, 0, 1]))
    course = EpochJudge(clean, None, amp=False, only="unlearn")
    monitor = Monitor(course, eval_every=2)
    for k in (0, 1):  # rounds, as those of BTI-DBF
        for stage in ("invert", "unlearn"):
            with monitor.stage(stage, 3) as progress:
                for epoch in (1, 2, 3):
                    progress.epoch(Says(k), epoch)
    table = course.with_history(monitor.history)
    assert table[table.stage == "unlearn"].test_acc.fillna(-1).tolist() == [-1, 0.75, -1, -1, 0.25, -1]
    assert table[table.stage == "invert"].test_acc.isna().all()
