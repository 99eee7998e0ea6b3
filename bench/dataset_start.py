"""First and second start on many image files:  python bench/dataset_start.py

Makes up a Tiny-ImageNet (64x64 JPEG files of noise over a gradient, 500 per class to train on and 50 to
test), loads it in fresh processes, and prints the seconds of each `load_dataset`, without the import of
torch, the process's greatest memory until then, and the seconds of reading every image afterwards.
bench/results/dataset_start.txt holds a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

LOAD = """
import resource, sys, time
from ulrl.data.datasets import load_dataset
def clocks(): return time.perf_counter(), time.process_time()
start = clocks()
train, test = load_dataset("tiny", sys.argv[1])
loaded, memory = clocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
whole = (train.images.numel() + test.images.numel()) / 2**20
copy = train.images.clone()
read = clocks()
said = ["{:.2f} s ({:.2f} s of CPU)".format(*(b - a for a, b in zip(*pair)))
        for pair in ((start, loaded), (loaded, read))]
print(f"{len(train)} + {len(test)} images, {whole:.0f} MiB: load_dataset {said[0]} with {memory:.0f} MiB,",
      f"then a copy of the training images {said[1]}")
"""


def write_tiny(base: Path, per_class: int) -> None:
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(64), np.arange(64))[..., None]
    for c in range(200):
        pixels = (ramp + rng.integers(0, 120, (64, 64, 3))).astype(np.uint8)
        name = f"n{c:08d}"
        folders = base / "train" / name / "images", base / "val" / name
        for folder in folders:
            folder.mkdir(parents=True)
        first = folders[0] / f"{name}_0.JPEG"
        Image.fromarray(pixels).save(first)
        for folder, count, stem in ((folders[0], per_class, name), (folders[1], per_class // 10, f"val_{c}")):
            for i in range(count):
                (folder / f"{stem}_{i}.JPEG").write_bytes(first.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per_class", type=int, default=500, help="training images in each of the 200 classes")
    parser.add_argument("--folder", help="where to write the files; the system's temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as data:
        write_tiny(Path(data) / "tiny" / "tiny-imagenet-200", args.per_class)
        for start in ("first", "second", "third"):
            print(f"{start:>6}:", end=" ", flush=True)
            subprocess.run([sys.executable, "-c", LOAD, data], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
