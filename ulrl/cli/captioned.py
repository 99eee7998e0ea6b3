"""`ulrl clip`: a dual encoder for images and captions, its backdoor and its repair."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ulrl.attacks.base import ATTACKS
from ulrl.cli.terminal import print_path, print_table
from ulrl.configure import yaml_layer
from ulrl.multimodal.repairs import Repairing
from ulrl.multimodal.running import ClipRun, run_clip
from ulrl.options import Schema
from ulrl.report.captioned import clip_table, draw_captions
from ulrl.training import TrainOptions

ABOUT = """Train a dual encoder for the scenes and their captions with a backdoor in it, and one without; repair the
first by fine-tuning, by token-level unlearning and by ULRL's idea; judge each by zero-shot classification."""


def clip(argv: Sequence[str]) -> None:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--attack", default=ClipRun.attack)
    attack = ATTACKS[peek.parse_known_args(argv)[0].attack]  # whose options are flags, too
    schema = Schema(ClipRun, attack, TrainOptions, Repairing)
    flags = schema.flags(argv, "ulrl clip", ABOUT)
    settings, _ = schema.merge(yaml_layer(schema, flags.get("yaml_path", "clip/fashion_scenes")), ("given", flags))
    folder, result = run_clip(
        settings.build(attack), settings.build(ClipRun), settings.build(TrainOptions), settings.build(Repairing)
    )
    draw_captions(folder)
    print_table(clip_table(result))
    print_path(folder)
