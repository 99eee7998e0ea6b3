"""A sweep file: the grid of runs that it names, as jobs."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ulrl.attacks.base import ATTACKS
from ulrl.configure import (
    AttackRun,
    DefenseRun,
    attack_schema,
    configure_attack,
    configure_defense,
    defense_schema,
    options_of,
)
from ulrl.data.datasets import DATASETS, dataset_spec
from ulrl.defenses.base import DEFENSES
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.models import architecture_of
from ulrl.models.architectures import ARCHITECTURES
from ulrl.record_folder import record_folder, result_file
from ulrl.registry import nearest
from ulrl.shipped import options_file
from ulrl.sweep.jobs import AttackJob, DefenseJob, Job
from ulrl.untrusted.opening import MIB, opened
from ulrl.untrusted.texts import read_yaml

SHORT_NAMES = {"target": "attack_target", "seeds": "random_seed"}
WORDS = (*SHORT_NAMES, "overrides", "exclude")  # of a section, besides options
OURS = ("save_folder_name", "overwrite", "result_file")  # options that a sweep decides
# What does not change a result, and so is no part of a job's name.
WHERE = {*OURS, "device", "dataset_path", "yaml_path", "bd_yaml_path"}

MOST = 100_000  # runs of a sweep
NAMED = 8192 * MIB  # bytes of a file that a job is named by; a larger one, which may be all holes, takes minutes

Cell = dict[str, Any]  # one choice on each axis


@dataclass(frozen=True)
class Section:
    """`attacks` or `defenses` of a sweep file.

    axes: option to its values. overrides: (which cells, options) pairs, later ones winning. exclude: which cells.
    A cell is meant when, for each key, its value is one of those listed.
    """

    axes: dict[str, list[Any]]
    overrides: list[tuple[dict[str, list[Any]], Cell]]
    exclude: list[dict[str, list[Any]]]

    def __len__(self) -> int:
        """The number of cells, before any is excluded."""
        return math.prod(map(len, self.axes.values()))

    def cells(self, beside: Cell) -> Iterator[tuple[Cell, Cell]]:
        """Each cell that is not excluded, and its options. Rules may also name what is in `beside`."""
        for values in itertools.product(*self.axes.values()):
            cell = dict(zip(self.axes, values, strict=True))
            whole = {**beside, **cell}
            if not any(_meant(rule, whole) for rule in self.exclude):
                options = dict(cell)
                for rule, given in self.overrides:
                    if _meant(rule, whole):
                        options |= given
                yield cell, options


def read_sweep(path: str) -> list[Job]:
    """The jobs of a sweep file, attacks first, each once, all their options checked.

    Raises:
        UserError: a file that cannot be used, an unknown key, method or data set, or an unfit value.
    """
    file = options_file(path)
    content = read_yaml(file)
    try:
        return _jobs(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _jobs(content: Mapping[Any, Any]) -> list[Job]:
    _known(content, ("attacks", "defenses"), "the file")
    attacks = _section(content.get("attacks"), "attacks", ("attack", "dataset"))
    defenses = None
    if "defenses" in content:
        beside = [key for key in attacks.axes if key != "random_seed"]  # which the defenses have of their own
        defenses = _section(content["defenses"], "defenses", ("defense",), (*beside, "model"))
    count = len(attacks) * (1 + (len(defenses) if defenses else 0))  # a record, and what repairs it
    if count > MOST:
        raise UserError(f"its lists make {count} runs, more than the {MOST} that a sweep may have; divide it")
    jobs: dict[str, Job] = {}
    for cell, options in attacks.cells({}):
        record = _attack_job(options)
        jobs.setdefault(record.name, record)
        if defenses:
            for _, given in defenses.cells({**{k: cell[k] for k in beside}, "model": record.run.model}):
                job = _defense_job(record, given)
                jobs.setdefault(job.name, job)
    return sorted(jobs.values(), key=lambda job: job.needs is not None)  # as sorting is stable, else as they come


def _section(content: Any, where: str, required: Sequence[str], beside: Sequence[str] = ()) -> Section:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a section with a mapping of option: value or option: [values]")
    for key in map(str, content):  # which as options would be told by their long names alone
        if key not in WORDS and (close := difflib.get_close_matches(key, WORDS, n=1, cutoff=0.8)):
            raise UserError(f"unknown key {key!r} in {where}; did you mean {close[0]!r}?")
    given = _by_name(content)
    if len(given) < len(content):
        raise UserError(f"{where} names an option twice: target is attack_target, seeds is random_seed")
    overrides, exclude = given.pop("overrides", None) or [], given.pop("exclude", None) or []
    if type(count := content.get("seeds")) is int and count > 0:
        if count > MOST:
            raise UserError(f"{where}: {count} seeds are more than the {MOST} runs that a sweep may have")
        given["random_seed"] = list(range(count))  # as --seeds of `ulrl compare`
    axes = {key: _values(key, value, where) for key, value in given.items()}
    for key in required:
        if key not in axes:
            raise UserError(f"{where}: the key {key} is missing")
    known = tuple(dict.fromkeys((*axes, *beside)))
    if not isinstance(overrides, list) or not all(
        isinstance(o, dict) and set(o) == {"where", "set"} for o in overrides
    ):
        raise UserError(f"{where}: overrides must be a list of mappings, each with where: and set:")
    if not isinstance(exclude, list):
        raise UserError(f"{where}: exclude must be a list of mappings")
    return Section(
        axes,
        [(_rule(o["where"], known, f"overrides of {where}"), _options(o["set"], where)) for o in overrides],
        [_rule(rule, known, f"exclude of {where}") for rule in exclude],
    )


def _values(key: str, value: Any, where: str) -> list[Any]:
    if key in OURS:
        raise UserError(f"{where}: {key} is for the sweep to choose; leave it out")
    values = value if isinstance(value, list) else [value]
    if not values or any(v is None or isinstance(v, dict) for v in values):
        raise UserError(f"{where}: {key} must be a value or a list of values")
    return values


def _rule(rule: Any, known: Sequence[str], where: str) -> dict[str, list[Any]]:
    if not isinstance(rule, dict) or not rule:
        raise UserError(f"{where}: {rule!r} is no mapping of option: value that says which runs are meant")
    named = _by_name(rule)
    _known(named, known, where)
    values = {key: value if isinstance(value, list) else [value] for key, value in named.items()}
    known_names = {"attack": [*ATTACKS], "defense": [*DEFENSES], "dataset": [*DATASETS], "model": [*ARCHITECTURES]}
    for key, names in known_names.items():
        for name in map(str, values.get(key, ())):
            if name not in names:  # a misspelt one is told, not passed over
                raise UserError(f"unknown {key} {name!r} in {where}{nearest(name, names)}")
    return values


def _options(given: Any, where: str) -> Cell:
    if not isinstance(given, dict):
        raise UserError(f"{where}: set: of overrides must be a mapping of option: value")
    options = _by_name(given)
    for key in ("attack", "defense", "dataset", *OURS):
        if key in options:
            raise UserError(f"{where}: overrides cannot set {key}")
    return options


def _by_name(given: Mapping[Any, Any]) -> Cell:
    return {SHORT_NAMES.get(str(key), str(key)): value for key, value in given.items()}


def _meant(rule: Mapping[str, Sequence[Any]], cell: Mapping[str, Any]) -> bool:
    return all(key in cell and cell[key] in values for key, values in rule.items())


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"unknown key {key!r} in {where}{nearest(str(key), list(known))}")


def _attack_job(options: Cell) -> AttackJob:
    method = str(options["attack"])
    given = attack_schema(method).check({k: v for k, v in options.items() if k != "attack"}, "attacks")
    device = _device(given)
    attack, run, training = configure_attack(method, given | {"device": device}, AttackRun, quiet=True)
    attack.check(dataset_spec(run.dataset, run.dataset_path, run.img_size))
    architecture_of(run.model, run.width, pretrained=run.pretrained)
    share = f"p{attack.pratio:g}" if attack.p_num is None else f"n{attack.p_num}"
    words = (attack.name, run.dataset, run.model, share, f"t{attack.attack_target}", f"s{run.random_seed}")
    # Of the data set `folder`, the path is what the data are.
    data = {"data": str(find_input(run.dataset_path, shipped=False).resolve())} if run.dataset == "folder" else {}
    name = _name(words, options_of(attack, run, training) | data)
    alike = ("attack", attack.name, run.dataset)
    return AttackJob(name=name, needs=None, alike=alike, device=device, attack=attack, run=run, training=training)


def _defense_job(record: AttackJob, options: Cell) -> DefenseJob:
    method = str(options["defense"])
    given = defense_schema(method).check({k: v for k, v in options.items() if k != "defense"}, "defenses")
    for key in ("dataset", "model"):
        if key in given:
            raise UserError(f"{key} of defenses would have no effect: it is the record's; leave it out")
    device = _device(given)
    defense, run = configure_defense(
        method, given | {"device": device}, record.run.dataset, record.run.model, quiet=True
    )
    if "dataset_path" not in given and run.dataset_path == DefenseRun.dataset_path:  # said nowhere
        run = replace(run, dataset_path=record.run.dataset_path)
    name = _name((defense.name, f"r{run.ratio:g}", f"s{run.random_seed}"), options_of(defense, run))
    return DefenseJob(
        name=f"{record.name}/defense/{name}", needs=record.name, alike=("defense", defense.name, record.run.dataset),
        device=device, small=True, defense=defense, run=run,
    )  # fmt: skip


def _device(given: Cell) -> str:
    """The sweep's own, as an options file's is of the machine that it was written on."""
    device = str(given.get("device", "auto"))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is none of auto, cpu, cuda; the sweep shares out the GPUs")
    return device


def _name(words: Sequence[str], options: Cell) -> str:
    """Legible, and different where any option is that can change the result."""
    kept = {key: _content(key, value) for key, value in options.items() if key not in WHERE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    return "_".join([*(re.sub(r"[^\w.+-]+", "-", word) for word in words), digest])


def _content(key: str, value: Any) -> Any:
    """Of an option that names a file or a record, what is in that, where it is there: it may be another one later."""
    if not value or not (key in ("index", "clean_model") or key.lower().endswith("path")):
        return value
    try:
        file = result_file(record_folder(value, key)) if key == "clean_model" else find_input(value)
        return _digest(file, os.stat(file).st_mtime_ns)
    except (UserError, OSError):  # told by the job, which fails of it
        return value


@functools.cache
def _digest(file: Path, when: int) -> str:
    """when: it was changed last."""
    digest = hashlib.sha256()
    with opened(file, NAMED) as content:
        while block := content.read(MIB):
            digest.update(block)
    return digest.hexdigest()
