"""Hostile records: `attack_result.pt` and what lies beside it."""

from __future__ import annotations

import io
import os
import pickle
import socket
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pickles
import torch
from doors import Case, Place
from PIL import Image

RESULT = "attack_result.pt"
DAMAGED = (RESULT, "no readable torch file")


def put(file: Path, content: bytes | str) -> None:
    """In place of what was there, which other homes may share."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def changed(change: Callable[[dict[str, Any]], object], **how: Any) -> Callable[[Place], None]:
    """The record with another content."""

    def plant(place: Place) -> None:
        content = torch.load(place.result, weights_only=False)
        change(content)
        buffer = io.BytesIO()
        torch.save(content, buffer, **how)
        put(place.result, buffer.getvalue())

    return plant


def pickled(content: bytes | Callable[[Place], bytes]) -> Callable[[Place], None]:
    """The record's archive with another pickle."""

    def plant(place: Place) -> None:
        data = content if isinstance(content, bytes) else content(place)
        pickles.rewritten(place.result, lambda _: data)

    return plant


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    return lambda place: put(place.result, change(place.result.read_bytes()))


def sparse(file: Path, start: bytes, size: int) -> None:
    put(file, start)
    os.truncate(file, size)


class Odd:
    """Pickles as the call that it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def gadgets() -> Iterator[Case]:
    for i, name in enumerate(pickles.GADGETS):
        yield Case(
            f"record calls {name}", pickled(lambda place, name=name: pickles.call(name, place.canary)),
            words=(RESULT, "asks to run", name), slow=i % 9 > 0,
        )  # fmt: skip
    for module, name in (("os", "system"), ("builtins", "getattr"), ("collections", "OrderedDict.fromkeys"),
                         ("torch", "load"), ("numpy", "ndarray.__reduce__"), ("torch._utils", "sys.modules")):  # fmt: skip
        yield Case(
            f"record calls {module}.{name} from the stack",
            pickled(lambda place, m=module, n=name: pickles.stack_call(m, n, place.canary)),
            words=(RESULT, "asks to run", name), slow=name != "system",
        )  # fmt: skip
    yield Case("record calls by INST", pickled(lambda p: b"(" + pickles.text(f"touch {p.canary}") + b"ios\nsystem\n."),
               words=(RESULT, "os.system"))  # fmt: skip
    yield Case("record calls by an extension", pickled(b"\x80\x02\x82\x01."), words=DAMAGED)
    yield Case("record names with an escape code", pickled(b"\x80\x02c\x1b]0;owned\x07\nx\x00\xe2\x80\xae\n."),
               words=(RESULT, "asks to run"))  # fmt: skip
    yield Case("record names ten megabytes", pickled(b"\x80\x02c" + b"A" * 10_000_000 + b"\nx\n."), words=(RESULT,))


def opcodes() -> Iterator[Case]:
    deep = b"(" * 100_000 + b"t" * 100_000
    for name, content, words in (
        ("nothing", b"", DAMAGED),
        ("a stop", b".", DAMAGED),
        ("no stop", b"\x80\x02}", DAMAGED),
        ("an unknown opcode", b"\x80\x02\xff.", DAMAGED),
        ("a protocol of tomorrow", b"\x80\x63.", DAMAGED),
        ("a memo of 2^32", pickles.reduced(b"Nr\xff\xff\xff\xff"), (RESULT,)),
        ("a text of 2^63", pickles.reduced(b"\x8d" + b"\xff" * 7 + b"\x7f"), (RESULT,)),
        ("bytes of 20 GB", b"\x80\x05\x96" + (20 << 30).to_bytes(8, "little") + b".", (RESULT,)),
        ("a frame of 2^60", b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b".", (RESULT,)),
        ("a number of 2^31 bytes", b"\x80\x02\x8b\xff\xff\xff\x7f.", DAMAGED),
        ("digits by the million", b"\x80\x00I" + b"9" * 1_000_000 + b"\n.", DAMAGED),
        ("a bytearray of 20 GB", pickles.reduced(b"cbuiltins\nbytearray\n", pickles.integer(20 << 30), b"\x85R"), (RESULT,)),
        ("a list in itself", pickles.reduced(b"]q\x00h\x00a"), DAMAGED),
        ("a mapping in itself", pickles.reduced(b"}q\x00", pickles.text("a"), b"h\x00s"), DAMAGED),
        ("tuples nested 100,000 deep", b"\x80\x02" + deep + b".", (RESULT,)),
        ("such a tuple as a key", b"\x80\x02}" + deep + b"Ns.", (RESULT,)),
        ("a key that takes 2^60 steps", pickles.exploding(60), (RESULT,)),
        ("lists that multiply", pickles.reduced(b"]q\x00", *(b"0](h\x00h\x00eq\x00" for _ in range(60))), (RESULT,)),
        ("a persistent id in another", pickles.reduced(pickles.text("storage") + b"QQ"), DAMAGED),
        ("a persistent id that is a number", pickles.reduced(b"K\x01Q"), DAMAGED),
        ("state for a function", pickles.reduced(b"ctorch._utils\n_rebuild_tensor_v2\n}b"), DAMAGED),
        ("state for a dtype", pickles.reduced(b"ctorch\nFloatStorage\n}b"), DAMAGED),
        ("a tensor of nothing", pickles.reduced(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR"), DAMAGED),
        ("an array that is pointers", pickles.reduced(b"cnumpy\ndtype\n", pickles.text("O8"), b"\x85R"), DAMAGED),
        ("a call of what is no function", pickles.reduced(b"K\x01)R"), DAMAGED),
        ("a pop from nothing", b"\x80\x020000.", DAMAGED),
    ):  # fmt: skip
        quick = ("memo", "20 GB", "itself", "a key that", "multiply", "pointers", "nothing", "in another")
        yield Case(f"pickle: {name}", pickled(content), words=words, slow=not any(word in name for word in quick))
    yield Case("pickle: 300,000 keys of one hash", pickled(pickles.colliding(300_000)),
               words=(RESULT, "would take over"), slow=True)  # fmt: skip
    yield Case("pickle: 20,000 arrays of the same megabyte", pickled(pickles.arrays(20_000, 1 << 20)),
               words=(RESULT, "hundreds of megabytes"))  # fmt: skip


def contents() -> Iterator[Case]:
    def model(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
        return changed(lambda r: change(r["model"]))

    def samples(r: dict[str, Any]) -> dict[int, Any]:
        return r["bd_test"]["bd_data_container"]["data_dict"]

    def first(r: dict[str, Any]) -> dict[str, Any]:
        return samples(r)[min(samples(r))]

    w, none = "conv1.weight", np.zeros(0, np.int64)
    eye = torch.eye(2)
    for name, change, word in (
        ("sparse", lambda m: m.update({w: eye.to_sparse()}), "sparse"),
        ("quantised", lambda m: m.update({w: torch.quantize_per_tensor(eye, 1.0, 0, torch.qint8)}), "quantised"),
        ("nested", lambda m: m.update({w: torch.nested.nested_tensor([eye, eye])}), "nested"),
        ("on meta", lambda m: m.update({w: torch.empty(2, device="meta")}), "meta"),
        ("complex", lambda m: m.update({w: eye.to(torch.complex64)}), "conv1.weight"),
        ("a conjugate view", lambda m: m.update({w: eye.to(torch.complex64).conj()}), "conjugate"),
        ("of stride 0", lambda m: m.update({w: torch.zeros(1).expand(10**12)}), "larger than its storage"),
        ("NaN", lambda m: m[w].fill_(float("nan")), "NaN"),
        ("infinite", lambda m: m[w].fill_(float("inf")), "infinity"),
        ("a number", lambda m: m.update({w: 3}), "is a int"),
        ("None", lambda m: m.update({w: None}), "NoneType"),
        ("a text with an escape", lambda m: m.update({w: "\x1b[2J"}), "is a str"),
        ("a numpy array", lambda m: m.update({w: np.zeros(2)}), "ndarray"),
        ("of another shape", lambda m: m.update({w: eye}), "conv1.weight"),
        ("missing", lambda m: m.pop(w), "conv1.weight"),
        ("named by a number", lambda m: m.update({7: eye}), "state dict"),
        ("named None", lambda m: m.update({None: eye}), "state dict"),
        ("named by escape codes", lambda m: m.update({"\x1b]0;\x07\u202e\ud800": eye}), "x1b"),
        ("named by ten megabytes", lambda m: m.update({"n" * 10_000_000: eye}), "nnn ... nnn"),
        ("there with and without module.", lambda m: m.update({f"module.{w}": eye}), "module."),
    ):  # fmt: skip
        yield Case(
            f"weight {name}", model(change), words=(word,), slow=name in ("a number", "None", "missing", "infinite")
        )
    for name, change, words in (
        ("model a list", lambda r: r.update(model=[1]), (RESULT, "state dict")),
        ("num_classes a billion", lambda r: r.update(num_classes=10**9), ()),
        ("num_classes of 400 digits", lambda r: r.update(num_classes=10**400), (RESULT, "num_classes")),
        ("img_size a billion", lambda r: r.update(img_size=(10**9, 10**9, 3)), ()),
        ("model_name an escape", lambda r: r.update(model_name="\x1b[31m\x00"), ("x1b",)),
        ("clean_data a path", lambda r: r.update(clean_data="../../../etc/passwd"), ("unknown dataset",)),
        ("clean_data with NUL", lambda r: r.update(clean_data="digits\0"), ("unknown dataset",)),
        ("bd_test a text", lambda r: r.update(bd_test="x"), (RESULT, "bd_test")),
        ("bd_test nested in itself", lambda r: r["bd_test"].update(again=r["bd_test"]), DAMAGED),
        ("indicator complex", lambda r: r["bd_test"].update(poison_indicator=np.zeros(9, complex)), DAMAGED),
        ("indicator of times", lambda r: r["bd_test"].update(poison_indicator=np.zeros(9, "m8[s]")), DAMAGED),
        ("indicator structured", lambda r: r["bd_test"].update(poison_indicator=np.zeros(9, "f8,f8")), DAMAGED),
        ("indicator void", lambda r: r["bd_test"].update(poison_indicator=np.zeros(9, "V8")), DAMAGED),
        ("indicator of texts", lambda r: r["bd_test"].update(poison_indicator=np.array(["1"])), DAMAGED),
        ("indicator of objects", lambda r: r["bd_test"].update(poison_indicator=np.array([{}])), (RESULT,)),
        ("indicator 2-D", lambda r: r["bd_test"].update(poison_indicator=np.zeros((3, 3))), (RESULT, "indicator")),
        ("index beyond", lambda r: r["bd_test"].update(original_index_array=np.array([10**9])), (RESULT, "positions")),
        ("index twice", lambda r: r["bd_test"].update(original_index_array=np.array([1, 1])), (RESULT, "positions")),
        ("samples that name one image", lambda r: [s.update(path="x/1/1.png") for s in samples(r).values()],
         (RESULT, "same image")),
        ("a sample that leads out", lambda r: first(r).update(path="x/../../../canary.png"), (RESULT, "path")),
        ("a sample with a device", lambda r: first(r).update(path="/dev/zero"), (RESULT, "path")),
        ("a sample with NUL", lambda r: first(r).update(path="x/1/1\0.png"), (RESULT, "path")),
        ("a label beyond", lambda r: first(r).update(other_info=[10**6, 0]), (RESULT, "labels")),
        ("a label of 400 digits", lambda r: first(r).update(other_info=[10**400, 0]), (RESULT, "labels")),
        ("a folder that leads out", lambda r: r["bd_test"]["bd_data_container"].update(save_folder_path="x/.."),
         (RESULT, "plain folder")),
        ("pickled images", lambda r: r["bd_test"].update(x=[Image.new("RGB", (2, 2))]), (RESULT, "RAM mode")),
        ("a program beside it", lambda r: r.update(extra=Odd(os.getcwd, ())), (RESULT, "asks to run")),
        ("no keys", lambda r: r.clear(), (RESULT, "lacks")),
    ):  # fmt: skip
        yield Case(
            f"record with {name}", changed(change), words=words, slow=name.startswith(("a label", "index", "img"))
        )
    yield Case("record with an array of nothing, of a size beyond", _vast, words=DAMAGED)
    yield Case("record that shows no training image", changed(lambda r: r["bd_train"].update(original_index_array=none)),
               "detect tiny --samples strip --ratio 0.1 --device cpu".split(), ("shows no training images",))  # fmt: skip
    yield Case("an OrderedDict with attributes is opened", changed(lambda r: r.update(model=_with_attributes(r["model"]))),
               exits=(0,), slow=True)  # fmt: skip
    yield Case("an old torch file is opened", changed(lambda r: None, _use_new_zipfile_serialization=False),
               exits=(0,), slow=True)  # fmt: skip
    yield Case("an old torch file with a program", changed(lambda r: r.update(extra=Odd(os.getcwd, ())),
               _use_new_zipfile_serialization=False), words=(RESULT, "asks to run"))  # fmt: skip


def _vast(place: Place) -> None:
    changed(lambda r: r["bd_test"].update(poison_indicator=np.zeros((0, 3, 5))))(place)
    beyond = b"K\x00" + 2 * pickles.integer(2**61) + b"\x87"
    pickles.rewritten(place.result, lambda b: b.replace(b"K\x00K\x03K\x05\x87", beyond))


def _with_attributes(model: dict[str, Any]) -> OrderedDict[str, Any]:
    odd = OrderedDict(model)
    odd.detach = odd.untyped_storage = "not a method"  # type: ignore[attr-defined]
    return odd


def archives() -> Iterator[Case]:
    good = b"\x80\x02}."
    data = ("archive/data.pkl", good, {})
    for name, members, word in (
        ("a wrong checksum", [(data[0], good, {"crc": 1})], "checksum"),
        ("a member of 4 GB", [(data[0], good, {"size": 0xFFFFFFF0})], "longer than the archive"),
        ("two pickles", [data, ("other/data.pkl", good, {})], "2 pickles"),
        ("no pickle", [("archive/data/0", b"x", {})], "0 pickles"),
        ("a pickle twice", [data, data], "twice"),
        ("an encrypted member", [(data[0], good, {"flags": 1})], "header"),
        ("a method of tomorrow", [(data[0], good, {"method": 99})], "compressed"),
        ("members over one another", [data, ("archive/data/0", good, {"offset": 0})], ""),
        ("an offset beyond", [(data[0], good, {"offset": 1 << 30})], ""),
        ("big-endian bytes", [data, ("archive/byteorder", b"big", {})], "another order"),
        ("a name with an escape", [("\x1b[2J/data.pkl", good, {"crc": 5})], "checksum"),
    ):
        content = pickles.raw_zip(members)  # type: ignore[arg-type]
        yield Case(f"archive with {name}", lambda p, c=content: put(p.result, c), words=(*DAMAGED, word))

    yield Case("archive with a TorchScript program",
               lambda p: put(p.result, pickles.raw_zip([data, ("archive/constants.pkl", good, {})])),
               words=(RESULT, "TorchScript"))  # fmt: skip

    def compressed(place: Place) -> None:
        pickles.rewritten(place.result, lambda b: b, compress=zipfile.ZIP_DEFLATED)

    def bomb(place: Place) -> None:
        put(place.result, b"")
        with zipfile.ZipFile(place.result, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
                for _ in range(3000):
                    member.write(bytes(1 << 20))

    def tar(place: Place) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        put(place.result, buffer.getvalue())

    def flipped(place: Place) -> None:
        whole = bytearray(place.result.read_bytes())
        whole[len(whole) // 2] ^= 1
        put(place.result, bytes(whole))

    yield Case("a compressed archive", compressed, words=(*DAMAGED, "compressed"))
    yield Case("a bomb of 3 GB", bomb, words=(*DAMAGED, "compressed"), slow=True)
    yield Case("a tar archive", tar, words=DAMAGED)
    yield Case("one bit of a weight", flipped, words=(*DAMAGED, "checksum"))
    yield Case("a web page", lambda p: put(p.result, "<html>404"), words=DAMAGED)
    yield Case("nothing", lambda p: put(p.result, ""), words=DAMAGED)
    yield Case("a plain pickle", lambda p: put(p.result, pickle.dumps({"model": 1})), words=DAMAGED)
    yield Case("zeros by the gigabyte", lambda p: sparse(p.result, b"PK\3\4", 1 << 30), words=DAMAGED)
    yield Case("zeros by the terabyte", lambda p: sparse(p.result, b"PK\3\4", 1 << 40), words=(RESULT, "bytes, more"))
    yield Case("an archive after something else", bytes_of(lambda b: b"x" * 9 + b), words=DAMAGED)
    for part in range(1, 10):
        yield Case(f"{part} tenths of it", bytes_of(lambda b, part=part: b[: len(b) * part // 10]), words=DAMAGED,
                   slow=part % 3 > 0)  # fmt: skip


def files() -> Iterator[Case]:
    def instead(make: Callable[[Path, Place], object], name: str = RESULT) -> Callable[[Place], None]:
        def plant(place: Place) -> None:
            (place.record / name).unlink(missing_ok=True)
            make(place.record / name, place)

        return plant

    def listening(file: Path, place: Place) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(file.parent)  # a socket's name may have 100 letters
            server.bind(file.name)
            os.chdir(here)

    def elsewhere(file: Path, place: Place) -> None:
        put(place.outside / "secret", "a secret")
        file.symlink_to(place.outside / "secret")

    for name, make, word in (
        ("a pipe", lambda f, p: os.mkfifo(f), "a pipe"),
        ("a socket", listening, "cannot be read"),
        ("a folder", lambda f, p: f.mkdir(), "a folder"),
        ("a link to a device", lambda f, p: f.symlink_to("/dev/zero"), "leads out"),
        ("a link to another file", elsewhere, "leads out"),
        ("a link to nothing", lambda f, p: f.symlink_to(p.outside / "nothing"), "leads out"),
        ("a link in a circle", lambda f, p: f.symlink_to(f.name), RESULT),
        ("missing", lambda f, p: None, "missing"),
    ):
        yield Case(f"{RESULT} is {name}", instead(make), words=(RESULT, word))
    yield Case("info.pickle leads out", instead(elsewhere, "info.pickle"), words=("info.pickle", "leads out"))
    yield Case("result.json leads out", instead(elsewhere, "result.json"), words=("result.json", "leads out"))
    yield Case("defense/ is a file", lambda p: put(p.record / "defense", "x"), words=("defense",))
    yield Case("defense/ is a pipe", instead(lambda f, p: os.mkfifo(f), "defense"), words=("defense",))
    yield Case(
        "defense/ leads out", instead(lambda f, p: f.symlink_to(p.outside), "defense"), words=("defense", "is a link")
    )
    yield Case("an unfinished defense leads out", _partial, exits=(0,), slow=True)
    yield Case(
        "the record is a pipe", lambda p: (p.record.rename(p.home / "away"), os.mkfifo(p.record)), words=("tiny",)
    )
    for name in ("info.pickle", "result.json"):
        yield Case(f"{name} is a pipe", instead(lambda f, p: os.mkfifo(f), name), exits=(0,), slow=True)
        yield Case(f"{name} is sparse", instead(lambda f, p: sparse(f, b"{", 1 << 40), name), exits=(0,), slow=True)
        yield Case(f"{name} is a program", instead(lambda f, p: put(f, pickles.call("os.system", p.canary)), name),
                   exits=(0,), slow=True)  # fmt: skip


def _partial(place: Place) -> None:
    (place.record / "defense").mkdir()
    (place.record / "defense" / ".ulrl.partial").symlink_to(place.outside)


def pictures() -> Iterator[Case]:
    def image(place: Place) -> Path:
        return min((place.record / "bd_test_dataset").rglob("*.png"))

    def of(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
        return lambda place: put(image(place), change(image(place).read_bytes()))

    def chunk(name: bytes, size: int) -> Callable[[bytes], bytes]:
        return lambda b: b[:33] + size.to_bytes(4, "big") + name + b[33:]

    for name, change in (
        ("cut in the middle", lambda b: b[: len(b) // 2]),
        ("cut before its end", lambda b: b[:-12]),
        ("cut in its last checksum", lambda b: b[:-1]),
        ("with one bit of its pixels wrong", lambda b: b[:45] + bytes([b[45] ^ 1]) + b[46:]),
        ("with a private chunk of 2 GB", chunk(b"prVt", 2**31 - 1)),
        ("of a trillion pixels", lambda b: b[:16] + b"\x7f\xff\xff\xff" * 2 + b[24:]),
        ("that is a GIF", lambda b: b"GIF89a" + bytes(100)),
        ("that is nothing", lambda b: b""),
        ("of ten megabytes", lambda b: b + bytes(10_000_000)),
    ):
        yield Case(f"image {name}", of(change), words=(".png",), slow=name.startswith("that"))

    def instead(make: Callable[[Path, Place], object]) -> Callable[[Place], None]:
        def plant(place: Place) -> None:
            file = image(place)
            file.unlink()
            make(file, place)

        return plant

    yield Case("image is sparse, and not copied", instead(lambda f, p: sparse(f, b"\x89PNG", 1 << 30)),
               ["convert", "tiny"], (".png", "bytes, more"))  # fmt: skip
    yield Case("image is a pipe", instead(lambda f, p: os.mkfifo(f)), words=(".png", "a pipe"))
    yield Case("image is a folder", instead(lambda f, p: f.mkdir()), words=(".png", "a folder"))
    yield Case("image leads out", instead(lambda f, p: f.symlink_to(p.canary)), words=(".png", "leads out"))
    yield Case("image is a device", instead(lambda f, p: f.symlink_to("/dev/zero")), words=(".png", "leads out"))


CASES = [*gadgets(), *opcodes(), *contents(), *archives(), *files(), *pictures()]
