"""The report: all runs as one HTML page that needs nothing but a browser, which may be offline.

What comes from a record reaches the page as JSON or through Jinja's escaping, and the page's script only ever
writes text. A content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ulrl import __version__
from ulrl.errors import UserError
from ulrl.files import whole_file
from ulrl.report.frame import frame_of_runs
from ulrl.report.plots import highest, signed_z
from ulrl.report.results import (
    Run,
    class_names,
    find_runs,
    may_show,
    neurons_of,
    printable,
    read_table,
)

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
PREVIEW_WIDTH = 700  # pixels
EPOCHS_SHOWN = 60  # of a run's curves; more are thinned out evenly
CURVES = ("loss", "acc", "test_acc", "test_asr", "test_ra")


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
    names = {str(run.folder): run.folder.relative_to(root).as_posix() for run in runs}
    frame = frame_of_runs(runs).drop(columns="options")
    # NaN is no JSON; as objects, the missing are null.
    rows = frame.astype("object").where(frame.notna(), None).to_dict("records")
    for row, folder in zip(rows, frame.index, strict=True):
        row["id"], row["name"] = _id(names[folder]), printable(names[folder])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    scripts = [Markup(part) for part in (vega, _read("report.js"))]
    return environment.get_template("report.html").render(
        style=Markup(_read("report.css")),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in scripts],
        rows=rows,
        colours=[to_hex(colormaps["cividis"](i / 40)) for i in range(41)],
        details={_id(names[str(run.folder)]): _details(run) for run in runs},
        previews=_previews(runs),
        left_out=left_out,
        runs=len(runs),
        records=len({run.record for run in runs}),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )


def repeat_command(result: dict[str, Any]) -> str:
    """What to type to run it again, with every option spelled out."""
    defense = result["kind"] == "defense"
    given = {"result_file": result["record"]} if defense else {}
    words = ["ulrl", result["kind"], result["method"]]
    for name, value in {**result["options"], **given}.items():
        if value is None or value in ("", []) or name in ("yaml_path", "bd_yaml_path", "overwrite"):
            continue  # what the files said is among the options
        if isinstance(value, list):
            value = ",".join(map(str, value))
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def _details(run: Run) -> dict[str, Any]:
    """What the section of a run shows beside its row; read from its folder, and left out where it is not there."""
    r = run.result
    keys = ("before", "after", "oracle", "seconds", "options", "evidence", "environment", "peak_memory_mb", "flagged")
    return {
        **{k: r[k] for k in keys if k in r},
        "command": repeat_command(r),
        "preview": _id(str(run.record)),
        "neurons": _neurons(run),
        "curves": _curves(run),
    }


def _neurons(run: Run) -> list[dict[str, Any]] | None:
    """Class, signed robust z and mark of the classes with the highest z."""
    table, names = neurons_of(run), class_names(run)
    if table is None:
        return None
    signed = signed_z(table)
    return [
        {"name": f"{k} {names[k]}" if 0 <= k < len(names) else str(k), "z": _short(signed[k]),
         "flagged": bool(table.flagged[k])}
        for k in highest(signed)
    ]  # fmt: skip


def _curves(run: Run) -> list[dict[str, Any]] | None:
    """Stage, epoch and figures of each epoch."""
    if run.result["kind"] == "attack":
        table = read_table(run, "attack_df.csv", {"epoch": "int64"})
        if table is not None:
            names = {"train_epoch_loss_avg_over_batch": "loss", "train_acc": "acc"}
            table = table.rename(columns=names).assign(stage="train")
    else:
        table = read_table(run, f"{run.result['method']}_df.csv", {"stage": "str", "epoch": "int64"})
    if table is None or table.empty:
        return None
    kept = sorted({*range(0, len(table), -(-len(table) // EPOCHS_SHOWN)), len(table) - 1})
    columns = [c for c in CURVES if c in table and table[c].dtype.kind == "f"]
    return [
        {"at": i + 1, "stage": str(row["stage"]), "epoch": row["epoch"],
         **{c: _short(row[c]) for c in columns if abs(row[c]) < float("inf")}}
        for i, row in zip(kept, table.iloc[kept].to_dict("records"), strict=True)
    ]  # fmt: skip


def _previews(runs: list[Run]) -> dict[str, str]:
    """Each record's picture of its trigger, made small, as a data URL."""
    urls = {}
    for folder in {run.record: None for run in runs}:
        file = folder / "trigger_preview.png"
        try:
            if not may_show(file, folder):
                continue
            with Image.open(file, formats=["PNG"]) as picture:
                if picture.width * picture.height > 10_000_000:
                    raise ValueError(f"{picture.width} x {picture.height} pixels")
                small = picture.convert("RGB")
            small.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH), Image.Resampling.LANCZOS)
            content = io.BytesIO()
            small.save(content, "WEBP", quality=80)
        except Exception as error:  # whatever PIL makes of a stranger's bytes
            log.warning("%s is not shown: %s", printable(str(file)), printable(" ".join(str(error).split())))
        else:
            urls[_id(str(folder))] = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return urls


def _id(name: str) -> str:
    """For links; the same in every report."""
    return "run-" + hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:10]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")
