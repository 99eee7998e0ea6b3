"""Defenses on the Fashion-MNIST records of attacks_fashion_mnist.py; writes bench/results/defenses_fashion_mnist.csv.

python bench/defenses_fashion_mnist.py [defense ...] [--ratio 0.05]

Narrow net, 1% clean data (600 images) unless given, each defense with its paper's values; `rnp:ours` with those of
config/defense/rnp/fashion_mnist.yaml, as its script uses them, and `abl:short` for eight epochs, where the
paper's 80 would take some 90 minutes a record. A run that has its result is kept, so a stopped one goes on
where it was; several may work side by side, each with defenses of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ulrl.configure import DefenseRun, defense_layers  # noqa: E402
from ulrl.defenses.base import DEFENSES, Defense  # noqa: E402
from ulrl.errors import UserError  # noqa: E402
from ulrl.files import home  # noqa: E402
from ulrl.options import Schema  # noqa: E402
from ulrl.record import load_record  # noqa: E402
from ulrl.runs.defending import run_once  # noqa: E402

RECORDS = ("badnet", "blended", "sig", "lf", "wanet", "inputaware", "trojannn", "ssba")
FAMILY = ("ulrl", "rnp", "tsbd", "fst", "ft", "ft-sam")  # three seeds with 1%; everything else has one
BASELINES = ("bnp", "clp", "fp", "nad", "i-bau", "nc", "anp", "npd", "sau", "detect_label", "rnp:ours", "abl:short")
RATIOS = (0.01, 0.05)
SHORT = {"tuning_epochs": 3, "finetuning_epochs": 5, "unlearning_epochs": 5}


def folder(defense: str, ratio: float, seed: int) -> str:
    return f"{defense.replace(':', '_')}_{ratio:g}_seed{seed}"


def options(defense: str, seed: int) -> Defense:
    name, _, variant = defense.partition(":")
    cls = DEFENSES[name]
    schema = Schema(DefenseRun, cls)
    ours = defense_layers(schema, name, "fashion_mnist", "preactresnet18")
    layers = {"": [], "ours": ours, "short": [("", SHORT)]}[variant]
    return schema.merge(*layers, ("", {"random_seed": seed}))[0].build(cls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defenses", nargs="*", metavar="defense", default=[*FAMILY, *BASELINES])
    parser.add_argument("--ratio", type=float, choices=RATIOS, default=RATIOS[0])
    args = parser.parse_args()
    for seed in range(3):
        for defense in args.defenses:
            for attack in RECORDS if seed == 0 or (defense in FAMILY and args.ratio == RATIOS[0]) else ():
                record = load_record(home() / "record" / f"bench_{attack}")
                name = folder(defense, args.ratio, seed)
                run = DefenseRun(ratio=args.ratio, random_seed=seed, save_folder_name=name)
                try:
                    after = run_once(options(defense, seed), record, run)[1]["after"]
                    print(defense, attack, seed, {k: round(after[k], 4) for k in ("acc", "asr", "ra")}, flush=True)
                except UserError as error:
                    print(defense, attack, seed, error, flush=True)
    rows = []
    for attack in RECORDS:
        for defense in (*FAMILY, *BASELINES):
            for ratio in RATIOS:
                for seed in range(3):
                    name = folder(defense, ratio, seed)
                    file = home() / "record" / f"bench_{attack}" / "defense" / name / "result.json"
                    if file.is_file():
                        rows.append(row(attack, defense, ratio, json.loads(file.read_text())))
    pd.DataFrame(rows).to_csv(ROOT / "bench" / "results" / "defenses_fashion_mnist.csv", index=False)


def row(attack: str, defense: str, ratio: float, result: dict[str, dict[str, float]]) -> dict[str, object]:
    figures = {
        f"{when}_{key}": round(100 * result[when][key], 2)
        for when in ("before", "after")
        for key in ("acc", "asr", "ra")
    }
    return {
        "attack": attack,
        "defense": defense,
        "ratio": ratio,
        "seed": result["seed"],
        **figures,
        "der": round(100 * float(result["der"]), 2),  # type: ignore[arg-type]
        "flagged": " ".join(map(str, result["flagged"])),
        "detected_label": result["evidence"].get("detected_label"),
        "seconds": round(result["seconds"]["total"] - result["seconds"]["judge"], 1),
    }


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
