"""Hostile weights, images, options, sweeps, results and index files."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pickles
import torch
from doors import QUICK, REPAIR, Case, Place
from PIL import Image
from records import put, sparse
from safetensors.torch import save as save_safetensors

NET = """import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
"""
PURIFY = [*"purify --model hostile_net:net --check --images photos --mean 0.5 --std 0.5 --device cpu --weights".split()]


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def own(place: Place) -> None:
    """A model of the user's own: two classes of gray 8x6 images."""
    put(place.home / "hostile_net.py", NET)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (place.home / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (8, 6), np.uint8)
            Image.fromarray(pixels).save(place.home / "photos" / name / f"{i}.png")
    put(place.home / "good.pt", saved({"1.weight": torch.zeros(2, 48), "1.bias": torch.zeros(2)}))


def weights() -> Iterator[Case]:
    good = {"1.weight": torch.zeros(2, 48), "1.bias": torch.zeros(2)}
    eye = torch.eye(2)

    def case(name: str, content: bytes, word: str, file: str = "w.pt", slow: bool = False) -> Case:
        return Case(f"weights {name}", lambda p: (own(p), put(p.home / file, content)), [*PURIFY, file],
                    ("--weights", file, word), slow=slow)  # fmt: skip

    for name, odd, word in (
        ("sparse", eye.to_sparse(), "sparse"),
        ("quantised", torch.quantize_per_tensor(eye, 1.0, 0, torch.qint8), "quantised"),
        ("nested", torch.nested.nested_tensor([eye, eye]), "nested"),
        ("on meta", torch.empty(2, device="meta"), "meta"),
        ("NaN", torch.full((2,), float("nan")), "NaN"),
        ("NaN of 8 bits", torch.full((2,), float("nan")).to(torch.float8_e4m3fn), "NaN"),
        ("too large for a model", torch.full((2,), 1e300, dtype=torch.float64), "infinity"),
        ("a text", "\x1b[2J", "is a str"),
        ("a list", [1, 2], "is a list"),
        ("of another shape", torch.zeros(10**6), "1.bias"),
    ):
        yield case(name, saved({**good, "1.bias": odd}), word, slow=name not in ("sparse", "NaN"))
    yield case("of the same megabyte, 30,000", saved(dict.fromkeys(map(str, range(30_000)), torch.zeros(1 << 18))),
               "the same bytes")  # fmt: skip
    empty = torch.empty(0, 3, 3)
    for name, old, new, word in (
        ("with an end beyond", b"QK\x00", b"Q" + pickles.integer(2**70), "1.bias"),
        ("of a size beyond", b"K\x03K\x03\x87", pickles.integer(2**61) * 2 + b"\x87", "without a size"),
    ):
        yield Case(f"weights of nothing, {name}", lambda p, o=old, n=new: (
            own(p), put(p.home / "w.pt", saved({"1.bias": empty})),
            pickles.rewritten(p.home / "w.pt", lambda b: b.replace(o, n))), [*PURIFY, "w.pt"], ("--weights", word))  # fmt: skip
    yield case("of a variance below 0", saved({**good, "bn.running_var": -torch.ones(2)}), "below 0")
    yield case("named by numbers", saved({1: eye, None: eye}), "w.pt")
    yield case("named by half a surrogate", saved({**good, "\ud800": eye}), "no text")
    yield case("named by escape codes", saved({**good, "\x1b]0;\x07\u202e": eye}), "x1b")
    yield case("a number", saved(3), "no state_dict", slow=True)
    yield case("nothing", b"", "no readable torch file", slow=True)
    yield case("an empty mapping", saved({}), "no state_dict")
    yield case("a module", saved(torch.nn.Linear(1, 1)), "asks to run")
    program = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), program)
    yield case("a TorchScript program", program.getvalue(), "TorchScript")
    yield case("cut", saved(good)[:-90], "no readable torch file")
    for name, header in (
        ("a header of 2^63", b"\xff" * 8),
        ("a header that is no JSON", struct.pack("<Q", 4) + b"\x1b[2J"),
        ("an offset beyond", _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}})),
        ("a shape beyond", _header({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 8]}}) + bytes(8)),
        ("a type of tomorrow", _header({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8)),
        ("65 dimensions", _header({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}) + bytes(4)),
        (
            "numbers of 4 bits",
            _header(
                {
                    "1.weight": {"dtype": "F4", "shape": [2, 96], "data_offsets": [0, 96]},
                    "1.bias": {"dtype": "F32", "shape": [2], "data_offsets": [96, 104]},
                }
            )
            + bytes(104),
        ),
        ("cut", save_safetensors(good)[:-9]),
        ("nothing", b""),
    ):
        yield case(f"safetensors with {name}", header, "", "w.safetensors", slow=name in ("cut", "nothing"))
    many = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    yield case("safetensors with empty tensors", _header(many), "holds 100000 tensors", "w.safetensors")
    lists = {"__metadata__": {"record": "[" + "[]," * (6 << 20)}}  # JSON, which takes twenty times as much memory
    yield case("safetensors with a text of 18 MB", _header(lists), "a header of", "w.safetensors")
    yield Case("inspect looks into no text of 18 MB", lambda p: put(p.home / "w.safetensors", _header(lists)),
               ["inspect", "w.safetensors"], ("a header of",))  # fmt: skip
    for name, make, word in (
        ("a pipe", lambda f: os.mkfifo(f), "a pipe"),
        ("a folder", lambda f: f.mkdir(), "a folder"),
        ("a device", lambda f: f.symlink_to("/dev/zero"), "a device"),
        ("of a terabyte", lambda f: sparse(f, b"PK\3\4", 1 << 40), "bytes, more"),
    ):
        for file in ("w.pt", "w.safetensors"):
            yield Case(f"weights {name}, {file}", lambda p, m=make, f=file: (own(p), m(p.home / f)), [*PURIFY, file],
                       ("--weights", file, word), slow=file == "w.pt")  # fmt: skip
    yield Case("weights of a name with NUL", own, [*PURIFY, "a\0b"], ("--weights",))
    yield Case("weights of a name with half a surrogate", own, [*PURIFY, "a\ud800b"], ("--weights",))
    yield Case("weights of a name of a megabyte", own, [*PURIFY, "n" * 1_000_000], ())


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def folders() -> Iterator[Case]:
    def case(name: str, change: Callable[[Path, Place], object], word: str, slow: bool = False) -> Case:
        return Case(f"images {name}", lambda p: (own(p), change(p.home / "photos" / "cat" / "0.png", p)),
                    [*PURIFY, "good.pt"], (word,), slow=slow)  # fmt: skip

    def of(change: Callable[[bytes], bytes]) -> Callable[[Path, Place], None]:
        return lambda f, p: put(f, change(f.read_bytes()))

    def instead(make: Callable[[Path], object]) -> Callable[[Path, Place], None]:
        return lambda f, p: (f.unlink(), make(f))  # type: ignore[return-value]

    def deep(f: Path, p: Place) -> None:
        here = os.getcwd()
        os.chdir(f.parent)
        for _ in range(150):
            os.mkdir("a")
            os.chdir("a")
        os.chdir(here)

    yield case("cut before the end", of(lambda b: b[:-12]), "0.png")
    yield case("with a wrong bit", of(lambda b: b[:-20] + bytes([b[-20] ^ 1]) + b[-19:]), "0.png")
    yield case("with a private chunk of 2 GB", lambda f, p: sparse(f, f.read_bytes()[:33] + b"\x7f\xff\xff\xf0prVt", 2**31), "0.png")  # fmt: skip
    yield case("of a trillion pixels", of(lambda b: b[:16] + b"\x7f\xff\xff\xff" * 2 + b[24:]), "0.png")
    yield case("of 400 million pixels", lambda f, p: Image.new("1", (20_000, 20_000)).save(f), "0.png")
    yield case("all of 81 million pixels and a few bytes", lambda f, p: [
        Image.new("1", (9000, 9000)).save(file) for file in p.home.glob("photos/*/*.png")], "--img_size")  # fmt: skip
    yield case("a pipe", instead(lambda f: os.mkfifo(f)), "a pipe")
    yield case("a device", instead(lambda f: f.symlink_to("/dev/zero")), "a device")
    yield case("a text", of(lambda b: b"no image"), "0.png", slow=True)
    yield case("a page of PostScript", of(lambda b: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "0.png")
    yield case("16 bits deep", lambda f, p: Image.fromarray(np.zeros((8, 6), np.uint16)).save(f), "0.png", slow=True)
    yield case("150 folders deep", deep, "folders deep")
    yield case("in a folder with an escape code",
               lambda f, p: (f.parent.rename(f.parent.with_name("\x1b]0;x\x07")), put(p.home / "photos" / "dog" / "0.png", "x")),
               "0.png", slow=True)  # fmt: skip
    yield case("with an escape code in a name", lambda f, p: put(f.with_name("\x1b[2J\u202e.png"), "x"), "x1b")
    yield case("with a name that is no UTF-8", lambda f, p: put(f.with_name("\udcff\udcfe.png"), "x"), "udcff")
    yield case(
        "none", lambda f, p: (shutil.rmtree(f.parent), f.parent.mkdir(), shutil.rmtree(p.home / "photos/dog")), "photos"
    )
    yield Case("a cache that leads out, as it once lay",
               lambda p: (own(p), (p.home / "photos" / ".ulrl_cache").symlink_to(p.outside)), [*PURIFY, "good.pt"],
               exits=(0, 2, 3))  # fmt: skip


def yamls() -> Iterator[Case]:
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    for name, text, word in (
        ("aliases that multiply", laughs, "anchors"),
        ("an anchor in epochs", "relearn_epochs: &x 3\nunlearning_epochs: *x\n", "anchors"),
        ("a merge key", "base: &b {ratio: 0.1}\n<<: *b\n", "anchors"),
        ("a key twice", "ratio: 0.1\nratio: 0.2\n", "twice"),
        ("nothing", "", "empty"),
        ("a tag that calls", "ratio: !!python/object/apply:os.system ['touch /tmp/x']\n", "hostile.yaml"),
        ("digits by 200,000", "ratio: " + "1:" * 100_000 + "1\n", "400 digits"),
        ("a number of 5,000 digits", "ratio: " + "9" * 5000 + "\n", "400 digits"),
        ("brackets by 100,000", "ratio: " + "[" * 100_000, "hostile.yaml"),
        ("a megabyte", "x" * 1_000_000, "bytes, more"),
        ("an escape code as a key", '"\\e[2J\\x07": 1\n', "x1b"),
        ("an escape code as a value", 'ratio: "\\e[2J"\n', "x1b"),
        ("NUL in a path", 'index: "a\\0b"\n', "index"),
        ("half a surrogate in a path", 'index: "a\\ud800b"\n', "index"),
        ("a mapping as a value", "ratio: {a: 1}\n", "ratio"),
        ("a negative seed", "random_seed: -1\n", "random_seed"),
        ("a gigantic seed", "random_seed: 1e300\n", "random_seed"),
        ("a seed of 30 digits", "random_seed: 1" + "0" * 30 + "\n", "random_seed"),
        ("infinity", "ratio: .inf\n", "ratio"),
        ("a threshold of 1e308 and more", "ratio: 1e999\n", "ratio"),
        ("a date as a key", "2001-01-01: 1\n", "unknown key"),
        ("a list as a key", "? [a]\n: 1\n", "hostile.yaml"),
    ):
        yield Case(f"YAML with {name}", lambda p, t=text: put(p.home / "hostile.yaml", t),
                   [*REPAIR, "--yaml_path", "hostile.yaml"], (word,),
                   slow=name.startswith(("a date", "a list", "infinity", "a mapping", "a seed")))  # fmt: skip
    for name, make in (
        ("a pipe", lambda f: os.mkfifo(f)),
        ("a device", lambda f: f.symlink_to("/dev/zero")),
        ("a folder", lambda f: f.mkdir()),
        ("binary", lambda f: put(f, bytes(range(256)))),
    ):
        yield Case(f"YAML that is {name}", lambda p, m=make: m(p.home / "hostile.yaml"),
                   [*REPAIR, "--yaml_path", "hostile.yaml"], ("hostile.yaml",))  # fmt: skip


def sweeps() -> Iterator[Case]:
    head = "attacks:\n  attack: badnet\n  dataset: digits\n"
    hundred = ", ".join(map(str, range(1, 101)))
    for name, text, word in (
        ("a billion seeds", head + "  seeds: 1000000000\n", "100000"),
        ("ten billion runs", head + "".join(f"  {k}: [{hundred}]\n" for k in "epochs batch_size width patch_size".split()), "100000"),
        ("a negative seed", head + "  seeds: [-1]\n", "random_seed"),
        ("aliases", head + "  epochs: &e [1]\n  batch_size: *e\n", "anchors"),
        ("an attack with an escape code", 'attacks:\n  attack: "\\e[2J"\n  dataset: digits\n', "x1b"),
        ("a list of lists", head + "  epochs: [[[1]]]\n", ""),
    ):  # fmt: skip
        yield Case(f"sweep with {name}", lambda p, t=text: put(p.home / "hostile.yaml", t),
                   ["sweep", "hostile.yaml", "--dry_run"], (word,) if word else (), exits=(2,) if word else (0, 2))  # fmt: skip
    for make, name in ((lambda f, p: os.mkfifo(f), "a pipe"), (lambda f, p: f.symlink_to(p.canary), "a link"),
                       (lambda f, p: f.symlink_to(p.outside / "new"), "a link to nothing")):  # fmt: skip

        def plant(place: Place, make: Callable[[Path, Place], object] = make) -> None:
            put(place.home / "good.yaml", head)
            folder = place.home / "record" / ".sweep"
            folder.mkdir(exist_ok=True)
            from ulrl.sweep.grid import read_sweep

            (job,) = read_sweep(str(place.home / "good.yaml"))
            make(folder / f"{job.name}.lock", place)

        yield Case(f"a sweep's lock is {name}", plant, ["sweep", "good.yaml"], (".lock",))


def results() -> Iterator[Case]:
    def case(
        name: str, change: Callable[[dict[str, Any]], object] | str, *, raw: bool = False, slow: bool = False
    ) -> Case:
        def plant(place: Place) -> None:
            content = fabricated.result()
            text = change if isinstance(change, str) else json.dumps((change(content), content)[1])
            fabricated.write(place.home / "results" / "good" / "defense" / "ulrl", fabricated.result())
            folder = place.home / "results" / "bad" / "defense" / "ulrl"
            folder.mkdir(parents=True)
            put(folder / "result.json", text)

        return Case(f"result with {name}", plant, ["results", "results"], exits=(0,), slow=slow)

    yield case("an escape code as method", lambda r: r.update(method="\x1b[2J\x07\u202e"))
    yield case("markup of the table", lambda r: r.update(method="[link=file:///etc]x[/link][blink]"))
    yield case("a method of ten megabytes", lambda r: r.update(method="m" * 7_000_000))
    yield case("half a surrogate", lambda r: r.update(method="\ud800"))
    yield case("a NUL", lambda r: r.update(record="a\0b"))
    yield case("NaN", lambda r: r["after"].update(acc=float("nan")))
    yield case("infinity", lambda r: r["seconds"].update(total=float("inf")), slow=True)
    yield case("1e308", lambda r: r["seconds"].update(total=1e308))
    yield case("a number of 400 digits", lambda r: r.update(seed=10**400))
    yield case("a clean_samples of 400 digits", lambda r: r.update(clean_samples=10**400), slow=True)
    yield case("a class of 10^18", lambda r: r.update(flagged=[10**18]))
    yield case("text for numbers", lambda r: r["after"].update(acc="0.9"), slow=True)
    yield case("a list for a mapping", "[]")
    yield case("nesting", "[" * 200_000)
    yield case("nesting of mappings", '{"a":' * 100_000, slow=True)
    yield case("nothing", "")
    yield case("missing keys", "{}", slow=True)
    for name, make in (("a pipe", lambda f: os.mkfifo(f)), ("a device", lambda f: f.symlink_to("/dev/zero")),
                       ("of 6 GB", lambda f: sparse(f, b"{", 6 << 30)), ("a folder", lambda f: f.mkdir()),
                       ("a link in a circle", lambda f: f.symlink_to(f.name))):  # fmt: skip

        def plant(place: Place, make: Callable[[Path], object] = make) -> None:
            fabricated.write(place.home / "results" / "good" / "defense" / "ulrl", fabricated.result())
            (place.home / "results" / "bad").mkdir()
            make(place.home / "results" / "bad" / "result.json")

        yield Case(f"a run's result.json is {name}", plant, ["results", "results"], exits=(0,), slow=name == "a folder")
    for name, text in (
        ("below a blank line", "\n" + "a," * 1_000_000 + "\n"),
        ("below a name with a line break", '"a\n"' + ",a" * 1_000_000 + "\n"),
        ("in the first line of numbers", "class,z\n" + "1," * 1_000_000 + "\n"),
    ):
        yield Case(f"a table with a million columns {name}", lambda p, t=text: put(fabricated.write(
                   p.home / "results/g/defense/u", fabricated.result()) / "neurons.csv", t),
                   ["plot", "ranking", "results/g/defense/u", "--out", "r.png"], ("ranks neurons",))  # fmt: skip
    deep = json.dumps(fabricated.result(evidence={"x": 0})).replace('"x": 0', '"x": ' + "[" * 978 + "]" * 978)
    figures = "class,change,z,flagged,excess\n0,1.5,{},True,{}\n1,0.5,-1,False,0\n"
    for name, file, text, attack in (
        ("nested as deep as Python reads", "result.json", deep, False),
        ("a table with a column twice", "attack_df.csv", "epoch,loss,train_epoch_loss_avg_over_batch\n0,1.5,1.5\n", True),
        ("a loss at the end of floats", "ulrl_df.csv", "stage,epoch,loss\nx,0,1.7976931348623157e308\n", False),
        ("a z at the end of floats", "neurons.csv", figures.format("1.7976931348623157e308", 0), False),
    ):  # fmt: skip

        def beside(place: Place, file: str = file, text: str = text, attack: bool = attack) -> None:
            fabricated.write_record(place.home / "results" / "good", "badnet", {})
            folder = place.home / "results" / ("bad" if attack else "bad/defense/ulrl")
            put(fabricated.write(folder, fabricated.result("attack" if attack else "defense")) / file, text)

        yield Case(f"page of {name}", beside, ["report", "results"], exits=(0,))
    for name, text in (
        ("a z at the end of floats", figures.format("1.7976931348623157e308", 0)),
        ("an excess of text", figures.format(1, "x")),
        ("an excess at the end of floats", figures.format(1, "1.7976931348623157e308")),
        ("no class", figures.splitlines()[0]),
    ):
        yield Case(f"ranking with {name}", lambda p, t=text: put(fabricated.write(
                   p.home / "results/g/defense/u", fabricated.result(evidence={"z_threshold": 2})) / "neurons.csv", t),
                   ["plot", "ranking", "results/g/defense/u", "--out", "r.png"], ("ranks neurons",))  # fmt: skip
    for argv, word in (
        (["results", "results", "--export", "no/such/folder.csv"], "folder"),
        (["results", "results", "--export", "results/x.csv/y.csv"], "folder"),
        (["report", "results", "--out", "no/such/page.html"], "folder"),
        (["report", "results", "--out", "results"], "a folder"),
        (["plot", "asr-acc", "results", "--out", "no/such/figure.png"], "folder"),
        (["results", "nosuch\x1b[2J"], "x1b"),
        (["results", "a\0b"], ""),
    ):
        yield Case(f"{argv[0]} {argv[-1]!r}", lambda p: fabricated.write(p.home / "results/g/defense/u", fabricated.result()),
                   argv, (word,))  # fmt: skip
    yield Case("--out is a device", lambda p: fabricated.write(p.home / "results/g/defense/u", fabricated.result()),
               ["report", "results", "--out", "/dev/null"], ("/dev/null", "a device"))  # fmt: skip


def options() -> Iterator[Case]:
    nothing: Callable[[Place], None] = lambda place: None  # noqa: E731
    for name, argv, word in (
        ("an escape code in a flag", ["defense", "ulrl", "--\x1b[2J", "1"], "x1b"),
        ("an escape code in a value", [*REPAIR, "--ratio", "\x1b]0;\x07"], "x1b"),
        ("a value of ten megabytes", [*REPAIR, "--ratio", "9" * 10_000_000], "ratio"),
        ("a record of NUL", ["defense", "ulrl", "--result_file", "a\0b", *QUICK], "result_file"),
        ("a record of half a surrogate", ["defense", "ulrl", "--result_file", "a\ud800", *QUICK], "result_file"),
        ("a record with an escape code", ["defense", "ulrl", "--result_file", "\x1b[2J", *QUICK], "x1b"),
        ("a seed below 0", [*REPAIR, "--random_seed", "-1"], "random_seed"),
        ("a seed of 30 digits", [*REPAIR, "--random_seed", "1" + "0" * 30], "random_seed"),
        ("a method with an escape code", ["defense", "\x1b[2J"], "x1b"),
        ("a command with an escape code", ["\x1b[2J"], "x1b"),
        ("an index that is a device", [*REPAIR, "--index", "/dev/zero"], "index"),
        ("an index that is a folder", [*REPAIR, "--index", "record"], "index"),
        ("a data set path of NUL", [*REPAIR, "--dataset_path", "a\0b"], "dataset_path"),
    ):
        yield Case(f"{name}", nothing, argv, (word,), slow=name == "an index that is a folder")
    for name, content in (("half a gigabyte of digits", None), ("a number of 10,000 digits", "9" * 10_000),
                          ("200,000 lines", "1\n" * 200_000), ("an escape code", "\x1b[2J")):  # fmt: skip

        def plant(place: Place, content: str | None = content) -> None:
            if content is None:
                sparse(place.home / "index.txt", b"1", 1 << 29)
            else:
                put(place.home / "index.txt", content)

        yield Case(f"an index of {name}", plant, [*REPAIR, "--index", "index.txt"], ("index.txt",),
                   slow=name in ("a number of 10,000 digits", "200,000 lines"))  # fmt: skip
    yield Case("an index that is a pipe", lambda p: os.mkfifo(p.home / "index.txt"), [*REPAIR, "--index", "index.txt"],
               ("index.txt",))  # fmt: skip
    yield Case("inspect says it of a program", lambda p: pickles.rewritten(p.result, lambda _: pickles.call("os.system", p.canary)),
               ["inspect", "record/tiny"], exits=(2,))  # fmt: skip


CASES = [*weights(), *folders(), *yamls(), *sweeps(), *results(), *options()]
