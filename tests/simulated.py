"""A sweep's directory as it is when all runs have ended, in minutes where training takes days.

    python -m tests.simulated DIR COUNT

trains one small run a cell and copies it COUNT times: seed, learning rate and threshold, the names
that follow from them and how each run ended are every copy's own. What stands in the large files
is not: copies share them, as one file under many names.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rnngrad.config import Experiment, experiment
from rnngrad.runs import CONFIG, SUMMARY, read_config

CELLS = ("rnn", "lstm")
SEEDS = 10
THRESHOLDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
ALIKE = (
    *("task=adding", "task.length=20", "cell.hidden_size=8"),
    *("trainer.steps=200", "trainer.batch_size=8", "trainer.eval_every=50", "trainer.eval_size=64"),
)
"""What all runs are told."""

LINKS = 10_000
"""Names of one file; file systems end at 65,000."""
OWN = (CONFIG, SUMMARY, ".hydra/overrides.yaml")
"""Files that each copy has for itself."""


def rates(count: int) -> list[float]:
    """Learning rates over three decades, as many as ``count`` runs need."""
    number = math.ceil(count / (len(CELLS) * SEEDS * len(THRESHOLDS)))
    return [float(f"{10 ** (-4 + 3 * i / number):.4g}") for i in range(number)]


def command(directory: Path, count: int) -> list[str]:
    """The overrides of the sweep; its grid has ``count`` runs where that is a multiple of 200."""
    return [
        *("-m", f"hydra.sweep.dir={directory}", *ALIKE),
        f"optim.lr={','.join(map(str, rates(count)))}",
        f"clip.max_norm={','.join(map(str, THRESHOLDS))}",
        f"cell={','.join(CELLS)}",
        f"seed=range({SEEDS})",
    ]


def simulate(directory: Path, count: int) -> None:
    """Makes the directory of a sweep whose first ``count`` runs have ended."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        originals = {cell: Original.trained(Path(folder), cell) for cell in CELLS}
        grid = itertools.product(rates(count), THRESHOLDS, CELLS, range(SEEDS))
        for rate, threshold, cell, seed in itertools.islice(grid, count):
            originals[cell].leave(directory, rate, threshold, seed)


@dataclass
class Original:
    """A run that was trained, and how many times it has been copied."""

    path: Path
    settings: dict[str, Any]
    names: Mapping[str, str]
    config: str
    summary: dict[str, Any]
    folders: dict[str, list[str]]
    copies: int = 0

    @classmethod
    def trained(cls, folder: Path, cell: str) -> Original:
        """Trains it."""
        path = folder / cell
        overrides = [*ALIKE, f"cell={cell}", f"hydra.run.dir={path}"]
        subprocess.run([sys.executable, "-m", "rnngrad", *overrides], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        folders = {
            os.path.relpath(inner, path): [
                name
                for name in names
                if os.path.relpath(os.path.join(inner, name), path) not in OWN
            ]
            for inner, _, names in os.walk(path)
        }
        spec = experiment(read_config(path / CONFIG))
        return cls(
            path,
            spec.settings,
            spec.names,
            (path / CONFIG).read_text(),
            json.loads((path / SUMMARY).read_text()),
            folders,
        )

    def leave(self, directory: Path, rate: float, threshold: float, seed: int) -> None:
        """Makes a copy in a sweep's directory, under the name that such a run has."""
        target = directory / self._name(rate, threshold, seed)
        self.copies += 1
        if self.copies % LINKS == 0:
            self.path = Path(shutil.copytree(self.path, self.path.with_name(target.name)))
        for inner, names in self.folders.items():
            os.mkdir(target / inner)
            for name in names:
                os.link(f"{self.path}/{inner}/{name}", f"{target}/{inner}/{name}")
        config = self.config
        for key, value in (("lr", rate), ("max_norm", threshold), ("seed", seed)):
            config = re.sub(rf"^( *{key}): .*$", rf"\1: {value}", config, count=1, flags=re.M)
        cell = self.names["cell"]
        told = (f"optim.lr={rate}", f"clip.max_norm={threshold}", f"cell={cell}", f"seed={seed}")
        overrides = "".join(f"- {override}\n" for override in (*ALIKE, *told))
        summary = self.summary | _ending(cell, rate, seed, threshold)
        texts = (config, json.dumps(summary), overrides)
        for name, text in zip(OWN, texts, strict=True):
            (target / name).write_text(text)

    def _name(self, rate: float, threshold: float, seed: int) -> str:
        """As of an ``Experiment``, which would check all of it again and take 10 ms."""
        changed = {"optim": {"lr": rate}, "clip": {"max_norm": threshold}}
        settings = self.settings | {g: self.settings[g] | own for g, own in changed.items()}
        run = SimpleNamespace(
            settings=settings | {"seed": seed}, names=self.names, general=SimpleNamespace(seed=seed)
        )
        name: str = Experiment.run_name.fget(run)  # type: ignore[attr-defined]
        return name


def _ending(cell: str, rate: float, seed: int, threshold: float) -> dict[str, Any]:
    """How a run might have ended: the LSTM learns best at some rate, a large step diverges."""
    draw = random.Random(f"{cell} {rate} {seed} {threshold}")
    if draw.random() < 0.1 * (rate > 0.03) * (threshold > 5):
        reason = "loss is nan"
        return {"status": "diverged", "steps": draw.randrange(50, 200), "eval_loss": None,
                "solved_at": None, "verdict": "numerically broken", "reason": reason}  # fmt: skip
    far = abs(math.log10(rate) + 2) + (1 if cell == "rnn" else 0)
    loss = 0.167 * 10 ** (min(0.0, far - 1.5) + draw.gauss(0, 0.1))
    solved = loss < 0.02
    return {
        "loss": loss * draw.uniform(0.8, 1.2),
        "eval_loss": loss,
        "solved_at": draw.randrange(50, 201, 50) if solved else None,
        "clip_fraction": round(draw.random() / (1 + threshold), 3),
        "verdict": "healthy" if solved else "vanishing" if cell == "rnn" else "inconclusive",
    }


def main(arguments: list[str]) -> None:
    """Makes the directory; says how to issue its sweep again."""
    directory, count = Path(arguments[0]).absolute(), int(arguments[1])
    directory.mkdir(parents=True)
    simulate(directory, count)
    print(f"rnngrad {' '.join(command(directory, count))}")


if __name__ == "__main__":
    main(sys.argv[1:])
