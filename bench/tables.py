"""bench.quality's tables: what is there, beside what can be reached, ranked by the distance to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.pages import FOLDER as BENCH
from bench.pages import RESULTS, cell, interval, percent, with_earlier, write_block, write_csv
from bench.victims import rate_of, took_of, victim_of
from ulrl.defenses.base import DEFENSES
from ulrl.sweep.jobs import AttackJob

FOLDER = re.compile(r"bench_(.+)_r([\d.]+)_c(\d+)")
ATTACKS_AFTER = ("before", "retuned", "query", "universal")
# Harden's settings were chosen, or tried, on these.
DEVELOPED_ON = ("badnet", "blended", "wanet", "ssba", "lf", "sig", "trojannn", "lc")
PAGES = BENCH.parent
FEWEST = 6  # records that the defenses share, for a ranking to be shown on the project's own pages


def distance(asr: float, ra: float, clean_asr: float, clean_ra: float) -> float:
    """How far a repaired model is from a clean net on the triggered images: 0 is as good as can be.

    |ASR - clean ASR| + max(0, clean RA - RA), fractions. An ASR below the clean net's counts as a distance too (the
    model has become blind to the class); an RA above it does not.
    """
    return abs(asr - clean_asr) + max(0.0, clean_ra - ra)


def gather(jobs: Mapping[str, AttackJob]) -> pd.DataFrame:
    """A line for each repair that is there; that of a victim has the clean nets' figures beside it, where known."""
    rows: list[dict[str, Any]] = []
    for name, job in jobs.items():
        if not job.done():
            continue
        victim = victim_of(job)
        missed = took_of(job, jobs) if victim else ""
        reach = _read(job.folder / "reach" / "clean_nets" / "result.json")
        nets = reach["nets"] if reach else []
        nets_again = _read(job.folder / "reach" / "clean_nets_again" / "result.json")
        for file in sorted(job.folder.glob("defense/bench_*/result.json")):
            parts = FOLDER.fullmatch(file.parent.name)
            result = _read(file)
            if parts is None or result is None:
                continue
            defense, ratio, subset = parts[1].replace("-ours", ":ours"), float(parts[2]), int(parts[3])
            before, after = result["before"], result["after"]
            row: dict[str, Any] = {
                "record": name, "attack": victim.name if victim else "clean",
                "rate": rate_of(job), "defense": defense, "ratio": ratio, "subset": subset,
                "missed": "" if missed == "took" else missed.removeprefix("did not take: "),
                "clean_samples": result["clean_samples"],
                **{f"{k}_before": before[k] for k in ("acc", "asr", "ra")},
                **{k: after[k] for k in ("acc", "asr", "ra")},
                "acc_lost": before["acc"] - after["acc"], "der": result["der"],
                "flagged": " ".join(map(str, result["flagged"])),
                "seconds": result["seconds"]["total"] - result["seconds"]["judge"],
            }  # fmt: skip
            if nets:
                row |= {f"clean_{k}": sum(net[k] for net in nets) / len(nets) for k in ("asr", "ra")}
                row |= {"clean_nets": len(nets)}
                row["distance"] = distance(after["asr"], after["ra"], row["clean_asr"], row["clean_ra"])
            truth = _read(job.folder / "reach" / f"truth_r{ratio:g}_c{subset}" / "result.json")
            if truth:
                row |= {f"truth_{k}": truth["after"][k] for k in ("acc", "asr", "ra")}
                row["truth_lost"] = before["acc"] - truth["after"]["acc"]
                if nets:
                    reached = (row["truth_asr"], row["truth_ra"])
                    row["truth_distance"] = distance(*reached, row["clean_asr"], row["clean_ra"])
            again = _read(file.parent / "reactivation" / "result.json")
            if again:
                row |= {f"again_{k}": again["asr"][k] for k in (*ATTACKS_AFTER, "retuned_acc")}
            if nets_again:
                again_of = nets_again["nets"]
                row |= {f"clean_again_{k}": sum(net[k] for net in again_of) / len(again_of) for k in ATTACKS_AFTER}
            rows.append(row)
    return pd.DataFrame(rows)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except OSError:
        return None


def of_another_victim(runs: pd.DataFrame) -> pd.Series:
    """bool: whether a run repaired another net than most of the record's runs: a victim that was lost and trained anew,
    of which the figures before the repair tell. Its own clean nets' figures stand in its row."""
    nets = runs.acc_before.map("{:.3f}".format) + " " + runs.asr_before.map("{:.3f}".format)
    return nets != nets.groupby(runs.record).transform(lambda of_record: of_record.mode()[0])


def ranking(runs: pd.DataFrame) -> pd.DataFrame:
    """The defenses of some runs (of one ratio), the nearest to the clean nets first: distance, interval, records.

    Runs of another victim than the others' are left out. Each is averaged over its subsets within a record, then over
    the records that all the ranked ones have. One with fewer than half of the records of the fullest is not ranked, but
    stands below them with its own.
    """
    runs = runs[~of_another_victim(runs)]
    own = {name: set(part.record) for name, part in runs.groupby("defense")}
    most = max(map(len, own.values()), default=0)
    ranked = [name for name, records in own.items() if 2 * len(records) >= most]
    shared = set.intersection(*(own[name] for name in ranked)) if ranked else set()
    rows = []
    for name, part in runs.groupby("defense"):
        among = name in ranked and bool(shared)
        used = part[part.record.isin(shared)] if among else part
        per_record = used.groupby("record")[["distance", "acc_lost"]].mean()
        mean, half, n = interval(per_record.distance.tolist())
        half = half if n > 2 else math.nan  # two say nothing of the spread
        rows.append({
            "defense": name, "ranked": among, "distance": mean, "half": half, "records": n, "runs": len(used),
            "acc_lost": per_record.acc_lost.mean(), "worst": per_record.distance.idxmax(),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.sort_values(["ranked", "distance"], ascending=[False, True]).reset_index(drop=True)


def report(profile: str, frame: pd.DataFrame) -> None:
    """Print the tables and, unless it is the smoke profile, write them to bench/results/ and into the README.

    Those are of earlier runs, too, whose records are no longer there.
    """
    if profile != "smoke":
        frame = with_earlier(RESULTS / f"quality_{profile}.csv", frame, ("record", "defense", "ratio", "subset"))
    if frame.empty or "distance" not in frame:
        print("no table: no repair is there, or nothing of the clean nets")
        return
    lines: list[str] = []
    victims = frame[frame.distance.notna()]
    shares = list(victims.groupby("ratio"))
    for ratio, runs in shares:
        lines += [f"### With {percent(ratio, 0)}% of the training images", "", *words(runs), ""]
        lines += [*_repairs(runs), "", *_reactivations(runs), ""]
    lines += _clean(frame[frame.attack == "clean"])
    print("\n".join(lines))
    if profile == "smoke":
        return
    write_csv(RESULTS / f"quality_{profile}.csv", frame)
    write_block(f"quality {profile}", lines)
    runs = shares[0][1]
    ranks = ranking(runs)
    if profile == "cpu" and ranks.ranked.sum() > 1 and ranks[ranks.ranked].records.min() >= FEWEST:
        write_block("ranking", [*words(runs), "", *_ranks(runs)], PAGES / "docs" / "results.md")


def words(runs: pd.DataFrame) -> list[str]:
    """Who wins, by how much, and where ULRL stands."""
    ranks = ranking(runs)
    first = ranks[ranks.ranked]
    if first.empty:
        return ["No record has all of the defenses, so none is ranked."]

    def said(row: Any) -> str:
        spread = "" if pd.isna(row.half) else f" ±{percent(row.half)}"
        return f"{row.defense} ({percent(row.distance)}{spread} points from the clean nets)"

    best = list(first.itertuples())
    if len(best) == 1:
        return [f"One defense alone has been run on half of the records or more: {said(best[0])}. {_not_run(runs)}"]
    sentences = [f"Over the {best[0].records} records that all {len(best)} ranked defenses have, {said(best[0])} wins"]
    sentences[0] += f", before {said(best[1])}."
    told = []
    for row in best[:2]:
        alike = _alike(runs, str(row.defense), [str(other.defense) for other in best[row.Index + 1 :]])
        apart = f"cannot be told from {', '.join(alike)}" if alike else "is nearer than each that follows"
        told.append(f"{row.defense} {apart}")
    sentences.append(f"By paired differences over the records (95%), {'; '.join(told)}.")
    took = runs[runs.missed == ""]
    if 0 < took.record.nunique() < runs.record.nunique() and "harden" in set(took.defense):
        sentences.append(f"On those that meet the bench's bar for victims ({_order(took)}.")
    ours = next((row for row in best if row.defense == "ulrl"), None)
    if ours is not None and ours.Index:
        behind = percent(ours.distance - best[0].distance)
        sentences.append(f"ULRL is number {ours.Index + 1}, {behind} points behind; it is worst on {ours.worst}.")
    others = runs[~runs.attack.isin(DEVELOPED_ON) & runs.defense.isin(first.defense)]
    if "harden" in set(others.defense):
        sentences.append(
            f"Harden's settings were chosen or tried on {', '.join(DEVELOPED_ON)}, those of the others are their "
            f"papers'; on the others ({_order(others)}."
        )
    if "truth_distance" in runs and runs.truth_distance.notna().any():
        far, lost, n = _truth(runs)
        sentences.append(
            f"Fine-tuning on the true trigger would reach {percent(far)} ({n}), for {percent(lost)} of accuracy."
        )
    out = ranks[~ranks.ranked].defense.tolist()
    if out:
        sentences.append(f"Not ranked, on fewer than half of the records: {', '.join(out)}.")
    return [" ".join([*sentences, _not_run(runs)]).rstrip()]


def _order(runs: pd.DataFrame) -> str:
    """The first five on some records, after how many these are."""
    ranks = ranking(runs)
    ranks = ranks[ranks.ranked]
    first = [f"{row.defense} {percent(row.distance)}" for row in ranks[:5].itertuples()]
    return f"{ranks.records.max()}): {', '.join(first)}"


def _alike(runs: pd.DataFrame, defense: str, others: Sequence[str]) -> list[str]:
    """Which of `others` lie no further from the clean nets than `defense`, record by record, by the 95% interval."""
    runs = runs[~of_another_victim(runs)]
    far = runs.groupby(["record", "defense"]).distance.mean().unstack()
    alike = []
    for other in others:
        mean, half, _ = interval((far[other] - far[defense]).dropna().tolist())
        if not mean > half:
            alike.append(other)
    return alike


def _not_run(runs: pd.DataFrame) -> str:
    never = [name for name, cls in DEFENSES.items() if cls.repairs and name not in set(runs.defense)]
    return f"Not run: {', '.join(never)}." if never else ""


def _ranks(runs: pd.DataFrame) -> list[str]:
    """Each defense's distance from the clean nets over the records, and the accuracy it costs."""
    lines = ["| defense | distance, points | ACC lost, points | records | worst on |", "|---|---:|---:|---:|---|"]
    for row in ranking(runs).itertuples():
        far = percent(row.distance) + ("" if pd.isna(row.half) else f" ±{percent(row.half)}")
        name = f"{row.defense}{'' if row.ranked else ', not ranked'}"
        worst = runs[runs.record == row.worst].attack.iloc[0]
        lines.append(f"| {name} | {far} | {percent(row.acc_lost)} | {row.records} | {worst} |")
    return lines


def _repairs(runs: pd.DataFrame) -> list[str]:
    """ASR / RA of each defense on each record, beside the clean nets and the true trigger."""
    records = list(dict.fromkeys(runs.record))
    lines = [
        "ASR / RA in percent, mean ±95% interval (n clean subsets); distance over records (n).", "",
        "| defense | distance | ACC lost | " + " | ".join(_titles(runs, records)) + " |",
        "|---|---:|---:|" + "---:|" * len(records),
    ]  # fmt: skip

    def line(title: str, far: str, lost: str, cells: Sequence[str]) -> None:
        lines.append(f"| {title} | {far} | {lost} | " + " | ".join(cells) + " |")

    others = of_another_victim(runs)
    by_record = {record: runs[(runs.record == record) & ~others] for record in records}
    line("(none)", "", "", [_pair(part.head(1), "asr_before", "ra_before") for part in by_record.values()])
    nets = [
        f"{_pair(part.head(1), 'clean_asr', 'clean_ra', n=False)} ({part.clean_nets.iloc[0]:.0f})"
        for part in by_record.values()
    ]
    line("(clean nets)", "0", "", nets)
    if "truth_distance" in runs and runs.truth_distance.notna().any():
        truth = [_pair(part.drop_duplicates("subset"), "truth_asr", "truth_ra") for part in by_record.values()]
        far, lost, n = _truth(runs)
        line("(true trigger)", f"{percent(far)} ({n})", percent(lost), truth)
    for row in ranking(runs).itertuples():
        mine = runs.defense == row.defense
        far = percent(row.distance) + ("" if pd.isna(row.half) else f" ±{percent(row.half)}") + f" ({row.records})"
        cells = [
            _pair(runs[mine & ~others & (runs.record == record)], "asr", "ra")
            or _pair(part := runs[mine & others & (runs.record == record)], "asr", "ra") + " ‡" * bool(len(part))
            for record in records
        ]
        line(str(row.defense), far, percent(row.acc_lost), cells)
    return [*lines, *_marks(runs)]


def _truth(runs: pd.DataFrame) -> tuple[float, float, int]:
    """What fine-tuning on the true trigger comes to: distance and accuracy lost, means over so many records."""
    known = runs[runs.truth_distance.notna()].groupby("record")[["truth_distance", "truth_lost"]].mean()
    return known.truth_distance.mean(), known.truth_lost.mean(), len(known)


def _marks(runs: pd.DataFrame) -> list[str]:
    """What † in a title and ‡ in a cell mean."""
    missed = runs[runs.missed != ""].drop_duplicates("record")
    said = [f"{row.attack} ({row.missed})" for row in missed.itertuples()]
    lines = ["", f"† The victim did not quite take: {'; '.join(said)}."] if said else []
    anew = runs[of_another_victim(runs)]
    told = [f"{row.defense} on {row.attack} (ACC {percent(row.acc_before)}, ASR {percent(row.asr_before)} before)"
            for row in anew.itertuples()]  # fmt: skip
    return [*lines, "", f"‡ Of a victim trained anew, and not in the ranking: {'; '.join(told)}."] if told else lines


def _reactivations(runs: pd.DataFrame) -> list[str]:
    """ASR after each attack that is to bring the backdoor back, over the records, and how far above clean nets'."""
    if "again_before" not in runs or runs.again_before.isna().all():
        return ["No re-activation has been measured."]
    lines = ["Re-activation: ASR in percent, mean ±95% interval over records (n); last, how many points it is at most "
             "above that of clean nets attacked in the same way.", "",
             "| defense | as repaired | retuned | query | universal | most above clean nets |",
             "|---|---:|---:|---:|---:|---|"]  # fmt: skip
    once = runs.drop_duplicates("record")
    if "clean_again_before" in once:
        cells = [cell(once[f"clean_again_{k}"].dropna().tolist()) for k in ATTACKS_AFTER]
        lines.append("| (clean nets) | " + " | ".join(cells) + " | |")
    done = runs[runs.again_before.notna()]
    for name in ranking(runs).defense:
        part = done[done.defense == name].groupby("record")[[f"again_{k}" for k in ATTACKS_AFTER]].mean()
        if len(part):
            cells = [cell(part[f"again_{k}"].tolist()) for k in ATTACKS_AFTER]
            lines.append(f"| {name} | " + " | ".join([*cells, _most_above(done[done.defense == name])]) + " |")
    return lines


def _most_above(part: pd.DataFrame) -> str:
    """The record and the attack that bring back most, beside clean nets attacked in the same way."""
    if "clean_again_before" not in part:
        return ""
    above = pd.DataFrame({k: part[f"again_{k}"] - part[f"clean_again_{k}"] for k in ATTACKS_AFTER[1:]}).stack().dropna()
    if above.empty:
        return ""
    row, attack = above.idxmax()
    return f"{percent(above.max())} ({attack}, {part.attack[row]})"


def _clean(runs: pd.DataFrame) -> list[str]:
    """What each defense does to models without a backdoor."""
    if runs.empty:
        return ["No clean net has been repaired."]
    lines = ["### Clean nets", "",
             "ACC lost in points, mean ±95% interval (n runs); false alarms: runs that flagged a class.", "",
             "| defense | clean samples | ACC lost | false alarms |", "|---|---:|---:|---:|"]  # fmt: skip
    for (ratio, name), part in runs.groupby(["ratio", "defense"]):
        alarms = int((part.flagged != "").sum())
        lines.append(f"| {name} | {percent(ratio, 0)}% | {cell(part.acc_lost.tolist())} | {alarms} of {len(part)} |")
    return lines


def _titles(runs: pd.DataFrame, records: Sequence[str]) -> list[str]:
    """The attack; with the rest of the record's name where there is more than one of it."""
    attacks = {record: str(runs[runs.record == record].attack.iloc[0]) for record in records}
    count = pd.Series(attacks).value_counts()
    marks = {record: "" if not runs[runs.record == record].missed.any() else " †" for record in records}
    names = {record: a if count[a] == 1 else f"{a} {record.split(f'_{a}_')[-1]}" for record, a in attacks.items()}
    return [names[record] + marks[record] for record in records]


def _pair(part: pd.DataFrame, first: str, second: str, *, n: bool = True) -> str:
    a, b = part[first].dropna().tolist(), part[second].dropna().tolist()
    if not a:
        return ""
    (mean, half, count), (other, other_half, _) = interval(a), interval(b)
    text = " / ".join(
        percent(m) + ("" if pd.isna(h) else f" ±{percent(h)}") for m, h in ((mean, half), (other, other_half))
    )
    return f"{text} ({count})" if n else text
