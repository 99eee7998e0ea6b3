"""How often `ulrl.suspect` is right on small models; writes bench/results/suspect_rates.csv.

python bench/suspect_rates.py

Trains 24 models on 20,000 images of Fashion-MNIST (PreAct-ResNet18 of width 8, 5 epochs), 12 of them clean and 12
backdoored, each with a seed of its own, and asks about each with 600 clean images. Models that are there are
kept, in $ULRL_HOME/record/suspect_*, so a stopped run goes on where it was.
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
from ulrl.data.batches import normalise  # noqa: E402
from ulrl.data.datasets import clean_subset, load_dataset  # noqa: E402
from ulrl.files import home  # noqa: E402
from ulrl.models import load_model  # noqa: E402
from ulrl.runs.attacking import AttackRun, run_attack  # noqa: E402
from ulrl.training import TrainOptions  # noqa: E402

CLEAN = [("prototype", 0, seed) for seed in range(12)]
BACKDOORED = [
    *(("badnet", target, 20 + target) for target in (0, 3, 5, 7)),
    *(("blended", target, 40 + target) for target in (1, 4, 6, 9)),
    *(("sig", target, 60 + target) for target in (2, 8)),
    *(("wanet", target, 80 + target) for target in (3, 9)),
]


def main() -> None:
    train, _ = load_dataset("fashion_mnist")
    rows = []
    for attack, target, seed in [row for pair in zip(CLEAN, BACKDOORED, strict=True) for row in pair]:
        name = f"suspect_{attack}_{seed}"
        folder = home() / "record" / name
        if not (folder / "result.json").exists():
            options = {} if attack == "prototype" else {"attack_target": target}
            run_attack(
                ATTACKS[attack](random_seed=seed, **options),
                AttackRun(
                    dataset="fashion_mnist", width=8, train_samples=20_000, save_folder_name=name, random_seed=seed
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
                "attack": attack,
                "seed": seed,
                "target": None if attack == "prototype" else target,
                "asr": json.loads((folder / "result.json").read_text())["after"]["asr"],
                "verdict": found.verdict,
                "label": found.label,
                "reach": round(found.reach, 3),
                "z": round(found.z, 1),
                "z_highest": round(found.ranking.z.max(), 1),
                "seconds": round(found.report["seconds"]["total"], 1),
            }
        )
        found.ranking.to_csv(f"/tmp/sus/rank_{name}.csv")
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows).astype({"target": "Int64"})
    table.to_csv(ROOT / "bench" / "results" / "suspect_rates.csv", index=False)
    print(table.groupby([table.target.notna().rename("backdoored"), "verdict"]).size())


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
