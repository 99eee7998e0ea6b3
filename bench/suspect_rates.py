"""How often `ulrl.suspect` is right on small models; writes bench/results/suspect_rates.csv.

python bench/suspect_rates.py

Trains small models, half of them backdoored, each with a seed of its own, and asks about each with the default
options: on 10,000 images of Fashion-MNIST (PreAct-ResNet18 of width 8, 4 epochs; 600 clean images) and on the digits
(width 16, 10 epochs, the shipped options; 200 clean images). No threshold of `suspect` was set on any of them.
A backdoor that did not take (ASR below 0.9) is no backdoor to be found, and its row says so. Models that are there are
kept, in $ULRL_HOME/record/verdict_*, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ulrl  # noqa: E402
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
    for dataset, first, clean in (("digits", 2000, 12), ("fashion_mnist", 1000, 4))
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


def main() -> None:
    rows = []
    for dataset, attack, target, seed in MODELS:
        run, training, ratio = DATASETS[dataset]
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
        record = ulrl.load_record(folder)
        judged = json.loads((folder / "result.json").read_text())["after"]
        train, _ = load_dataset(dataset)
        model = load_model(record.model_name, record.num_classes, record.state_dict, train.spec.channels)
        clean = train.subset(clean_subset(len(train), ratio, seed))
        found = ulrl.suspect(model, normalise(clean.images, clean.spec), clean.labels, random_seed=seed)
        rows.append(
            {
                "dataset": dataset,
                "attack": attack,
                "seed": seed,
                "target": target,
                "acc": round(judged["acc"], 4),
                "asr": judged["asr"],
                "took": None if target is None else judged["asr"] >= TOOK,
                "verdict": found.verdict,
                "label": found.label,
                "reach": round(found.reach, 3),
                "z": round(found.z, 1),
                "z_highest": round(float(found.ranking.z.max()), 1),
                "seconds": round(found.report["seconds"]["total"], 1),
            }
        )
        print(rows[-1], flush=True)
        table = pd.DataFrame(rows).astype({"target": "Int64"})
        table.to_csv(ROOT / "bench" / "results" / "suspect_rates.csv", index=False)
    print(table.groupby(["dataset", "attack", "verdict"]).size())


if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", ulrl.Note)
    main()
