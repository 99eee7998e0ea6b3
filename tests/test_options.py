"""Options: what wins over what, what is refused, and that nothing typed by a user ends in a traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from manners import refused

from ulrl.attacks.badnet import BadNet
from ulrl.attacks.base import ATTACKS
from ulrl.cli import attack_main, defense_main, main
from ulrl.cli.flags import attack_flags
from ulrl.configure import AttackRun, DefenseRun, DetectionRun, configure_attack, configure_defense
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS
from ulrl.errors import UserError
from ulrl.models.architectures import ARCHITECTURES
from ulrl.options import IGNORED, LARGEST, Schema, option
from ulrl.shipped import options_file
from ulrl.training import TrainOptions

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config"


@dataclass(frozen=True)
class Toy:
    epochs: int = option(3, "how often", low=1, high=50)
    lr: float = option(0.1, "how fast", low=0)
    amp: bool = option(True, "whether")
    init: bool = option(False, "whether too")
    name: str = option("x", "which", source="a paper")
    path: str | None = option(None, "where")
    count: int | None = option(None, "how many", low=1)
    steplr_milestones: tuple[int, ...] = option((), "when")
    kind: str = option("sgd", "which kind", choices=("sgd", "adamw"))
    secret: int = 7  # a field, but no option


@dataclass(frozen=True)
class Other:
    ignored: ClassVar[frozenset[str]] = IGNORED  # but for what is an option of the toy
    epochs: int = option(5, "how often, for another")
    alpha: float = option(0.5, "how much")


TOY = Schema(Toy, Other)


def flags(*argv: str) -> dict[str, Any]:
    return TOY.flags(argv, "toy", "A toy.")


def test_options_that_are_piped_in_are_read_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("epochs: 3\n"))
    for _ in ("checked", "taken"):  # a pipe gives it once
        assert TOY.yaml(Path("/dev/stdin")) == {"epochs": 3}
    monkeypatch.setattr("sys.stdin", io.StringIO(f"epochs: 3\n#{'x' * 300_000}\nlr: 0.5\n"))
    with pytest.raises(UserError, match="/dev/stdin gives more"):
        TOY.yaml(Path("/dev/stdin"))


@pytest.fixture
def from_yaml(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        file = tmp_path / "options.yaml"
        file.write_text(text)
        return TOY.yaml(file)

    return read


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What `work` returns, or the message of the UserError that it raises; nothing else may come."""
    try:
        return work()
    except UserError as error:
        return str(error)


# What wins


def test_later_layers_win_and_tell_their_origin() -> None:
    prototype = {"epochs": 10, "lr": 0.2, "name": "prototype", "num_workers": 4}
    attack = {"lr": 0.3, "name": "attack"}
    merged, ignored = TOY.merge(("proto.yaml", prototype), ("bd.yaml", attack), ("flag", {"name": "flag"}))
    assert merged.build(Toy) == Toy(epochs=10, lr=0.3, name="flag")
    assert merged.build(Other) == Other(epochs=10)
    assert {k: merged.origin[k] for k in ("epochs", "lr", "name")} == {
        "epochs": "proto.yaml",
        "lr": "bd.yaml",
        "name": "flag",
    }
    assert ignored == ["num_workers"]


def test_without_layers_the_dataclass_speaks() -> None:
    merged, ignored = TOY.merge()
    assert merged.build(Toy) == Toy()
    assert merged.build(Other) == Other()
    assert ignored == []
    assert flags() == {}


def test_a_run_takes_flag_over_attack_yaml_over_prototype_yaml_over_default(
    empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prototype = empty_home / "config/attack/prototype/digits.yaml"
    attack = empty_home / "config/attack/badnet/default.yaml"
    for file in (prototype, attack):
        file.parent.mkdir(parents=True)
    prototype.write_text("width: 6\nepochs: 2\nbatch_size: 64\nlr: 0.02\nattack_target: 1\nwd:\nnum_workers: 4\n")
    attack.write_text("batch_size: 32\nlr: 3e-2\nattack_target: 2\nfrequency_save: 0\n")
    argv = "--train_samples 64 --lr 0.04 --attack_target 3 --width 2 --device cpu --save_folder_name a --pin_memory 1"
    with pytest.raises(SystemExit) as left:
        attack_main("badnet", argv.split())
    said = capsys.readouterr()
    assert left.value.code == 0, said.err[-2000:]
    options = json.loads((empty_home / "record/a/result.json").read_text())["options"]
    got = {k: options[k] for k in ("wd", "epochs", "batch_size", "lr", "attack_target", "width", "pratio")}
    assert got == {
        "wd": TrainOptions.wd,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.04,
        "attack_target": 3,
        "width": 2,
        "pratio": 0.1,
    }
    (ignored,) = [line for line in said.err.splitlines() if "num_workers" in line]
    for key in ("num_workers", "frequency_save", "pin_memory"):
        assert key in ignored
    for file in (prototype, attack):
        assert str(file) in said.err


def test_an_attacks_file_for_the_data_set_is_over_its_default_and_under_what_is_named(empty_home: Path) -> None:
    """What it says of the training yields to a training file that the user named, even where the user's has no say."""
    own = empty_home / "config/attack/badnet"
    own.mkdir(parents=True)
    (own / "default.yaml").write_text("patch_size: 4\npratio: 0.3\n")
    (own / "digits.yaml").write_text("patch_size: 2\nepochs: 7\n")
    (empty_home / "mine.yaml").write_text("dataset: digits\nepochs: 3\n")
    (empty_home / "theirs.yaml").write_text("pratio: 0.4\n")
    cases: list[tuple[dict[str, Any], tuple[int, float, int]]] = [
        ({}, (2, 0.3, 7)),
        ({"yaml_path": None, "bd_yaml_path": None}, (2, 0.3, 7)),  # as a flag: none
        ({"epochs": 5}, (2, 0.3, 5)),
        ({"dataset": "mnist"}, (4, 0.3, 10)),
        ({"yaml_path": "mine.yaml"}, (2, 0.3, 3)),
        ({"bd_yaml_path": "theirs.yaml"}, (BadNet.patch_size, 0.4, 10)),
    ]
    assert attack_flags("badnet", ["--yaml_path", "none", "--bd_yaml_path", "none"], "AttackRun", "") == cases[1][0]
    for said, expected in cases:
        attack, _, training = configure_attack("badnet", said, AttackRun, quiet=True)
        assert isinstance(attack, BadNet)
        assert (attack.patch_size, attack.pratio, training.epochs) == expected, said


def test_the_data_set_and_net_of_an_attacks_named_file_choose_the_training_files(empty_home: Path) -> None:
    """As its `dataset:` and `model:` win over those files' own."""
    folder = empty_home / "config/attack/prototype"
    folder.mkdir(parents=True)
    (folder / "mnist.yaml").write_text("dataset: mnist\nmodel: vgg19\nwidth: 5\nepochs: 4\n")
    (folder / "vit_tiny.yaml").write_text("lr: 0.003\n")
    file = empty_home / "theirs.yaml"
    for text, said, expected in (
        ("dataset: mnist", {}, ("mnist", "vgg19", 5, 4, 0.01)),
        ("dataset: mnist\nmodel: vit_tiny", {}, ("mnist", "vit_tiny", None, 4, 0.003)),
        ("dataset: cifar10\nmodel: vgg19", {"dataset": "mnist", "model": "vit_tiny"},
         ("mnist", "vit_tiny", None, 4, 0.003)),
    ):  # fmt: skip
        file.write_text(text)
        _, run, training = configure_attack("badnet", {"bd_yaml_path": str(file), **said}, AttackRun, quiet=True)
        assert (run.dataset, run.model, run.width, training.epochs, training.lr) == expected


def test_shipped_files_go_by_name_and_the_users_own_file_wins(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = CONFIG / "defense/ulrl/cifar10.yaml"
    for named in ("defense/ulrl/cifar10", "config/defense/ulrl/cifar10.yaml", "./config/defense/ulrl/cifar10.yaml"):
        assert options_file(named).resolve() == shipped.resolve()
    monkeypatch.setattr("ulrl.files.PACKAGE_ROOT", empty_home / "nowhere")  # as when it is installed
    assert options_file("./config/defense/ulrl/cifar10.yaml").resolve() == shipped.resolve()
    own = empty_home / "config/defense/ulrl/cifar10.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("ratio: 0.5\n")
    assert options_file("config/defense/ulrl/cifar10.yaml") == own
    for named, hint in (("defense/ulrl/cifar11", "cifar10"), ("../defense/ulrl/cifar10", ""), ("/sweep/quick", "")):
        with pytest.raises(UserError, match=f"{named}.*{hint}.*ulrl list configs"):
            options_file(named)
    for named in (".", "./", "..", "/"):
        with pytest.raises(UserError, match=f"^{named} is a folder; name an options file in it"):
            options_file(named)


# What is understood


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--amp"], True),
        (["--amp", "false"], False),
        (["--amp", "True"], True),
        (["--amp=no"], False),
        (["--amp", "0"], False),
        (["--amp", "1"], True),
    ],
)
def test_booleans_as_flags(argv: list[str], value: bool) -> None:
    assert flags(*argv) == {"amp": value}
    assert flags("--init", "--lr", "1", *argv) == {"init": True, "lr": 1.0, "amp": value}


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("False", False), ("'False'", False), ("yes", True), ("off", False)]
)
def test_booleans_in_yaml(from_yaml: Callable[[str], dict[str, Any]], text: str, value: bool) -> None:
    assert from_yaml(f"amp: {text}") == {"amp": value}


def test_lists_in_every_spelling(from_yaml: Callable[[str], dict[str, Any]]) -> None:
    wanted = {"steplr_milestones": (10, 20)}
    assert flags("--steplr_milestones", "10", "20") == wanted
    assert flags("--steplr_milestones", "10,20") == wanted
    assert flags("--steplr_milestones=10,20") == wanted
    assert flags("--steplr_milestones", "10,", "20", "--lr", "1") == {**wanted, "lr": 1.0}
    assert from_yaml("steplr_milestones: [10, 20]") == wanted
    assert from_yaml("steplr_milestones: [10.0, 20]") == wanted
    assert from_yaml("steplr_milestones: 10, 20") == wanted
    assert from_yaml("steplr_milestones:\n- 10\n- 20\n") == wanted
    assert from_yaml("steplr_milestones: []") == {"steplr_milestones": ()}
    assert flags("--steplr_milestones", "none") == {"steplr_milestones": ()}  # as --help writes it


def test_numbers_that_yaml_takes_for_text(from_yaml: Callable[[str], dict[str, Any]]) -> None:
    assert from_yaml("lr: 1e-3") == {"lr": 0.001}
    assert from_yaml("lr: 1") == {"lr": 1.0}
    assert from_yaml("epochs: '12'") == {"epochs": 12}
    assert from_yaml("epochs: 12.0") == {"epochs": 12}
    assert from_yaml("name: 5") == {"name": "5"}
    assert isinstance(from_yaml("lr: 1")["lr"], float)
    assert isinstance(from_yaml("epochs: 12.0")["epochs"], int)


def test_an_empty_yaml_key_is_not_given(from_yaml: Callable[[str], dict[str, Any]]) -> None:
    assert from_yaml("epochs:\nlr: ~\npath:\nnum_classes:\nname: y\n") == {"name": "y"}


def test_none_can_be_written_for_what_may_be_none(from_yaml: Callable[[str], dict[str, Any]]) -> None:
    assert flags("--path", "None", "--count", "null") == {"path": None, "count": None}
    assert from_yaml("count: none") == {"count": None}
    refused(lambda: flags("--epochs", "None"), "--epochs", "whole number")


def test_keys_of_backdoorbench_are_accepted_and_reported(from_yaml: Callable[[str], dict[str, Any]]) -> None:
    keys = sorted(IGNORED - set(TOY.fields))
    assert {"num_workers", "pin_memory", "non_blocking", "prefetch", "frequency_save", "steplr_stepsize"} <= set(keys)
    given_yaml = from_yaml("".join(f"{key}: 4\n" for key in keys))
    given_flags = flags(*(word for key in keys for word in (f"--{key}", "4")), "--epochs", "9", "--prefetch")
    for layer in (given_yaml, given_flags):
        merged, ignored = TOY.merge(("somewhere", layer))
        assert ignored == keys
        assert not set(merged.values) & set(keys)
    assert given_flags["epochs"] == 9
    short = flags("-n", "4", "-pm", "True", "-nb", "-pf", "False", "--epochs", "9")
    assert short == {"num_workers": "4", "pin_memory": "True", "non_blocking": None, "prefetch": "False", "epochs": 9}


# What is refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], ["--epoch;", "--epochs"]),
        (["--step_milestones=1"], ["--step_milestones;", "--steplr_milestones"]),
        (["stray"], ["stray"]),
        (["--epochs"], ["--epochs"]),
        (["--epochs", "many"], ["--epochs", "many", "whole number"]),
        (["--epochs", "1.5"], ["--epochs", "1.5", "whole number"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--epochs", "51"], ["--epochs", "at most 50"]),
        (["--epochs", "-3"], ["--epochs", "at least 1"]),
        (["--lr", "fast"], ["--lr", "fast", "number"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--lr=-1e-3"], ["--lr", "at least 0"]),
        (["--amp", "maybe"], ["--amp", "maybe", "true or false"]),
        (["--amp="], ["--amp"]),
        (["--kind", "adam"], ["--kind", "'adam'", "sgd", "adamw"]),
        (["--count", "0"], ["--count", "at least 1"]),
        (["--steplr_milestones", "10", "x"], ["--steplr_milestones", "whole numbers"]),
        (["--secret", "1"], ["--secret"]),
        (["--epochs", "1" + "0" * 400], ["--epochs"]),
        (["--epochs", "1" + "0" * 5000], ["--epochs"]),
        (["--lr", "1" + "0" * 400], ["--lr"]),
        (["--lr", "1e39"], ["--lr", "too large"]),
        (["--steplr_milestones", "1" + "0" * 30], ["--steplr_milestones", "too large"]),
    ],
)
def test_flags_that_are_refused(argv: list[str], words: list[str]) -> None:
    refused(lambda: flags(*argv), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["'epoch'", "'epochs'"]),
        ("secret: 3", ["'secret'"]),
        ("3: epochs", ["3"]),
        ("- epochs\n- 3\n", ["list", "mapping"]),
        ("just words", ["str", "mapping"]),
        ("3", ["int", "mapping"]),
        ("epochs: [", ["YAML"]),
        ("epochs: 3\n\tlr: 1\n", ["YAML"]),
        ("epochs: 2024-13-45\n", ["YAML"]),
        ("epochs: " + "1" * 5000, []),
        ("epochs: many", ["epochs", "whole number"]),
        ("epochs: 1.5", ["epochs", "whole number"]),
        ("epochs: True", ["epochs", "whole number"]),
        ("epochs: [3]", ["epochs", "whole number"]),
        ("epochs: .inf", ["epochs", "too large"]),
        ("epochs: 0", ["epochs", "at least 1"]),
        ("lr: .nan", ["lr", "number"]),
        ("lr: yes", ["lr", "number"]),
        ("lr: 1" + "0" * 400, ["lr"]),
        ("amp: 2", ["amp", "true or false"]),
        ("amp: [True]", ["amp", "true or false"]),
        ("name: [a]", ["name", "text"]),
        ("name: {a: b}", ["name", "text"]),
        ("name: True", ["name", "text"]),
        ("kind: adam", ["kind", "sgd", "adamw"]),
        ("steplr_milestones: [10, x]", ["steplr_milestones", "whole numbers"]),
        ("steplr_milestones: [[10], 20]", ["steplr_milestones", "whole numbers"]),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    refused(lambda: TOY.yaml(file), str(file), *words)


def test_yaml_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused(lambda: TOY.yaml(tmp_path / "nosuch.yaml"), "nosuch.yaml", "No such file")
    refused(lambda: TOY.yaml(tmp_path), str(tmp_path))
    binary = tmp_path / "model.pt"
    binary.write_bytes(bytes(range(256)))
    refused(lambda: TOY.yaml(binary), str(binary), "no text")
    refused(lambda: TOY.yaml("x" * 5000), "xxx")


# Every option of every method

ALL = {
    **{f"attack {name}": Schema(AttackRun, cls, TrainOptions) for name, cls in ATTACKS.items()},
    **{f"defense {name}": Schema(DefenseRun, cls) for name, cls in DEFENSES.items()},
    **{f"detector {name}": Schema(DetectionRun, cls) for name, cls in DETECTORS.items()},
}
EVERY = [(method, key) for method, schema in ALL.items() for key in schema.fields]


def strategy(schema: Schema, key: str) -> st.SearchStrategy[Any]:
    """Values that the option takes."""
    about, hint = schema.fields[key].metadata, schema.hints[key]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(part for part in parts if part is not types.NoneType)
    if about["choices"]:
        return st.sampled_from(about["choices"])
    if kind is bool:
        return st.booleans()
    if kind in (int, float):
        low, high = (bound if bound is not None else sign * LARGEST[kind]
                     for bound, sign in ((about["low"], -1), (about["high"], 1)))  # fmt: skip
        return st.integers(low, high) if kind is int else st.floats(low, high)
    if kind is str:
        return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(
            lambda text: text.strip().lower() not in ("", "none", "null")
        )
    assert typing.get_origin(kind) is tuple
    return st.lists(st.integers(-LARGEST[int], LARGEST[int])).map(tuple)


def test_all_options_explain_themselves() -> None:
    assert len(EVERY) > 40
    for method, key in EVERY:
        about = ALL[method].fields[key].metadata
        for what in ("help", "source"):
            assert about[what].strip(), f"{key} of {method} has no {what}"


@pytest.mark.parametrize("method", ALL)
def test_help_shows_each_flag_with_default_and_source(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, name = method.split()
    with pytest.raises(SystemExit) as left:
        if kind == "detector":
            main(["detect", "any", "--samples", name, "--help"])
        else:
            {"attack": attack_main, "defense": defense_main}[kind](name, ["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # a line may end within BTI-DBF
    for key, f in ALL[method].fields.items():
        assert f"--{key} " in said
        default = "none" if f.default is None or f.default == () else f.default
        assert ("(required)" if default == "" else f"(default: {default}, {f.metadata['source']})") in said


def test_defaults_lie_within_their_own_bounds() -> None:
    for method, key in EVERY:
        schema = ALL[method]
        default = schema.fields[key].default
        if default not in (None, ""):
            text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert schema.flags([f"--{key}={text}"], "x", "") == {key: default}, key


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(EVERY), st.data())
def test_what_is_written_is_read(tmp_path: Path, which: tuple[str, str], data: st.DataObject) -> None:
    (method, key), file = which, tmp_path / "written.yaml"
    schema = ALL[method]
    value = data.draw(strategy(schema, key))
    if isinstance(value, tuple):
        words = [",".join(map(str, value))]
    else:
        words = [str(value)]
    assert schema.flags([f"--{key}={words[0]}"], "x", "") == {key: value}
    file.write_text(yaml.safe_dump({key: list(value) if isinstance(value, tuple) else value}))
    assert schema.yaml(file) == {key: value}
    file.write_text(yaml.safe_dump({key: words[0]}))
    assert schema.yaml(file) == {key: value}


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(EVERY), GARBAGE | st.integers(10**300, 10**500))
def test_garbage_in_yaml_is_read_or_refused(tmp_path: Path, which: tuple[str, str], garbage: Any) -> None:
    method, key = which
    file = tmp_path / "garbage.yaml"
    file.write_text(yaml.safe_dump({key: garbage}))
    got = attempt(lambda: ALL[method].yaml(file))
    assert key in got if isinstance(got, str) else set(got) <= {key}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text().map(str.encode) | st.binary())
def test_any_file_as_yaml_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    got = attempt(lambda: TOY.yaml(file))
    assert str(file) in got if isinstance(got, str) else got == {}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(EVERY), st.text() | st.from_regex(r"-?[0-9]+(e[0-9]{1,4})?", fullmatch=True), st.lists(st.text())
)
def test_garbage_as_flags_is_read_or_refused(which: tuple[str, str], text: str, more: list[str]) -> None:
    method, key = which
    assume(not any(word.startswith(("-h", "--h")) for word in more))
    schema = ALL[method]
    got = attempt(lambda: schema.flags([f"--{key}={text}"], "x", ""))
    assert f"--{key}" in got if isinstance(got, str) else set(got) == {key}
    got = attempt(lambda: schema.flags([f"--{key}", *more], "x", ""))
    assert got  # an error says something, and what is read is at least this option


# The files that come with the library

ATTACK_SCHEMA = Schema(AttackRun, *ATTACKS.values(), TrainOptions)


def schema_of(file: Path) -> Schema:
    kind, name = file.relative_to(CONFIG).parts[:2]
    if kind == "defense":
        return Schema(DefenseRun, DEFENSES[name])
    if kind == "detection":
        return Schema(DetectionRun, DETECTORS[name])
    return ATTACK_SCHEMA if name == "prototype" else Schema(AttackRun, ATTACKS[name], TrainOptions)


def test_shipped_files_are_options_of_their_method() -> None:
    files = [file for kind in ("attack", "defense", "detection") for file in sorted((CONFIG / kind).rglob("*.y*ml"))]
    assert {file.relative_to(CONFIG).parts[0] for file in files} == {"attack", "defense", "detection"}
    for file in files:
        assert schema_of(file).yaml(file), file


def test_shipped_prototype_files_are_of_the_data_set_or_the_architecture_in_their_name() -> None:
    for file in (CONFIG / "attack" / "prototype").glob("*.yaml"):
        content = ATTACK_SCHEMA.yaml(file)
        if file.stem in ARCHITECTURES:  # it lies over any data set's
            assert not {"dataset", "model", "epochs"} & set(content)
        else:
            assert content["dataset"] == file.stem


@pytest.mark.parametrize(
    ("name", "dataset", "relearn_lr", "relearn_alpha"),
    [
        ("config", "cifar10", 0.005, 0.7),
        ("cifar10", "cifar10", 0.005, 0.7),
        ("cifar100", "cifar100", 0.001, 0.001),
        ("gtsrb", "gtsrb", 0.001, 0.001),
        ("tiny", "tiny", 0.001, 0.001),
    ],
)
def test_the_released_ulrls_files_carry_its_values(
    name: str, dataset: str, relearn_lr: float, relearn_alpha: float
) -> None:
    cls = DEFENSES["ulrl"]
    schema = Schema(DefenseRun, cls)
    settings, _ = schema.merge(("file", schema.yaml(CONFIG / "defense" / "ulrl" / f"{name}.yaml")))
    run = settings.build(DefenseRun)
    assert (run.dataset, run.model, run.ratio, run.random_seed) == (dataset, "preactresnet18", 0.01, 0)
    got = dataclasses.asdict(settings.build(cls))
    assert got == {
        **dataclasses.asdict(cls()),  # keys that the release does not have: its behaviour is their default
        "batch_size": 128,
        "amp": True,
        "random_seed": 0,
        "linear_name": "linear",
        "unlearning_epochs": 20,
        "unlearning_lr": 0.01,
        "lr_scheduler": "MultiStepLR",
        "steplr_milestones": (10, 20),
        "steplr_gamma": 0.1,
        "client_optimizer": "sgd",
        "sgd_momentum": 0.9,
        "wd": 0.0005,
        "clean_threshold": 0.2,
        "init": True,
        "relearn_epochs": 20,
        "relearn_lr": relearn_lr,
        "relearn_alpha": relearn_alpha,
    }
    assert (got["clip"], got["z_threshold"], got["max_neurons"]) == (20, 3.5, 2)


# The keys of BackdoorBench's own files config/attack/<name>/*.yaml.
_AUGMENTED = "random_rotation random_crop"
PEER_KEYS = {
    "badnet": "patch_mask_path",
    "blended": "attack_trigger_img_path attack_train_blended_alpha attack_test_blended_alpha",
    "sig": "sig_delta sig_f",
    "lc": "reduced_amplitude",
    "lf": "",
    "ssba": "",
    "ctrl": "use_dct use_yuv trigger_channels pos_list use_clean_label",
    "ftrojann": "channel_list magnitude YUV window_size pos_list",
    "trojannn": "selected_layer_name selected_layer_param_name num_neuron mask_path neuron_target_values "
    "mask_update_iters model",
    "wanet": f"cross_ratio {_AUGMENTED} s k grid_rescale lr_scheduler steplr_milestones steplr_gamma",
    "inputaware": f"lr_G lr_C lr_M C_lr_scheduler schedulerG_milestones schedulerC_milestones schedulerM_milestones "
    f"schedulerG_lambda schedulerC_lambda schedulerM_lambda lambda_div lambda_norm mask_density EPSILON {_AUGMENTED} "
    "random_seed clean_train_epochs",
    "bpp": f"neg_ratio {_AUGMENTED} steplr_milestones steplr_gamma lr_scheduler squeeze_num grid_rescale lr dithering "
    "epochs",
    "lira": f"{_AUGMENTED} attack_model lr_atk eps test_eps alpha test_alpha optimizer both_train_epochs "
    "fix_generator_epoch steplr_gamma steplr_milestones finetune_eps finetune_alpha finetune_client_optimizer "
    "finetune_sgd_momentum finetune_wd epochs finetune_lr finetune_lr_scheduler finetune_steplr_gamma "
    "finetune_steplr_milestones",
    "blind": "batch_size lr epochs cos_t_max weight_loss_balance_mode mgda_normalize fix_scale_normal_weight "
    "fix_scale_backdoor_weight batch_history_len",
}


@pytest.mark.parametrize("name", PEER_KEYS)
def test_every_key_of_backdoorbench_is_an_option_or_ignored(name: str) -> None:
    schema = Schema(AttackRun, ATTACKS[name], TrainOptions)
    keys = {*PEER_KEYS[name].split(), "attack", "attack_label_trans", "attack_target", "pratio"}
    assert keys <= set(schema.fields) | schema.ignored


# Of its scripts' own flags, those that its YAML files do not have too.
PEER_FLAGS = {"ft-sam": "rho adaptive print_freq"}


@pytest.mark.parametrize("name", list(DEFENSES))
def test_the_flags_of_every_script_of_backdoorbench_are_options_or_ignored(name: str) -> None:
    schema = Schema(DefenseRun, DEFENSES[name])
    keys = {*PEER_FLAGS.get(name, "").split(), "steplr_stepsize", "steplr_gamma", "steplr_milestones"}
    assert keys <= set(schema.fields) | schema.ignored


@pytest.mark.parametrize("name", list(DETECTORS))
def test_a_detector_takes_the_steps_of_a_learning_rate(name: str) -> None:
    schema = Schema(DetectionRun, DETECTORS[name])
    assert {"steplr_gamma", "steplr_milestones"} <= set(schema.fields) | schema.ignored


@pytest.mark.parametrize(
    ("kind", "name", "given", "told"),
    [
        ("attack", "lira", {"pratio": 0.05, "epochs": 3}, "lira, which poisons no training image for good: pratio"),
        ("attack", "blind", {"p_num": 9}, "blind, which poisons no training image for good: p_num"),
        ("attack", "prototype", {"pratio": 0.1}, "prototype, which poisons no training image for good: pratio"),
        ("attack", "prototype", {"p_num": None}, None),
        ("attack", "wanet", {"pratio": 0.1}, None),
        ("attack", "badnet", {"pratio": 0.1}, None),
        ("defense", "abl", {"ratio": 0.05}, "abl, which is given the poisoned training set: ratio"),
        ("defense", "cbd", {"ratio": 0.1, "index": "a"}, "cbd, which is given the poisoned training set: ratio, index"),
        ("defense", "abl", {"index": None}, None),
        ("defense", "ft", {"ratio": 0.05}, None),
    ],
)
def test_what_a_method_has_no_use_for_is_told_where_it_was_said(
    kind: str, name: str, given: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    def configure(given: dict[str, Any], quiet: bool = False) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "ulrl"):
            if kind == "attack":
                configure_attack(name, given, AttackRun, quiet=quiet)
            else:
                configure_defense(name, given, "digits", "preactresnet18", quiet=quiet)
        return [line for line in caplog.messages if "without an effect" in line]

    assert configure(given) == ([f"without an effect on {told}"] if told else [])
    assert configure({}) == configure(given, quiet=True) == [], "the defaults, and a sweep"


def test_what_backdoorbench_gives_rnp_in_vain_has_no_effect_here() -> None:
    """Its file names a cosine; its script, as RNP's release, lowers the rate in steps."""
    method, _ = configure_defense("rnp", {"lr_scheduler": "CosineAnnealingLR"}, "cifar10", "preactresnet18", quiet=True)
    assert vars(method)["lr_scheduler"] == "MultiStepLR"


@pytest.mark.parametrize("name", list(ATTACKS))
def test_no_option_is_ignored_too(name: str) -> None:
    assert not set(Schema(AttackRun, ATTACKS[name], TrainOptions).fields) & set(ATTACKS[name].ignored)
