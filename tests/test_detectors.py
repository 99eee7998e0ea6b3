"""Every sample detector finds the poisoned images of a real small backdoor, and is not told which they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from ulrl.attacks.base import ATTACKS
from ulrl.cli import main
from ulrl.configure import AttackRun, DetectionRun
from ulrl.data.datasets import SPECS, clean_subset, load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.detectors.base import DETECTORS, Detector, Scored
from ulrl.metrics import ranking_judgement
from ulrl.models import build_model
from ulrl.options import Schema
from ulrl.record import Record, load_record
from ulrl.runs.attacking import run_attack
from ulrl.runs.detecting import run_detector
from ulrl.training import Monitor, TrainOptions

CONFIG = Path(__file__).parent.parent / "config" / "detection"

# The record and the least AUROC with the YAML for the digits. Spectral signatures and clustering want the poisoned to
# be few among the images of their label: of "often", a tenth of all images and so half of the target's, they may find
# none, and how high the spectrum puts them in so small a net is chance. SCALE-UP has little to see in digits, which are
# white already. What these two compute is held by tests of their own.
EXPECTED = {
    "ac": ("seldom", 0.6),
    "cd": ("often", 0.65),
    "ibd-psc": ("often", 0.7),
    "rnp": ("often", 0.8),
    "scale-up": ("often", 0.3),
    "spectral": ("seldom", 0.4),
    "strip": ("often", 0.9),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULRL_HOME", str(tmp_path_factory.mktemp("poisoned")))
        for name, pratio, side in (("often", 0.1, 2), ("seldom", 0.03, 3)):
            folder, _ = run_attack(
                ATTACKS["badnet"](attack_target=7, patch_size=side, pratio=pratio),
                AttackRun(dataset="digits", width=16, save_folder_name=name, device="cpu"),
                TrainOptions(epochs=10, batch_size=64, lr=0.05),
                bar=False,
            )
            made[name] = load_record(folder)
    return made


def configured(name: str, **given: Any) -> tuple[Detector, DetectionRun]:
    """The detector and the run options of its YAML for the digits."""
    schema = Schema(DetectionRun, DETECTORS[name])
    settings, _ = schema.merge(("yaml", schema.yaml(CONFIG / name / "digits.yaml")), ("test", given))
    return settings.build(DETECTORS[name]), settings.build(DetectionRun)


def test_every_detector_has_a_row() -> None:
    assert set(EXPECTED) == set(DETECTORS)


@pytest.mark.parametrize("name", EXPECTED)
def test_detector_finds_the_poisoned_images(name: str, records: dict[str, Record]) -> None:
    record, least = records[EXPECTED[name][0]], EXPECTED[name][1]
    brief = {"images": 300} if name == "cd" else {}
    detector, run = configured(name, **brief)
    handed: list[tuple[ImageSet, ImageSet]] = []
    cls = type(detector)
    original = cls.score

    def spy(self: Detector, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        handed.append((suspects, clean))
        before = [w.clone() for w in model.state_dict().values()]
        scored = original(self, model, suspects, clean, monitor)
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
        return scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "score", spy)
        folder, result = run_detector(detector, record, run, bar=False)
    assert result["auroc"] >= least
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))

    suspects, clean = handed[0]
    train, _ = load_dataset("digits")
    index, table = clean_subset(len(train), run.ratio, 0), pd.read_csv(folder / "scores.csv", index_col="image")
    assert type(suspects) is type(clean) is ImageSet, "no word on which are poisoned"
    assert torch.equal(clean.images, train.subset(index).images)
    assert not set(table.index) & set(index.tolist())
    poisoned = record.poisoned_train(train)
    assert torch.equal(suspects.images, poisoned.subset(torch.tensor(table.index)).images)
    assert result["n_images"] == len(table) == (brief.get("images") or len(train) - len(index))
    truly = {int(i) for i in (record.folder / "poison_index.txt").read_text().split()}
    assert set(table.index[table.poisoned]) == truly & set(table.index)
    assert result["n_poisoned"] == table.poisoned.sum() > 0


def test_scale_up_counts_the_scales_that_keep_the_class() -> None:
    """Of a net that says 1 where an image is bright: a gray image of 60 is bright from the third scale on."""

    class Bright(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            light = x.flatten(1).mean(1) * 0.376 + 0.305
            return nn.functional.one_hot((light > 0.8).long(), 10).float()

    def flat(*values: int) -> ImageSet:
        images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
        return ImageSet(images, torch.zeros(len(values), dtype=torch.int64), SPECS["digits"])

    clean = flat(0, 60, 0, 60, 255, 255)  # class 0 is kept at 1, 0.2, 1, 0.2 of the scales; class 1, at all
    scores = DETECTORS["scale-up"]().score(Bright(), flat(0, 30, 60, 255), clean, Monitor()).scores
    assert scores[:3].tolist() == pytest.approx([(share - 0.6) / 0.46188 for share in (1.0, 0.4, 0.2)], rel=1e-3)
    assert scores[3] > 0
    large = DETECTORS["scale-up"](scales=(129, 255, 2**40))  # 129 times white is more than 16 bits hold
    scores = large.score(Bright(), flat(0, 3, 255), flat(0, 0, 3, 3), Monitor()).scores
    assert scores.tolist() == pytest.approx([share / 0.57735 for share in (0.5, -0.5, 0.5)], rel=1e-3)


def test_ranking_judgement_against_hand_worked_figures() -> None:
    poisoned = torch.tensor([True, True, False, False, False, False])
    found = ranking_judgement(torch.tensor([5.0, 2, 1, 2, 3, 0]), poisoned)
    assert found.auroc == pytest.approx((4 + 2.5) / 8)
    assert found.recall_at_1_fpr == 0.5, "of four others none may be reached"
    assert (found.n_images, found.n_poisoned) == (6, 2)
    many = torch.cat([torch.tensor([99.5]), torch.arange(101.0)])
    assert ranking_judgement(many, many == 99.5).recall_at_1_fpr == 1.0, "one of 101 is above it"
    assert ranking_judgement(torch.ones(3), torch.zeros(3, dtype=torch.bool)).auroc is None


def test_command_prints_a_table_and_replaces_nothing_unasked(
    tiny_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", "tiny", "--samples", "spectral,rnp", "--ratio", "0.1", "--device", "cpu"]
    for arguments, code in ((command, 0), (command, 2), ([*command, "--overwrite"], 0)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr()
        assert left.value.code == code
        assert ("AUROC" in said.out) == (code == 0)
    file = tiny_home / "record" / "tiny" / "detection" / "spectral" / "result.json"
    assert json.loads(file.read_text())["options"]["ratio"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to look for: --samples"),
        (["--samples", "stripp"], "did you mean 'strip'?"),
        (["--samples", "strip", "--overlay", "3"], "did you mean '--overlays'?"),
        (["--samples", "strip,rnp", "--overlays", "3"], "unknown argument --overlays"),
        (["--samples", "strip", "--images", "5000"], "--images 5000 is more than the 1293 training images"),
        (["--samples", "strip", "--result_file", "other"], "--result_file would have no effect"),
        (["--samples", "strip,rnp", "--save_folder_name", "x"], "each of several detectors has its own"),
        (["--samples", "strip", "--model", "vgg19"], "contradicts the record tiny"),
        (["--samples", "scale-up", "--scales", "3,0"], "--scales 3 0: give factors of at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tiny_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["detect", "tiny", *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    assert words in said[-1]
    assert not (tiny_home / "record" / "tiny" / "detection").exists()


def test_the_spectrum_leads_with_what_few_images_of_a_class_share() -> None:
    """And with nothing where all of a class are alike."""
    train, _ = load_dataset("digits")
    images = train.images.clone()
    stamped = (train.labels == 3).nonzero().flatten()[::10]
    images[stamped, :, :4] = 255
    suspects = ImageSet(images, train.labels, train.spec)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    detector, _ = configured("spectral")
    scores = detector.score(net, suspects, train.subset(torch.arange(20)), Monitor()).scores
    others = torch.ones(len(scores), dtype=torch.bool)
    others[stamped] = False
    assert scores[stamped].min() > scores[others & (train.labels == 3)].max()
    same = train.subset((train.labels == 2).nonzero().flatten()[:1].expand(9))
    assert detector.score(net, same, train.subset(torch.arange(20)), Monitor()).scores.max() < 1e-6


def test_clustering_leaves_a_class_of_equal_images_whole() -> None:
    train, _ = load_dataset("digits")
    twos = (train.labels == 2).nonzero().flatten()
    same = train.subset(torch.cat([twos[:1].expand(6), (train.labels == 3).nonzero().flatten()[:30]]))
    detector, _ = configured("ac")
    found = detector.score(build_model("preactresnet18", 10, 1, 4), same, train.subset(torch.arange(20)), Monitor())
    assert not found.scores[:6].any()
    assert found.scores[6:].any()
    assert found.evidence["smaller_shares"]["2"] == 0.5


@pytest.mark.parametrize("images", [[0] * 19 + [1], [0, 1] * 4, [0, 1, 2] * 5])
def test_clustering_takes_a_class_of_few_different_images(images: list[int]) -> None:
    """Of which ICA finds fewer directions than there are features or images."""
    features = torch.rand(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[images]
    detector, _ = configured("ac")
    nearness, silhouette, share = detector._split(features)
    assert nearness.isfinite().all()
    assert silhouette > 0.9 or len(set(images)) > 2
    assert share == images.count(1) / len(images) or len(set(images)) > 2


@pytest.mark.parametrize("name", ["ac", "cd", "spectral", "strip"])
def test_keys_of_backdoorbench_are_accepted(name: str) -> None:
    """Those of its config/detection/<name>/*.yaml, most of a training that its detectors do not do."""
    keys = set(
        "device amp pin_memory non_blocking prefetch checkpoint_load checkpoint_save log dataset_path dataset epochs "
        "batch_size num_workers lr lr_scheduler model client_optimizer sgd_momentum wd frequency_save random_seed "
        "unlearning_epochs lr_unlearning_init momentum weight_decay gradient_ascent_type gamma flooding".split()
    )
    schema = Schema(DetectionRun, DETECTORS[name])
    assert keys <= set(schema.fields) | schema.ignored


def test_a_record_without_a_training_set_is_told(records: dict[str, Record], tmp_path: Path) -> None:
    detector, run = configured("spectral")
    with pytest.raises(Exception, match="stores no poisoned training set"):
        run_detector(detector, replace(records["often"], bd_train=None), run, bar=False)
    copied = tmp_path / "record"
    shutil.copytree(records["often"].folder, copied, ignore=shutil.ignore_patterns("detection"))
    (copied / "detection").symlink_to(tmp_path)
    with pytest.raises(Exception, match="is a link"):
        run_detector(detector, load_record(copied), run, bar=False)
