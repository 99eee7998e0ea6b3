"""The bench's own arithmetic: intervals, what counts as taken, the distance to a clean net, the ranking."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bench import pages, speed, strangers, successor
from bench.idle import idle_jobs
from bench.pages import cell, interval, with_earlier, write_block, write_csv
from bench.pictures import sight
from bench.quality import all_defenses, folder, repair_job
from bench.reactivation import EPS, Material, retune, shifted, universal
from bench.release_agreement import lines, whole
from bench.successor import COLUMNS, PREFIX, RATIO, front, goal, pictured, table
from bench.tables import (
    FOLDER,
    _marks,
    _reactivations,
    _repairs,
    _titles,
    distance,
    of_another_victim,
    ranking,
    words,
)
from bench.valley import mixed
from bench.victims import PROFILES, VICTIMS, chosen, jobs_of, took, victim_of
from ulrl.data.datasets import dataset_spec
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.harden import Harden
from ulrl.errors import UserError
from ulrl.sweep import scheduler
from ulrl.sweep.jobs import State


@pytest.mark.parametrize("path", sorted(p.relative_to(pages.FOLDER) for p in pages.FOLDER.rglob("*.py")), ids=str)
def test_every_script_still_finds_what_it_imports(path: Path) -> None:
    importlib.import_module(".".join(["bench", *path.with_suffix("").parts]).removesuffix(".__init__"))


def test_pruned_weights_are_put_together_as_the_net_uses_them() -> None:
    """FP's release leaves weights and masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.random_unstructured(net[1], "weight", amount=0.5)
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    other.load_state_dict(whole(net.state_dict()))
    x = torch.rand(5, 4)
    assert torch.equal(other(x), net(x))
    assert (other[1].weight == 0).sum() == 3


def test_agreement_is_of_both_sides_and_marks_what_differs() -> None:
    rows = [("ft", 0, "ours", 0.8, 0.1), ("ft", 0, "theirs", 0.8, 0.5), ("ft", 1, "ours", 0.6, 0.1),
            ("ft", 1, "theirs", 0.8, 0.5), ("clp", 0, "ours", 0.6, 0.2), ("clp", 0, "theirs", 0.6, 0.9)]  # fmt: skip
    runs = pd.DataFrame(rows, columns=["defense", "seed", "side", "acc", "asr"]).assign(ra=0.5)
    ft, clp = lines(runs)[2:]
    assert ft.startswith("| ft | 2 | 70.0 ±127.1 / 80.0 ±0.0 | 10.0 ±0.0 / 50.0 ±0.0 * | ")
    assert clp.startswith("| clp | 1 | 60.0 / 60.0 | 20.0 / 90.0 | 50.0 / 50.0 | ")


def test_the_picture_shows_each_records_figures_on_its_own_line() -> None:
    rows = [("a", "harden", 0.1, 0.6, 0.9), ("b", "harden", 0.2, 0.7, 0.3), ("a", "ulrl", 0.3, 0.8, 0.9)]
    runs = pd.DataFrame(rows, columns=["record", "defense", "asr", "ra", "clean_ra"])
    runs = runs.assign(attack=runs.record, clean_asr=0.0, asr_before=1.0, ra_before=0.0)
    axes = sight(runs).axes
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["b", "a"]  # the hardest to read first
    for ax, of_harden, of_ulrl in zip(axes, ([20, 10], [70, 60]), (30, 80), strict=True):
        points = {line.get_label(): line.get_xdata() for line in ax.lines}
        assert points["harden"] == pytest.approx(of_harden)
        assert points["ulrl"][1] == pytest.approx(of_ulrl)


def test_the_ends_of_the_line_between_two_nets_are_the_nets() -> None:
    a, b = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    b["weight"].add_(1)
    assert torch.equal(mixed(a, b, 0.0)["weight"], a["weight"])
    assert torch.equal(mixed(a, b, 1.0)["weight"], b["weight"])
    assert torch.equal(mixed(a, b, 0.5)["weight"], a["weight"] + 0.5)


def test_an_interval_is_students() -> None:
    mean, half, n = interval([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.30 / math.sqrt(3), rel=1e-3)
    assert math.isnan(interval([1.0])[1])
    assert [cell([0.5] * n) for n in range(4)] == ["", "50.0 (1)", "50.0 (2)", "50.0 ±0.0 (3)"]


def test_a_clean_nets_own_figures_are_no_distance_away() -> None:
    assert distance(0.234, 0.607, 0.234, 0.607) == 0
    assert distance(0.0, 0.607, 0.234, 0.607) == pytest.approx(0.234)  # blind to the class
    assert distance(0.234, 0.9, 0.234, 0.607) == 0
    assert distance(0.334, 0.507, 0.234, 0.607) == pytest.approx(0.2)


def runs(*rows: tuple[str, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["defense", "record", "distance"])
    return frame.assign(acc_lost=0.0, acc_before=0.9, asr_before=1.0)


def test_re_activation_is_told_beside_clean_nets_that_were_attacked_too() -> None:
    frame = runs(("a", "x", 0.1), ("a", "y", 0.2), ("b", "x", 0.3)).assign(attack=["badnet", "wanet", "badnet"])
    assert _reactivations(frame) == ["No re-activation has been measured."]
    figures = {"before": (0.1, 0.1), "retuned": (0.4, 0.1), "query": (0.2, 0.1), "universal": (0.9, 0.8)}
    for attack, (of_a, clean) in figures.items():
        frame[f"again_{attack}"] = [of_a, of_a / 2, math.nan]
        frame[f"clean_again_{attack}"] = [clean, math.nan, clean]
    clean_nets, line = _reactivations(frame)[-2:]  # b has none, and y's clean nets were not attacked
    assert clean_nets == "| (clean nets) | 10.0 (1) | 10.0 (1) | 10.0 (1) | 80.0 (1) | |"
    assert line == "| a | 7.5 (2) | 30.0 (2) | 15.0 (2) | 67.5 (2) | 30.0 (retuned, badnet) |"


def test_ranks_are_over_the_records_that_all_share() -> None:
    ranks = ranking(runs(("a", "x", 0.1), ("a", "x", 0.3), ("a", "y", 0.9), ("b", "x", 0.25)))
    assert ranks.defense.tolist() == ["a", "b"]  # 0.2 on x, whatever it is on y
    assert ranks.distance.tolist() == pytest.approx([0.2, 0.25])
    assert ranks.records.tolist() == [1, 1]


def test_a_defense_with_few_records_is_not_ranked() -> None:
    everywhere = [("a", record, 0.5) for record in "vwxyz"]
    ranks = ranking(runs(*everywhere, ("b", "x", 0.0)))
    assert ranks[ranks.ranked].defense.tolist() == ["a"]
    assert ranks.defense.tolist() == ["a", "b"]
    assert ranks.records.tolist() == [5, 1]


def test_a_victim_that_was_trained_anew_is_not_ranked_with_the_first() -> None:
    """b repaired x when it was lost and another had been made by the same recipe."""
    frame = full(("a", "x", 0.1), ("c", "x", 0.2), ("b", "x", 0.0), *((d, "y", 0.5) for d in "abc"))
    frame.loc[2, ["asr_before", "acc_before"]] = 0.9, 0.88
    assert of_another_victim(frame).tolist() == [False, False, True, False, False, False]
    assert ranking(frame).records.tolist() == [1, 1, 1]
    assert ranking(frame).distance.tolist() == [0.5, 0.5, 0.5]
    assert _marks(frame)[-1].startswith(
        "‡ Of a victim trained anew, and not in the ranking: b on x (ACC 88.0, ASR 90.0"
    )
    assert [line.count("‡") for line in _repairs(frame) if line.startswith(("| a |", "| b |"))] == [0, 1]


def test_who_cannot_be_told_from_the_next_is_said() -> None:
    """a is nearer than b and c on each record; b is nearer than c on two of three."""
    rows = [("a", 0.1, 0.12, 0.11), ("b", 0.5, 0.6, 0.5), ("c", 0.6, 0.7, 0.45)]
    said = words(full(*((name, record, far) for name, *fars in rows for record, far in zip("xyz", fars, strict=True))))
    assert "(95%), a is nearer than each that follows; b cannot be told from c." in said[0]


def full(*rows: tuple[str, str, float]) -> pd.DataFrame:
    """As `runs`, with all that a table shows; the records are named for their attacks, and `lf` did not take."""
    frame = runs(*rows)
    figures = dict.fromkeys(("asr", "ra", "asr_before", "ra_before", "clean_asr", "clean_ra"), 0.5)
    missed = frame.record.map(lambda record: "ASR 80.0 below 95.0" if record == "lf" else "")
    return frame.assign(attack=frame.record, missed=missed, clean_nets=2, **figures)


def test_the_words_tell_which_records_a_defense_was_made_on_and_what_was_not_run() -> None:
    said = " ".join(
        words(full(("ulrl", "lf", 0.1), ("ulrl", "bpp", 0.5), ("harden", "lf", 0.0), ("harden", "bpp", 0.4)))
    )
    assert "harden (20.0" in said
    assert "on the others (1): harden 40.0, ulrl 50.0" in said
    assert "ULRL is number 2, 10.0 points behind; it is worst on bpp." in said
    assert "Harden's settings" not in " ".join(words(full(("harden", "lf", 0.0), ("ulrl", "lf", 0.1))))
    assert "abl" in said.split("Not run: ")[1]
    assert "ulrl" not in said.split("Not run: ")[1]


def test_a_victim_that_did_not_take_is_marked_in_a_table() -> None:
    runs = full(("ulrl", "lf", 0.1), ("ulrl", "sig", 0.5))
    assert _titles(runs, list(runs.record)) == ["lf †", "sig"]
    assert _marks(runs)[-1] == "† The victim did not quite take: lf (ASR 80.0 below 95.0)."


def test_the_front_page_shows_what_both_methods_repaired() -> None:
    def run(record: str, variant: str, asr: float | None, acc: float) -> dict[str, Any]:
        figures = {"ra": asr, "clean_asr": 0.1, "clean_ra": 0.9, "asr_before": 1.0, "attack": record, "ratio": RATIO}
        return {"record": PREFIX + record, "variant": variant, "asr": asr, "acc": acc, "acc_before": 0.9, **figures}

    both = [
        run(r, v, asr, acc) for r, asr in (("lf", 0.2), ("clean", None)) for v, acc in (("ulrl", 0.8), ("harden", 0.89))
    ]
    other = run("lf", "ulrl", 0.9, 0.5) | {"acc_before": 0.91}  # of another victim: not in the line's mean
    lines = list(front(pd.DataFrame([*both, other, run("sig", "ulrl", 0.2, 0.8)])))
    apart = list(front(pd.DataFrame([other, both[1]])))
    assert apart[-1] == "| lf | 10.0 / 90.0 | 100.0 | 90.0 / 90.0 / -41.0 ‡ | 20.0 / 20.0 / -1.0 |"
    assert lines[2:] == ["| clean | | | -10.0 | -1.0 |",
                         "| lf | 10.0 / 90.0 | 100.0 | 20.0 / 20.0 / -10.0 | 20.0 / 20.0 / -1.0 |"]  # fmt: skip
    # The picture has what the front page has, all seeds of it, and of another defense what the other bench found.
    more = [*both, other, both[1] | {"asr": 0.4}]
    found = [run("lf", name, 0.7, 0.8) | {"distance": 0.0, "defense": name} for name in ("harden", "ulrl", "d3")]
    seen = pictured(pd.DataFrame(more), pd.DataFrame(found).drop(columns="variant")).groupby("defense").asr
    assert {name: list(asr) for name, asr in seen} == {"d3": [0.7], "harden": [0.2, 0.4], "ulrl": [0.2]}


def test_what_is_met_of_the_goal_is_counted_over_records_of_unequal_seeds() -> None:
    def run(record: str, asr: float | None, ra: float | None, acc: float, seed: int) -> dict[str, Any]:
        return {"record": PREFIX + record, "variant": "harden", "asr": asr, "ra": ra, "acc": acc, "seed": seed,
                "ratio": RATIO, "acc_before": 0.9, "clean_asr": 0.02, "clean_ra": 0.85}  # fmt: skip

    runs = [run("lf", 0.01, 0.85, 0.895, 0), run("lf", 0.03, 0.83, 0.889, 1), run("sig", 0.4, 0.5, 0.87, 0)]
    others = [run("sig", 0.9, 0.1, 0.5, 0) | other for other in ({"ratio": 0.05}, {"record": "vgg"})]
    clean = [run("clean0", None, None, 0.89, 0), run("clean1", None, None, 0.9, 0)]
    said = goal(pd.DataFrame([*runs, *clean, *others]))
    assert "Of 2 backdoored nets, 1-2 seeds each" in said
    assert "ASR at most 1 point above a clean net's: 1 of 2 (+19.0 in the mean, +38.0 at worst, sig), within 1" in said
    assert "within 1 point either way 1; RA" in said
    assert "RA at most 5 points below it: 1 of 2 (+18.0 in the mean, +35.0 at worst, sig)" in said
    assert "at most 1 point of ACC lost: 1 of 2 (+1.9 in the mean, +3.0 at worst, sig)" in said
    assert "Clean nets: at most 0.5: 1 of 2 (+0.5 in the mean, +1.0 at worst, clean0)" in said
    said = goal(pd.DataFrame(clean))
    assert "Of 0 backdoored nets, 1 seed each" in said
    assert "ASR at most 1 point above a clean net's: none measured" in said


def test_what_the_other_bench_has_repaired_is_taken_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two methods that are compared; its seconds are of a clock, so none of the CPU is said."""
    row = {"record": PREFIX + "lf", "attack": "lf", "ratio": RATIO, "subset": 2, "acc_before": 0.9, "acc": 0.88,
           "asr_before": 1.0, "asr": 0.03, "ra": 0.5, "clean_asr": 0.02, "clean_ra": 0.4, "flagged": "6",
           "seconds": 300.0}  # fmt: skip
    found = pd.DataFrame([row | {"defense": name} for name in ("harden", "clp")])
    monkeypatch.setattr(successor, "gather", lambda jobs: found)
    taken = successor._of_quality()
    assert list(taken.columns) == COLUMNS
    assert (taken.variant.tolist(), taken.seed.tolist()) == (["harden"], [2])
    assert repair_job(next(iter(jobs_of("cpu").values())), "harden", RATIO, 2, 600).defense == Harden(random_seed=2)
    assert list(table(taken))[2:] == ["| lf | 1.0% | harden | -2.0 | 3.0 (2.0) | 50.0 (40.0) | 6 |  | 1 |"]


def test_what_was_measured_where_the_records_lay_stays_in_the_table(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    row = {"record": "b", "seed": 0, "asr": 0.5, "flagged": "6"}
    write_csv(file, pd.DataFrame([row, row | {"seed": 1, "flagged": ""}, row | {"record": "c", "asr": None}]))
    again = pd.DataFrame([row | {"record": "a", "flagged": "0 5"}, row | {"asr": 0.25}])
    for _ in range(2):
        known = with_earlier(file, again, ("record", "seed"))
        write_csv(file, known)
        assert known.record.tolist() == ["a", "b", "b", "c"]
        assert known.asr.tolist()[:3] == [0.5, 0.25, 0.5]
        assert known.flagged.tolist() == ["0 5", "6", "", "6"]
    assert len(with_earlier(file, pd.DataFrame(), ("record", "seed"))) == 4


def test_a_victim_has_to_take() -> None:
    dirty = next(v for v in VICTIMS if not v.clean_label)
    clean_label = next(v for v in VICTIMS if v.clean_label)
    assert took({"acc": 0.875, "asr": 0.96}, [0.87, 0.89], dirty) == "took"
    assert "ACC 1.5 below" in took({"acc": 0.865, "asr": 0.96}, [0.87, 0.89], dirty)
    assert "ASR 92.0 below 95.0" in took({"acc": 0.88, "asr": 0.92}, [0.88], dirty)
    assert took({"acc": 0.88, "asr": 0.92}, [0.88], clean_label) == "took"
    everyone = next(v for v in VICTIMS if v.name == "badnet-all2all")
    assert took({"acc": 0.88, "asr": 0.84}, [0.88], everyone) == "took"
    assert "ASR 83.0 below 83.6" in took({"acc": 0.88, "asr": 0.83}, [0.88], everyone)
    assert "no clean net" in took({"acc": 0.88, "asr": 1.0}, [], dirty)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_record_of_a_profile_is_a_line_of_the_table(profile: str) -> None:
    jobs = jobs_of(profile)
    labels = {victim.name for job in jobs.values() if (victim := victim_of(job))}
    assert labels == {v.name for v in VICTIMS}
    for name, job in jobs.items():
        assert (victim_of(job) is None) == (job.attack.name == "prototype"), name
        assert job.needs is None or job.needs in jobs


def test_a_name_means_an_attack_or_a_pattern() -> None:
    jobs = jobs_of("cpu")
    assert {victim_of(job).name for job in chosen(jobs, ["badnet"])} == {"badnet"}  # type: ignore[union-attr]
    assert next(job.name for job in chosen(jobs, ["*_lf_p0.1_*_s1_*"])).split("_")[3] == "clean"  # which it needs
    with pytest.raises(UserError, match="badnett"):
        chosen(jobs, ["badnett"])


def test_each_defense_has_its_published_values_and_its_folder() -> None:
    record = next(iter(jobs_of("cpu").values()))
    for defense in all_defenses():
        job = repair_job(record, defense, 0.01, 2, 600)
        assert job.run.ratio == 0.01
        assert job.defense.random_seed == 2
        parts = FOLDER.fullmatch(folder(defense, 0.01, 2))
        assert parts is not None
        assert (parts[1].replace("-ours", ":ours"), parts[2], parts[3]) == (defense, "0.01", "2")
    steps = repair_job(record, "i-bau", 0.01, 0, 600).defense.n_rounds * 6  # type: ignore[attr-defined]
    assert abs(steps - 250) <= 6


def test_a_block_of_the_page_is_replaced_and_the_rest_left(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin x -->\nold\n<!-- end x -->\nafter\n")
    write_block("x", ["new", "lines"], page)
    assert page.read_text() == "before\n<!-- begin x -->\nnew\nlines\n<!-- end x -->\nafter\n"
    with pytest.raises(UserError, match="begin y"):
        write_block("y", [], page)


class Bright(nn.Module):
    """Calls an image class 1 the surer the brighter it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.float().mean((1, 2, 3)) * self.scale
        return torch.stack([-brightness, brightness], 1)


@pytest.fixture
def material() -> Material:
    spec = dataset_spec("digits")
    images = torch.full((64, 1, 8, 8), 120, dtype=torch.uint8)
    zeros = torch.zeros(64, dtype=torch.int64)
    triggered = PoisonedSet(images, zeros + 1, spec, zeros, torch.arange(64))
    return Material.of(ImageSet(images, zeros, spec), triggered)


def test_a_universal_perturbation_stays_within_its_bound_and_leads_to_the_target(material: Material) -> None:
    delta = universal(Bright(), material)
    assert torch.allclose(delta, torch.full_like(delta, 255 * EPS))
    moved = shifted(material.judged, delta)
    assert moved.images.dtype == torch.uint8
    assert moved.images.unique().tolist() == [133]


def test_retuning_leaves_the_repaired_model_alone(material: Material) -> None:
    model = Bright()
    assert retune(model, material).scale != 1
    assert model.scale == 1


def test_what_is_judged_is_not_what_the_attacker_works_with(material: Material) -> None:
    made_on, judged = set(material.made_on.original_indices.tolist()), set(material.judged.original_indices.tolist())
    assert not made_on & judged
    assert len(made_on | judged) == 64


def test_the_speed_table_has_lines_for_each_part() -> None:
    """Small; what `--profile gpu` does is the same on a CPU. Starting has tests of its own."""
    tiny = replace(speed.PROFILES["smoke"], rounds=1, jobs=20, files=100)
    lines = [line for part in speed.PARTS if part is not speed.start for line in part(tiny)]
    assert len(lines) == 14
    for line in lines:
        assert len(line.values) == 1
        assert min(line.values) > 0 or "folder" in line.name
        assert str(line).startswith(line.name)


def test_a_sweeps_share_does_not_grow_with_its_jobs() -> None:
    """By calls, as time would hang on the machine: each job costs a few looks at files, however many there are."""
    looks: list[int] = []
    for count in (100, 400):
        calls = 0

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        board_jobs = idle_jobs(count)
        states = {job.name: State.QUEUED for job in board_jobs}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "state", lambda job: State.DONE)
            sys.setprofile(count_call)
            try:
                board = scheduler.Board(board_jobs, states)
                while board.left:
                    for queue in list(board.ready.values()):
                        while queue:
                            board.look(board.taken(queue.popleft()))
            finally:
                sys.setprofile(None)
        looks.append(calls // count)
    assert set(states.values()) == {State.DONE}
    assert looks[0] == looks[1]


@pytest.mark.parametrize("data", ["fm", "sc"])
def test_a_stranger_learns_what_its_trigger_says(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images of noise, of which nothing but the trigger can be learnt."""
    monkeypatch.setenv("ULRL_HOME", str(tmp_path))
    monkeypatch.setattr(strangers, "IMAGES", 512)
    monkeypatch.setattr(strangers, "POISONED", 0.5)
    channels, side = (1, 28) if data == "fm" else (3, 32)
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(1600, channels, side, side, generator=draws), torch.randint(10, (1600,), generator=draws)
    monkeypatch.setattr(strangers, "images", lambda _: (x[:512], y[:512], x, y))
    for net in strangers.strangers():
        changed = strangers.triggered(net.attack, x[:4], net.seed)
        assert 0 <= changed.min() <= changed.max() <= 1
        assert torch.equal(changed, x[:4]) == (net.attack == "clean")
        assert strangers.build(net.kind, channels, side)(x[:2]).shape == (2, 10)
    net = strangers.Stranger(data, "res", "side", 3, 1)
    model = strangers.trained(net)
    assert strangers.judged(model, net)["asr"] > 80
    assert all(torch.equal(w, strangers.trained(net).state_dict()[k]) for k, w in model.state_dict().items()), "kept"
