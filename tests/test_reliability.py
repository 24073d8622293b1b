"""The table of docs/reliability.md, and those of its rows that have no better place."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS
from rnngrad.diagnosis import diagnose_run
from rnngrad.dynamics import decay
from rnngrad.init import INITS
from rnngrad.measure import MEASURES, Dynamics, Observer
from rnngrad.model import SequenceModel, build_model
from rnngrad.nn import GRU, LSTM, RNN, unroll
from rnngrad.norms import log10_rms
from rnngrad.parts import InputError
from rnngrad.runs import BPTT, METRICS, UPDATES, Run
from rnngrad.runs import MEASURES as MEASURED
from rnngrad.task import TASKS, Batch, Task
from tests.small import small_task
from tests.test_training import Stream, small_run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?:~~)?([A-Z]\d+)(?:~~)? \|(.*)\|$", PAGE, re.M)
COUNTS = {"R": 5, "C": 10, "S": 3, "N": 9, "G": 5, "I": 4, "P": 5, "L": 4}


# --- the page


def test_every_row_is_there_once() -> None:
    expected = [f"{letter}{n}" for letter, count in COUNTS.items() for n in range(1, count + 1)]
    assert [name for name, _ in ROWS] == expected


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE))
    assert len(named) > 50
    there = set()
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        there |= {(file, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert named <= there, named - there


def test_every_row_has_a_test_or_says_why_not() -> None:
    to_be_written = []
    for name, row in ROWS:
        if "to be written" in row:
            to_be_written.append(name)
            continue
        without = re.search(r"~~[^~]+~~:? \w+", row)
        assert "`tests/" in row or without, f"{name}: neither a test nor a reason"
    if to_be_written:
        pytest.skip(f"to be written: {', '.join(to_be_written)}")


# --- R2


def test_equal_commands_in_processes_of_their_own_leave_equal_bits(tmp_path: Path) -> None:
    """Wherever the temporary directory is; and another seed leaves others."""
    arguments = ["cell=lstm", "cell.num_layers=2", "clip=zclip", "clip.warmup_steps=2"]
    arguments += ["measure=full", "task.length=5", "cell.hidden_size=4", "trainer.steps=6"]
    arguments += ["trainer.batch_size=8", "trainer.eval_size=2"]
    arguments += ["hydra.run.dir=one", "hydra.sweep.dir=.", "hydra.sweep.subdir=two-${seed}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "rnngrad", *arguments, *seeds],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seeds, temporary in ((["seed=0"], "/proc/self"), (["-m", "seed=0,1"], "/dev/full"))
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    for file in (METRICS, BPTT, MEASURED, UPDATES, "checkpoint/step-000000006/tensors.safetensors"):
        one, two, other = ((tmp_path / d / file).read_bytes() for d in ("one", "two-0", "two-1"))
        assert one == two, file
        assert one != other, file


# --- N4


def curve(layer: nn.Module, x: Tensor) -> Tensor:
    """``log10`` of the recorded norm by lag, the loss on the last step alone."""
    with record(layer) as tape:
        layer(x)[0][-1].sum().backward()
    return log10_rms(tape["l0"].hidden_norm).flip(0)


def test_what_is_recorded_of_a_vanishing_gradient_ends_where_its_dtype_does() -> None:
    """A default RNN over 400 steps: straight down, where a norm in float32 is 0 from lag 92 on."""
    slopes = []
    for seed in range(10):
        torch.manual_seed(seed)
        layer, x = RNN(7, 64), torch.randn(400, 4, 7)
        single = curve(layer, x)
        double = curve(layer.double(), x.double())
        line = decay(double)
        slopes.append(line.slope)
        assert double.isfinite().all() and double[-1] < -75
        assert line.points == 390 and line.r2 > 0.9999
        held = double > -36  # with all digits of float32, whose least normal number is 1.2e-38
        torch.testing.assert_close(single[held], double[held], rtol=0, atol=1e-5)
        assert single[double > -43].isfinite().all()
        assert double[single == -math.inf].max() < -43.5  # the least of all is 1.4e-45
    assert np.mean(slopes) == pytest.approx(-0.236, abs=0.01)
    assert np.std(slopes) < 0.03  # so much do weights drawn alike differ


@pytest.mark.parametrize(("length", "level"), [(100, "ok"), (400, "warning")])
def test_underflow_is_found_where_the_gradient_leaves_float32_and_not_before(
    length: int, level: str, tmp_path: Path
) -> None:
    task = TASKS.default("adding", length=length)
    part = CELLS.default("rnn", hidden_size=64)
    run, _, _ = small_run(
        tmp_path, task=task, model=build_model(part, task, INITS.default("torch"), 0), steps=1
    )
    (found,) = (f for f in diagnose_run(run).findings if f.symptom == "underflow")
    hidden = run.bptt["l0"].hidden[0]
    assert found.level == level and found.value == (hidden < math.log10(2.0**-126)).mean()
    assert np.isneginf(hidden).any() == (length == 400)


# --- N5


@dataclass(frozen=True)
class Flat(Stream):
    """A loss that nothing changes."""

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return super().training_batch(seed, step, batch_size)._replace(continues=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0 * outputs.sum() + 1


def small_model(task: Task, cell: str = "rnn", hidden: int = 5) -> SequenceModel:
    part = CELLS.default(cell, hidden_size=hidden if task.reads_out else task.output_size)
    return build_model(part, task, INITS.default("torch"), 0)


@pytest.mark.parametrize("clip", sorted(CLIPS.load()))
def test_a_run_without_any_gradient_stays_where_it_is(clip: str, tmp_path: Path) -> None:
    before = small_model(Flat()).state_dict()
    run, result, model = small_run(tmp_path, task=Flat(), clip=clip, log_every=1)
    assert result.status == "completed" and result.clip_fraction == result.skip_fraction == 0
    metrics = run.metrics
    assert (metrics["clip_coef"] == 1).all() and (metrics["loss"] == 1).all()
    assert not metrics["grad_norm_pre"].any() and not metrics["grad_norm_post"].any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_of_a_gradient_that_is_0_no_share_is_a_number(tmp_path: Path) -> None:
    """Not 0 / 0, which warns; null in JSON."""
    chosen = MEASURES.default("full", when="logged")
    assert isinstance(chosen, Dynamics)
    model = small_model(Flat())
    run, result, _ = small_run(
        tmp_path,
        task=Flat(),
        model=model,
        observer=Observer(chosen, model, Flat().time_steps),
        audit={name: CLIPS.default(name) for name in CLIPS.load()},
        columns=[f"audit_{n}_{what}" for n in CLIPS for what in ("clipped", "coef")],
        batch_size=8,
    )
    measures = run.measures
    for name in ("l0/attribution", "clip_effect/norm", "clip/cosine", "l0/lag"):
        assert np.isnan(measures[name]).all(), name
    assert (measures["noise/signal"] == 0).all() and (measures["noise/variance"] == 0).all()
    assert np.isneginf(measures["l0/weight_norm"]).all()
    text = (tmp_path / "summary.json").read_text()
    audit = json.loads(text, parse_constant=pytest.fail)["clip_audit"]
    assert audit == {n: {"clip_fraction": 0.0, "mean_coef": None} for n in CLIPS}
    (underflow,) = (f for f in diagnose_run(run).findings if f.symptom == "underflow")
    assert underflow.level == "alarm" and result.status == "completed"


@pytest.mark.parametrize("clip", sorted(CLIPS.load()))
def test_frozen_parameters_stay_and_the_others_learn(clip: str, tmp_path: Path) -> None:
    task = small_task("adding")
    model = small_model(task, "lstm")
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.readout.bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run, result, _ = small_run(tmp_path, task=task, model=model, clip=clip)
    assert result.status == "completed" and np.isfinite(run.metrics["grad_norm_post"]).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


# --- N8


@dataclass(frozen=True)
class Breakthrough(Stream):
    """Loss and gradient vary by a hundredth, and from step 81 on are ``jump`` times as large."""

    jump: float = 1.0

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = super().training_batch(seed, step, batch_size)
        size = (1 + 0.01 * math.sin(step)) * (1 if step <= 80 else self.jump)
        return Batch(torch.ones_like(batch.inputs), torch.full_like(batch.targets, size))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs + 10) * targets).mean()


@pytest.mark.parametrize("clip", sorted(CLIPS.load()))
@pytest.mark.parametrize("jump", [0.85, 1e-6])
def test_a_breakthrough_is_a_step_like_any_other(jump: float, clip: str, tmp_path: Path) -> None:
    """15 and 100 % down at once, where a deviation is 0.7 %."""
    run, result, _ = small_run(
        tmp_path,
        task=Breakthrough(jump=jump),
        clip=clip,
        optim="sgd",
        lr=1e-9,
        steps=84,
        log_every=1000,
        eval_every=1000,
    )
    assert result.status == "completed" and result.skip_fraction == 0
    assert run.updates["loss"][80] < run.updates["loss"][:80].mean() * (jump + 0.02)
    assert (run.updates["clip_coef"][80:] > 0).all()


def test_a_jump_up_is_skipped_by_the_rule_that_skips(tmp_path: Path) -> None:
    task = Breakthrough(jump=1e3)
    result = small_run(tmp_path, task=task, clip="spike_skip", optim="sgd", lr=1e-9, steps=81)[1]
    assert result.skip_fraction == 1 / 81


# --- N9


def shortest(name: str) -> Task:
    """A task at the least length that it takes."""
    for length in range(1, 20):
        try:
            return small_task(name, length=length)
        except InputError as error:
            if "no such key" in str(error):
                break
    return small_task(name)


SMALLEST = [(task, "rnn") for task in sorted(TASKS.load())]
SMALLEST += [("parity", cell) for cell in sorted(CELLS.load())]


@pytest.mark.parametrize(("task", "cell"), SMALLEST)
def test_one_sequence_of_the_least_length_and_one_unit_train(
    task: str, cell: str, tmp_path: Path
) -> None:
    made = shortest(task)
    batch = 2 if cell.startswith("bn_") else 1  # which has no variance of one, and says so
    run, result, _ = small_run(
        tmp_path,
        task=made,
        model=small_model(made, cell, hidden=1),
        batch_size=batch,
        eval_size=1,
        steps=3,
        log_every=1,
    )
    assert result.status == "completed" and math.isfinite(run.summary["eval_loss"])
    for column in ("loss", "accuracy", "grad_norm_pre", "grad_norm_post", "clip_coef"):
        assert np.isfinite(run.metrics[column]).all(), column
    assert not np.isnan(run.bptt["l0"].hidden).any()


@dataclass(frozen=True)
class Masked(Stream):
    """Classes of which none is asked for."""

    output_size: ClassVar[int] = 3

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        inputs, targets, _ = super().training_batch(seed, step, batch_size)
        return Batch(inputs, torch.full(targets.shape[:2], -1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), ignore_index=-1
        )

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(())


def test_a_mean_over_nothing_ends_a_run_before_its_update(tmp_path: Path) -> None:
    before = small_model(Masked()).state_dict()
    _, result, model = small_run(tmp_path, task=Masked())
    assert result.status == "diverged" and result.steps == 0
    assert result.reason == "step 1: the loss is nan while every output is finite"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [RNN, LSTM, GRU])
def test_no_sequences_have_no_gradient_and_no_steps_are_refused(make: Any) -> None:
    layer = make(3, 4)
    with record(layer) as tape:
        output, _ = layer(torch.zeros(5, 0, 3))
        output.sum().backward()
    assert output.shape == (5, 0, 4) and tape["l0"].hidden_norm.shape == (5, 0)
    assert not any(parameter.grad.any() for parameter in layer.parameters())
    with pytest.raises(RuntimeError, match="larger than 0"):
        layer(torch.zeros(0, 2, 3))
    with pytest.raises(RuntimeError, match="greater than 0"):
        layer(pack_padded_sequence(torch.zeros(5, 2, 3), [5, 0]))
    with pytest.raises(ValueError, match="x has no time steps"):
        unroll(nn.LSTMCell(3, 4), torch.zeros(0, 2, 3))


# --- G5


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all the files that a run can have."""
    task = small_task("adding")
    model = small_model(task)
    chosen = MEASURES.default("standard", when="logged", parameters=False)
    assert isinstance(chosen, Dynamics)
    observer = Observer(chosen, model, task.time_steps)
    path = tmp_path_factory.mktemp("measured")
    return small_run(path, task=task, model=model, observer=observer)[0]


def columns(run: Run, file: str) -> dict[str, Any]:
    if file == BPTT:
        layer = run.bptt.get("l0")
        kinds = ("step", "hidden", "direct", "hidden_mean")
        return {} if layer is None else {kind: getattr(layer, kind) for kind in kinds}
    return {METRICS: run.metrics, MEASURED: run.measures, UPDATES: run.updates}[file]


@pytest.mark.parametrize("file", [METRICS, BPTT, MEASURED, UPDATES])
def test_a_file_cut_off_at_any_byte_is_read_to_its_last_whole_line_or_record(
    file: str, measured: Run, tmp_path: Path
) -> None:
    for path in measured.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (measured.path / file).read_bytes()
    whole = columns(measured, file)
    count = len(whole["step"])
    if file == METRICS:
        ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")][1:]
    else:
        ends = [len(data) * (number + 1) // count for number in range(count)]
    assert len(ends) == count >= 5 and ends[-1] == len(data)
    for size in range(len(data) - 1, -1, -1):
        os.truncate(tmp_path / file, size)
        there = sum(end <= size for end in ends)
        found = columns(Run(tmp_path), file)
        assert len(found["step"] if found else []) == there, size
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name][:there])
