"""Where faults are tried: the commands, a home for each try, and what an undisturbed run comes to."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from bench.faults.processes import forked
from bench.faults.units import half_written, units

CPU = ["--device", "cpu"]
TINY = ["attack", "badnet", "--dataset", "digits", "--width", "4", "--save_folder_name", "tiny", *CPU]
GRID = """attacks: {attack: badnet, dataset: digits, width: 4, epochs: 1, device: cpu}
defenses: {defense: ft, epochs: [1, 2], ratio: 0.1, device: cpu}
"""
NET = """import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
"""
PURIFY = ["purify", "--model", "net:net", "--weights", "w.pt", "--images", "photos", *CPU]
COMMANDS = {
    "attack": [*TINY, "--epochs", "2", "--overwrite"],
    "defense": ["defense", "ft", "--result_file", "tiny", "--epochs", "3", "--ratio", "0.1", *CPU],
    "sweep": ["sweep", "sweep.yaml"],
    "compare": ["compare", "tiny", "--defenses", "ft,clp", "--ratio", "0.05", *CPU],
    "cache": [*PURIFY, "--check"],
}
LONG = {  # to be stopped
    "attack": [*TINY, "--epochs", "5000", "--overwrite"],
    "defense": ["defense", "ft", "--result_file", "tiny", "--epochs", "5000", *CPU],
    "sweep": ["sweep", "long.yaml"],
    "compare": ["compare", "tiny", "--defenses", "ft,ulrl", "--seeds", "50", *CPU],
    "purify": [*PURIFY, "--out", "out.pt", "--relearn_epochs", "5000"],
    "report": ["report", "--out", "page.html"],
}


@dataclass
class Lab:
    folder: Path
    rng: random.Random
    rows: list[dict[str, object]]
    times: int
    base: Path = field(init=False)
    whole: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)
        self.base = self.folder / "base"
        (self.base / "photos").mkdir(parents=True)
        (self.base / "sweep.yaml").write_text(GRID)
        (self.base / "long.yaml").write_text(GRID.replace("epochs: 1,", "epochs: 5000,"))
        (self.base / "net.py").write_text(NET)
        for name, light in (("cat", 0), ("dog", 128)):
            (self.base / "photos" / name).mkdir()
            for i in range(300):
                pixels = Image.frombytes("RGB", (8, 8), bytes(b // 2 + light for b in self.rng.randbytes(192)))
                pixels.save(self.base / "photos" / name / f"{i}.png")
        dark, light = torch.full((2, 192), 0.01) * torch.tensor([[-1], [1]])
        torch.save({"1.weight": torch.stack([dark, light]), "1.bias": torch.zeros(2)}, self.base / "w.pt")
        self.run([*TINY, "--epochs", "1"], self.base)
        shutil.rmtree(self.base / "cache", ignore_errors=True)

    def run(self, argv: list[str], home: Path) -> None:
        code, last = forked(argv, home).end()
        assert code in (0, 3), (code, last)

    def home(self) -> Path:
        home = self.folder / f"home{self.rng.randrange(10**9)}"
        shutil.copytree(self.base, home)
        return home

    def undisturbed(self, what: str) -> tuple[dict[str, str], float]:
        """The units of a run that nothing disturbs, and its seconds."""
        if what not in self.whole:
            home, begin = self.home(), time.monotonic()
            self.run(COMMANDS[what], home)
            self.whole[what] = units(home), time.monotonic() - begin
            shutil.rmtree(home)
        return self.whole[what]

    def again(self, what: str, home: Path, wanted: dict[str, str]) -> list[str]:
        """The command once more, and what is not as it should be then."""
        argv = [*COMMANDS[what], *(["--retry_failed"] if what == "sweep" else [])]
        code, last = forked(argv, home).end()
        if code not in (0, 3) and "exists" not in last:
            return [f"run again, it left with {code}: {last}"]
        now = units(home)
        lost = [f"{n} differs after going on" for n in {**wanted, **now} if now.get(n) != wanted.get(n)]
        return lost + [f"{path} is left" for path in home.rglob(".*.partial")] + half_written(home)

    def row(self, fault: str, what: str, times: int, lost: list[str], note: str = "") -> None:
        text = "; ".join(lost).replace(str(self.folder), "")[:300] or note
        same = [row for row in self.rows if (row["fault"], row["command"]) == (fault, what) and "mended" not in row]
        self.rows[:] = [row for row in self.rows if row not in same]
        self.rows.append({"fault": fault, "command": what, "times": times, "lost": len(lost), "note": text})
        print(f"{fault:32} {what:10} {times:3} times, {len(lost)} lost {text}", flush=True)
