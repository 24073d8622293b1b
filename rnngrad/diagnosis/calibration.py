"""Runs made to show each symptom, and how many of them get the verdict that was written down.

``python -m rnngrad.diagnosis.calibration docs/diagnosis.md`` runs them all and renews the tables of
that page, in about ten minutes on two cores. The verdicts stood here before any threshold was
tuned, and
tuning looked at the seeds of ``TUNING`` alone; the page shows those of ``JUDGING``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rnngrad.cells import CELLS
from rnngrad.diagnosis.before_training import diagnose
from rnngrad.diagnosis.detectors import DETECTORS
from rnngrad.diagnosis.findings import Diagnosis, Verdict
from rnngrad.diagnosis.from_run import diagnose_run
from rnngrad.init import INITS
from rnngrad.initial import gaussian
from rnngrad.runs import Run, find_runs

TUNING = (*range(100, 110), *range(10))
"""Seeds 0 to 9 judged a first time; what they showed was mended, and so they judge no more."""
JUDGING = range(10, 20)

SMALL = (
    "cell.hidden_size=32 trainer.batch_size=32 trainer.eval_size=500 trainer.eval_every=50 "
    "trainer.log_every=20 trainer.stop_when_solved=true"
)
"""What the runs have in common."""


@dataclass(frozen=True)
class Case:
    """One set-up, run with every seed.

    Args:
        name: What it is.
        verdict: What a person who knows how it was made would say of it.
        overrides: The command line.
        shows: Symptoms that it was made to show.
        solves: Whether its runs are meant to solve the task.
    """

    name: str
    verdict: Verdict
    overrides: str
    shows: tuple[str, ...] = ()
    solves: bool = False


CASES = (
    # healthy: they solve the task within the budget
    Case(
        "LSTM, adding",
        "healthy",
        "task=adding task.length=30 cell=lstm optim.lr=0.01 trainer.steps=1200",
        solves=True,
    ),
    Case(
        "GRU, temporal order",
        "healthy",
        "task=temporal_order task.length=30 cell=gru optim.lr=0.01 trainer.steps=800",
        solves=True,
    ),
    Case(
        "tanh RNN, parity at every step",
        "healthy",
        "task=parity task.length=10 task.scored=every cell=rnn optim.lr=0.01 trainer.steps=1000",
        solves=True,
    ),
    Case(
        "LSTM by momentum, temporal order",
        "healthy",
        "task=temporal_order task.length=20 cell=lstm optim=sgd optim.lr=0.5 optim.momentum=0.9 "
        "trainer.steps=800",
        solves=True,
    ),
    Case(
        "GRU without clipping, adding",
        "healthy",
        "task=adding task.length=40 cell=gru optim.lr=0.01 clip=none trainer.steps=1000",
        solves=True,
    ),
    # healthy: they learn, and the budget ends first
    Case(
        "GRU, selective copying",
        "healthy",
        "task=selective_copying task.length=20 task.n_tokens=4 task.vocabulary=8 cell=gru "
        "optim.lr=0.01 trainer.steps=800",
    ),
    Case(
        "orthogonal tanh RNN, temporal order",
        "healthy",
        "task=temporal_order task.length=50 cell=rnn init.recurrent=orthogonal trainer.steps=600",
    ),
    Case(
        "LSTM, characters, truncated",
        "healthy",
        "task=chars task.path=TEXT task.length=50 cell=lstm optim.lr=0.005 trainer.tbptt_k2=10 "
        "trainer.steps=300",
    ),
    Case(
        "orthogonal RNN, adding",
        "healthy",
        "task=adding task.length=30 cell=orthogonal optim.lr=0.005 trainer.steps=500",
    ),
    Case(
        "GRU, characters",
        "healthy",
        "task=chars task.path=TEXT task.length=50 cell=gru optim.lr=0.005 trainer.steps=300",
    ),
    Case(
        "LSTM of 3 layers, temporal order",
        "healthy",
        "task=temporal_order task.length=20 cell=lstm cell.num_layers=3 optim.lr=0.005 "
        "trainer.steps=400",
        solves=True,
    ),
    # healthy, but for a threshold that does too much or nothing
    Case(
        "clipped at every update",
        "healthy",
        "task=temporal_order task.length=20 cell=gru optim.lr=0.01 clip.max_norm=1e-4 "
        "trainer.steps=400",
        shows=("clip regime",),
        solves=True,
    ),
    Case(
        "clipped never",
        "healthy",
        "task=temporal_order task.length=20 cell=gru optim.lr=0.01 clip.max_norm=1e4 "
        "trainer.steps=400",
        shows=("clip regime",),
        solves=True,
    ),
    # vanishing
    Case(
        "tanh RNN, adding, T = 100",
        "vanishing",
        "task=adding task.length=100 cell=rnn trainer.steps=400",
        shows=("vanishing in time", "at chance", "stalled"),
    ),
    Case(
        "sigmoid RNN, temporal order, T = 50",
        "vanishing",
        "task=temporal_order task.length=50 cell=rnn cell.nonlinearity=sigmoid trainer.steps=400",
        shows=("vanishing in time", "at chance", "stalled"),
    ),
    Case(
        "tanh RNN, copy, a loss at every step",
        "vanishing",
        "task=copy task.length=60 cell=rnn optim.lr=0.003 trainer.steps=600",
        shows=("vanishing in time", "at chance"),
    ),
    Case(
        "LSTM that forgets",
        "vanishing",
        "task=adding task.length=60 cell=lstm cell.forget_bias=-3 trainer.steps=400",
        shows=("vanishing in time", "at chance", "stalled"),
    ),
    Case(
        "LSTM as torch.nn's, temporal order",
        "vanishing",
        "task=temporal_order task.length=40 cell=lstm cell.forget_bias=null optim.lr=0.01 "
        "trainer.steps=800",
        shows=("vanishing in time", "at chance", "stalled"),
    ),
    Case(
        "sigmoid RNN of 5 layers",
        "vanishing",
        "task=parity task.length=20 cell=rnn cell.nonlinearity=sigmoid cell.num_layers=5 optim=sgd "
        "optim.lr=0.1 trainer.steps=400",
        shows=("lower layers barely learn", "at chance", "stalled"),
    ),
    Case(
        "weight decay alone moves the weights",
        "vanishing",
        "task=adding task.length=60 cell=rnn optim=sgd optim.lr=0.01 optim.weight_decay=1 "
        "trainer.steps=400",
        shows=("weights shrink by decay alone", "vanishing in time"),
    ),
    # exploding
    Case(
        "orthogonal x 2, tanh",
        "exploding",
        "task=adding task.length=60 cell=rnn init.recurrent=orthogonal init.recurrent_scale=2 "
        "optim.lr=1e-4 clip=none trainer.steps=300",
        shows=("exploding in time",),
    ),
    Case(
        "identity x 1.3, ReLU",
        "exploding",
        "task=adding task.length=60 cell=rnn cell.nonlinearity=relu init.recurrent=identity "
        "init.recurrent_scale=1.3 optim=sgd optim.lr=1e-3 clip=none trainer.steps=300",
        shows=("exploding in time", "jumps", "loss not finite"),
    ),
    Case(
        "orthogonal x 1.1, linear",
        "exploding",
        "task=adding task.length=80 cell=rnn cell.nonlinearity=linear init.recurrent=orthogonal "
        "init.recurrent_scale=1.1 optim=sgd optim.lr=1e-3 clip=none trainer.steps=300",
        shows=("exploding in time", "loss not finite"),
    ),
    Case(
        "learning rate 1000 times too high",
        "exploding",
        "task=adding task.length=30 cell=lstm optim.lr=10 trainer.steps=300",
        shows=("jumps",),
    ),
    Case(
        "a step beyond float32",
        "exploding",
        "task=adding task.length=30 cell=lstm optim=sgd optim.lr=1e45 clip=none trainer.steps=300",
        shows=("jumps", "weights not finite", "loss not finite"),
    ),
    # both
    Case(
        "every other sequence 100 times too loud",
        "both",
        "task=disturbed task.fault=uneven task.length=60 cell=rnn init.recurrent=orthogonal "
        "init.recurrent_scale=2 optim.lr=1e-4 clip=none trainer.steps=300",
        shows=("both at once",),
    ),
    # numerical
    Case(
        "NaN in the data",
        "numerical",
        "task=disturbed task.fault=broken task.length=30 cell=lstm trainer.steps=300",
        shows=("loss not finite",),
    ),
    Case(
        "a loss under float32's range",
        "numerical",
        "task=disturbed task.fault=faint task.length=30 cell=lstm trainer.steps=300",
        shows=("underflow", "at chance", "stalled"),
    ),
    Case(
        "read-out of 1e12",
        "numerical",
        "task=adding task.length=30 cell=lstm init.output=normal init.output_scale=1e12 "
        "trainer.steps=300",
        shows=("overflow",),
    ),
    Case(
        "input weights of 1e30, ReLU",
        "numerical",
        "task=adding task.length=30 cell=rnn cell.nonlinearity=relu init.input=normal "
        "init.input_scale=1e30 trainer.steps=300",
        shows=("loss not finite",),
    ),
    # saturated
    Case(
        "tanh RNN, input weights of 30",
        "saturated",
        "task=temporal_order task.length=40 cell=rnn init.input=normal init.input_scale=30 "
        "trainer.steps=400",
        shows=("saturation", "at chance"),
    ),
    Case(
        "ReLU RNN, biases of -3",
        "saturated",
        "task=adding task.length=40 cell=rnn cell.nonlinearity=relu init=biased init.bias=-3 "
        "trainer.steps=400",
        shows=("dead units", "at chance", "stalled"),
    ),
    Case(
        "LSTM, output gates shut",
        "saturated",
        "task=adding task.length=40 cell=lstm init=biased init.bias=-12 init.block=3 "
        "trainer.steps=400",
        shows=("shut gates", "at chance"),
    ),
    # nothing is wrong with the gradient, and nothing is learnt
    Case(
        "learning rate 10,000 times too low",
        "inconclusive",
        "task=adding task.length=20 cell=lstm optim=sgd optim.lr=1e-6 trainer.steps=400",
        shows=("stalled", "at chance"),
    ),
    Case(
        "IRNN, adding, a budget too small",
        "inconclusive",
        "task=adding task.length=30 cell=rnn cell.nonlinearity=relu init=irnn clip.max_norm=10 "
        "trainer.steps=800",
    ),
)


@dataclass(frozen=True)
class Untrained:
    """One model, looked at before training, with every seed: no run, ``diagnose`` alone.

    Normal input of 7 values, 64 units, batch 16, loss on the last state.

    Args:
        name: What it is.
        verdict: What the slope of its gradient says.
        cell: Name of the cell.
        cell_changes: What of the cell is not its default.
        init_changes: What of ``init=torch`` is changed.
        time_steps: ``T``.
    """

    name: str
    verdict: Verdict
    cell: str
    cell_changes: dict[str, Any]
    init_changes: dict[str, Any]
    time_steps: int = 400


def _orthogonal(scale: float) -> dict[str, Any]:
    return {"recurrent": "orthogonal", "recurrent_scale": scale}


UNTRAINED = (
    Untrained("RNN as torch.nn's", "vanishing", "rnn", {}, {}),
    Untrained("RNN, orthogonal x 0.9", "vanishing", "rnn", {}, _orthogonal(0.9)),
    Untrained("RNN, orthogonal", "vanishing", "rnn", {}, _orthogonal(1.0)),
    Untrained("RNN, orthogonal x 1.1", "vanishing", "rnn", {}, _orthogonal(1.1)),
    Untrained("RNN, orthogonal x 1.5", "exploding", "rnn", {}, _orthogonal(1.5)),
    Untrained("LSTM as torch.nn's", "vanishing", "lstm", {"forget_bias": None}, {}),
    Untrained("LSTM, forget bias 1", "vanishing", "lstm", {}, {}),
    Untrained("LSTM, chrono", "healthy", "lstm", {"chrono_length": 400}, {}),
    Untrained("GRU as torch.nn's", "vanishing", "gru", {}, {}),
    Untrained("GRU, chrono", "healthy", "gru", {"chrono_length": 400}, {}),
    Untrained("linear, 0.9 Q", "vanishing", "rnn", {"nonlinearity": "linear"}, _orthogonal(0.9)),
    Untrained("linear, Q", "healthy", "rnn", {"nonlinearity": "linear"}, _orthogonal(1.0)),
    Untrained("linear, 1.05 Q", "exploding", "rnn", {"nonlinearity": "linear"}, _orthogonal(1.05)),
    Untrained("orthogonal, modReLU", "healthy", "orthogonal", {}, {}),
    Untrained("sigmoid RNN", "vanishing", "rnn", {"nonlinearity": "sigmoid"}, {}),
)


class Judged(NamedTuple):
    """One run, or one untrained model, and what was said of it.

    Args:
        case: Its name.
        seed: Its seed.
        expected: The verdict that was written down.
        diagnosis: What came out.
        solved: Whether the run solved its task.
        learnt: Whether it did, or ended at least 10 % under chance; an untrained model has nothing
            to learn.
    """

    case: str
    seed: int
    expected: Verdict
    diagnosis: Diagnosis
    solved: bool = False
    learnt: bool = True

    @property
    def right(self) -> bool:
        """Whether the verdict is that which was written down."""
        return self.diagnosis.verdict == self.expected


def train_case(case: Case, seeds: Sequence[int], folder: Path) -> list[Judged]:
    """Trains one set-up with every seed by the command line, in a process of its own.

    Raises:
        RuntimeError: The command was refused.
    """
    runs = folder / re.sub(r"\W+", "_", case.name)
    write_plugin(folder)
    arguments = [
        *SMALL.split(),
        *case.overrides.replace("TEXT", str(write_text(folder))).split(),
        "-m",
        f"seed={','.join(map(str, seeds))}",
        f"hydra.sweep.dir={runs}",
        "plugins=[rnngrad.diagnosis.disturbed]",
        "--config-dir",
        str(folder / "conf"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = [Run(path) for path in find_runs(runs)] if runs.exists() else []
    found = [run for run in found if run.config["seed"] in seeds]
    if not found:
        raise RuntimeError(f"{case.name}: {done.stderr.strip()}")
    return [judge(case, run) for run in found]


def judge(case: Case, run: Run) -> Judged:
    """What the diagnosis of one of the case's runs is."""
    summary = run.summary
    solved = summary["solved_at"] is not None
    last, chance = summary["eval_loss"], summary["chance_loss"]
    learnt = summary["status"] == "completed" and last is not None and last < 0.9 * chance
    seed = run.config["seed"]
    return Judged(case.name, seed, case.verdict, diagnose_run(run), solved, learnt)


def write_plugin(folder: Path) -> None:
    """Yamls for ``rnngrad.diagnosis.disturbed``, for the option ``--config-dir``."""
    for group, name, text in (
        ("task", "disturbed", "name: disturbed\nlength: 30\nfault: broken\n"),
        ("init", "biased", "name: biased\nbias: 0.0\nblock: 0\n"),
    ):
        (folder / "conf" / group).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / group / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_text(folder: Path) -> Path:
    """A text to learn characters from: the sources of this package."""
    path = folder / "text.txt"
    if not path.exists():
        sources = sorted(Path(__file__).parent.glob("*.py"))
        path.write_text("".join(source.read_text(encoding="utf-8") for source in sources), "utf-8")
    return path


class _LastState(nn.Module):
    """Layers, of which the last state of the top one comes out."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.rnn(x)[0]
        return hidden[-1]


def examine_untrained(case: Untrained, seed: int) -> Judged:
    """What ``diagnose`` says of one model."""
    cell = CELLS.default(case.cell, hidden_size=64, **case.cell_changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn = cell.layers(7)
        INITS.default("torch", **case.init_changes)(rnn)
        cell.adjust_(rnn)
    x = gaussian(case.time_steps, seed=seed).float()
    found = diagnose(_LastState(rnn), (x, None), lambda hidden, _: hidden.sum())
    return Judged(case.name, seed, case.verdict, found)


def calibrate(
    seeds: Sequence[int], folder: Path, cases: Sequence[Case] = CASES, workers: int = 2
) -> list[Judged]:
    """All runs and all untrained models with all seeds, in the order of the cases."""
    with ThreadPoolExecutor(workers) as pool:  # of processes that are waited for
        jobs = [pool.submit(train_case, case, seeds, folder) for case in cases]
        trained = [job.result() for job in tqdm(jobs, desc="calibration", disable=None)]
    untrained = [examine_untrained(case, seed) for case in UNTRAINED for seed in seeds]
    return [judged for found in trained for judged in found] + untrained


VERDICTS = get_args(Verdict)
START, END = "<!-- calibration: start -->", "<!-- calibration: end -->"
"""What ``main`` writes stands between these lines of the page."""


def tables(judged: Sequence[Judged], cases: Sequence[Case] = CASES) -> str:
    """The confusion table, case by case, and what was found of each symptom, in Markdown."""
    names = {case.name for case in cases}
    runs = [found for found in judged if found.case in names]
    untrained = [found for found in judged if found.case not in names]
    lines = [*_confusion("Runs", runs), *_confusion("Models before training", untrained)]
    lines += ["### Case by case", "", "| made as | verdict written down | right | else |"]
    lines += ["|---|---|---|---|", *_by_case(judged), ""]
    return "\n".join([*lines, *_by_symptom(runs, cases)]) + "\n"


def _confusion(title: str, judged: Sequence[Judged]) -> Iterator[str]:
    right = sum(found.right for found in judged)
    healthy = [found for found in judged if found.expected == "healthy"]
    sick = [found.learnt for found in healthy if found.diagnosis.in_trouble]
    failed = sum(not found.learnt for found in healthy)
    yield f"### {title}"
    yield ""
    yield f"{right} of {len(judged)} verdicts are right ({100 * right / len(judged):.1f} %)."
    yield f"{len(healthy)} were made to be healthy, and {len(healthy) - failed} are: {sum(sick)} of"
    yield f"these are called sick. {failed} did not learn after all; of those"
    yield f"{len(sick) - sum(sick)} are."
    yield "Rows: what was written down; columns: the verdict."
    yield ""
    yield f"| | {' | '.join(VERDICTS)} |"
    yield "|---" * (len(VERDICTS) + 1) + "|"
    for expected in VERDICTS:
        row = [found.diagnosis.verdict for found in judged if found.expected == expected]
        if row:
            counts = (str(row.count(verdict) or "") for verdict in VERDICTS)
            yield f"| **{expected}** | {' | '.join(counts)} |"
    yield ""


def _by_case(judged: Sequence[Judged]) -> Iterator[str]:
    for name in dict.fromkeys(found.case for found in judged):
        found = [one for one in judged if one.case == name]
        wrong = [f"{one.diagnosis.verdict} (seed {one.seed})" for one in found if not one.right]
        solved = sum(one.solved for one in found)
        note = f", {solved} solved" if solved else ""
        right = f"{len(found) - len(wrong)} of {len(found)}{note}"
        yield f"| {name} | {found[0].expected} | {right} | {', '.join(wrong)} |"


def _by_symptom(runs: Sequence[Judged], cases: Sequence[Case]) -> Iterator[str]:
    yield "### Symptom by symptom"
    yield ""
    yield "A finding is a warning or an alarm."
    yield ""
    yield "| symptom | made to show it | found in these | found in healthy runs | alarms there |"
    yield "|---|---|---|---|---|"
    healthy = [run.diagnosis for run in runs if run.expected == "healthy"]
    for symptom in DETECTORS:
        made = {case.name for case in cases if symptom in case.shows}
        shown = [run.diagnosis[symptom] for run in runs if run.case in made]
        others = [
            run.diagnosis[symptom]
            for run in runs
            if run.expected == "healthy" and run.case not in made
        ]
        counts = (
            len(shown),
            sum(finding.bad for finding in shown),
            f"{sum(finding.bad for finding in others)} of {len(others)}",
            sum(diagnosis[symptom].alarm for diagnosis in healthy),
        )
        yield f"| {symptom} | {' | '.join(map(str, counts))} |"


def main() -> None:
    """Runs the calibration with ``JUDGING``'s seeds and renews the page given as an argument."""
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/diagnosis.md")
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    with tempfile.TemporaryDirectory() as folder:
        written = tables(calibrate(JUDGING, Path(folder)))
    page.write_text(f"{before}{START}\n{written}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
