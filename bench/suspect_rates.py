"""How often `ulrl.suspect` is right on small models; writes bench/results/suspect_rates.csv.

python bench/suspect_rates.py

Trains small models, half of them backdoored, each with a seed of its own, and asks about each with the default
options: on 10,000 images of Fashion-MNIST (PreAct-ResNet18 of width 8, 4 epochs; 600 clean images) and on the digits
(width 16, 10 epochs, the shipped options; 200 clean images). Which of them a threshold was drawn on, docs/verdicts.md
says. A row stays until its net is asked again.
A backdoor that did not take (ASR below 0.9) is no backdoor to be found, and its row says so. Models that are there are
kept, in $ULRL_HOME/record/verdict_*, so a stopped run goes on where it was. With --records the models are those of
records that are there, such as the bench's victims.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ulrl  # noqa: E402
from bench.pages import write_csv  # noqa: E402
from ulrl.attacks.base import ATTACKS  # noqa: E402
from ulrl.configure import AttackRun  # noqa: E402
from ulrl.data.batches import normalise  # noqa: E402
from ulrl.data.datasets import clean_subset, load_dataset  # noqa: E402
from ulrl.files import home  # noqa: E402
from ulrl.models import load_model  # noqa: E402
from ulrl.runs.attacking import run_attack  # noqa: E402
from ulrl.training import TrainOptions  # noqa: E402

DATASETS = {  # how to train on each, and the share of its training images that the defender has
    "digits": (AttackRun(dataset="digits", width=16), TrainOptions(epochs=10, lr=0.05, batch_size=64), 200 / 1437),
    "fashion_mnist": (
        AttackRun(dataset="fashion_mnist", width=8, train_samples=10_000), TrainOptions(epochs=4, lr=0.05), 0.01
    ),
}  # fmt: skip
TARGETS = {
    "digits": {"badnet": (1, 2, 4, 6, 7, 9), "blended": (0, 3, 5, 6, 8, 9)},
    "fashion_mnist": {"badnet": (0, 8), "blended": (4,), "sig": (1,)},
}
MODELS = [
    (dataset, *model)
    for dataset, first, clean in (("digits", 4000, 12), ("fashion_mnist", 3000, 4))
    for model in [
        *(("prototype", None, first + seed) for seed in range(clean)),
        *(
            (attack, target, first + 20 * number + target)
            for number, (attack, targets) in enumerate(TARGETS[dataset].items(), 1)
            for target in targets
        ),
    ]
]
TOOK = 0.9


RESULT = ROOT / "bench" / "results" / "suspect_rates.csv"


def made(dataset: str, attack: str, target: int | None, seed: int) -> Path:
    """The record's folder, trained unless it is there."""
    run, training, _ = DATASETS[dataset]
    name = f"verdict_{dataset}_{attack}_{seed}"
    folder = home() / "record" / name
    if not (folder / "result.json").exists():
        options = {"random_seed": seed} if target is None else {"random_seed": seed, "attack_target": target}
        if attack == "badnet" and dataset == "digits":
            options["patch_size"] = 2  # of 8x8 pixels
        about = {"random_seed": seed, "save_folder_name": name}
        run_attack(
            ATTACKS[attack](**options),
            AttackRun(**{**vars(run), **about}),
            TrainOptions(**{**vars(training), "random_seed": seed}),
            bar=False,
        )
    return folder


def asked(folder: Path, ratio: float, seed: int) -> dict[str, Any]:
    """What `ulrl.suspect` says of a record's model, beside what is true."""
    record = ulrl.load_record(folder)
    result = json.loads((folder / "result.json").read_text())
    train, _ = load_dataset(record.dataset)
    model = load_model(record.model_name, record.num_classes, record.state_dict, train.spec.channels)
    clean = train.subset(clean_subset(len(train), ratio, seed))
    found = ulrl.suspect(model, normalise(clean.images, clean.spec), clean.labels, random_seed=seed)
    asr, options = result["after"]["asr"], result["options"]
    one_target = asr is not None and options.get("attack_label_trans", "all2one") == "all2one"
    return {
        "record": record.name, "dataset": record.dataset, "attack": record.attack, "seed": seed,
        "target": options["attack_target"] if one_target else None, "acc": round(result["after"]["acc"], 4), "asr": asr,
        "took": None if asr is None else asr >= TOOK, "verdict": found.verdict, "label": found.label,
        "reach": round(found.reach, 3), "z": round(found.z, 1), "z_highest": round(float(found.ranking.z.max()), 1),
        "seconds": round(found.report["seconds"]["total"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", metavar="NAME", help="ask about these, with 1%% and seed 0, instead")
    names = parser.parse_args().records
    rows = pd.read_csv(RESULT).to_dict("records") if RESULT.exists() else []
    todo = [(home() / "record" / name, 0.01, 0) for name in names or ()] or (
        (made(*model), DATASETS[model[0]][2], model[-1]) for model in MODELS
    )
    for folder, ratio, seed in todo:
        row = asked(folder, ratio, seed)
        print(row, flush=True)
        rows = [*(r for r in rows if r["record"] != row["record"]), row]
        table = pd.DataFrame(rows).astype({"target": "Int64"})
        write_csv(RESULT, table)
    print(table.groupby(["dataset", "attack", "verdict"]).size())


if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", ulrl.Note)
    main()
