"""What a command says before it works: at once, without importing torch, and the same as with it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manners import refused

import ulrl.declared
from ulrl.attacks.base import ATTACKS
from ulrl.cli import COMMANDS
from ulrl.configure import AttackRun, DefenseRun, DetectionRun, PreviewRun
from ulrl.converting import ConvertOptions
from ulrl.data.datasets import DATASETS
from ulrl.declared import about, declared, keys, methods
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS
from ulrl.models.architectures import ARCHITECTURES
from ulrl.multimodal.repairs import Repairing
from ulrl.multimodal.running import ClipRun
from ulrl.options import Schema
from ulrl.own_files import PurifyRun
from ulrl.registry import Registry
from ulrl.report.frame import KEYS
from ulrl.sweep.scheduler import SweepOptions
from ulrl.training import TrainOptions

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "pandas", "matplotlib", "sklearn", "PIL")
REGISTRIES: dict[str, Registry[Any]] = {"attacks": ATTACKS, "defenses": DEFENSES, "detectors": DETECTORS}
METHODS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]

# As `ulrl` does it; afterwards it says which heavy modules there are.
CHILD = """
import sys
from ulrl.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules} & set(%r)))
"""


def said(*arguments: str, home: Path) -> tuple[int, list[str], str]:
    """The exit code, the heavy modules that were imported, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD % (HEAVY,), *arguments], cwd=home, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ULRL_HOME": str(home)},
    )  # fmt: skip
    *lines, last = done.stdout.splitlines()
    return done.returncode, last.split()[1:], "\n".join([*lines, done.stderr])


HELP = [(command, "--help") for command in COMMANDS if command not in ("list", "inspect", "attack", "defense")]
MISTAKES = {
    ("deffense", "ulrl"): "did you mean 'defense'?",
    ("attack", "badnett"): "did you mean 'badnet'?",
    ("attack", "badnet", "--patch_size", "0"): "must be at least 1",
    ("attack", "wanet", "--yaml_path", "nowhere"): "No such file",
    ("attack", "sig", "--bd_yaml_path", "wrong.yaml"): "did you mean 'pratio'?",
    ("preview", "blended", "--wdth", "4"): "did you mean '--width'?",
    ("defense",): "name a defense first",
    ("defense", "anpp"): "did you mean 'anp'?",
    ("defense", "ulrl", "--relern_lr", "1"): "did you mean '--relearn_lr'?",
    ("defense", "ulrl", "--relearn_lr", "fast"): "is not a number",
    ("defense", "ft"): "--result_file is missing",
    ("defense", "ft", "--yaml_path", "none"): "--result_file is missing",
    ("defense", "ft", "--result_file", "~no-such-user/x"): "~no-such-user/x",
    ("defense", "ft", "--result_file", "nothing"): "is not a folder",
    ("compare", "nothing", "--defenses", "ft,fts"): "unknown defense 'fts'",
    ("purify", "--method", "ulr"): "did you mean 'ulrl'?",
    ("purify", "--method"): "ulrl: argument --method: expected one argument",
    ("purify", "--model", "a:b"): "--weights is missing",
    ("sweep", "sweep/quik"): "did you mean 'sweep/quick'?",
    ("sweep",): "name a sweep file first",
    ("show", "nothing"): "is not a folder",
    ("inspect",): "name a file",
    ("convert", "nothing"): "is not a folder",
    ("results", "nothing"): "is not a folder",
    ("results", "--format", "xml"): "is none of",
    ("report", "--out", "no/where.html"): "there is no folder",
    ("plot", "heat"): "did you mean 'heatmap'?",
    ("plot", "heatmap", "--out", "a.gif"): "ends in .pdf",
    ("detect", "nothing", "--samples", "strap"): "did you mean 'strip'?",
    ("detect", "nothing", "--samples"): "is not a folder",
    ("clip", "--attack", "badnett"): "did you mean 'badnet'?",
    ("clip", "--attack"): "ulrl: argument --attack: expected one argument",
    ("clip", "--repair_lr", "-1"): "must be at least 0",
    ("list", "config"): "takes nothing or `configs`",
}


@pytest.mark.parametrize("command", [(), ("list",), ("list", "configs"), ("--version",), *HELP], ids=" ".join)
def test_help_and_lists_wait_for_nothing(command: tuple[str, ...], tmp_path: Path) -> None:
    if command[-1:] == ("--help",) and command[0] in ("preview", "plot", "compare", "show", "convert", "detect"):
        command = (command[0], {"preview": "wanet", "plot": "tsne"}.get(command[0], "one"), "--help")
    code, heavy, text = said(*command, home=tmp_path)
    assert (code, heavy) == (0, []), text


@pytest.mark.parametrize(("command", "words"), MISTAKES.items(), ids=map(" ".join, MISTAKES))
def test_a_mistake_is_told_at_once(command: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("pration: 0.1\n")
    code, heavy, text = said(*command, home=tmp_path)
    assert (code, heavy) == (2, []), text
    assert words in text


def test_a_python_without_torch_is_told_what_to_do(tmp_path: Path) -> None:
    """As in a shell where the environment was not activated."""
    (tmp_path / "record" / "x").mkdir(parents=True)
    (tmp_path / "record" / "x" / "attack_result.pt").touch()
    without = "import sys; sys.modules['torch'] = None"
    run = f"{without}; from ulrl.cli import main; main(['defense', 'ft', '--result_file', 'x'])"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ULRL_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"ulrl: {sys.executable} has no torch; `source .venv/bin/activate`")
    assert "Traceback" not in done.stderr


def test_every_kind_of_method_shows_its_help_at_once(tmp_path: Path) -> None:
    for command in (("attack", "lira"), ("defense", "i-bau")):
        assert said(*command, "--help", home=tmp_path)[:2] == (0, [])


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_methods_options_are_read_as_they_are(kind: str, name: str) -> None:
    module, cls = methods(f"ulrl.{kind}")[name]
    assert_same(declared(module, cls), REGISTRIES[kind][name])
    assert about(module) == inspect.getdoc(sys.modules[REGISTRIES[kind][name].__module__])


@pytest.mark.parametrize(
    "cls",
    [
        AttackRun,
        ClipRun,
        ConvertOptions,
        DefenseRun,
        DetectionRun,
        PreviewRun,
        PurifyRun,
        Repairing,
        SweepOptions,
        TrainOptions,
    ],
)
def test_a_runs_options_are_read_as_they_are(cls: type) -> None:
    assert_same(declared(cls.__module__, cls.__name__), cls)


def assert_same(read: type, real: type) -> None:
    assert read is not real, "it was imported after all"
    assert inspect.getdoc(read) == inspect.getdoc(real)
    ours, theirs = Schema(read), Schema(real)
    assert (list(ours.fields), ours.hints, ours.ignored) == (list(theirs.fields), theirs.hints, theirs.ignored)
    for f, g in zip(ours.fields.values(), theirs.fields.values(), strict=True):
        assert (f.default, f.metadata) == (g.default, g.metadata)
        assert f.default_factory is g.default_factory is dataclasses.MISSING


def test_names_are_read_as_they_are() -> None:
    for kind, registry in REGISTRIES.items():
        assert list(methods(f"ulrl.{kind}")) == list(registry)
        assert "no such method" not in registry, "and to ask is no mistake"
    assert declared("ulrl.data.datasets", "DATASETS") == DATASETS
    assert keys("ulrl.models.architectures", "ARCHITECTURES") == list(ARCHITECTURES)
    assert declared("ulrl.report.frame", "KEYS") == KEYS


def test_what_is_more_than_a_declaration_is_imported() -> None:
    assert declared("ulrl.models.architectures", "ARCHITECTURES") is ARCHITECTURES


TOY = """
from dataclasses import dataclass
from typing import Optional
from ulrl.options import option
from toys import register

@register("{name}")
@dataclass(frozen=True)
class Toy:
    size: {option}
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of methods with a sound one, `good`, in it."""
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "__init__.py").write_text("from ulrl.registry import Registry\nTOYS = Registry('toy', 'toys')\n"
                                        "register = TOYS.register\n")  # fmt: skip
    (folder / "good.py").write_text(TOY.format(name="good", option="Optional[int] = option(1, 'side')"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ulrl.declared, "_file", lambda module: folder / f"{(module + '.__init__').split('.')[1]}.py")
    ulrl.declared._module.cache_clear()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            TOY.format(name="mine", option="list[int] = option([1, 2], 'sides')"),
            "line 10: ValueError: an option's default is",
        ),
        (TOY.format(name="mine", option="int = option(1, 'side')") + "import torhc", "line 11: ModuleNotFoundError"),
        (TOY.format(name="mine", option="int = option(1, 'side')") + "x = (", "line 11: SyntaxError"),
    ],
)
def test_a_broken_method_is_named_and_stops_no_other(text: str, words: str, toys: Path) -> None:
    (toys / "mine.py").write_text(text)
    known: Registry[Any] = importlib.import_module("toys").TOYS
    assert list(known) == ["good", "mine"]
    assert known["good"].__name__ == "Toy"
    refused(lambda: known["mine"], f"{toys / 'mine.py'}, {words}", "mend it")
    if "SyntaxError" in words or "ValueError" in words:  # what is read off the text does not do
        refused(lambda: declared("toys.mine", "Toy"), f"{toys / 'mine.py'}, {words}")


@pytest.mark.parametrize("decorators", [
    "@register('mine')\n",
    '@register( "mine" )  # ours\n# a word\n',
    '@register(\n    "mine",\n)\n@dataclass(\n    frozen=True\n)\n',
])  # fmt: skip
def test_a_method_is_found_however_it_is_written(decorators: str, toys: Path) -> None:
    text = "from dataclasses import dataclass\nfrom toys import register\n\n\n"
    (toys / "mine.py").write_text(f"{text}{decorators}class Mine:\n    pass\n")
    assert importlib.import_module("toys").TOYS["mine"].__name__ == "Mine"


def test_two_methods_of_one_name_are_told(toys: Path) -> None:
    shutil.copy(toys / "good.py", toys / "mine.py")
    refused(lambda: importlib.import_module("toys").TOYS["good"], "registers 'good'", "give one of them another name")


@pytest.mark.parametrize("option", ["list[int] = option((1, 2), 'sides')", "object = option(1, 'side')"])
def test_an_option_of_a_type_that_no_flag_has_is_told(option: str, toys: Path) -> None:
    (toys / "mine.py").write_text(TOY.format(name="mine", option=option))
    refused(lambda: Schema(declared("toys.mine", "Toy")), "the option size of Toy", "tuple[int, ...]")
    assert Schema(declared("toys.good", "Toy")).hints == {"size": int | None}, "of a type that the file imports"


@pytest.mark.parametrize("command", ["attack", "defense", "preview", "compare", "show", "detect", "inspect", "convert"])
def test_help_without_a_name_says_that_one_is_needed(command: str, tmp_path: Path) -> None:
    code, heavy, text = said(command, "--help", home=tmp_path)
    assert (code, heavy) == (0, [])
    assert text.startswith(f"usage: ulrl {command} NAME")


def test_closed_streams_lead_nowhere() -> None:
    """As under some services; the next file that is opened is not taken for one of them."""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "ulrl", "--version"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
