"""What bench.quality measures, each a job of the sweep's scheduler: done once, kept, and one process each."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.reactivation import Material, reactivate
from ulrl.attacks.base import Attack
from ulrl.configure import configure_defense
from ulrl.data.datasets import clean_subset, dataset_spec, load_dataset
from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.defenses.finetuning import FineTuning
from ulrl.errors import UserError
from ulrl.files import home, whole_file
from ulrl.machine import pick_device
from ulrl.models import load_model
from ulrl.record import Record, load_defense_result, load_record
from ulrl.runs.common import write_json
from ulrl.runs.defending import run_defense
from ulrl.sweep.jobs import DefenseJob, Job
from ulrl.training import Monitor, judge
from ulrl.untrusted.torchfiles import load_torch

DIFFERENT = 1.0  # mean pixel values by which a trigger made again may differ from the recorded one


@dataclass(frozen=True, kw_only=True)
class RepairJob(DefenseJob):
    """A defense on a record, judged."""

    def work(self) -> None:
        assert self.needs is not None
        run = replace(self.run, result_file=self.needs, save_folder_name=self.folder.name, overwrite=True)
        run_defense(self.defense, load_record(self.needs), run, bar=False)


@dataclass(frozen=True, kw_only=True)
class MeasureJob(Job):
    """Something measured on a record: `result.json` alone."""

    record: str
    clean_nets: tuple[str, ...] = ()
    device_name: str = "auto"

    def work(self) -> None:
        start = time.perf_counter()
        figures = self.measure(Bench.of(self.record, self.device_name))
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "result.json") as partial:
            write_json(partial, {**figures, "seconds": {"total": round(time.perf_counter() - start, 3)}})

    def measure(self, bench: Bench) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class Bench:
    """A record and its data on the device."""

    record: Record
    spec: DatasetSpec
    train: ImageSet
    clean_test: ImageSet
    poisoned_test: PoisonedSet

    @classmethod
    def of(cls, name: str, device_name: str, dataset_path: str = "./data") -> Bench:
        record, device = load_record(name), pick_device(device_name)
        size = record.img_size[:2]
        spec = dataset_spec(record.dataset, dataset_path, size)
        train, test = load_dataset(record.dataset, dataset_path, size)
        record.check_test(test)
        return cls(record, spec, train.to(device), test.to(device), record.poisoned_test(spec).to(device))

    def net(self, record: Record | None = None, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """The record's own model, another record's, or one with other weights."""
        record = record or self.record
        state = record.state_dict if weights is None else weights
        model = load_model(record.model_name, record.num_classes, state, self.spec.channels)
        return model.to(self.clean_test.device).eval()


@dataclass(frozen=True, kw_only=True)
class CleanNetsJob(MeasureJob):
    """What clean nets make of the record's triggered images."""

    def measure(self, bench: Bench) -> dict[str, Any]:
        nets = {name: bench.net(load_record(name)) for name in self.clean_nets}
        return {
            "nets": [
                {"net": name, **asdict(judge(net, bench.clean_test, bench.poisoned_test))} for name, net in nets.items()
            ]
        }


@dataclass(frozen=True, kw_only=True)
class CleanNetsAgainJob(MeasureJob):
    """Clean nets, after each attack that is to bring a repaired model's backdoor back."""

    def measure(self, bench: Bench) -> dict[str, Any]:
        material, backdoored = Material.of(bench.train, bench.poisoned_test), bench.net()
        nets = [bench.net(load_record(name)) for name in self.clean_nets]
        # The clean net that the query attack spares is another one, where there is another.
        return {
            "nets": [reactivate(net, backdoored, nets[i - 1], bench.clean_test, material) for i, net in enumerate(nets)]
        }


@dataclass(frozen=True, kw_only=True)
class TruthJob(MeasureJob):
    """The record's model after fine-tuning with FT's published values on the clean samples, and on each of them with
    the true trigger and its true label: what a defender who knew the trigger would reach."""

    attack: Attack
    ratio: float
    subset: int

    def measure(self, bench: Bench) -> dict[str, Any]:
        clean = bench.train.subset(clean_subset(len(bench.train), self.ratio, self.subset))
        triggered = trigger_of(self.attack, bench).poison(clean.images, train=False)
        both = ImageSet(torch.cat([clean.images, triggered]), torch.cat([clean.labels] * 2), bench.spec)
        given = {"yaml_path": "config/defense/ft/published.yaml", "random_seed": self.subset}
        tuning, _ = configure_defense("ft", given, bench.record.dataset, bench.record.model_name, quiet=True)
        assert isinstance(tuning, FineTuning)
        model = bench.net()
        tuning.finetune(model, both, Monitor(), "finetune")
        return {"after": asdict(judge(model, bench.clean_test, bench.poisoned_test)), "clean_samples": len(clean)}


@dataclass(frozen=True, kw_only=True)
class ReactivationJob(MeasureJob):
    """A repaired model, after each attack that is to bring its backdoor back."""

    repaired: str

    def measure(self, bench: Bench) -> dict[str, Any]:
        weights = load_defense_result(home() / "record" / self.repaired, bench.record)
        spared = bench.net(load_record(self.clean_nets[0]))
        material = Material.of(bench.train, bench.poisoned_test)
        return {"asr": reactivate(bench.net(weights=weights), bench.net(), spared, bench.clean_test, material)}


def trigger_of(attack: Attack, bench: Bench) -> Attack:
    """The bench's attack with what it learnt for this record, so that it can poison more images.

    Raises:
        UserError: it does not make the record's images again.
    """
    learned = load_torch(bench.record.folder / "trigger.pt", inside=bench.record.folder)
    attack = attack.with_learned(**{k: v for k, v in learned.items() if isinstance(v, torch.Tensor)})
    some = bench.poisoned_test.subset(torch.arange(min(64, len(bench.poisoned_test))))
    again = attack.poison(bench.clean_test.subset(some.original_indices).images, train=False)
    if (again.float() - some.images.float()).abs().mean() > DIFFERENT:
        raise UserError(f"{bench.record.folder}: its trigger cannot be made again from trigger.pt")
    return attack
