"""What a record's model and a repaired one see in the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ulrl.data.datasets import load_dataset
from ulrl.errors import UserError
from ulrl.machine import pick_device
from ulrl.models import load_model
from ulrl.models.head import find_head
from ulrl.record import load_defense_result, load_record
from ulrl.runs.given import record_spec
from ulrl.seeds import generator
from ulrl.training import head_inputs


def penultimate_features(
    folder: Path, dataset_path: str, device: str, samples: int
) -> tuple[dict[str, np.ndarray], np.ndarray, Sequence[str]]:
    """Penultimate features before and after the repair in `folder`, a defense's folder in a record.

    Of `samples` clean test images drawn at random and a fifth as many triggered ones: by "before" and "after"
    float32 [N, D]; the class of each clean sample, -1 for the triggered ones, int64 [N]; the classes' names.

    Raises:
        UserError: `folder` is none, or the record, its data or the repaired model cannot be read.
    """
    folder = folder.absolute()
    if folder.parent.name != "defense":
        raise UserError(f"{folder} is not a defense's folder; name one, such as record/NAME/defense/ulrl")
    record = load_record(folder.parent.parent)
    repaired = load_defense_result(folder, record)
    spec, on = record_spec(record, dataset_path), pick_device(device)
    _, clean = load_dataset(record.dataset, dataset_path, record.img_size[:2])
    record.check_test(clean)
    triggered = record.poisoned_test(spec)
    draw = generator(0, "features")
    clean = clean.subset(torch.randperm(len(clean), generator=draw)[:samples]).to(on)
    triggered = triggered.subset(torch.randperm(len(triggered), generator=draw)[: samples // 5]).to(on)
    if not len(triggered):
        raise UserError(f"{record.folder} has no triggered images, so there is nothing to compare")
    features = {}
    for title, weights in (("before", record.state_dict), ("after", repaired)):
        model = load_model(record.model_name, record.num_classes, weights, spec.channels).to(on)
        _, head = find_head(model, record.num_classes)
        features[title] = torch.cat([head_inputs(model, head, part).cpu() for part in (clean, triggered)]).numpy()
    groups = torch.cat([clean.labels.cpu(), torch.full((len(triggered),), -1)]).numpy()
    return features, groups, spec.class_names
