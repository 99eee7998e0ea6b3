"""What a run is given: the dataclasses' defaults, over them options files, over those what the user said."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, ClassVar, TypeVar

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.detectors.base import DETECTORS, Detector
from ulrl.errors import UserError
from ulrl.files import home
from ulrl.machine import NoSuchDevice, pick_device
from ulrl.options import IGNORED, Schema, Settings, option
from ulrl.shipped import options_file, shipped_files
from ulrl.training import TrainOptions

log = logging.getLogger(__name__)

Layer = tuple[str, dict[str, Any]]  # an options file and its values


@dataclass(frozen=True)
class RunOptions:
    """What all runs have in common."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    dataset_path: str = option(
        "./data", "folder that holds <dataset>/; for the data set `folder`, that folder", source="BackdoorBench"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU where there is one")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)


@dataclass(frozen=True)
class EpochRun(RunOptions):
    """What attacks and defenses have in common: their models are judged as they change."""

    eval_every: int = option(0, "judge on the test sets every N epochs too; 0: only at start and end", low=0)


@dataclass(frozen=True)
class PreviewRun(EpochRun):
    """What data and what network an attack is made for."""

    yaml_path: str | None = option(
        None, "options file, or the name of a shipped one; else attack/prototype/<dataset> and /<model>"
    )
    bd_yaml_path: str | None = option(
        None, "the attack's own options file, or the name of a shipped one; else attack/<attack>/default and /<dataset>"
    )
    dataset: str = option("digits", "data set", source="embedded, needs no download")
    img_size: tuple[int, ...] = option(
        (), "--dataset folder: height and width that its images are resized to, or one number for both; 64 if not given"
    )
    train_samples: int | None = option(None, "train on a random subset of this many images", low=2)
    model: str = option("preactresnet18", "architecture", source="BackdoorBench")
    width: int | None = option(
        None, "channels of the first layer (of a ViT, the embedding's size), for a narrow net; the architecture's own",
        source="BackdoorBench's nets", low=1,
    )  # fmt: skip
    pretrained: bool = option(False, "start from torchvision's ImageNet weights, all but the head")
    clean_model: str | None = option(
        None, "record of a clean model of that architecture, for an attack that needs one; else it trains its own"
    )


@dataclass(frozen=True)
class AttackRun(PreviewRun):
    """What to train and where the record goes."""

    save_folder_name: str | None = option(None, "name of the record; else made from attack, data set and time")
    overwrite: bool = option(False, "replace a record of that name")


@dataclass(frozen=True)
class RecordRun(RunOptions):
    """Which record to work on, and with how many clean samples."""

    result_file: str = option("", "the record: its name under record/, or the path of its folder", source="user")
    yaml_path: str | None = option(
        None, "options file, or the name of a shipped one; else defense/<defense>/<dataset> and /<model>"
    )
    dataset: str | None = option(None, "data set; the record's, another is an error")
    model: str | None = option(None, "architecture; the record's, another is an error")
    ratio: float = option(
        0.01, "share of the clean training images that the defender has", source="ULRL paper", low=0, high=1
    )
    index: str | None = option(None, "text file of the clean training images' indices to use, instead of ratio")
    save_folder_name: str | None = option(
        None, "folder of the results, under the record's defense/; the defense's name"
    )
    overwrite: bool = option(False, "replace the results of that name")


@dataclass(frozen=True)
class DefenseRun(RecordRun, EpochRun):
    """Which record to repair, and what to report."""

    report_oracle: bool = option(
        False, "afterwards, judge every strength the defense could have chosen too; what the test set would choose "
        "is reported as `oracle` beside the result, never in its place",
    )  # fmt: skip


@dataclass(frozen=True)
class DetectionRun(RecordRun):
    """Whose poisoned training set to search, and how much of it."""

    yaml_path: str | None = option(
        None, "options file, or the name of a shipped one; else detection/<method>/<dataset> and /<model>"
    )
    save_folder_name: str | None = option(
        None, "folder of the results, under the record's detection/; the method's name"
    )
    images: int | None = option(None, "search a random draw of this many training images; all of them", low=2)


Run = TypeVar("Run", bound=PreviewRun)


def attack_schema(name: str, run: type[PreviewRun] = AttackRun) -> Schema:
    """The options of an attack, its run and its training."""
    return Schema(run, ATTACKS[name], TrainOptions)


def defense_schema(name: str) -> Schema:
    """The options of a defense and its run."""
    return Schema(DefenseRun, DEFENSES[name])


def detection_schema(name: str) -> Schema:
    """The options of a sample detector and its run."""
    return Schema(DetectionRun, DETECTORS[name])


def configure_attack(
    name: str, given: Mapping[str, Any], run: type[Run], *, quiet: bool = False
) -> tuple[Attack, Run, TrainOptions]:
    """An attack, its run and its training; `given`, what the user said, overrides the options files.

    Which files those are is logged, unless `quiet`.

    Raises:
        UserError: a file that cannot be used, an unknown key or an unfit value.
    """
    schema = attack_schema(name, run)
    settings = _merged(schema, attack_layers(schema, name, given), given, quiet)
    if not quiet and not ATTACKS[name].chooses:
        _tell_idle(settings, ("pratio", "p_num"), f"{name}, which poisons no training image for good")
    return settings.build(ATTACKS[name]), settings.build(run), settings.build(TrainOptions)


def configure_defense(
    name: str, given: Mapping[str, Any], dataset: str, model: str, *, quiet: bool = False
) -> tuple[Defense, DefenseRun]:
    """A defense and its run, for a record of that data set and architecture; as `configure_attack`."""
    schema = defense_schema(name)
    settings = _merged(schema, defense_layers(schema, name, dataset, model, given.get("yaml_path")), given, quiet)
    if not quiet and DEFENSES[name].in_training:
        _tell_idle(settings, ("ratio", "index"), f"{name}, which is given the poisoned training set")
    return settings.build(DEFENSES[name]), settings.build(DefenseRun)


def configure_detector(
    name: str, given: Mapping[str, Any], dataset: str, model: str, *, quiet: bool = False
) -> tuple[Detector, DetectionRun]:
    """A sample detector and its run, for a record of that data set and architecture; as `configure_attack`."""
    schema = detection_schema(name)
    files = _record_layers(schema, f"detection/{name}", dataset, model, given.get("yaml_path"))
    settings = _merged(schema, files, given, quiet)
    return settings.build(DETECTORS[name]), settings.build(DetectionRun)


def options_of(*parts: Any) -> dict[str, Any]:
    """The options in these dataclasses, as given or by default."""
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.metadata}


def _merged(schema: Schema, files: list[Layer], given: Mapping[str, Any], quiet: bool) -> Settings:
    settings, ignored = schema.merge(*files, ("given", given))
    for path, _ in files:
        if path and not quiet:
            log.info("options from %s", path)
    if ignored and not quiet:
        log.info("accepted for BackdoorBench's sake, without a meaning here: %s", ", ".join(ignored))
    device, source = settings.values.get("device"), settings.origin.get("device")
    if device and source != "given":
        try:
            pick_device(device)
        except NoSuchDevice:
            log.warning("device %s of %s is not on this machine: using the CPU", device, source)
            return Settings({**settings.values, "device": "cpu"}, settings.origin)
        except UserError as error:
            raise UserError(f"{source}: {str(error).removeprefix('--')}") from None
    return settings


def _tell_idle(settings: Settings, keys: tuple[str, ...], where: str) -> None:
    """Say which of these options were given in vain; the defaults, and what was said to be none, are not."""
    if idle := [key for key in keys if key in settings.origin and settings.values[key] is not None]:
        log.info("without an effect on %s: %s", where, ", ".join(idle))


# The options files


DEFENSE_ONLY = {
    "target_label": "attack_target",
    "poison_rate": "pratio",
    "target_type": "attack_label_trans",
    "pretrain_model_path": "clean_model",
}


def attack_layers(schema: Schema, name: str, flags: Mapping[str, Any]) -> list[Layer]:
    """What an attack's options files say: of the training, then of the attack, and over that of the attack on that
    data set; `flags` may name others in place of either pair. The data set and the net are those of `flags`, else of
    the attack's named file, which wins over those of the training.

    Raises:
        UserError: a file that cannot be used, or a name that would have no effect.
    """
    named, own = flags.get("yaml_path") is not None, [yaml_layer(schema, flags.get("bd_yaml_path"))]
    said = {**own[0][1], **flags}
    if named:
        training = [yaml_layer(schema, flags["yaml_path"])]
    else:
        usual = said.get("dataset", PreviewRun.dataset)
        training = _usual_layers(schema, "attack/prototype", usual, said.get("model"))
    if flags.get("bd_yaml_path") is None:
        layers = (flags, *(values for _, values in reversed(training)))
        dataset = next((v["dataset"] for v in layers if "dataset" in v), PreviewRun.dataset)
        own = [_usual_layer(schema, f"attack/{name}", "default")]
        if name != "prototype":  # whose files are those of the training
            own.append(_usual_layer(schema, f"attack/{name}", dataset))
        if named:  # what the user named for the training says how to train
            trains = {f.name for f in fields(TrainOptions)}
            own = [(path, {k: v for k, v in values.items() if k not in trains}) for path, values in own]
    files = [*training, *own]
    for other, ours in DEFENSE_ONLY.items():  # in a defense's file they only describe the record
        if any(other in layer for layer in (flags, *(values for _, values in files))):
            raise UserError(f"{other} would have no effect on an attack; its name here is {ours}")
    return files


def defense_layers(schema: Schema, name: str, dataset: str, model: str, given: str | None = None) -> list[Layer]:
    """What the options files of a defense say: the one named, or the usual ones for data set and model."""
    return _record_layers(schema, f"defense/{name}", dataset, model, given)


def _record_layers(schema: Schema, folder: str, dataset: str, model: str, given: str | None) -> list[Layer]:
    return _usual_layers(schema, folder, dataset, model) if given is None else [yaml_layer(schema, given)]


def yaml_layer(schema: Schema, given: str | None) -> Layer:
    """The options of the file that the user named, if any."""
    if given is None:
        return "", {}
    file = options_file(given)
    return str(file), schema.yaml(file)


def _usual_layer(schema: Schema, folder: str, name: str | None) -> Layer:
    """The options of a file in the user's `config/`, else of the shipped one of that name, where there is one.

    name: a record's perhaps, which could lead anywhere.
    """
    own = home() / "config" / folder / f"{name}.yaml"
    inside = name is not None and PurePath(name).name == name
    file = own if inside and os.path.isfile(own) else shipped_files().get(f"{folder}/{name}")
    return (str(file), schema.yaml(file)) if file else ("", {})


def _usual_layers(schema: Schema, folder: str, dataset: str, model: str | None) -> list[Layer]:
    """The data set's file and, over it, the architecture's, of those that exist.

    model: the user's or the record's; else the file's own. What a file says of layers is of its own model.
    """
    path, values = _usual_layer(schema, folder, dataset)
    if model is None:
        model = values.get("model")
    elif values.get("model", model) != model:
        values = {k: v for k, v in values.items() if k not in ("model", "width", "linear_name")}
    return [(path, values), _usual_layer(schema, folder, model)]
