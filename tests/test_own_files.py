"""The door for a user's own model, from files: ulrl purify."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from own_nets import Headless, Net, rates, weights
from PIL import Image
from torch import nn

import ulrl
from ulrl.cli import main
from ulrl.own_files import PurifyRun, load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def files(
    backdoored: nn.Module,
    innocent: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """my_nets.py, weights in many forms, and photos/ with a subfolder per class."""
    root = tmp_path_factory.mktemp("files")
    source = inspect.getsource(Net).replace("Callable[[int], nn.Module]", "object")
    (root / "my_nets.py").write_text(
        "from __future__ import annotations\nimport os\nimport torch\nfrom torch import nn\n\n\n" + source + "\n\n"
        "def eleven():\n    net = Net()\n    net.classify = nn.Linear(64, 11)\n    return net\n\n\n"
        + inspect.getsource(Headless)
        + "\n\n"
        "class Two(Net):\n    def forward(self, x):\n        return super().forward(x), x\n\n\n"
        "class Extra(Net):\n    def get_extra_state(self):\n        return {'epoch': 3}\n\n"
        "    def set_extra_state(self, state):\n        pass\n\n\n"
        "class Importing(Net):\n    def forward(self, x):\n        import my_helper\n\n"
        "        return my_helper.same(super().forward(x))\n\n\n"
        "class Needing(Net):\n    def forward(self, x):\n        import no_such_module\n\n\n"
        "class Asking(Net):\n    def forward(self, x, more):\n        return super().forward(x)\n\n\n"
        "class Leaving(Net):\n    def forward(self, x):\n        raise SystemExit(0)\n\n\n"
        "def leaving():\n    raise SystemExit(0)\n\n\n"
        "def moving():\n    os.chdir('empty')\n    return Net()\n\n\n"
        "def half():\n    return Net().half()\n\n\n"
        "def parallel():\n    return nn.DataParallel(Net())\n\n\n"
        "def compiled():\n    return torch.compile(Net(), backend='eager')\n\n\n"
        "def meta():\n    return Net().to('meta')\n\n\n"
        "def program():\n    return torch.jit.load('program.pt')\n\n\n"
        "def lazy():\n    net = Net()\n    net.classify = nn.LazyLinear(10)\n    return net\n\n\n"
        "def broken():\n    raise ValueError('out of order')\n\n\ndef number():\n    return 7\n"
    )
    (root / "my_helper.py").write_text("def same(x):\n    return x\n")
    (root / "my_program.py").write_text("raise SystemExit(0)\n")
    weights = backdoored.state_dict()
    safetensors.torch.save_file(weights, root / "net.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"_orig_mod.module.{k}": w for k, w in weights.items()}}, root / "parallel.pt"
    )
    torch.save({"model": weights, "model_name": "net"}, root / "record.pt")
    torch.save({"net": weights, "acc": 0.9, "epoch": 3}, root / "net.pt")
    torch.save({"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}}, root / "lightning.pt")
    torch.save(Headless().state_dict(), root / "headless.pt")
    torch.save(innocent.state_dict(), root / "innocent.pt")
    torch.save(Trap(root / "sprung"), root / "trap.pt")
    torch.save({f"net.{k}": w for k, w in weights.items()}, root / "prefixed.pt")
    torch.save([1, 2], root / "list.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what many a model is kept as
        torch.jit.save(torch.jit.trace(copy.deepcopy(backdoored).eval(), clean[0][:2]), root / "program.pt")
    (root / "damaged.safetensors").write_bytes(b"no weights")
    for name, photos in (("photos", "digit {}"), ("some", "{}"), ("named", "digit {}")):
        for i, (x, y) in enumerate(zip(*clean, strict=True)):
            if name == "photos" or y < 8:
                folder = root / name / photos.format(int(y))
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i}.png")
    shutil.copytree(root / "photos", root / "sizes")
    Image.new("L", (9, 9)).save(root / "sizes" / "digit 3" / "odd.png")
    shutil.copytree(root / "photos", root / "texts")
    (root / "texts" / "digit 3" / "notes.png").write_text("no picture")
    (root / "empty").mkdir()
    shutil.copytree(root / "photos" / "digit 3", root / "one" / "digit 3")
    (root / "one" / "digit 4").mkdir()
    for name in ("a", "b"):
        (root / "hollow" / name).mkdir(parents=True)
    return root


class Trap:
    """Opening its pickle would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


GRAY = "--mean 0.5 --std 0.5 --device cpu --batch_size 32".split()
SHORT = "--method ulrl --unlearning_epochs 2 --relearn_epochs 1".split()


def command(files: Path, *argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.chdir(files)
        main(["purify", *argv])
    assert isinstance(left.value.code, int)
    return left.value.code


FILES = "--model my_nets:Net --weights net.safetensors --images photos".split()


@pytest.mark.parametrize("out", ["repaired.safetensors", "repaired.pt"])
def test_the_command_repairs_a_model(
    out: str, files: Path, digits: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    given = (files / "net.safetensors").read_bytes()
    assert command(files, *FILES, *GRAY, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "verdict: backdoored; look at digit 7" in printed
    assert "on 40 clean images that were held out" in printed
    load = safetensors.torch.load_file if out.endswith("safetensors") else torch.load
    repaired = Net()
    repaired.load_state_dict(load(files / out), strict=True)
    acc, asr = rates(repaired, digits)
    assert asr < 0.05
    assert acc > 0.9
    assert (files / "net.safetensors").read_bytes() == given


def test_what_a_model_keeps_beside_its_weights_does_not_matter(files: Path) -> None:
    assert command(files, "--model", "my_nets:Extra", *FILES[2:], *GRAY, *SHORT, "--check") in (3, 4)


@pytest.mark.parametrize("factory", ["Importing", "moving", "half", "parallel", "compiled"])
def test_a_factory_may_do_more_than_make_a_net(
    factory: str, files: Path, backdoored: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(files / "empty")  # so that sys.path is put back
    gray = {"mean": (0.5,), "std": (0.5,), "device": "cpu"}
    model, _ = load(PurifyRun(model=f"my_nets:{factory}", weights="net.safetensors", images="photos", **gray))
    assert torch.equal(weights(model), weights(copy.deepcopy(backdoored).half() if factory == "half" else backdoored))


def test_a_check_has_an_exit_code(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*") if path.is_file()}
    assert command(files, *FILES, *GRAY, "--check") == 3
    innocent = ["--model", "my_nets:Net", "--weights", "innocent.pt", *FILES[4:], *GRAY, "--check"]
    code = command(files, *innocent)
    said = capsys.readouterr().out
    assert "verdict: backdoored" in said
    assert (code, "verdict: no evidence found" in said, "verdict: uncertain" in said) in (
        (0, True, False),
        (4, False, True),
    )
    assert before.items() <= {path: path.stat().st_mtime_ns for path in files.rglob("*")}.items()


@pytest.mark.parametrize("weights", ["parallel.pt", "record.pt", "net.pt", "lightning.pt"])
def test_weights_may_be_wrapped(weights: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "my_nets:Net", "--weights", weights, "--images", "photos", *GRAY, *SHORT, "--check"]
    assert command(files, *argv) in (3, 4)
    assert "only" not in capsys.readouterr().err  # it reads the images right


def test_weights_that_are_there_are_kept(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ft = [*FILES, *GRAY, "--method", "ft", "--epochs", "1"]
    shutil.copy(files / "net.safetensors", files / "kept.safetensors")
    (files / "link.safetensors").symlink_to(files / "net.safetensors")
    before = (files / "net.safetensors").read_bytes()
    for out, words in (
        ("kept.safetensors", "kept.safetensors exists; pass --overwrite to replace it"),
        ("net.safetensors --overwrite", "is the file of the given weights, which are kept"),
        ("link.safetensors --overwrite", "is the file of the given weights, which are kept"),
    ):
        assert command(files, *ft, "--out", *out.split()) == 2
        assert words in capsys.readouterr().err
    assert (files / "net.safetensors").read_bytes() == (files / "kept.safetensors").read_bytes() == before
    assert command(files, *ft, "--out", "kept.safetensors", "--overwrite") == 0
    assert (files / "kept.safetensors").read_bytes() != before


def test_a_repair_that_costs_too_much_is_not_written(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ruin = "--method ft --epochs 1 --lr 5 --max_accuracy_loss 0.05 --out ruined.pt".split()
    assert command(files, *FILES, *GRAY, *ruin) == 2
    said = capsys.readouterr().err
    assert "accuracy would have gone from" in said
    assert "ruined.pt was not written" in said.splitlines()[-1]
    assert not (files / "ruined.pt").exists()


def test_what_cannot_work_is_said_before_the_diagnosis(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    headless = "--model my_nets:Headless --weights headless.pt --images photos".split()
    assert command(files, *headless, *GRAY, "--method", "bnp", "--out", "x.pt") == 2
    said = capsys.readouterr()
    assert "BatchNorm" in said.err
    assert "looking for" not in said.err
    assert command(files, *headless, *GRAY, "--check") == 2
    assert "no nn.Linear layer or convolution" in capsys.readouterr().err
    assert command(files, *headless, *GRAY, "--method", "ft", "--epochs", "1", "--out", "headless_ft.pt") == 0
    said = capsys.readouterr()
    assert "no diagnosis: the model has no nn.Linear" in said.err
    assert (files / "headless_ft.pt").exists()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Two", "the model's output is tuple, not logits [B, K]"),
        ("Needing", "(ModuleNotFoundError: No module named 'no_such_module')"),
        ("Asking", "missing 1 required positional argument: 'more')"),
        ("Leaving", "the model fails on a batch of [2, 1, 8, 8] (SystemExit: 0)"),
    ],
)
def test_what_is_the_models_is_not_laid_to_the_images(
    factory: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(files, "--model", f"my_nets:{factory}", *FILES[2:], *GRAY, "--check") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--model my_nets:{factory}: " in said
    assert words in said
    assert "--img_size" not in said


def test_classes_by_number_and_other_methods(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FILES[:4], "--images", "some", *GRAY, "--method", "ft", "--epochs", "1", "--out", "ft.pt"]
    assert command(files, *argv) == 0
    said = capsys.readouterr()
    assert "2 of the model's 10 classes have no clean sample" in said.err
    assert "only" not in said.err
    assert (files / "ft.pt").exists()


@pytest.mark.parametrize("more", ["--check", "--out wrong.pt"])
def test_a_wrong_normalisation_gives_no_verdict(more: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, *FILES, "--mean", "9", "--std", "0.01", *SHORT, *more.split()) == 2
    said = capsys.readouterr()
    assert "the model reads only" in said.err
    assert "no verdict; look at --img_size, --mean, --std" in said.err.splitlines()[-1]
    assert said.out == ""
    assert not (files / "wrong.pt").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--model is missing"),
        ("--model my_nets:Net --weights net.safetensors --images photos", "--out is missing"),
        (f"{' '.join(FILES)} --out repaired.onnx", "--out repaired.onnx: name a file that ends in .safetensors"),
        (f"{' '.join(FILES)} --out no/such/place.pt", "there is no folder no/such"),
        (f"{' '.join(FILES)} --check --method ulr", "did you mean 'ulrl'"),
        (f"{' '.join(FILES)} --out x.pt --method abl", "repairs while it trains on the poisoned training set"),
        (f"{' '.join(FILES)} --out x.pt --method recover_trigger", "only finds and repairs nothing"),
        (f"{' '.join(FILES)} --check --z_threshold 3", "an option of ulrl and not of harden; add --method ulrl"),
        (f"{' '.join(FILES)} --check --attack badnet", "unknown argument --attack"),
        (f"{' '.join(FILES)} --check --methods ulrl", "--methods; did you mean '--method'"),
        (f"{' '.join(FILES)} --check --mean 0.5 0.5", "--mean and --std take three numbers each"),
        (f"{' '.join(FILES)} --check --mean x", "--mean: ['x'] is not a list of numbers"),
        (f"{' '.join(FILES)} --check", "--mean, --std (one number each: gray images) its own?"),
        (f"{' '.join(FILES[2:])} --check --model my_nets", "write package.module:factory"),
        (f"{' '.join(FILES[2:])} --check --model no_nets:Net", "No module named 'no_nets'"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:Nett", "has no attribute 'Nett'"),
        (f"{' '.join(FILES[2:])} --check --model my_nets.py:Nett", "has no attribute 'Nett'"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:broken", "ValueError: out of order"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:leaving", "my_nets:leaving fails (SystemExit: 0)"),
        (f"{' '.join(FILES[2:])} --check --model my_program:Net", "my_program:Net fails (SystemExit: 0)"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:meta", "is on the meta device, where tensors hold no numbers"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:program", "give the plain nn.Module it was made from"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:number", "returns a int, not a torch.nn.Module"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:lazy", "classify.weight has no shape yet"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:eleven", "does not fit --model: see classify.weight"),
        ("--model my_nets:Net --images photos --check --weights trap.pt", "save its state_dict() instead"),
        ("--model my_nets:Net --images photos --check --weights program.pt", "a TorchScript program', which no"),
        ("--model my_nets:Net --images photos --check --weights prefixed.pt", "; the file has net.body.0.0.weight"),
        ("--model my_nets:Net --images photos --check --weights list.pt", "holds no state_dict"),
        ("--model my_nets:Net --images photos --check --weights none.pt", "--weights none.pt: there is no such file"),
        (
            "--model my_nets:Net --images photos --check --weights none.safetensors",
            "none.safetensors: there is no such",
        ),
        ("--model my_nets:Net --images photos --check --weights damaged.safetensors", "damaged.safetensors is damaged"),
        (f"{' '.join(FILES[:4])} --check --images empty", "does not hold a subfolder per class"),
        (f"{' '.join(FILES[:4])} --check --images hollow", "add some, or name another --images"),
        (f"{' '.join(FILES[:4])} --check --images one", "--images one holds images of one class only"),
        (f"{' '.join(FILES[:4])} --check --images nowhere", "--images nowhere: there is no such folder"),
        (
            f"{' '.join(FILES[2:])} --check --model torchvision.models:resnet18",
            "does not fit --model: see conv1.weight",
        ),
        (f"{' '.join(FILES[:4])} --check --images sizes", "give the model's input as --img_size"),
        (f"{' '.join(FILES[:4])} --check --images texts", "notes.png is not a readable image (none of JPEG, PNG"),
        (f"{' '.join(FILES[:4])} --check --images named --mean 0.5 --std 0.5", "name the subfolders by the classes'"),
    ],
)
def test_bad_files_are_one_line(argv: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(files.iterdir())
    assert command(files, *argv.split()) == 2
    said = capsys.readouterr()
    told, last = [line for line in said.err.splitlines() if line.startswith("converting ")], said.err.splitlines()[-1]
    assert last.startswith("ulrl: ")
    assert words in last
    assert said.err.count("\n") == len(told) + 1
    assert said.out == ""
    assert set(files.iterdir()) == before  # nothing was run from trap.pt, nothing half-written


def test_the_example_runs_as_it_stands(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(ulrl, "purify", functools.partial(ulrl.purify, epochs=2, restore_epochs=2))
    example = importlib.import_module("purify_folder")
    for name in ("digit 0", "digit 1", "digit 2"):
        shutil.copytree(files / "photos" / name, tmp_path / "few" / name)
    weights = example.network(3).state_dict()
    weights["fc.bias"][0] += 100  # the first class always wins: at chance, whatever the other weights are
    torch.save(weights, tmp_path / "weights.pt")
    example.main(str(tmp_path / "weights.pt"), str(tmp_path / "few"), str(tmp_path / "repaired.pt"), size=32)
    said = capsys.readouterr().out
    assert "no verdict\nnote: the model reads only" in said, "it reads nothing"
    assert "samples held out" in said
    example.network(3).load_state_dict(torch.load(tmp_path / "repaired.pt"), strict=True)
