"""Means over runs that may be averaged, and who is best where all were run on the same records.

A line of a summary holds runs of the same settings only; those of a seed that was run twice count once. Seeds are
averaged within a record before records are, so that a record which was repaired more often does not weigh more.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

import pandas as pd

from ulrl.report.frame import FIGURES, KEYS, NO_DEFENSE, ORACLE, known_key

_VARIANTS = ["variant", "record_variant"]


def summarise(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean and sample standard deviation of each figure over the runs that agree in the keys `by`.

    by: some of KEYS, with commas between. With `defense` among them, a line's runs have the same options, and lines
    that share all other keys and the ratio are ranked on the records that they share (see `_shared`): their figures,
    and those of the undefended model, are over these. With data set, model and attack among them a line's records have
    the same options. Records whose backdoor is known not to have taken have lines of their own. Without `defense`,
    only repairs count: what was not defended, and what the test set chose, is never averaged with them.

    Columns: the keys; variant and record_variant, the options by which a line differs from another, of the same data
    set and model where these are keys ("" where none does); oracle, repairs and failed (bool; the last: no backdoor
    took); n (runs), records (that they are of), rivalry (the same number for rivals), block (records that any of these
    was run on), ranked (bool), repeats (runs left out), over (what differs within the line); and for each of FIGURES
    <figure>_mean, _std (over the records; of one record, over its runs; NaN for one) and _n (the runs in which it is
    known).

    Raises:
        UserError: an unknown key.
    """
    keys = list(dict.fromkeys(known_key(key.strip(), "--by") for key in by.split(",")))
    if "defense" not in keys:
        frame = frame[(frame.kind == "defense") & frame.repairs & ~frame.oracle]
    of_line = ["settings"] if "defense" in keys else []
    of_block = ["record_settings"] if {"dataset", "model", "attack"} <= {*keys} else []
    places = [frame[key] for key in ("dataset", "model") if key in keys]

    def within(method: pd.Series) -> pd.Series:
        alike = [json.dumps(parts) for parts in zip(*places, method.fillna(""), strict=True)]
        return pd.Series(alike, frame.index, dtype="object")

    frame = frame.assign(
        failed=frame.took.eq(False).fillna(False).astype(bool),
        variant=variants(within(frame.defense.str.removesuffix(ORACLE)), frame.settings, keys) if of_line else "",
        record_variant=variants(within(frame.attack), frame.record_settings, keys) if of_block else "",
    )
    blocks = [key for key in keys if key != "defense"] + [*of_block, "failed"]
    ratios = frame.ratio[frame.kind == "defense"]  # unknown where the samples were listed
    if of_line and ratios.nunique(dropna=False) > 1:  # who has more clean samples is no rival
        blocks = list(dict.fromkeys([*blocks, "ratio"]))
    rows: list[dict[str, Any]] = []
    for rivalry, (_, block) in enumerate(frame.groupby(blocks, sort=False, dropna=False)):
        lines = [line for _, line in block.groupby([*keys, *of_line, "oracle"], sort=False, dropna=False)]
        rivals = [line for line in lines if "defense" in keys and _competes(line.iloc[0])]
        ranked, shared = _shared([set(line.origin) for line in rivals])
        ranks = {id(rivals[i]) for i in ranked}
        for line in lines:
            common = line.origin.isin(shared)
            used = line[common] if common.any() and (id(line) in ranks or not _competes(line.iloc[0])) else line
            rows.append({
                **{k: line.iloc[0][k] for k in (*keys, *_VARIANTS, "oracle", "repairs", "failed")},
                **_figures(used[~used.repeat]), "rivalry": rivalry, "ranked": id(line) in ranks,
                "block": len(set().union(*(rival.origin for rival in rivals))),
                "repeats": int(line.repeat.sum()), "over": _varying(used, keys, bool(of_block)),
            })  # fmt: skip
    figures = [f"{figure}_{part}" for figure in FIGURES for part in ("mean", "std", "n")]
    about = ["oracle", "repairs", "failed", "n", "records", "rivalry", "block", "ranked", "repeats", "over"]
    return pd.DataFrame(rows, columns=[*keys, *_VARIANTS, *about, *figures])


def _competes(row: pd.Series) -> bool:
    """Whether a row's line may be ranked: a repair, not an oracle's choice, nor on a dud."""
    return bool(row.kind == "defense" and row.repairs and not (row.oracle or row.failed))


def _shared(records: list[set[str]]) -> tuple[list[int], set[str]]:
    """Which of the lines, each with the records it was run on, are ranked, and on which records.

    A line with fewer than half the records of the fullest one is not ranked, rather than that all others are judged on
    the few that it has. None is where only one line is left, or no record has all of them.
    """
    most = max(map(len, records), default=0)
    ranked = [i for i, own in enumerate(records) if 2 * len(own) >= most]
    shared = set.intersection(*(records[i] for i in ranked)) if len(ranked) > 1 else set()
    return (ranked, shared) if shared else ([], set())


def _figures(runs: pd.DataFrame) -> dict[str, Any]:
    figures: dict[str, Any] = {"n": len(runs), "records": runs.origin.nunique()}
    units = runs.groupby("origin")[list(FIGURES)].mean() if figures["records"] > 1 else runs[list(FIGURES)]
    for figure in FIGURES:
        figures |= {f"{figure}_mean": units[figure].mean(), f"{figure}_std": units[figure].std(),
                    f"{figure}_n": runs[figure].count()}  # fmt: skip
    return figures


def variants(method: pd.Series, settings: pd.Series, shown: Collection[str]) -> pd.Series:
    """For each row the options by which its method's settings differ, such as "epochs 5, lr 0.1"; "" where none do.

    method: texts, the same for rows that are compared. settings: JSON. shown: options that the reader sees elsewhere.
    """
    labels: dict[tuple[str, str], str] = {}
    for name, own in settings.groupby(method):
        different = own.unique()
        names = _differing(different, shown)
        for text in different:
            known = json.loads(text) if text else {}
            words = [f"{key} {_text(known.get(key))}" for key in names] if text else ["options unknown"]
            labels[str(name), text] = ", ".join(words) if len(different) > 1 else ""
    return pd.Series([labels[pair] for pair in zip(method, settings, strict=True)], settings.index, dtype="object")


def _differing(settings: Iterable[str], hidden: Collection[str] = ()) -> list[str]:
    """The names of the options that are not the same in all of these settings, JSON each; "" is not known."""
    known = [json.loads(text) for text in settings if text]
    names = dict.fromkeys(name for options in known for name in options if name not in hidden)
    return [name for name in names if any(options.get(name) != known[0].get(name) for options in known)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()  # as in YAML
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _varying(runs: pd.DataFrame, keys: list[str], alike: bool) -> str:
    """What the runs of one line do not agree in, other than the seed; `alike`: their records have the same options."""
    asked = [key for key in (*KEYS[:6], "clean_samples") if key not in keys and runs[key].nunique(dropna=False) > 1]
    if not alike:
        known = [text for text in runs.record_settings.unique() if text]
        common = set.intersection(*(set(json.loads(text)) for text in known)) if known else set()
        asked += [name for name in _differing(known) if name in common and name not in (*keys, *asked)]
    return ", ".join(asked)


def in_order(summary: pd.DataFrame) -> pd.DataFrame:
    """Sorted by its keys, what was not defended first and records without a working backdoor last."""
    keys = [k for k in summary if k in (*KEYS, *_VARIANTS)]
    return summary.sort_values(
        ["failed", *keys], key=lambda c: c.where(c != NO_DEFENSE, "") if c.name == "defense" else c
    )


def best_of(summary: pd.DataFrame) -> pd.DataFrame:
    """Which figures are the best of the ranked lines that are rivals: bool, columns acc, asr, ra, der."""
    best = pd.DataFrame(False, index=summary.index, columns=["acc", "asr", "ra", "der"])
    for _, block in summary[summary.ranked].groupby("rivalry"):
        for figure, pick in (("acc", "max"), ("asr", "min"), ("ra", "max"), ("der", "max")):
            means = block[f"{figure}_mean"]
            if means.count() > 1:
                best.loc[means.index, figure] = means == means.agg(pick)
    return best


def notes_of(summary: pd.DataFrame) -> list[str]:
    """What a reader of the summary has to know besides the figures, a sentence each."""
    notes, keys = [], [k for k in (*KEYS, *_VARIANTS) if k in summary and k not in ("defense", "variant")]
    rivals = (summary.block > 0) & summary.repairs & ~summary.oracle & ~summary.failed
    lines = summary[rivals & (summary.get("defense") != NO_DEFENSE)]
    several = [k for k in keys if lines[k].nunique(dropna=False) > 1]
    for _, block in lines.groupby("rivalry", sort=False):
        where = ", ".join(text for k in several if (text := str(block[k].iloc[0])))
        notes.append(_coverage(block, f"{where}: " if where else ""))
    over = dict.fromkeys(name for text in summary.over for name in text.split(", ") if name)
    if over:
        notes.append(f"lines average over runs that differ in {', '.join(over)}")
    if summary.failed.any():
        notes.append("where the backdoor did not take, nothing is ranked")
    if repeats := int(summary.repeats.sum()):
        notes.append(f"{repeats} run{'s repeat' if repeats > 1 else ' repeats'} the options and the seed of another; "
                     "each counts once")  # fmt: skip
    return [note for note in notes if note]


def _coverage(lines: pd.DataFrame, where: str) -> str:
    """On how many of its records a block was ranked, where that is not all for all."""
    ranked, out = lines[lines.ranked], lines[~lines.ranked]
    block = int(lines.block.max())
    named = zip(out.defense, out.variant, strict=True)
    left = ", ".join(f"{defense} ({variant})" if variant else defense for defense, variant in named)
    if ranked.empty:
        return f"{where}not ranked: no record has all of {left}" if len(out) > 1 else ""
    shared = int(ranked.records.max())
    text = f"{where}ranked on the {shared} of {block} records that all {len(ranked)} have" if shared < block else ""
    if left:
        text = (text or f"{where}ranked on {block} records") + f"; not ranked, on fewer than half of them: {left}"
    return text
