"""How often `ulrl.suspect` is right on small models; writes bench/results/suspect_rates.csv.

python bench/suspect_rates.py

Trains 48 models on 20,000 images of Fashion-MNIST (PreAct-ResNet18 of width 8, 5 epochs), half of them clean and
half backdoored, each with a seed of its own, and asks about each with 600 clean images. The thresholds of `suspect`
were set on the first half of each; its rates are counted on the other, `unseen`. Models that are there are kept,
in $ULRL_HOME/record/suspect_*, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import sys
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

TARGETS = {  # of the models seen, and of the unseen
    "badnet": ((0, 3, 5, 7), (1, 4, 6, 9)),
    "blended": ((1, 4, 6, 9), (0, 3, 5, 7)),
    "sig": ((2, 8), (0, 5)),
    "trojannn": ((3, 9), (1, 6)),
}
MODELS = [
    *(("prototype", None, seed, seed >= 12) for seed in range(24)),
    *(
        (attack, target, 20 * number + target, unseen)
        for number, (attack, halves) in enumerate(TARGETS.items(), 1)
        for unseen, targets in enumerate(halves)
        for target in targets
    ),
]
CLEAN = "suspect_prototype_0"  # TrojanNN starts from it


def main() -> None:
    train, _ = load_dataset("fashion_mnist")
    rows = []
    for attack, target, seed, unseen in MODELS:
        name = f"suspect_{attack}_{seed}"
        folder = home() / "record" / name
        if not (folder / "result.json").exists():
            run_attack(
                ATTACKS[attack](random_seed=seed, **({} if target is None else {"attack_target": target})),
                AttackRun(
                    dataset="fashion_mnist",
                    width=8,
                    train_samples=20_000,
                    random_seed=seed,
                    save_folder_name=name,
                    clean_model=CLEAN if attack == "trojannn" else None,
                ),
                TrainOptions(epochs=5, lr=0.05, random_seed=seed),
                bar=False,
            )
        record = ulrl.load_record(folder)
        model = load_model(record.model_name, record.num_classes, record.state_dict)
        clean = train.subset(clean_subset(len(train), 0.01, seed))
        found = ulrl.suspect(model, normalise(clean.images, clean.spec), clean.labels, random_seed=seed)
        rows.append(
            {
                "unseen": bool(unseen),
                "attack": attack,
                "seed": seed,
                "target": target,
                "asr": json.loads((folder / "result.json").read_text())["after"]["asr"],
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
    print(table.groupby(["unseen", "attack", "verdict"]).size())


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
