"""Runs that nobody trained, quick to make: what they hold is known."""

import itertools
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rnngrad.bptt import LayerRecord
from rnngrad.runs import Run
from rnngrad.tracking import Result, Tracker

CELLS, CLIPS, SEEDS = ("rnn", "lstm", "gru"), ("none", "norm", "value"), (0, 1, 2)
LENGTH = 20
CHANCE = 0.1667
DECAY = {"rnn": -0.6, "lstm": -0.1, "gru": -0.05}
"""Decades that the gradient loses at each step back."""


def settings(cell: str, clip: str, seed: int, lr: float = 1e-3) -> dict[str, Any]:
    """A configuration like a real one, with every kind of value."""
    parts: dict[str, dict[str, Any]] = {
        "task": {"name": "adding", "length": LENGTH, "min_length": None},
        "cell": {"name": cell, "hidden_size": 8, "num_layers": 2},
        "clip": {"name": clip} | ({"max_norm": 1.0} if clip == "norm" else {}),
        "optim": {"name": "adam", "lr": lr, "betas": [0.9, 0.999]},
        "trainer": {"stop_when_solved": False, "eval_lengths": [], "clip_audit": ["agc"]},
    }
    if cell == "lstm":
        parts["cell"]["forget_bias"] = 1.0
    return parts | {"seed": seed, "device": "cpu"}


def loss_at(step: int, cell: str, seed: int, lr: float = 1e-3) -> float:
    """The evaluation loss of a run: the tanh RNN stays at chance."""
    speed = {"rnn": 0.0, "lstm": 2.0, "gru": 3.0}[cell] * (1 + seed / 10) * lr / 1e-3
    return CHANCE * float(np.exp(-speed * step / 100))


def make_run(
    path: Path,
    cell: str = "lstm",
    clip: str = "norm",
    seed: int = 0,
    *,
    lr: float = 1e-3,
    steps: int = 100,
    every: int = 10,
    diverges: bool = False,
    measures: bool = True,
) -> Run:
    """Writes a run's files by ``Tracker``; one that diverges does so half way."""
    config = settings(cell, clip, seed, lr)
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    last = steps // 2 if diverges else steps
    with Tracker(path, CHANCE, LENGTH, settings=config) as tracker:
        for step in range(1, last + 1):
            norm = 2.0 + np.sin(step + seed)
            loss = np.nan if diverges and step == last else loss_at(step, cell, seed, lr)
            coefficient = min(1.0, 1 / norm) if clip != "none" else 1.0
            tracker.updated(loss, norm, coefficient)
            if step != 1 and step % every:
                continue
            row = {
                "step": step,
                "loss": loss,
                "accuracy": 0.5,
                "grad_norm_pre": norm,
                "grad_norm_post": min(norm, 1.0) if clip != "none" else norm,
                "clip_coef": coefficient,
                "clipped": int(clip != "none"),
                "skipped": 0,
                "lr": lr,
            }
            if not np.isnan(loss):
                row |= {"eval_loss": loss, "eval_accuracy": 0.5}
            if measures and not np.isnan(loss):
                tracker.measured(step, quantities(cell))
            tracker.recorded(step, {} if np.isnan(loss) else records(cell))
            tracker.log(row)
        final = loss_at(last, cell, seed, lr)
        result = Result(
            status="diverged" if diverges else "completed",
            steps=last - diverges,  # the update is not made
            loss=np.nan if diverges else final,
            eval_loss=final,
            eval_accuracy=0.5,
            solved_at=last if final < 0.03 and not diverges else None,
            clip_fraction=0.5,
            reason=f"step {last}: the loss is nan" if diverges else None,
        )
        tracker.finish(result)
        tracker.diagnosed(diagnosis(cell))
    return Run(path)


def records(cell: str) -> dict[str, LayerRecord]:
    """Two layers' gradients, which decay at the cell's pace."""
    lag = torch.arange(LENGTH - 1, -1, -1, dtype=torch.float64)
    norm = (10 ** (DECAY[cell] * lag)).unsqueeze(1).expand(LENGTH, 4)
    both = {"hidden_norm": norm, "cell_norm": norm if cell == "lstm" else None}
    return {f"rnn.l{n}": LayerRecord(direct_norm=norm * 0, **both) for n in (0, 1)}


def quantities(cell: str) -> dict[str, Any]:
    """What is measured of them."""
    lag, even = DECAY[cell] * np.arange(LENGTH), np.full(LENGTH, 1 / LENGTH)
    found: dict[str, Any] = {"clip/cosine": 0.9, "input_norm": lag[::-1]}
    for layer in ("l0", "l1"):
        found |= {
            f"{layer}/lag": lag,
            f"{layer}/weight_norm": lag[::-1],
            f"{layer}/attribution": even,
            f"{layer}/saturated": 0.25,
            f"{layer}/dead": np.nan,
            f"parameter/rnn.weight_hh_{layer}/norm": 3.0,
            f"parameter/rnn.weight_hh_{layer}/grad_norm": 0.1,
            f"parameter/rnn.weight_hh_{layer}/update_norm": 3e-3,
            f"parameter/rnn.bias_hh_{layer}/norm": 4.0,
            f"parameter/rnn.bias_hh_{layer}/grad_norm": 0.2,
            f"parameter/rnn.bias_hh_{layer}/update_norm": 4e-3,
        }
        gates = {"rnn": [""], "lstm": ["/i", "/f", "/g", "/o"], "gru": ["/r", "/z", "/n"]}[cell]
        found |= {f"{layer}/spectral_radius{gate}": 0.5 + 0.1 * k for k, gate in enumerate(gates)}
        for gate in gates if cell != "rnn" else []:
            found |= {f"{layer}/gate_low{gate}": 0.1, f"{layer}/gate_high{gate}": 0.2}
    return found


def diagnosis(cell: str) -> dict[str, Any]:
    """A verdict with one finding of each level."""
    sick = cell == "rnn"
    finding: dict[str, Any] = {
        "symptom": "vanishing in time",
        "level": "alarm" if sick else "ok",
        "value": 10 ** (DECAY[cell] * (LENGTH - 1)),
        "threshold": 2.0**-24,
        "evidence": "|dL/dh_1| beside |dL/dh_T| in l1",
        "steps": [1, 10],
        "remedies": ["cell=lstm", "init.recurrent=orthogonal"] if sick else [],
    }
    unknown = finding | {"symptom": "stall", "level": "unknown", "value": None, "remedies": []}
    return {"verdict": "vanishing" if sick else "healthy", "findings": [finding, unknown]}


def make_sweep(directory: Path) -> list[Run]:
    """3 cells x 3 clip rules x 3 seeds; one seed of the unclipped tanh RNN diverges."""
    return [
        make_run(
            directory / f"adding_{cell}_{clip}_s{seed}",
            cell,
            clip,
            seed,
            diverges=(cell, clip, seed) == ("rnn", "none", 1),
        )
        for cell, clip, seed in itertools.product(CELLS, CLIPS, SEEDS)
    ]


def make_large_sweep(directory: Path) -> Iterator[Run]:
    """300 short runs: the three cells at ten learning rates, ten seeds each."""
    rates = [float(f"{rate:.2g}") for rate in np.logspace(-4, -2, 10)]
    for index, (cell, lr, seed) in enumerate(itertools.product(CELLS, rates, range(10))):
        diverges = lr > 5e-3 and seed % 2 == 1 and cell == "rnn"
        yield make_run(
            directory / f"adding_{cell}_norm_s{seed}-{index:08x}",
            cell,
            seed=seed,
            lr=lr,
            steps=50,
            diverges=diverges,
            measures=seed == 0,
        )


@contextmanager
def tensorboard(logdir: Path, runs: int) -> Iterator[str]:
    """TensorBoard's address, on a port of its own, once it has read so many runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = iter(process.stderr.readline, "")
        found = (re.search(r"at (http://127\.0\.0\.1:\d+/)", line) for line in said)
        address = next(match[1] for match in found if match)
        deadline = time.monotonic() + 300
        while len(fetch(address, "data/runs")) < runs and time.monotonic() < deadline:
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate()


def fetch(address: str, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
    """What one of TensorBoard's JSON endpoints answers."""
    url = f"{address}{path}?{urllib.parse.urlencode(query)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
