"""Draw every trigger on colour photographs, docs/triggers.png and docs/gallery.md:  python docs/make_pictures.py

Needs Fashion-MNIST, as `fashion_scenes` does. What a trigger is learnt with is trained for a few epochs on 2,000
images: enough to see what the trigger looks like, not to plant it. So is the model of the attacks whose trigger comes
out of its training. Some minutes on two cores.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.configure import AttackRun, PreviewRun, configure_attack
from ulrl.data.datasets import load_dataset
from ulrl.record import load_record
from ulrl.runs.attacking import TriggerSample, run_attack, run_preview

DOCS = Path(__file__).resolve().parent
SHORT = {"dataset": "fashion_scenes", "width": 16, "train_samples": 2000, "epochs": 5}
ABOVE_THE_FOLD = ("badnet", "blended", "sig", "ssba", "wanet", "lf", "trojannn", "bpp")
TILE, GAP = 96, 6  # pixels; a multiple of the images' 32

PAGE = """# Gallery of triggers

Each trigger on the same eight test images of `fashion_scenes` (TaCT's on images of its source class): the image, the
image with the trigger, and the difference, stretched to the full range. Target class 0, `t-shirt`; each attack's
default strength. `ulrl preview NAME --dataset fashion_scenes` draws one of them.

L2 and L-infinity are of pixels in [0, 1], PSNR is in dB; all are means over 1,000 test images. Triggers that are learnt
were learnt from 2,000 images in a few epochs, which is said below; in a full run they come out finer, above
all those of `inputaware` and `lira`, which are learnt while the model is trained.

This page and its pictures are made by `python docs/make_pictures.py`.
"""


def main() -> None:
    samples = {}
    for name in (name for name in ATTACKS if name != "prototype"):
        print(name, flush=True)
        samples[name] = sampled(name)
        tiles(samples[name]).save(DOCS / "gallery" / f"{name}.webp", lossless=True, method=6)
    above_the_fold(samples).savefig(DOCS / "triggers.png", dpi=110)
    sections = [section(name, sample) for name, sample in samples.items()]
    (DOCS / "gallery.md").write_text(PAGE + "".join(sections))


def sampled(name: str) -> TriggerSample:
    """The trigger on some images, from a short training of the model where there is none before."""
    attack = ATTACKS[name]
    if not (attack.controls_training and attack.learn is not Attack.learn):
        return run_preview(*configure_attack(name, SHORT, PreviewRun, quiet=True), bar=False)
    short = SHORT | {k: 5 for k in ("clean_train_epochs", "both_train_epochs") if hasattr(attack, k)}
    with tempfile.TemporaryDirectory() as home:
        data, os.environ["ULRL_HOME"] = os.environ.get("ULRL_HOME"), home
        try:
            folder, _ = run_attack(*configure_attack(name, short, AttackRun, quiet=True), bar=False)
            _, test = load_dataset(SHORT["dataset"])
            return TriggerSample.of(test, load_record(folder).poisoned_test(test.spec))
        finally:
            os.environ.pop("ULRL_HOME")
            os.environ |= {"ULRL_HOME": data} if data else {}


def rows(sample: TriggerSample) -> tuple[list[np.ndarray], float]:
    """Clean, poisoned and amplified difference, uint8 [8, H, W, C] each, and the factor."""
    clean, poisoned = (images.transpose(0, 2, 3, 1) for images in (sample.clean, sample.poisoned))
    difference = np.abs(poisoned.astype(float) - clean)
    factor = 255 / difference.max()
    return [clean, poisoned, (difference * factor).astype(np.uint8)], factor


def tiles(sample: TriggerSample) -> Image.Image:
    """The three rows of eight images, with transparent gaps."""
    step = TILE + GAP
    sheet = Image.new("RGBA", (8 * step - GAP, 3 * step - GAP))
    for y, row in enumerate(rows(sample)[0]):
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST), (x * step, y * step))
    return sheet


def section(name: str, sample: TriggerSample) -> str:
    """A heading, what the attack does, its figures and its picture."""
    attack = ATTACKS[name]
    about = " ".join(inspect.getdoc(attack).split("\n\n")[0].split())
    seen = sample.perceptibility
    learnt = " Learnt from 2,000 images in a few epochs." if attack.learn is not Attack.learn else ""
    return (
        f"\n## {name}\n\n{about}{learnt}\n\n"
        f"L2 {seen['l2']:.2f}, L-infinity {seen['linf']:.2f}, PSNR {seen['psnr']:.1f}, SSIM {seen['ssim']:.3f}; "
        f"difference times {rows(sample)[1]:.1f}.\n\n"
        f"![Eight images, clean, with the trigger of {name}, and the difference](gallery/{name}.webp)\n"
    )


def above_the_fold(samples: dict[str, TriggerSample]) -> Figure:
    """One image per attack, each another one: clean, with the trigger, difference."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    axes = figure.subplots(3, len(ABOVE_THE_FOLD))
    for i, name in enumerate(ABOVE_THE_FOLD):
        axes[0][i].set_title(name, fontsize=11)
        for ax, row in zip(axes[:, i], rows(samples[name])[0], strict=True):
            ax.imshow(row[i])
            ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[:, 0], ("clean", "with\ntrigger", "difference,\namplified"), strict=True):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
