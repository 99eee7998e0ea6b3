"""Sweeps: what a file names, and that each job is done once, whatever happens to those who do it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sweep_jobs
from manners import refused
from PIL import Image
from sweep_jobs import command, ends, noted, study

from ulrl.cli import main
from ulrl.sweep import grid, local, scheduler
from ulrl.sweep.cluster import RayEngine, _work
from ulrl.sweep.grid import read_sweep
from ulrl.sweep.jobs import Job, State, claim, reason, retry, state
from ulrl.sweep.local import LocalEngine
from ulrl.sweep.scheduler import Clock, SweepOptions, run_jobs, status, sweep

ROOT = Path(__file__).parent.parent
GRID = """
attacks:
  attack: [badnet, sig]
  dataset: [digits, fashion_mnist]
  pratio: 0.1
  target: [0, 3]
  seeds: 2
  overrides:
    - {where: {attack: sig}, set: {pratio: 0.05}}
  exclude:
    - {attack: sig, dataset: digits}
defenses:
  defense: [ulrl, ft]
  ratio: [0.01, 0.05]
  seeds: [4]
  overrides:
    - {where: {defense: ulrl, dataset: digits}, set: {relearn_epochs: 7}}
  exclude:
    - {defense: ft, target: 3}
    - {ratio: 0.05, dataset: [fashion_mnist]}
"""


@pytest.fixture
def shared_home(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ULRL_HOME whose jobs other processes can import too."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setattr(scheduler, "POLL", 0.1)
    return empty_home


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(2, 1)
    yield engine
    engine.close()


def written(text: str) -> str:
    Path("sweep.yaml").write_text(text)
    return "sweep.yaml"


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# The grid


def test_grid_names_each_run_once_and_attacks_first(empty_home: Path) -> None:
    jobs = read_sweep(written(GRID))
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    records = [job for job in jobs if isinstance(job, grid.AttackJob)]
    assert jobs[: len(records)] == records
    assert {(r.attack.name, r.run.dataset) for r in records} == {
        ("badnet", "digits"), ("badnet", "fashion_mnist"), ("sig", "fashion_mnist"),
    }  # fmt: skip
    assert len(records) == 3 * 2 * 2
    assert {r.attack.pratio for r in records if r.attack.name == "sig"} == {0.05}
    assert all(r.attack.random_seed == r.run.random_seed == r.training.random_seed for r in records)
    assert sorted({r.run.random_seed for r in records}) == [0, 1]
    first = records[0]
    assert first.name.startswith("badnet_digits_preactresnet18_p0.1_t0_s0_")
    assert first.training.lr == 0.05, "from config/attack/prototype/digits.yaml"

    defenses = [job for job in jobs if isinstance(job, grid.DefenseJob)]
    assert {job.needs for job in defenses} == {r.name for r in records}
    of_first = [job for job in defenses if job.needs == first.name]
    assert [job.folder.name.rsplit("_", 1)[0] for job in of_first] == [
        "ulrl_r0.01_s4", "ulrl_r0.05_s4", "ft_r0.01_s4", "ft_r0.05_s4",
    ]  # fmt: skip
    assert of_first[0].folder == empty_home / "record" / first.name / "defense" / of_first[0].folder.name
    assert vars(of_first[0].defense)["relearn_epochs"] == 7
    assert not any(job.defense.name == "ft" and "_t3_" in job.name for job in defenses)
    assert not any(job.run.ratio == 0.05 and "fashion" in job.name for job in defenses)


def test_a_name_tells_options_that_change_a_result_and_no_others(empty_home: Path) -> None:
    def name(more: str) -> str:
        return read_sweep(written(f"attacks: {{attack: badnet, dataset: digits{more}}}"))[0].name

    plain = name("")
    assert plain == name(", seeds: [0]") == name(", device: cpu, dataset_path: elsewhere") == name(", pratio: 0.1")
    assert plain.rsplit("_", 1)[0] == name(", epochs: 11").rsplit("_", 1)[0]
    assert len({plain, name(", epochs: 11"), name(", width: 4"), name(", random_seed: 1"), name(", target: 1")}) == 5


def test_what_a_named_file_or_record_holds_is_part_of_a_name(empty_home: Path) -> None:
    def names() -> list[str]:
        attacks = "attacks: {attack: lf, dataset: digits, clean_model: clean}"
        return [job.name for job in read_sweep(written(f"{attacks}\ndefenses: {{defense: ft, index: some.txt}}"))]

    held = {empty_home / "record" / "clean" / "attack_result.pt", Path("some.txt")}
    for file in held:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    before = names()
    assert names() == before
    for file in held:
        file.write_text("2")
        os.utime(file, (1, 1))  # a clock may be too coarse to tell
        now = names()
        assert now[-1] != before[-1], file
        before = now


def test_another_folder_of_images_is_another_record(empty_home: Path) -> None:
    def name(folder: Path | str) -> str:
        section = f"{{attack: badnet, dataset: folder, dataset_path: {folder}, img_size: 16}}"
        return read_sweep(written(f"attacks: {section}"))[0].name

    for folder in ("photos", "drawings"):
        for part in ("train/a", "train/b", "test/a", "test/b"):
            Path(folder, part).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(Path(folder, part, "0.png"))
    assert name("photos") != name("drawings")
    assert name("photos") == name(Path("photos").resolve())
    attacks = "attacks: {attack: badnet, dataset: folder, dataset_path: photos, img_size: 16}\n"
    for given, path in (("", "photos"), (", dataset_path: drawings", "drawings")):
        jobs = read_sweep(written(f"{attacks}defenses: {{defense: ft{given}}}"))
        assert [job.run.dataset_path for job in jobs] == ["photos", path], "a defense reads what its attack read"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attack: {attack: badnet}", ("unknown key 'attack'", "attacks")),
        ("attacks: {attack: badnet}", ("dataset", "missing")),
        ("attacks: [badnet]", ("attacks", "mapping")),
        ("attacks: {attack: badnett, dataset: digits}", ("badnett", "did you mean 'badnet'")),
        ("attacks: {attack: badnet, dataset: digit}", ("digit",)),
        ("attacks: {attack: badnet, dataset: digits, pration: 0.1}", ("pration", "pratio")),
        ("attacks: {attack: badnet, dataset: digits, targt: 1}", ("'targt'", "'target'")),
        ("attacks: {attack: badnet, dataset: digits, seed: 2}", ("'seed'", "'seeds'")),
        ("attacks: {attack: badnet, dataset: digits, override: []}", ("'override'", "'overrides'")),
        ("attacks: {attack: badnet, dataset: digits, pratio: much}", ("pratio", "much")),
        ("attacks: {attack: badnet, dataset: digits, pratio: []}", ("pratio", "list of values")),
        ("attacks: {attack: badnet, dataset: digits, target: 10}", ("attack_target", "10")),
        ("attacks: {attack: badnet, dataset: digits, seeds: 2, random_seed: 1}", ("twice",)),
        ("attacks: {attack: badnet, dataset: digits, overwrite: true}", ("overwrite", "leave it out")),
        ("attacks: {attack: badnet, dataset: digits, device: 'cuda:1'}", ("cuda:1", "shares out")),
        ("attacks: {attack: badnet, dataset: digits, exclude: [{atack: sig}]}", ("atack", "attack")),
        ("attacks: {attack: badnet, dataset: digits, exclude: [{attack: sigg}]}", ("sigg", "sig")),
        ("attacks: {attack: badnet, dataset: digits, exclude: [{dataset: digit}]}", ("'digit'", "digits")),
        ("attacks: {attack: badnet, dataset: digits, exclude: [{attack: [[sig]]}]}", ("['sig']", "exclude")),
        ("attacks: {attack: badnet, dataset: digits, exclude: [{model: preactresnet18}]}", ("'model'", "exclude")),
        ("attacks: {attack: badnet, dataset: digits, model: vgg19, exclude: [{model: vgg}]}", ("'vgg'", "vgg")),
        ("attacks: {attack: badnet, dataset: digits, model: vgg}", ("unknown model 'vgg'",)),
        ("attacks: {attack: badnet, dataset: digits, model: resnet18, width: 8}", ("--width 8", "one width only")),
        ("attacks: {attack: badnet, dataset: digits, overrides: [{attack: sig}]}", ("overrides", "where")),
        ("attacks: {attack: badnet, dataset: digits}\ndefenses: {defense: ft, model: vgg}", ("model", "record's")),
        ("attacks: {attack: badnet, dataset: digits}\ndefenses: {ratio: 0.1}", ("defense", "missing")),
        (
            "attacks: {attack: badnet, dataset: digits, seeds: 2}\ndefenses: {defense: ft, exclude: [{seeds: 1}]}",
            ("'random_seed'", "exclude of defenses"),
        ),
    ],
)
def test_a_bad_file_is_one_clear_line(text: str, words: tuple[str, ...], empty_home: Path) -> None:
    refused(lambda: read_sweep(written(text)), "sweep.yaml: ", *words)


def test_seeds_in_a_rule_for_defenses_are_their_own(empty_home: Path) -> None:
    attacks = "attacks: {attack: badnet, dataset: digits, seeds: 2}"
    jobs = read_sweep(written(f"{attacks}\ndefenses: {{defense: ft, seeds: 2, exclude: [{{seeds: 1}}]}}"))
    assert [job.run.random_seed for job in jobs if isinstance(job, grid.DefenseJob)] == [0, 0]


def test_the_files_that_come_with_ulrl(empty_home: Path) -> None:
    study = read_sweep("config/sweep/study.yaml")
    assert sum(job.needs is None for job in study) == 3 * 2 * 2
    assert len(study) == 12 + 12 * 4
    assert read_sweep("config/sweep/quick.yaml")


# What is done by processes here


def test_a_failed_job_keeps_its_log_and_stops_no_other(shared_home: Path, engine: LocalEngine) -> None:
    jobs: list[Job] = [
        command("good", "true"),
        command("bad", "test -e $ULRL_HOME/mended || { echo so it goes; exit 3; }"),
        command("killed", "test -e $ULRL_HOME/mended || kill -9 $PPID"),
        command("good/defense/d", "true", "good"),
        command("bad/defense/d", "true", "bad"),
    ]
    states = run_jobs(jobs, engine)
    assert [s.value for s in states.values()] == ["done", "failed", "failed", "done", "skipped"]
    assert "exit status 3" in reason(jobs[1])
    assert "so it goes" in (shared_home / "record" / "bad" / "failed.log").read_text()
    assert "SIGKILL" in reason(jobs[2])
    said = "\n".join(status(jobs))
    assert "2 done" in said
    assert "2 failed" in said
    assert "exit status 3" in said

    (shared_home / "mended").touch()
    assert run_jobs(jobs, engine) == states, "what failed is not done again by itself"
    for job in jobs:
        retry(job)
    assert set(run_jobs(jobs, engine).values()) == {State.DONE}
    assert ends(shared_home) == {job.name: 1 for job in jobs}
    assert not list((shared_home / "record" / ".sweep").glob("*.log"))


def test_a_sweep_killed_half_way_goes_on(shared_home: Path, engine: LocalEngine) -> None:
    jobs = study(2, 4, 0.3)
    killed = sweep_jobs.start(2, 4, 0.3)
    wait_for(lambda: len(ends(shared_home)) >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = [job for job in jobs if state(job) is State.DONE]
    assert len(done) < len(jobs)
    assert set(run_jobs(jobs, engine).values()) == {State.DONE}
    assert ends(shared_home) == {job.name: 1 for job in jobs}
    assert all(noted(shared_home)[f"begin {job.name}"] == 1 for job in done)


def test_a_job_that_is_stopped_has_time_to_clear_away(shared_home: Path, engine: LocalEngine) -> None:
    engine.start(sweep_jobs.Slow(name="slow", needs=None, alike=("attack",)))
    deadline = time.monotonic() + 60
    while not noted(shared_home)["begin slow"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    engine.close()
    assert noted(shared_home)["cleared slow"] == 1


def test_what_a_deaf_job_has_half_written_is_taken_away(
    shared_home: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PATIENCE", 0.5)
    for name in ("deaf", "learning"):
        engine.start(sweep_jobs.Deaf(name=name, needs=None, alike=("attack",)))
    wait_for(lambda: len(noted(shared_home)) == 2)
    engine.close()
    left = {str(path.relative_to(shared_home / "record")) for path in shared_home.glob("record/.*.partial/**")}
    assert left == {".learning.partial", ".learning.partial/learned"}, "what the next try goes on from"


def test_a_job_that_is_killed_leaves_no_words_of_multiprocessing(shared_home: Path) -> None:
    code = "import sweep_jobs; sweep_jobs.kill_one()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stderr == ""


def test_two_sweeps_at_once_share_the_jobs(shared_home: Path, engine: LocalEngine) -> None:
    jobs = study(2, 4, 0.3)
    other = sweep_jobs.start(2, 4, 0.3)
    wait_for(lambda: noted(shared_home))
    assert set(run_jobs(jobs, engine).values()) == {State.DONE}
    assert other.wait(300) == 0
    assert set(noted(shared_home).values()) == {1}, "each is begun once and ended once"
    assert ends(shared_home) == {job.name: 1 for job in jobs}


def test_status_tells_who_runs_what_and_the_time_left(shared_home: Path) -> None:
    jobs = study(1, 3, 0)
    nothing = {job.name: State.QUEUED for job in jobs}
    assert Clock(jobs, nothing).left(1) is None
    for job in jobs[:2]:
        job.folder.mkdir(parents=True)
        (job.folder / "result.json").write_text('{"seconds": {"total": 100}}')
    with claim(jobs[2]) as ours, claim(jobs[2]) as again:
        assert (ours, again) == (True, False)
        said = status(jobs)
    assert said[0] == "4 runs: 1 queued, 1 running, 2 done"
    assert said[1].startswith("running record/r0/defense/d1 by process ")
    assert said[-1] == "about 3 min left with 1 at once"


def test_the_time_left_goes_by_how_many_run_at_once_and_leaves_out_what_is_skipped(
    empty_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an attack that has failed before, a defense of which no like is done is never begun."""

    class TwoAtOnce:
        def __init__(self) -> None:
            self.jobs: list[Job] = []

        @property
        def running(self) -> int:
            return len(self.jobs)

        def fits(self, job: Job) -> bool:
            return self.running < 2

        def start(self, job: Job) -> None:
            self.jobs.append(job)

        def finished(self, timeout: float) -> list[tuple[Job, str]]:
            job = self.jobs.pop(0)
            job.folder.mkdir(parents=True)
            (job.folder / "result.json").write_text('{"seconds": {"total": 40}}')
            return [(job, "")]

        def close(self) -> None: ...

    jobs = [command(name, "") for name in ("bad", "a", "b", "c", "d")] + [command("bad/defense/d", "", "bad")]
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "failed.log").write_text("so it goes\n")
    with caplog.at_level(logging.INFO):
        states = run_jobs(jobs, TwoAtOnce())
    assert [s.value for s in states.values()] == ["failed", "done", "done", "done", "done", "skipped"]
    told = [line.split("; ")[1:] for line in caplog.messages if "] done record/" in line]
    assert told == [["about 60 s left"], ["about 40 s left"], ["about 20 s left"], []]

    jobs.append(command("e", ""))
    assert status(jobs)[0] == "7 runs: 1 queued, 4 done, 1 failed, 1 skipped"
    assert status(jobs)[-1] == "about 40 s left with 1 at once"


def test_a_failure_that_another_sweep_forgot_ends_none(shared_home: Path, engine: LocalEngine) -> None:
    job = command("bad", "false")
    states = run_jobs([job], engine)
    assert "status 1" in reason(job)
    retry(job)  # of another, just now
    assert "another sweep does it again" in scheduler._summary([job], states)[1]


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    engine = LocalEngine(None, 3)
    assert engine.jobs == 6
    given: list[str] = []

    class Process:
        def __init__(self, target: object, args: tuple[object, ...], name: str) -> None:
            given.append(str(args[3]))
            self.sentinel = len(given)

        def start(self) -> None: ...

    monkeypatch.setattr(engine._context, "Process", Process)
    attack = command("a", "")
    small = [sweep_jobs.Command(name=f"d{i}", needs="a", alike=(), command="", small=True) for i in range(4)]
    engine.start(attack)
    assert engine.fits(attack)
    for job in small[:3]:
        assert engine.fits(job)
        engine.start(job)
    assert not engine.fits(small[3])
    assert given == ["4", "7", "7", "7"]


def test_a_real_sweep_from_the_command_line(empty_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = written(
        "attacks: {attack: badnet, dataset: digits, width: 4, epochs: 1, seeds: 1, device: cpu}\n"
        "defenses: {defense: [ft, clp], ratio: 0.1, device: cpu,\n"
        "  overrides: [{where: {defense: ft}, set: {epochs: 1}}]}\n"
    )

    def ulrl(*flags: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["sweep", file, *flags])
        return int(left.value.code or 0), capfd.readouterr().out

    code, listed = ulrl("--dry_run")
    assert code == 0
    assert listed.count("queued") == 3
    assert "3 queued" in ulrl("--status")[1]
    assert not list(empty_home.iterdir()), "looking writes nothing"
    code, said = ulrl("--jobs", "2")
    assert code == 0, said
    assert "3 runs: 3 done" in said
    results = {path: path.stat().st_mtime_ns for path in empty_home.rglob("result.json")}
    assert sorted(json.loads(path.read_text())["method"] for path in results) == ["badnet", "clp", "ft"]
    assert all(list(path.parent.glob("*.log")) for path in results)
    assert ulrl()[0] == 0
    assert {path: path.stat().st_mtime_ns for path in results} == results, "nothing was done again"
    assert "3 done" in ulrl("--status")[1]


def test_a_sweep_with_a_failure_leaves_with_1(empty_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = written("attacks: {attack: lf, dataset: digits, clean_model: nowhere}\ndefenses: {defense: ft}")
    with pytest.raises(SystemExit) as left:
        main(["sweep", file])
    assert left.value.code == 1
    said = capfd.readouterr().out
    assert "1 failed, 1 skipped" in said
    assert "nowhere" in said
    assert "failed.log" in said


def test_a_script_takes_flags_and_variables(empty_home: Path) -> None:
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "sh" / "sweep_ulrl.sh", "--attacks", "badnet sig", "--ratios", "0.2", "--dry_run"],
        env={**os.environ, "PATH": python, "SEEDS": "0 1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.count("/defense/ulrl_r0.2_s0_") for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all("_s1_" in line for line in (lines[1], lines[3], lines[5], lines[7]))


@pytest.mark.parametrize(
    ("script", "flag"), [("attacks", "--defenses"), ("attacks", "--ratios"), ("ulrl", "--defenses")]
)
def test_a_script_refuses_what_it_would_swallow(script: str, flag: str) -> None:
    given = ["bash", ROOT / "sh" / f"sweep_{script}.sh", "--dry_run", flag, "ft"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{flag} would have no effect" in done.stderr


def test_a_script_takes_ulrl_home_from_where_the_user_is(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()  # which is refused, with its whole path
    done = subprocess.run(
        ["bash", ROOT / "sh" / "sweep_attacks.sh", "--attacks", "badnet", "--dry_run"], cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ULRL_HOME": "mine"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert f"ULRL_HOME is {tmp_path / 'mine'}, which is no folder" in done.stderr


def test_sweep_without_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sweep", "--jobs", "2"])
    assert left.value.code == 2
    assert "sweep/quick" in capsys.readouterr().err


# What is done by a cluster


@pytest.fixture
def cluster(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[object, list[object]]]:
    """A Ray cluster whose head does nothing, and two nodes of a CPU each, at home elsewhere."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("LEDGER", str(shared_home / "ledger"))
    small = {"object_store_memory": 100_000_000, "include_dashboard": False}
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon, **small})
    nodes = [
        cluster.add_node(num_cpus=1, env_vars={"ULRL_HOME": str(shared_home.parent / f"node{i}")}, **small)
        for i in range(2)
    ]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


def test_a_node_lost_half_way_and_records_sent_by_value(
    cluster: tuple[object, list[object]], shared_home: Path
) -> None:
    """On one cluster, as it takes seconds to start: a sweep on shared storage that loses a node, and then one
    whose nodes see each but their own."""
    ray_cluster, nodes = cluster
    jobs = study(2, 5, 0.5)
    engine = RayEngine(ray_cluster.address, 1, 1)  # type: ignore[attr-defined]

    def lose_a_node() -> None:
        wait_for(lambda: len(ends(shared_home)) >= 4)
        ray_cluster.remove_node(nodes[0], allow_graceful=False)  # type: ignore[attr-defined]

    loss = threading.Thread(target=lose_a_node)
    loss.start()
    try:
        states = run_jobs(jobs, engine)
    finally:
        engine.close()
        loss.join()
    assert set(states.values()) == {State.DONE}
    assert ends(shared_home) == {job.name: 1 for job in jobs}

    apart: list[Job] = [
        command("apart", "true"),
        command("apart/defense/d", "true", "apart"),
        command("broken", "false"),
        command("broken/defense/d", "true", "broken"),
    ]
    engine = RayEngine(ray_cluster.address, 1, 1, by_value=True)  # type: ignore[attr-defined]
    try:
        states = run_jobs(apart, engine)
    finally:
        engine.close()
    assert [s.value for s in states.values()] == ["done", "done", "failed", "skipped"]
    assert (shared_home / "record" / "apart" / "defense" / "d" / "result.json").exists()
    assert (shared_home.parent / "node1" / "record" / "apart" / "result.json").exists(), "where it was made"
    assert "status 1" in reason(apart[2])
    assert len(list(shared_home.glob("record/.sweep/*.seen"))) == 1, "one for all sweeps, also those that are killed"


def test_a_task_that_does_not_see_the_storage_says_so(empty_home: Path, tmp_path: Path) -> None:
    job = command("r", "true")
    assert _work(job, str(tmp_path / "nowhere"), "token", None) is None
    assert not job.done()


def test_a_job_that_is_sent_by_value_after_all_stays_claimed(shared_home: Path) -> None:
    """The first task answers that it does not see the sweep's files; a second sweep must not take the job then."""

    class Ray:
        class exceptions:
            RayError = RuntimeError

        answers: list[bytes | None] = [None, b""]  # noqa: RUF012

        def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
            return tasks, []

        def get(self, task: int) -> bytes | None:
            return self.answers.pop(0)

        def cluster_resources(self) -> dict[str, float]:
            return {}

        def options(self, **how: object) -> Ray:
            return self

        def remote(self, *arguments: object) -> int:
            return len(self.answers)

    job = command("alone", "true")
    engine = RayEngine.__new__(RayEngine)
    ray = Ray()
    vars(engine).update(
        _ray=ray, _task=ray, _cpus=1, _per_gpu=1, _by_value=False, _token=Path("x.seen"), _tasks={}, _claims={},
        _parcels={}, _not_ours=[],
    )  # fmt: skip
    engine.start(job)
    assert engine.finished(0) == []
    with claim(job) as free:
        assert not free
    assert engine.finished(0) == [(job, "")]
    with claim(job) as free:
        assert free


def test_more_runs_than_a_sweep_may_have_are_counted_not_made(empty_home: Path) -> None:
    file = empty_home / "many.yaml"
    lists = "".join(f"  {key}: [{', '.join(map(str, range(1, 101)))}]\n" for key in ("epochs", "batch_size", "width"))
    for text in (f"attacks:\n  attack: badnet\n  dataset: digits\n{lists}",
                 "attacks:\n  attack: badnet\n  dataset: digits\n  seeds: 1000000000\n"):  # fmt: skip
        file.write_text(text)
        refused(lambda: read_sweep(str(file)), "100000")


def test_ray_is_an_extra(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    file = written("attacks: {attack: badnet, dataset: digits}")
    refused(lambda: sweep(file, SweepOptions(engine="ray")), "--engine ray", "pip install 'ulrl[ray]'")
