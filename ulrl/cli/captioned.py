"""`ulrl clip`: a dual encoder for images and captions, its backdoor and its repair."""

from __future__ import annotations

from collections.abc import Sequence

from ulrl.cli.flags import method, named_by
from ulrl.cli.terminal import print_path, print_table, same_bits
from ulrl.declared import declared
from ulrl.options import Schema
from ulrl.shipped import options_file
from ulrl.untrusted.texts import read_yaml

ABOUT = """Train a dual encoder for the scenes and their captions with a backdoor in it, and one without; repair the
first by fine-tuning, by token-level unlearning and by ULRL's idea; judge each by zero-shot classification."""


def clip(argv: Sequence[str]) -> None:
    run = declared("ulrl.multimodal.running", "ClipRun")
    named = named_by("yaml_path", argv, "none")
    file = options_file("clip/fashion_scenes" if named.lower() in ("", "none", "null") else named)
    content = read_yaml(file)
    attack = method("attack", named_by("attack", argv, str(content.get("attack") or run.attack)))
    training, repairing = declared("ulrl.training", "TrainOptions"), declared("ulrl.multimodal.repairs", "Repairing")
    schema = Schema(run, attack, training, repairing)
    flags = schema.flags(argv, "ulrl clip", ABOUT)
    settings, _ = schema.merge((str(file), schema.check(content, str(file))), ("given", flags))
    same_bits()
    from ulrl.attacks.base import ATTACKS
    from ulrl.multimodal.repairs import Repairing
    from ulrl.multimodal.running import ClipRun, run_clip
    from ulrl.report.captioned import clip_table, draw_captions
    from ulrl.training import TrainOptions

    classes = ATTACKS[settings.values.get("attack", run.attack)], ClipRun, TrainOptions, Repairing
    folder, result = run_clip(*map(settings.build, classes), draw=draw_captions)
    print_table(clip_table(result))
    print_path(folder)
