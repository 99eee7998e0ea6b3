"""The report: all runs as one HTML page that needs nothing but a browser, which may be offline.

What comes from a record reaches the page as JSON or through Jinja's escaping, and the page's script only ever
writes text. A content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import logging
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ulrl import __version__
from ulrl.errors import UserError
from ulrl.files import whole_file
from ulrl.report.frame import ORACLE, frame_of_runs
from ulrl.report.looks import PALETTE, looks_of
from ulrl.report.plots import highest, signs_of
from ulrl.report.pooling import variants
from ulrl.report.results import (
    Run,
    brief,
    class_names,
    find_runs,
    may_show,
    neurons_of,
    read_table,
)

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
SCRIPTS = ("base.js", "pooling.js", "board.js", "pictures.js", "runs.js", "start.js")  # one, in parts
PREVIEW_WIDTH, THUMBNAIL_WIDTH = 700, 144  # pixels
EPOCHS_SHOWN = 60  # of a run's curves; more are thinned out evenly
CURVES = ("loss", "acc", "test_acc", "test_asr", "test_ra")
BY_ITSELF = ("save_folder_name", "dataset", "model")  # what a run finds by itself where it is None


def write_report(root: Path, out: Path) -> int:
    """Write the page of the runs below `root`: their number.

    Raises:
        UserError: `root` is not a folder, or has no runs.
    """
    runs, left_out = find_runs(root)
    if not runs:
        raise UserError(f"no result.json below {root}; there is nothing to report yet")
    page = render(runs, left_out, root)
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return len(runs)


def render(runs: list[Run], left_out: list[str], root: Path) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = "".join(map(_read, SCRIPTS))
    frame = frame_of_runs(runs)
    previews, thumbnails = _pictures(runs)
    return environment.get_template("report.html").render(
        style=Markup(_read("report.css")),
        vega=Markup(_vega()),
        script=Markup(f'"use strict";\n(() => {{\n{script}}})();\n'),
        hash=lambda part: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode(),
        rows=_rows(frame, runs, root),
        looks={name: {"colour": look.colour, "shape": look.shape}
               for name, look in looks_of(frame.defense.str.removesuffix(ORACLE)).items()},
        colours={"scale": [to_hex(colormaps["cividis"](i / 40)) for i in range(41)], "palette": PALETTE},
        details={_id(_name(run, root)): _details(run) for run in runs},
        previews=previews,
        thumbnails=thumbnails,
        left_out=left_out,
        runs=len(runs),
        records=len({run.record for run in runs}),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )  # fmt: skip


def _rows(frame: pd.DataFrame, runs: list[Run], root: Path) -> list[dict[Any, Any]]:
    """The frame's rows for the page, with the options by which lines differ, and numbers for what is only compared."""
    of = {str(run.folder): run for run in runs}
    kinds = [json.dumps(key) for key in zip(frame.dataset, frame.model, frame.attack.fillna(""), strict=True)]
    kind = pd.Series(kinds, frame.index, dtype="object")
    frame = frame.assign(
        id=[_id(_name(of[folder], root)) for folder in frame.index],
        name=[brief(_name(of[folder], root)) for folder in frame.index],
        record_id=[_id(str(of[folder].record)) for folder in frame.index],
        variant=variants(frame.defense.str.removesuffix(ORACLE), frame.settings, ()),
        record_variant=variants(kind, frame.record_settings, ()),
        group=pd.factorize(kind + frame.record_settings)[0],
        origin=pd.factorize(frame.origin)[0],
    ).drop(columns=["options", "settings", "record_settings"])
    # NaN is no JSON; as objects, the missing are null.
    return frame.astype("object").where(frame.notna(), None).to_dict("records")


def _name(run: Run, root: Path) -> str:
    return run.folder.relative_to(root).as_posix()


def repeat_command(run: Run) -> str:
    """What to type to run it again, with every option spelled out, also what is none: a file may say otherwise."""
    result = run.result
    given = {"result_file": run.record_name} if result["kind"] == "defense" else {}
    words = ["ulrl", result["kind"], result["method"]]
    for name, value in {**result["options"], **given}.items():
        if value == "" or name in ("yaml_path", "bd_yaml_path", "overwrite") or (value is None and name in BY_ITSELF):
            continue  # what the files said is among the options
        if isinstance(value, list):
            value = ",".join(map(str, value)) or "none"
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def _details(run: Run) -> dict[str, Any]:
    """What the section of a run shows beside its row; read from its folder, and left out where it is not there."""
    r = run.result
    keys = ("before", "after", "oracle", "seconds", "options", "evidence", "environment", "peak_memory_mb", "flagged")
    return {
        **{k: r[k] for k in keys if k in r},
        "command": repeat_command(run),
        "preview": _id(str(run.record)),
        "neurons": _neurons(run),
        "curves": _curves(run),
    }


def _neurons(run: Run) -> list[dict[str, Any]] | None:
    """Class, mark and signs of the classes with the highest z; the true target is named."""
    table, names = neurons_of(run), class_names(run)
    if table is None:
        return None
    signs, target = signs_of(table), run.result.get("target")
    return [
        {"name": (f"{k} {names[k]}" if 0 <= k < len(names) else str(k)) + ", true target" * (k == target),
         "flagged": bool(table.flagged[k]), **{sign: _short(heights[k]) for sign, heights in signs.items()}}
        for k in highest(signs["z"], target)
    ]  # fmt: skip


def _curves(run: Run) -> list[dict[str, Any]] | None:
    """Stage, epoch and figures of each epoch."""
    if run.result["kind"] == "attack":
        table = read_table(run, "attack_df.csv", {"epoch": "int64"})
        if table is not None:
            names = {"train_epoch_loss_avg_over_batch": "loss", "train_acc": "acc"}
            table = table.drop(columns=[*names.values()], errors="ignore").rename(columns=names).assign(stage="train")
    else:
        table = read_table(run, f"{run.result['method']}_df.csv", {"stage": "str", "epoch": "int64"})
    if table is None or table.empty:
        return None
    kept = sorted({*range(0, len(table), -(-len(table) // EPOCHS_SHOWN)), len(table) - 1})
    columns = [c for c in CURVES if c in table and table[c].dtype.kind == "f"]
    return [
        {"at": i + 1, "stage": str(row["stage"]), "epoch": row["epoch"],
         **{c: _short(row[c]) for c in columns if abs(row[c]) < 1e300}}
        for i, row in zip(kept, table.iloc[kept].to_dict("records"), strict=True)
    ]  # fmt: skip


def _pictures(runs: list[Run]) -> tuple[dict[str, str], dict[str, str]]:
    """Each record's picture of its trigger as data URLs: to look at, and small."""
    previews, thumbnails = {}, {}
    for folder in {run.record: None for run in runs}:
        preview = _picture(folder, "trigger_preview.png")
        if preview:
            previews[_id(str(folder))] = _url(preview, PREVIEW_WIDTH)
        if small := _picture(folder, "trigger_thumbnail.png") or preview:
            thumbnails[_id(str(folder))] = _url(small, THUMBNAIL_WIDTH)
    return previews, thumbnails


def _picture(folder: Path, name: str) -> Image.Image | None:
    file = folder / name
    try:
        if not may_show(file, folder):
            return None
        with Image.open(file, formats=["PNG"]) as picture:
            if picture.width * picture.height > 10_000_000:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            return picture.convert("RGB")
    except Exception as error:  # whatever PIL makes of a stranger's bytes
        log.warning("%s is not shown: %s", brief(str(file)), brief(" ".join(str(error).split())))
        return None


def _url(picture: Image.Image, width: int) -> str:
    picture.thumbnail((width, width), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _id(name: str) -> str:
    """For links; the same in every report."""
    return "run-" + hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:10]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@functools.cache
def _vega() -> str:
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")
