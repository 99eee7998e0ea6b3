"""Result files of runs that never were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def result(kind: str = "defense", **other: Any) -> dict[str, Any]:
    """A `result.json`; `acc`, `asr` and `ra` are those after, `options` are added to the usual ones."""
    after = {k: other.pop(k, v) for k, v in (("acc", 0.9), ("asr", 0.1), ("ra", 0.8))}
    usual = {"pratio": 0.1} if kind == "attack" else {"ratio": 0.01, "index": None}
    content = {
        "schema": 1, "kind": kind, "method": "ulrl" if kind == "defense" else "badnet", "record": "one",
        "attack": "badnet", "dataset": "digits", "model": "preactresnet18", "seed": 0,
        "clean_samples": 14 if kind == "defense" else None, "after": after | {"n_clean": 100, "n_poisoned": 90},
        "der": 0.9 if kind == "defense" else None, "flagged": [0] if kind == "defense" else [],
        "seconds": {"load": 0.5, "judge": 1.0, "total": 3.0}, "peak_memory_mb": 100.0, "evidence": {},
        "environment": {"torch": "2"},
    }  # fmt: skip
    if kind == "defense":
        content["before"] = {"acc": 0.95, "asr": 1.0, "ra": 0.0, "n_clean": 100, "n_poisoned": 90}
    return {**content, **other, "options": usual | other.get("options", {})}


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_record(record: Path, attack: str, defenses: dict[str, dict[str, Any]], **other: Any) -> Path:
    """A record with its picture and, by folder name, the results of its defenses.

    other: of all of them; but seed, took and options are the record's own.
    """
    own = {k: other.pop(k) for k in ("seed", "took", "options") if k in other}
    of = {"record": record.name, "attack": attack, **other}
    write(record, result("attack", method=attack, asr=0.99, ra=0.01, **of, **own))
    Image.new("RGB", (120, 48), (200, 30, 30)).save(record / "trigger_preview.png")
    (record / "attack_df.csv").write_text(",epoch,batch,train_epoch_loss_avg_over_batch,train_acc\n0,1,5,0.7,0.6\n")
    for name, about in defenses.items():
        write(record / "defense" / name, result(**{**of, **about}))
    return record
