"""Train every attack on Fashion-MNIST with the narrow net, and write bench/results/attacks_fashion_mnist.csv.

python bench/attacks_fashion_mnist.py [name ...]

Records go to $ULRL_HOME/record/bench_<name>; those that are there are kept, so a stopped run goes on where it
was. The clean model comes first: it is the accuracy to compare with, and what LC, LF and TrojanNN compute
their triggers against. About a quarter of an hour of two CPU cores for each six attacks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.pages import RESULTS, with_earlier, write_csv  # noqa: E402
from ulrl.files import home  # noqa: E402

COMMON = "--dataset fashion_mnist --width 16 --epochs 4".split()
FEW = "--train_samples 20000 --epochs 8"  # for those that train a generator

# name: (attack, what differs from the attack's defaults)
RUNS = {
    "clean": ("prototype", ""),
    "badnet": ("badnet", ""),
    "blended": ("blended", ""),
    "sig": ("sig", ""),
    "lc": ("lc", "--clean_model bench_clean --mark_scale 2"),
    "lf": ("lf", "--clean_model bench_clean"),
    "ssba": ("ssba", FEW),
    "trojannn": ("trojannn", "--clean_model bench_clean"),
    "wanet": ("wanet", ""),
    "inputaware": ("inputaware", "--train_samples 20000 --epochs 10 --clean_train_epochs 3"),
    "bpp": ("bpp", "--squeeze_num 3"),
    "lira": ("lira", "--train_samples 20000 --epochs 5 --both_train_epochs 3 --eps 0.05 --lr_atk 0.002"),
    "blind": ("blind", "--weight_loss_balance_mode fixed --epochs 3"),
    "ftrojann": ("ftrojann", "--magnitude 200"),
    "ctrl": ("ctrl", "--magnitude 300 --pratio 0.6"),
    "adaptive_blend": ("adaptive_blend", "--pratio 0.01 --cover_rate 0.01"),
    "adaptive_patch": ("adaptive_patch", "--pratio 0.06 --cover_rate 0.03"),
    "tact": ("tact", "--pratio 0.05 --cover_rate 0.02"),
    "sam": ("badnet", "--sam_rho 0.05 --epochs 3"),
}


def train(name: str) -> None:
    attack, options = RUNS[name]
    record = home() / "record" / f"bench_{name}"
    if (record / "result.json").exists():
        return
    command = [sys.executable, str(ROOT / "attack" / f"{attack}.py"), *COMMON, *options.split()]
    command += ["--save_folder_name", record.name]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def row(name: str) -> dict[str, object]:
    attack, options = RUNS[name]
    result = json.loads((home() / "record" / f"bench_{name}" / "result.json").read_text())
    seconds = {stage: s for stage, s in result["seconds"].items() if stage not in ("load", "judge", "total")}
    hidden = result["evidence"]["perceptibility"] or {}
    return {
        "name": name,
        "attack": attack,
        "options": " ".join([*COMMON, *options.split()]),
        **{key: value and round(100 * value, 2) for key, value in result["after"].items() if key[:2] != "n_"},
        **{key: result["evidence"][key] for key in ("train_samples", "poisoned", "covers")},
        **{key: value and round(value, 4) for key, value in hidden.items()},
        "seconds_total": round(result["seconds"]["total"], 1),
        "seconds_stages": " ".join(f"{stage}={s:.1f}" for stage, s in seconds.items()),
        "threads": result["environment"]["threads"],
    }


def main() -> None:
    for name in ["clean", *(sys.argv[1:] or RUNS)]:
        train(name)
    done = [name for name in RUNS if (home() / "record" / f"bench_{name}" / "result.json").exists()]
    table = pd.DataFrame([row(name) for name in done])
    table.insert(6, "acc_below_clean", (table.acc.iloc[0] - table.acc).round(2))
    file = RESULTS / "attacks_fashion_mnist.csv"
    write_csv(file, with_earlier(file, table, ["name"]))
    print(table.drop(columns=["options", "seconds_stages"]).to_string(index=False))


if __name__ == "__main__":
    main()
