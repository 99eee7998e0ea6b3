"""ULRL, FT and RNP on two other architectures; writes bench/results/architectures_fashion_mnist.csv.

python bench/architectures_fashion_mnist.py

Trains a narrow VGG19-BN and a narrow ViT with BadNets on 20,000 images of Fashion-MNIST, into
$ULRL_HOME/record/bench_<model>, and repairs each with 1% clean data (600 images), by ULRL with 5% too. What has its
result is kept, so a stopped run goes on where it was; to do one again after a change of options, remove its folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.pages import RESULTS, with_earlier, write_csv  # noqa: E402
from ulrl.files import home  # noqa: E402

TARGET = 7
ATTACK = f"--dataset fashion_mnist --train_samples 20000 --attack_target {TARGET}"
TRAINING = {
    "vgg19_bn": "--width 16 --lr 0.01 --batch_size 64 --epochs 12",
    "vit_tiny": "--width 48 --batch_size 64 --epochs 10 --amp false",
}
SEEDS = {("ulrl", 0.01): 3, ("ulrl", 0.05): 3, ("ft", 0.01): 1, ("rnp", 0.01): 1}
# ULRL's are in config/defense/ulrl/<model>.yaml; FT gets the same optimiser and rate for the ViT.
OPTIONS = {
    ("vgg19_bn", "ulrl", 0.05): "--relearn_lr 0.04",
    ("vit_tiny", "ulrl", 0.01): "--amp false",
    ("vit_tiny", "ulrl", 0.05): "--amp false",
    ("vit_tiny", "ft", 0.01): "--amp false --client_optimizer adamw --lr 0.001",
    ("vit_tiny", "rnp", 0.01): "--amp false",
}


def run(script: str, options: str) -> None:
    print(script, options, flush=True)
    command = [sys.executable, str(ROOT / script), *options.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def row(result: dict[str, Any]) -> dict[str, object]:
    figures = {
        f"{key}_{when}": round(100 * result[when][key], 2)
        for key in ("acc", "asr", "ra")
        for when in ("before", "after")
    }
    return {
        "model": result["model"],
        "defense": result["method"],
        "ratio": result["options"]["ratio"],
        "seed": result["seed"],
        **figures,
        "der": round(100 * result["der"], 2),
        "flagged": " ".join(map(str, result["flagged"])),
        "flagged_target": TARGET in result["flagged"] if result["method"] == "ulrl" else None,
        "seconds": round(result["seconds"]["total"] - result["seconds"]["judge"], 1),
    }


def main() -> None:
    for model, training in TRAINING.items():
        if not (home() / "record" / f"bench_{model}" / "result.json").exists():
            run("attack/badnet.py", f"{ATTACK} --model {model} {training} --save_folder_name bench_{model}")
    rows = []
    for (defense, ratio), seeds in SEEDS.items():
        for model in TRAINING:
            for seed in range(seeds):
                name = f"{defense}_{ratio:g}_seed{seed}"
                file = home() / "record" / f"bench_{model}" / "defense" / name / "result.json"
                if not file.exists():
                    chosen = (
                        f"--result_file bench_{model} --ratio {ratio} --random_seed {seed} --save_folder_name {name}"
                    )
                    run(f"defense/{defense}.py", f"{chosen} {OPTIONS.get((model, defense, ratio), '')}")
                rows.append(row(json.loads(file.read_text())))
                csv = RESULTS / "architectures_fashion_mnist.csv"
                table = with_earlier(csv, pd.DataFrame(rows), ["model", "defense", "ratio", "seed"])
                write_csv(csv, table)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
