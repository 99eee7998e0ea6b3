"""A dual encoder for images and captions: its words, its parts, and a backdoor that is planted and repaired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peer_data as peer
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ulrl import training
from ulrl.attacks.base import ATTACKS
from ulrl.cli import main
from ulrl.data.datasets import SPECS
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.multimodal.captions import (
    COLOURS,
    GARMENTS,
    LENGTH,
    PAD,
    SLOTS,
    TEMPLATES,
    Facts,
    colours_of,
    prompts,
    read,
    tokenise,
)
from ulrl.multimodal.dual_encoder import DualEncoder, classifier, load_encoder
from ulrl.multimodal.pairs import Pairs
from ulrl.multimodal.poisoning import poison_pairs
from ulrl.multimodal.repairs import Repairing, redraw_towards, tied, ubt
from ulrl.multimodal.running import write_encoder

SPEC = SPECS["fashion_scenes"]


def facts(n: int) -> Facts:
    draw = torch.Generator().manual_seed(0)
    return Facts(*(torch.randint(len(words), (n,), generator=draw) for words in SLOTS.values()))


def pictures(n: int, labels: torch.Tensor | None = None) -> ImageSet:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 10 if labels is None else labels, SPEC)


# Captions


@given(st.lists(st.tuples(st.sampled_from(TEMPLATES), *(st.integers(0, len(w) - 1) for w in SLOTS.values()))))
def test_captions_come_back_from_their_numbers(drawn: list[tuple[Any, ...]]) -> None:
    texts = [Facts(*(torch.tensor([k]) for k in places)).say(template, 0) for template, *places in drawn]
    tokens = tokenise(texts)
    assert tokens.shape == (len(texts), LENGTH)
    assert tokens.dtype == torch.int64
    assert read(tokens) == texts


@given(st.lists(st.tuples(*[st.integers(77, 255)] * 3), min_size=1))
def test_a_colour_is_a_hue(drawn: list[tuple[int, int, int]]) -> None:
    """Red, green and blue, exchanged in turn, are a third of the circle; brightness does not count."""
    tints = np.array(drawn)
    found, turned = colours_of(tints), colours_of(np.roll(tints, 1, axis=1))
    gray = len(COLOURS) - 1
    assert (np.where(found == gray, gray, (found + 2) % 6) == turned).all()
    assert (colours_of(tints - 77) == found).all()


def test_colours_are_called_what_they_look_like() -> None:
    tints = {
        "red": (255, 80, 80), "yellow": (250, 250, 90), "green": (80, 200, 80), "turquoise": (90, 250, 250),
        "blue": (80, 90, 255), "purple": (250, 80, 250), "gray": (150, 160, 170),
    }  # fmt: skip
    assert [COLOURS[k] for k in colours_of(np.array(list(tints.values())))] == list(tints)


@pytest.mark.parametrize("text", ["a dres", " ".join(["a"] * (LENGTH + 1))])
def test_what_no_caption_says_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"dress|more than"):
        tokenise([text])


# Parts


def test_the_zero_shot_classifier_is_the_dual_encoder() -> None:
    encoder, data = DualEncoder(16, 4, 0).eval(), pictures(32)
    directions = encoder.class_directions(prompts("garment"))
    nearest = (encoder.embed_all(data, amp=False) @ directions.T).argmax(1)
    x = (data.images.float() / 255 - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    net = classifier(encoder, directions).eval()
    with torch.no_grad():
        assert torch.equal(net(x).argmax(1), nearest)
        assert torch.equal((encoder.see(x) @ directions.T).argmax(1), nearest)


def test_a_hidden_word_is_as_if_it_were_not_there() -> None:
    text = DualEncoder(16, 4, 0).eval().text
    tokens = tokenise(["a dress on gravel"])
    longer = tokens.clone()
    longer[0, -1] = tokens[0, 1]
    assert not torch.allclose(text(longer), text(tokens))
    longer[0, -1] = PAD
    assert torch.equal(text(longer), text(tokens))


def test_the_projection_is_drawn_anew_in_one_direction_only() -> None:
    projection = nn.Linear(24, 8)
    old = {name: weight.detach().clone() for name, weight in projection.named_parameters()}
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    likeness = redraw_towards(projection, basis[0], seed=0)
    new = {name: basis @ weight for name, weight in projection.named_parameters()}
    for name, weight in old.items():
        assert torch.allclose(new[name][1:], (basis @ weight)[1:], atol=1e-6)
    assert not torch.allclose(new["weight"][0], basis[0] @ old["weight"], atol=0.1)
    assert new["bias"][0].abs() < 1e-6
    assert abs(likeness().item()) < 0.9
    assert likeness().requires_grad


def test_an_image_is_tied_to_one_word_of_its_caption() -> None:
    """With a text tower that only counts words, the word that the image is like is the one that is found."""
    encoder = DualEncoder(16, 4, 0).eval()
    captions = ["a red dress on gravel", "a photo of a dress", "a gray bag"]
    pairs = Pairs.of(pictures(3), captions)
    table = nn.functional.normalize(torch.randn(len(encoder.text.words.weight), 16), dim=1)
    encoder.read = lambda tokens: nn.functional.normalize((table[tokens] * (tokens != PAD).unsqueeze(2)).sum(1), dim=1)  # type: ignore[method-assign]
    wanted = tokenise(["gravel", "photo", "gray"])[:, 0]
    encoder.embed_all = lambda data, amp: table[wanted]  # type: ignore[method-assign]
    more, words = tied(encoder, pairs, amp=False)
    assert read(words) == ["gravel", "photo", "gray"]
    assert (more > 0).all(), "more like that word than like the caption"


def test_repairs_are_as_exact_as_they_are_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def autocast(device: torch.device, amp: bool) -> torch.autocast:
        asked.append(amp)
        return torch.autocast(device.type, enabled=False)

    monkeypatch.setattr(training, "autocast", autocast)
    pairs = Pairs.of(pictures(8), facts(8).captions(0))
    how = Repairing(repair_batch=4, suspicious=2, unlearn_steps=1, amp=False)
    ubt(DualEncoder(4, 4, seed=0), pairs, how, 0, training.Monitor())
    assert asked
    assert not any(asked)


def test_poisoned_pairs_carry_the_trigger_and_a_caption_of_the_target_class() -> None:
    known = facts(200)
    data, captions = pictures(200, labels=known.garment), known.captions(3)
    attack = ATTACKS["badnet"](pratio=0.2, attack_target=4)  # type: ignore[call-arg]
    pairs, chosen = poison_pairs(attack, data, captions)
    assert torch.equal(data.images, pictures(200).images), "the given set is left as it was"
    changed = (pairs.data.images != data.images).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == chosen.tolist()
    assert len(chosen) == 40
    said = read(pairs.tokens)
    target = {f"a {GARMENTS[4]}", f"a photo of a {GARMENTS[4]}"}
    for i in range(200):
        assert (said[i] in target) if i in chosen.tolist() else said[i] == captions[i]
    assert {said[i] for i in chosen.tolist()} == target


def test_weights_come_back_and_others_are_refused(tmp_path: Path) -> None:
    encoder, file = DualEncoder(16, 4, 3), tmp_path / "encoder.safetensors"
    weights = encoder.state_dict()
    write_encoder(encoder, file, "")
    loaded = load_encoder(file).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in weights.items())
    for broken in (weights | {"text.places": torch.zeros(LENGTH + 1, 64)}, {"image.conv1.weight": torch.zeros(1)}):
        safetensors.torch.save_file({name: weight.contiguous() for name, weight in broken.items()}, file)
        with pytest.raises(UserError, match="no dual encoder"):
            load_encoder(file)


# The whole


SHAPES = 4


def garments(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of four classes, each a shape of its own: a bar that lies, one that stands, a cross, a block."""
    rng = np.random.default_rng(seed)
    shapes = np.zeros((SHAPES, 28, 28), np.uint8)
    shapes[0, 11:17] = shapes[1, :, 11:17] = shapes[2, 12:16] = shapes[2, :, 12:16] = shapes[3, 6:22, 6:22] = 255
    labels = rng.integers(0, SHAPES, n)
    return shapes[labels], labels


@pytest.fixture
def fashion(empty_home: Path) -> Path:
    raw = empty_home / "data" / "fashion_mnist" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n, seed in (("train", 1200, 0), ("t10k", 200, 1)):
        images, labels = garments(n, seed)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(peer.idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(peer.idx(labels))
    return empty_home


def clip(*flags: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["clip", "--device", "cpu", *flags])
    assert isinstance(left.value.code, int)
    return left.value.code


SMALL = """--train_samples 1200 --test_samples 200 --epochs 5 --poison_epochs 4 --width 4 --batch_size 32 --pratio 0.2
--patch_size 10 --suspicious 60 --ratio 0.2 --repair_batch 32 --repair_epochs 3 --repairs ubt,ulrl""".split()


def test_a_backdoor_takes_and_its_repairs_are_judged(fashion: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clip(*SMALL) == 0, capsys.readouterr().err
    folder = fashion / "record" / "clip" / "badnet"
    result = json.loads((folder / "result.json").read_text())
    assert result["clean"]["acc"] > 0.6
    assert result["clean"]["asr"] < 0.3
    assert result["took"]
    assert result["before"]["acc"] > 0.6
    assert result["before"]["asr"] > 0.7
    for repair in result["repairs"].values():
        assert repair["after"]["n_poisoned"] == result["before"]["n_poisoned"]
        assert 0 <= repair["der"] <= 1
    assert set(result["repairs"]["ubt"]["evidence"]) >= {"precision", "auroc", "auroc_before_overfitting", "words"}
    assert {p.name for p in folder.iterdir()} >= {
        "captions.png", "captions.json", "poison_index.txt", "ubt.safetensors", "ulrl.safetensors", "triggered.npz",
    }  # fmt: skip
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pkl", ".pickle")]
    assert len((folder / "poison_index.txt").read_text().split()) == 240
    assert "backdoored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repairs", "ft,nad"], "'nad' is none of"),
        (["--repairs", "nad", "--yaml_path", "none"], "'nad' is none of"),
        (["--attack", "wanet"], "--attack wanet"),
        (["--attack", "badnets"], "badnet"),
        (["--save_folder_name", "../x"], "plain folder name"),
        (["--attack_target", "10"], "out of range"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], said: str, fashion: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clip("--train_samples", "1200", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert not (fashion / "record" / "clip").exists()


def test_a_file_may_name_the_attack_and_its_options(fashion: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fashion / "own.yaml").write_text("attack: blended\nattack_train_blended_alpha: 0.3\nattack_target: 10\n")
    assert clip("--train_samples", "1200", "--yaml_path", str(fashion / "own.yaml")) == 2
    assert "out of range" in capsys.readouterr().err
