"""EBYD's claim, put to the test: is a defense better on the exposed model than on the original?

    python -m bench.exposed --records badnet_scenes,blended_scenes --defenses ft,nad

Each record's model is exposed as `defense/ebyd.py` would do it; each defense then repairs the original and the exposed
model with the same clean samples and the same seed, and both are judged. The lines go to `results/exposed.csv`, too.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd
from torch import nn

from bench.pages import RESULTS, with_earlier, write_csv
from ulrl.configure import configure_defense
from ulrl.data.datasets import clean_subset, dataset_spec, load_dataset
from ulrl.defenses.exposing import Exposing
from ulrl.models import load_model
from ulrl.record import load_record
from ulrl.seeds import global_stream
from ulrl.training import Monitor, judge


def lines(name: str, defenses: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """ACC, ASR and RA of the record's two models before and after each defense."""
    record = load_record(name)
    spec = dataset_spec(record.dataset)
    train, clean_test = load_dataset(record.dataset)
    poisoned = record.poisoned_test(spec)
    exposing, run = configure_defense("ebyd", {"random_seed": seed}, record.dataset, record.model_name, quiet=True)
    clean = train.subset(clean_subset(len(train), run.ratio, seed))
    original = load_model(record.model_name, record.num_classes, record.state_dict, spec.channels)
    assert isinstance(exposing, Exposing)
    models = {"original": original, "exposed": exposing.unlearn(original, clean, Monitor()).model}
    for begins, model in models.items():
        for defense in ["none", *defenses]:
            repaired: nn.Module = copy.deepcopy(model)
            if defense != "none":
                method, _ = configure_defense(
                    defense, {"random_seed": seed}, record.dataset, record.model_name, quiet=True
                )
                with global_stream(seed, "repair"):
                    repaired = method.run(repaired, clean, Monitor()).model
            figures = asdict(judge(repaired, clean_test, poisoned))
            yield {"record": name, "model": begins, "defense": defense, "seed": seed, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, help="names under record/, with commas between")
    parser.add_argument("--defenses", default="ft,nad", help="with commas between")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    rows = []
    for record in given.records.split(","):
        for seed in range(given.seeds):
            for row in lines(record, given.defenses.split(","), seed):
                rows.append(row)
                print(pd.DataFrame([row]).round(4).to_csv(index=False, header=len(rows) == 1), end="", flush=True)
    file = RESULTS / "exposed.csv"
    write_csv(file, with_earlier(file, pd.DataFrame(rows), ("record", "model", "defense", "seed")))


if __name__ == "__main__":
    main()
