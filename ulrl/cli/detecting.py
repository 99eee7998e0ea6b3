"""`ulrl detect`: which images of a record's training set are poisoned."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

from ulrl.cli.flags import method
from ulrl.cli.terminal import first_name, print_path, print_table, same_bits
from ulrl.declared import declared, methods
from ulrl.errors import UserError
from ulrl.options import Schema
from ulrl.record_folder import record_folder

ABOUT = """Score the images of a record's training set, and judge the scores by the record's own list of the poisoned.

  --samples [NAME,NAME,...]  the sample detectors, all of them where none is named; where it is one, its options
                             are flags, too"""


def detect(argv: Sequence[str]) -> None:
    named, argv = first_name(argv, "detect", "a record")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--samples", nargs="?", const=",".join(methods("ulrl.detectors")))
    what, argv = peek.parse_known_args(argv)
    names = [name.strip() for name in (what.samples or "").split(",") if name.strip()]
    classes = [method("sample detector", name) for name in names]  # an unknown one is told before any has run
    own = classes if len(names) == 1 else []
    about = "\n\n".join([*(inspect.getdoc(cls) or "" for cls in own), ABOUT])
    schema = Schema(declared("ulrl.configure", "DetectionRun"), *own)
    flags = schema.flags(argv, "ulrl detect RECORD", about)
    if not names:
        raise UserError("say what to look for: --samples, or --samples NAME; ulrl list names the sample detectors")
    if "result_file" in flags:
        raise UserError(f"--result_file would have no effect: the record is {named}, named first; leave it out")
    if "save_folder_name" in flags and not own:
        raise UserError("--save_folder_name names one folder, and each of several detectors has its own; leave it out")
    folder = record_folder(named)
    same_bits()
    from ulrl.configure import configure_detector
    from ulrl.record import load_record
    from ulrl.report.tables import detection_table
    from ulrl.runs.detecting import run_detector
    from ulrl.runs.given import results_folder

    record = load_record(folder)
    runs = [configure_detector(name, flags, record.dataset, record.model_name) for name in names]
    for name, (_, run) in zip(names, runs, strict=True):
        folder = results_folder(record, "detection", run.save_folder_name or name)
        if folder.exists() and not run.overwrite:  # said before the first has run
            raise UserError(f"{folder} exists; pass --overwrite to replace it, or leave {name} out")
    done = [run_detector(detector, record, run) for detector, run in runs]
    print_table(detection_table(record.name, [result for _, result in done]))
    for folder, _ in done:
        print_path(folder)
