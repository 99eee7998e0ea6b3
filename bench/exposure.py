"""What unlearning the clean task leaves: which label, by clean nets too, and how near an inverted trigger comes.

    python -m bench.exposure --records badnet3,clean0 --triggers badnet3 --picture triggers.png

For each record and each way of unlearning: the label that most clean samples are then given, its share, the spread of
the shares, and what is left of ASR. For those of `--triggers`: Neural Cleanse on the original beside the same inversion
on the model exposed by EBYD's way, for the true target, with a fifth of the clean samples; the last one is drawn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulrl.configure import configure_defense
from ulrl.data.datasets import clean_subset, load_dataset
from ulrl.defenses.recover_trigger import Calibrated
from ulrl.files import whole_file
from ulrl.models import load_model
from ulrl.record import load_record
from ulrl.report.plots import recovered_triggers
from ulrl.runs.triggers import TRIGGER_FILE, judge_trigger
from ulrl.training import Monitor, predict

WAYS = (("detect_label", 0.01), ("detect_label", 0.001), ("ebyd", 1e-4))  # and its rate; the first is RNP's release
RATIO = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, help="names under record/, with commas between")
    parser.add_argument("--triggers", default="", help="those whose trigger is inverted")
    parser.add_argument("--picture", help="file to draw the last one to")
    given = parser.parse_args()
    for name in given.records.split(","):
        found = exposure(name, name in given.triggers.split(","))
        if found and given.picture:
            with whole_file(Path(given.picture)) as partial:
                recovered_triggers(partial, found, f"triggers found in {name}")


def exposure(name: str, invert: bool) -> dict[str, dict[str, np.ndarray]]:
    """Print the lines of a record; the triggers that were found, by what found them."""
    record = load_record(name)
    train, test = load_dataset(record.dataset)
    clean = train.subset(clean_subset(len(train), RATIO, 0))
    few = train.subset(clean_subset(len(train), RATIO / 5, 0))
    model = load_model(record.model_name, record.num_classes, record.state_dict, clean.spec.channels)
    poisoned = record.poisoned_test(clean.spec)
    some, found = poisoned.subset(torch.arange(min(300, len(poisoned)))), {}
    for way, rate in WAYS:
        method: Any = configure_defense(
            way, {"unlearning_lr": rate}, record.dataset, record.model_name, quiet=True
        )[0]  # fmt: skip
        left = method.unlearn(model, clean, Monitor())
        shares = predict(left.model, clean).bincount(minlength=record.num_classes).double() / len(clean)
        asr = (predict(left.model, some) == some.labels).double().mean().item()  # not a number for a clean net
        print(
            f"{name}, {way} at {rate:g}: label {left.label}, share {left.label_share:.3f}, spread "
            f"{shares.std(correction=0):.3f}, accuracy {left.accuracy:.3f} in epoch {left.epochs}, ASR {asr:.3f}",
            flush=True,
        )
        if not invert or way != "ebyd":
            continue
        target = int(poisoned.labels[0])
        subjects = {"original (NC)": model, "exposed": Calibrated(left.model, few, True)}
        for title, subject in subjects.items():
            triggers = method.invert(subject, few, Monitor(), [target]).triggers(few)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / TRIGGER_FILE
                judged = judge_trigger(model, triggers, [target], test, poisoned, True, file)
                with np.load(file) as arrays:
                    found[title] = dict(arrays)
            print(f"    {title}: {judged}, mask {triggers[target].mask.sum():.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
