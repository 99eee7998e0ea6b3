"""What a stranger's record, or an archive unpacked over `record/`, may hold beside the record; files and data sets that
attacks read."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
from doors import REPAIR, Case, Place
from PIL import Image
from records import put, sparse

from ulrl.configure import configure_defense
from ulrl.runs.given import result_options
from ulrl.sweep.grid import read_sweep

COMPARE = "compare tiny --defenses ft --ratio 0.1 --device cpu".split()
GRID = """attacks: {attack: badnet, dataset: digits, width: 4, epochs: 1, device: cpu}
"""
TINY = "attack badnet --dataset digits --width 4 --epochs 1 --device cpu --save_folder_name new".split()
SSBA = ["attack", "ssba", *TINY[2:]]


def kept() -> Iterator[Case]:
    """A result that says to be of the run that is asked for, with files beside it."""

    def folder(place: Place, **other: Any) -> Path:
        defense, run = configure_defense("ft", {"ratio": 0.1, "device": "cpu"}, "digits", "preactresnet18", quiet=True)
        content = fabricated.result(method="ft", record="tiny", evidence={"z_threshold": 2.0})
        return fabricated.write(
            place.record / "defense" / "ft_0.1_seed0",
            {**content, "options": result_options(defense, replace(run, save_folder_name="ft_0.1_seed0")), **other},
        )

    for name, other, words, exits in (
        ("", {}, (), (0,)),
        (" of a method that leads out", {"method": "../../../../outside/x"}, (), (0,)),
        (" with texts for numbers", {"after": {"acc": "1"}}, ("result.json", "damaged"), (2,)),
        (" with lists for texts", {"method": ["ft"]}, ("result.json", "damaged"), (2,)),
        (
            " with texts for a trigger",
            {"trigger": dict.fromkeys(("class", "cosine", "iou", "turned"), "1")},
            ("result.json", "damaged"),
            (2,),
        ),
        (
            " with a figure before that is named as a column is",
            {"before": {"acc": 0.9, "asr": 0.9, "ra": 0.1, "kind": "x", "self": "x"}},
            (),
            (0,),
        ),
    ):
        yield Case(f"result that came with the record{name}", lambda p, o=other: folder(p, **o), COMPARE, words, exits)
    for name, make in (
        ("a pipe", lambda f: os.mkfifo(f)),
        ("a device", lambda f: f.symlink_to("/dev/zero")),
        ("of 6 GB", lambda f: sparse(f, b"epoch,acc\n", 6 << 30)),
        ("a page of the outside", lambda f: f.symlink_to(f.parents[4] / "outside" / "canary")),
    ):
        for file in ("ft_df.csv", "neurons.csv", "acc_asr.png", "trigger_samples.npz"):
            yield Case(
                f"result that came with the record, {file} is {name}",
                lambda p, f=file, m=make: m(folder(p) / f), COMPARE, exits=(0,),
                slow=file != "ft_df.csv" or name not in ("a pipe", "a device"),
            )  # fmt: skip


def sweeps() -> Iterator[Case]:
    def links(place: Place) -> None:
        put(place.home / "s.yaml", GRID)
        folder = place.home / "record" / ".sweep"
        folder.mkdir()
        for job in read_sweep(str(place.home / "s.yaml")):
            (folder / f"{job.name}.log").symlink_to(place.canary)

    def out(place: Place) -> None:
        put(place.home / "s.yaml", GRID)
        (place.home / "record" / ".sweep").symlink_to(place.outside)

    def within(place: Place) -> None:
        put(place.home / "s.yaml", f"{GRID}defenses: {{defense: ft, ratio: 0.1}}\n")
        record, _ = read_sweep(str(place.home / "s.yaml"))
        folder = place.home / "record" / record.name
        fabricated.write(folder, fabricated.result("attack"))
        (folder / "defense").symlink_to(place.outside)

    yield Case("sweep of a data set whose name has 300 letters",
               lambda p: put(p.home / "s.yaml", GRID.replace("digits", "d" * 300)), ["sweep", "s.yaml"],
               ("s.yaml", "unknown dataset"))  # fmt: skip
    yield Case("sweep file whose name has 300 letters", lambda p: None, ["sweep", "s" * 300], ("list configs",))
    yield Case("record whose name has 300 letters", lambda p: None, ["show", "r" * 300], ("is not a folder",))
    yield Case("sweep with an index of a terabyte", lambda p: (
        sparse(p.home / "i.txt", b"1 2", 1 << 40), put(p.home / "s.yaml", f"{GRID}defenses: {{defense: ft, index: i.txt}}\n")),
               ["sweep", "s.yaml", "--dry_run"], exits=(0,))  # fmt: skip
    yield Case("sweep's record leads out", within, ["sweep", "s.yaml"], ("defense", "is a link"))
    yield Case("sweep's log leads out", links, ["sweep", "s.yaml"], exits=(0,), slow=True)
    yield Case("sweep's folder leads out", out, ["sweep", "s.yaml"], (".sweep", "is a link"))
    for key, value in (("result_file", "../../outside"), ("save_folder_name", "../../outside"), ("overwrite", "true")):
        yield Case(f"sweep that sets {key}", lambda p, k=key, v=value: put(p.home / "s.yaml", f"{GRID}  {k}: {v}\n".replace("}\n  ", ", ") + "}\n"),
                   ["sweep", "s.yaml"], (key, "for the sweep to choose"))  # fmt: skip


def unfinished() -> Iterator[Case]:
    """What an attack that was killed would have left, to be taken up again."""

    def left(make: Callable[[Path, Place], object]) -> Callable[[Place], None]:
        def plant(place: Place) -> None:
            folder = place.home / "record" / ".new.partial"
            folder.mkdir()
            make(folder / "learned", place)

        return plant

    yield Case("learned/ leads out", left(lambda f, p: f.symlink_to(p.outside)), TINY, exits=(0,), slow=True)
    yield Case("unfinished record is a pipe", lambda p: os.mkfifo(p.home / "record" / ".new.partial"), TINY, exits=(0,), slow=True)  # fmt: skip
    for name in ("save_folder_name", "result_file"):
        argv = [*(TINY[:-2] if name == "save_folder_name" else REPAIR[:2]), f"--{name}", "../../outside/x"]
        yield Case(f"{name} that leads out", lambda p: None, argv, (name if name == "save_folder_name" else "outside",))


def pictures() -> Iterator[Case]:
    def npy(array: np.ndarray[Any, Any]) -> bytes:
        np.save(content := io.BytesIO(), array)
        return content.getvalue()

    def header(text: str) -> bytes:
        return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()

    huge = header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 1)}")
    files: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("a pipe", lambda f: os.mkfifo(f)),
        ("a device", lambda f: f.symlink_to("/dev/zero")),
        ("a folder", lambda f: f.mkdir()),
        ("a page of PostScript", lambda f: put(f, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
        ("cut", lambda f: put(f, _png()[:-12])),
        ("of a trillion pixels", lambda f: put(f, _png()[:16] + b"\x7f\xff\xff\xff" * 2 + _png()[24:])),
    )
    for name, make in files:
        yield Case(f"patch that is {name}", lambda p, m=make: m(p.home / "patch.png"),
                   [*TINY, "--patch_mask_path", "patch.png"], ("--patch_mask_path", "patch.png"))  # fmt: skip
    arrays: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("a pipe", lambda f: os.mkfifo(f)),
        ("a device", lambda f: f.symlink_to("/dev/zero")),
        ("of trillions of images", lambda f: put(f, huge)),
        ("of trillions of images, sparse", lambda f: sparse(f, huge, len(huge) + (1 << 36))),
        ("of objects", lambda f: np.save(f, np.array([{}], dtype=object), allow_pickle=True)),
        ("a header of minus signs", lambda f: put(f, header("-" * 9000 + "1"))),
        ("cut", lambda f: put(f, npy(np.zeros((9, 8, 8, 1), np.uint8))[:-1])),
    )
    for name, make in arrays:
        yield Case(f"array that is {name}", lambda p, m=make: m(p.home / "a.npy"),
                   [*SSBA, "--attack_train_replace_imgs_path", "a.npy", "--attack_test_replace_imgs_path", "a.npy"],
                   ("replace_imgs_path", "a.npy"), slow=name in ("a device", "cut"))  # fmt: skip


def _png() -> bytes:
    Image.new("L", (8, 8), 9).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def data_sets() -> Iterator[Case]:
    mnist = [*TINY[:2], "--dataset", "mnist", "--dataset_path", "data", *TINY[4:]]

    def case(name: str, file: str, make: Callable[[Path], object], word: str) -> Case:
        def plant(place: Place) -> None:
            raw = place.home / "data" / "mnist" / "MNIST" / "raw"
            raw.mkdir(parents=True)
            make(raw / file)

        return Case(f"data set {name}", plant, mnist, (file, word))

    cifar = "cifar10/cifar-10-batches-py"
    for name, make, word in (
        ("of a terabyte", lambda f: sparse(f, b"\x80\2", 1 << 40), "bytes, more"),
        ("a pipe", lambda f: os.mkfifo(f), "a pipe"),
    ):
        yield Case(f"data set with a pickle that is {name}", lambda p, m=make: (
            (p.home / "data" / cifar).mkdir(parents=True), m(p.home / "data" / cifar / "data_batch_1")),
            [*TINY[:2], "--dataset", "cifar10", "--dataset_path", "data", *TINY[4:]], ("data_batch_1", word))  # fmt: skip
    zeros = gzip.compress(bytes(32 << 20), compresslevel=1)
    images, labels = "train-images-idx3-ubyte", b"\0\0\x08\1\x7f\xff\xff\xff"
    yield case("of 6 GB in a small .gz", f"{images}.gz", lambda f: put(f, zeros * 200), "bytes")
    yield case("of a terabyte", images, lambda f: sparse(f, b"\0\0\x08\3", 1 << 40), "bytes, more")
    yield case("of a terabyte, gzipped", f"{images}.gz", lambda f: sparse(f, zeros[:10], 1 << 40), "bytes, more")
    yield case("whose header promises 2^31 labels", images, lambda f: put(f, labels), "damaged")


def outputs() -> Iterator[Case]:
    def link(place: Place) -> None:
        fabricated.write(place.home / "results/g/defense/u", fabricated.result())
        (place.home / "page.html").symlink_to(place.canary)
        (place.home / "results.json").write_text(json.dumps({}))

    for argv in (["report", "results", "--out", "page.html"], ["results", "results", "--export", "page.csv"]):
        yield Case(f"{argv[0]} {argv[-1]} where a link leads out",
                   lambda p, f=argv[-1]: (link(p), f == "page.csv" and (p.home / f).symlink_to(p.canary)), argv,
                   exits=(0,), slow=argv[0] == "report")  # fmt: skip


CASES = [*kept(), *sweeps(), *unfinished(), *pictures(), *data_sets(), *outputs()]
