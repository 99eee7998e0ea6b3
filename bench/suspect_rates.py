"""How often `ulrl.suspect` is right on small models; writes bench/results/suspect_rates.csv.

python bench/suspect_rates.py [--only NAME ...] [--records NAME ...]

Trains small models, clean ones and backdoored ones of every attack, each with a seed of its own, and asks about each
with the default options. `digits`: PreAct-ResNet18 of width 16, 10 epochs, 200 clean images, by the shipped options,
with which an attack of the demonstration plants; `fashion_mnist` and `fashion_scenes`: width 8, 10,000 images, 4 and 8
epochs, 600 clean images, the attacks as the bench has them (bench/victims.py). Which of them a threshold was drawn on,
docs/verdicts.md says. A backdoor that did not take (ASR below 0.8) is none to be found, and its row says so.

A row stays until its net is asked again, and a model that is there is kept, in $ULRL_HOME/record/verdict_*, so a
stopped run goes on where it was, and several may work side by side on different names. With --records the models are
those of records that are there, such as the bench's victims, with 1% and seed 0.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ulrl  # noqa: E402
from bench.pages import with_earlier, write_csv  # noqa: E402
from bench.victims import VICTIMS  # noqa: E402
from ulrl.configure import AttackRun, attack_schema, configure_attack  # noqa: E402
from ulrl.data.batches import normalise  # noqa: E402
from ulrl.data.datasets import clean_subset, load_dataset  # noqa: E402
from ulrl.files import home  # noqa: E402
from ulrl.models import load_model  # noqa: E402
from ulrl.runs.attacking import run_attack  # noqa: E402

TRAINING: dict[str, dict[str, Any]] = {
    "digits": {},  # as shipped
    "fashion_mnist": {"width": 8, "train_samples": 10_000, "epochs": 4, "lr": 0.05},
    "fashion_scenes": {"width": 8, "train_samples": 10_000, "epochs": 8, "lr": 0.05},
}
DIGITS, SMALL = 200 / 1437, 0.01  # shares of the training images that the defender has
ON_DIGITS = (
    "wanet inputaware sig ctrl bpp lc ftrojann adaptive_blend tact adaptive_patch blended badnet ssba trojannn lf lira "
    "blind"
).split()
ON_FASHION = "badnet blended badnet blended ssba".split()
ON_SCENES = "badnet blended ssba wanet inputaware".split()
NEED_CLEAN = {"lc", "lf", "trojannn"}
TOOK = 0.8
RESULT = ROOT / "bench" / "results" / "suspect_rates.csv"


@dataclass(frozen=True)
class Net:
    """A model to ask about: an attack of the registry ("prototype": none) on a data set, and its seed."""

    dataset: str
    attack: str
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"verdict_{self.dataset}_{self.attack}_{self.seed}"

    @property
    def share(self) -> float:
        return DIGITS if self.dataset == "digits" else SMALL


def nets() -> Iterator[Net]:
    """Clean ones first, as some attacks need one."""
    for dataset, seeds in (
        ("digits", (*range(5000, 5014), *range(8000, 8012), *range(9000, 9010))),
        ("fashion_mnist", range(6000, 6003)),
        ("fashion_scenes", range(7000, 7004)),
    ):
        yield from (Net(dataset, "prototype", seed, {}) for seed in seeds)
    for first, count in ((5000, 8), (9000, 6)):
        for i in range(count):
            yield Net("digits", "badnet", first + 100 + i, {"attack_target": (3 * i + 1) % 10, "patch_size": 2})
            yield Net("digits", "blended", first + 200 + i, {"attack_target": 3 * i % 10})
    for i in range(3):
        yield Net("digits", "sig", 5300 + i, {"attack_target": (3 * i + 2) % 10, "pratio": 0.5})
    for i, attack in enumerate(ON_DIGITS):
        needs = {"clean_model": "verdict_digits_prototype_5000"} if attack in NEED_CLEAN else {}
        yield Net("digits", attack, 8100 + i, {"attack_target": (3 * i + 4) % 10, **needs})
    yield Net("digits", "badnet", 8190, {"attack_target": 0, "patch_size": 2, "attack_label_trans": "all2all"})
    victims = {victim.name: victim for victim in VICTIMS}
    for dataset, first, attacks in (("fashion_mnist", 6100, ON_FASHION), ("fashion_scenes", 7100, ON_SCENES)):
        for i, attack in enumerate(attacks):
            victim, target = victims[attack], (3 * i + (1 if dataset == "fashion_mnist" else 2)) % 10
            epochs = round(TRAINING[dataset]["epochs"] * victim.epochs)
            given = {"attack_target": target, "pratio": victim.rates[0], "epochs": epochs, **victim.options}
            yield Net(dataset, attack, first + i, given)


def made(net: Net) -> Path:
    """The record's folder, trained unless it is there."""
    folder = home() / "record" / net.name
    if not (folder / "result.json").exists():
        about = {"dataset": net.dataset, "random_seed": net.seed, "save_folder_name": net.name}
        given = attack_schema(net.attack).check({**TRAINING[net.dataset], **net.options, **about}, net.name)
        run_attack(*configure_attack(net.attack, given, AttackRun, quiet=True), bar=False)
    return folder


def asked(folder: Path, share: float, seed: int) -> dict[str, Any]:
    """What `ulrl.suspect` says of a record's model, beside what is true."""
    record = ulrl.load_record(folder)
    result = json.loads((folder / "result.json").read_text())
    train, _ = load_dataset(record.dataset)
    model = load_model(record.model_name, record.num_classes, record.state_dict, train.spec.channels)
    clean = train.subset(clean_subset(len(train), share, seed))
    found = ulrl.suspect(model, normalise(clean.images, clean.spec), clean.labels, random_seed=seed)
    asr, options = result["after"]["asr"], result["options"]
    one_target = asr is not None and options.get("attack_label_trans", "all2one") == "all2one"
    ranking = found.ranking
    return {
        "record": record.name, "dataset": record.dataset, "attack": record.attack, "seed": seed,
        "target": options["attack_target"] if one_target else None, "acc": round(result["after"]["acc"], 4), "asr": asr,
        "took": None if asr is None else asr >= TOOK, "verdict": found.verdict, "label": found.label,
        **ranking.loc[found.label, ["reach", "cover", "lead", "evidence"]].round(2),
        "flagged": " ".join(map(str, ranking.index[ranking.flagged])), "z_highest": round(float(ranking.z.max()), 1),
        "seconds": round(found.report["seconds"]["total"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names or patterns of the models")
    parser.add_argument("--records", nargs="+", metavar="NAME", help="ask about these instead")
    given = parser.parse_args()
    todo: Iterator[tuple[Path, float, int]] = (
        (made(net), net.share, net.seed)
        for net in nets()
        if any(fnmatch.fnmatch(net.name, pattern) for pattern in given.only)
    )
    if given.records:
        todo = ((home() / "record" / name, SMALL, 0) for name in given.records)
    for folder, share, seed in todo:
        row = asked(folder, share, seed)
        print(row, flush=True)
        rows = with_earlier(RESULT, pd.DataFrame([row]), ["record"])
        write_csv(RESULT, rows.astype({"target": "Int64"}))
    rows = pd.read_csv(RESULT)
    print(rows.groupby(["dataset", "attack", "verdict"]).size())


if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", ulrl.Note)
    main()
