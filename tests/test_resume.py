"""A run that was interrupted and went on is, bit for bit, the run that was not."""

import itertools
import json
import math
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rnngrad.cells import CELLS, CellPart, RNNCell
from rnngrad.checkpoint import Loaded, _encode, best_step
from rnngrad.clipping import CLIPS, Clip, Gradient, Outcome
from rnngrad.config import experiment
from rnngrad.parts import NothingUsable
from rnngrad.runs import (
    BPTT,
    BPTT_LAYOUT,
    MEASURES,
    MEASURES_LAYOUT,
    METRICS,
    SUMMARY,
    UPDATES,
    Run,
)
from rnngrad.snapshot import _packed, _unpacked
from tests.processes import Processes, differing, processes
from tests.sameness import (
    CONF,
    Uninterrupted,
    _walk,
    command,
    composed,
    differences,
    everything,
    kill_at,
    killed_at_every_moment,
    left,
    read,
    small,
    without_tensorboard,
)

__all__ = ["processes"]

# --- R1: at every step, whatever the run is made of

CELL_NAMES = sorted(CELLS.load())
OPTIM_NAMES = sorted(path.stem for path in CONF.glob("optim/*.yaml"))
CLIP_NAMES = sorted(CLIPS.load())
STATEFUL = [name for name in CLIP_NAMES if CLIPS.default(name).initial_state()]
TRIPLES = list(product(CELL_NAMES, OPTIM_NAMES, STATEFUL))


def pairwise(triples: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """As few as will do for every two parts to meet."""

    def pairs(triple: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {*combinations(triple, 2)}

    missing = set().union(*map(pairs, triples))
    chosen = []
    while missing:
        chosen.append(max(triples, key=lambda triple: len(pairs(triple) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


MET = pairwise(TRIPLES) + [
    (CELL_NAMES[i % len(CELL_NAMES)], OPTIM_NAMES[i % len(OPTIM_NAMES)], clip)
    for i, clip in enumerate(sorted({*CLIP_NAMES} - {*STATEFUL}))
]


@pytest.fixture
def no_board() -> Iterator[None]:
    with without_tensorboard():
        yield


def killed_at_every_step(changes: dict[str, Any], folder: Path) -> dict[int, list[str]]:
    """By the step that a run went on after: in what it then differed from one never killed."""
    whole = Uninterrupted(changes, folder / "whole")
    assert whole.end >= 12
    found = {k: whole.resumed(k, folder / str(k)) for k in range(whole.end)}
    return {step: different for step, different in found.items() if different}


@pytest.mark.parametrize("triple", MET, ids="-".join)
def test_killed_at_any_step_every_cell_optimiser_and_clip_rule_goes_on_bit_for_bit(
    triple: tuple[str, ...], tmp_path: Path, no_board: None
) -> None:
    parts = dict(zip(("cell", "optim", "clip"), triple, strict=True))
    assert killed_at_every_step(small(parts), tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("triple", sorted({*TRIPLES} - {*MET}), ids="-".join)
def test_so_does_every_combination_of_the_three(
    triple: tuple[str, ...], tmp_path: Path, no_board: None
) -> None:
    parts = dict(zip(("cell", "optim", "clip"), triple, strict=True))
    assert killed_at_every_step(small(parts), tmp_path) == {}


LIVELY_RULES = [small({"clip": name}) for name in STATEFUL]
AUDIT = [
    {"name": changes["clip"]}
    | {k.removeprefix("clip."): v for k, v in changes.items() if k.startswith("clip.")}
    for changes in LIVELY_RULES
]
MEASURED = {"measure": "full", "measure.when": "logged", "trainer.clip_audit": AUDIT}
VARIANTS: dict[str, dict[str, Any]] = {
    "evaluated at odd steps and other lengths, penalised, clipped through time": MEASURED
    | {
        "cell": "rnn",
        "regularizer": "omega",
        "bptt_clip": "norm",
        "trainer.eval_every": 3,
        "trainer.log_every": 1,
        "trainer.eval_lengths": [3, 9],
    },
    "truncated, of any length, logged by decades, nothing but normalised": MEASURED
    | {
        "cell": "ln_rnn",
        "task.min_length": 2,
        "trainer.tbptt_k1": 2,
        "trainer.tbptt_k2": 3,
        "trainer.log_per_decade": 7,
    },
    "two layers, a cosine after a warm-up, run again on the way back": MEASURED
    | {
        "cell": "lstm",
        "cell.num_layers": 2,
        "clip": "zclip",
        "optim.schedule": "cosine",
        "optim.warmup_steps": 4,
        "regularizer": "orthogonality",
        "trainer.recompute_segments": 2,
    },
    "two layers with statistics, down on a line": MEASURED
    | {
        "cell": "bn_rnn",
        "cell.num_layers": 2,
        "clip": "spike_skip",
        "optim.schedule": "linear",
        "optim.warmup_steps": 2,
    },
    "ends when it is solved": {
        "task": "cliff",
        "task.length": 2,
        "cell": "rnn",
        "cell.nonlinearity": "sigmoid",
        "cell.hidden_size": 1,
        "optim": "adam",
        "optim.lr": 0.3,
        "trainer.steps": 100,
        "trainer.stop_when_solved": True,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_does_whatever_else_a_run_may_be(variant: str, tmp_path: Path, no_board: None) -> None:
    changes = small(VARIANTS[variant])
    assert killed_at_every_step(changes, tmp_path) == {}
    summary = json.loads((tmp_path / "whole" / "summary.json").read_bytes())
    assert summary["status"] == "completed"
    assert (summary["solved_at"] == summary["steps"] < 100) == ("solved" in variant)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_so_does_a_stream_whose_state_goes_on_from_batch_to_batch(
    cell: str, tmp_path: Path, no_board: None
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog and then " * 4)
    stream = {"task": "chars", "task.path": str(text), "task.length": 6, "task.valid_fraction": 0.3}
    task = experiment(composed(small(stream))).task
    goes_on = [task.training_batch(0, step, 3).continues for step in range(1, 13)]
    assert 4 <= sum(goes_on[1:]) <= 10, "it begins anew within the run"
    assert killed_at_every_step(small({"cell": cell, **stream}), tmp_path) == {}


@dataclass(frozen=True)
class Wobble(Clip):
    """Draws from every global stream."""

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        drawn = [torch.rand(()).item(), torch.randn(()).item(), random.random(), random.gauss(0, 1)]
        drawn += [np.random.rand(), np.random.randn()]
        for grad in gradient.grads:
            grad.mul_(1 + 0.1 * math.tanh(sum(drawn)))
        return Outcome(clipped=True)


def test_so_does_a_run_whose_parts_draw_from_the_global_streams(
    tmp_path: Path, no_board: None
) -> None:
    CLIPS.register("wobble")(Wobble)
    changes = small({"cell": "rnn"}) | {"clip": {"name": "wobble"}}
    assert killed_at_every_step(changes, tmp_path) == {}
    other = Uninterrupted(changes | {"seed": 1}, tmp_path / "other")
    torch.manual_seed(5)
    again = Uninterrupted(changes | {"seed": 1}, tmp_path / "again")
    assert differences(other.memory, again.memory) == []


class Counting(RNNCell):
    """Remembers in Python's own values what it has seen, and goes by it."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.seen: dict[str, Any] = {"last": None, "norms": []}

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if self.training:
            self.seen["norms"].append(x.norm().item())
            self.seen["last"] = x[0].detach().clone()
        return super().forward(x * (1 + 0.1 * math.sin(sum(self.seen["norms"]))), state)

    def get_extra_state(self) -> Any:
        return {"norms": [*self.seen["norms"]], "last": self.seen["last"]}

    def set_extra_state(self, state: Any) -> None:
        self.seen = {"norms": [*state["norms"]], "last": state["last"]}


@dataclass(frozen=True)
class CountingPart(CellPart):
    def cell(self, input_size: int) -> torch.nn.Module:
        return Counting(input_size, self.hidden_size)


def test_so_does_a_cell_whose_extra_state_is_no_tensor(tmp_path: Path, no_board: None) -> None:
    CELLS.register("counting")(CountingPart)
    own = {"cell": {"name": "counting", "hidden_size": 4, "num_layers": 2}}
    assert killed_at_every_step(small({}) | own, tmp_path) == {}


STATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), min_size=14, max_size=18)
    | st.lists(st.floats(), min_size=14, max_size=18)
    | st.lists(st.floats(), max_size=3).map(lambda numbers: torch.tensor(numbers).double())
    | st.lists(st.floats(), max_size=3).map(lambda numbers: np.array(numbers)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "a/b", "0", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(STATES)
@example({"a/b": torch.ones(2), "a": {"b": torch.zeros(3)}})
@example([2**64] * 16)
def test_whatever_a_part_remembers_comes_back_as_it_was(state: Any) -> None:
    tensors: dict[str, Tensor] = {}
    loaded = read(_encode(0, tensors, {"state": _packed(state, tensors, "x")}), 0)
    back = _unpacked(loaded.values["state"], loaded.tensors)
    assert [*_walk(back, "", set())] == [*_walk(state, "", set())]
    assert shapes(back) == shapes(state)


def shapes(state: Any) -> Any:
    """The kinds of which a state is made."""
    if isinstance(state, dict):
        return [(name, shapes(part)) for name, part in state.items()]
    return [type(state), *map(shapes, state if isinstance(state, list | tuple) else ())]


DATA = (METRICS, BPTT, MEASURES, UPDATES)

# --- R1: whenever a run asks whether to stop


INTERRUPTED = small(
    {
        "cell": "gru",
        "measure": "standard",
        "trainer.steps": 5,
        "trainer.eval_every": 2,
        "trainer.eval_size": 7,
        "trainer.eval_lengths": [3],
        "trainer.checkpoint_every": None,
        "trainer.checkpoint_keep": 2,
    }
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of seven sequences asks three times whether to stop."""
    monkeypatch.setattr("rnngrad.training.EVALUATION_CHUNK", 3)


def test_stopped_whenever_it_asks_a_run_goes_on_bit_for_bit(
    tmp_path: Path, small_chunks: None
) -> None:
    values = composed(INTERRUPTED)
    code, often = command(values, tmp_path / "whole")
    assert code == 0 and often >= 2 * 5 + 3 * 2 * 3  # twice a step; 3 evaluations, 2 lengths
    whole = everything(tmp_path / "whole")
    for asked in range(often):
        directory = tmp_path / str(asked)
        assert command(values, directory, asked)[0] == 128 + signal.SIGTERM
        run = Run(directory)
        assert run.summary["status"] == "interrupted"
        assert run.metrics["step"][-1] == run.summary["steps"]
        assert command(values, directory)[0] == 0
        assert differences(whole, everything(directory)) == [], asked


@pytest.mark.parametrize("first", [0, 1, 2, 3, 6])
def test_so_it_does_stopped_again_and_again(first: int, tmp_path: Path, small_chunks: None) -> None:
    values = composed(INTERRUPTED)
    command(values, tmp_path / "whole")
    stops = itertools.cycle([first, 0, 9, 2, 1, 7])
    tries = 0
    while command(values, tmp_path / "run", next(stops))[0] != 0:
        tries += 1
        assert tries < 20
    assert tries >= 3
    whole, run = everything(tmp_path / "whole"), everything(tmp_path / "run")
    assert differences(whole, run) == []


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path: Path, small_chunks: None) -> None:
    values = composed(INTERRUPTED | {"trainer.checkpoint_every": 1})
    with killed_at_every_moment(tmp_path / "run", tmp_path / "killed") as copies:
        command(values, tmp_path / "run")
    assert len(copies) > 40
    whole = everything(tmp_path / "run")
    for copy in copies:
        assert command(values, copy)[0] == 0
        assert differences(whole, everything(copy)) == [], copy


def test_how_often_it_is_saved_may_be_changed_on_the_way_and_no_bit_of_the_run_is(
    tmp_path: Path,
) -> None:
    values, run = composed(INTERRUPTED), tmp_path / "run"
    command(values, tmp_path / "whole")
    assert command(values, run, 5)[0] == 143
    changed = {"trainer.checkpoint_every": 1, "trainer.checkpoint_keep": 0}
    assert command(composed(INTERRUPTED | changed), run, 9, again=True)[0] == 143
    assert len([*(run / "checkpoint").iterdir()]) > 3
    assert command(values, run)[0] == 0
    assert differences(everything(tmp_path / "whole"), everything(run)) == []


@pytest.mark.parametrize("bytes_", [1, 7, 8, 30])
def test_what_was_written_after_the_checkpoint_in_whole_or_in_part_is_cut_off(
    bytes_: int, tmp_path: Path
) -> None:
    values = composed(INTERRUPTED)
    command(values, tmp_path / "run", 12)
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    command(values, tmp_path / "run")
    torn = [*DATA, *(path.name for path in (tmp_path / "torn").glob("events.*"))]
    for name in torn:
        with (tmp_path / "torn" / name).open("ab") as file:
            file.write(b"5,0.1,,"[:bytes_] if name == METRICS else bytes(range(1, 1 + bytes_)))
    (tmp_path / "torn" / "events.out.tfevents.9999999999.somewhere.1.0").write_bytes(b"torn")
    assert command(values, tmp_path / "torn")[0] == 0
    assert differences(everything(tmp_path / "run"), everything(tmp_path / "torn")) == []
    text = (tmp_path / "torn" / SUMMARY).read_text()
    json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_layouts_that_a_power_cut_has_taken_are_written_again(damage: str, tmp_path: Path) -> None:
    values = composed(INTERRUPTED | {"measure": "standard", "cell.num_layers": 11})
    command(values, tmp_path / "run", 6)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    command(values, tmp_path / "run")
    for name in (BPTT_LAYOUT, MEASURES_LAYOUT):
        path = tmp_path / "damaged" / name
        path.unlink() if damage == "gone" else path.write_text("")
    assert command(values, tmp_path / "damaged")[0] == 0
    assert differences(everything(tmp_path / "run"), everything(tmp_path / "damaged")) == []


def test_a_run_that_has_recorded_more_than_is_ever_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = composed(INTERRUPTED | {"measure": "full", "measure.when": "logged"})
    command(values, tmp_path / "whole")
    monkeypatch.setattr("rnngrad.runs.ARRAY_LIMIT", 2000)
    monkeypatch.setattr("rnngrad.runs.METRICS_LIMIT", 400)
    monkeypatch.setattr("rnngrad.tracking.board.GROWTH", 1.01)
    monkeypatch.setattr("rnngrad.tracking.board.SHARE", 1e9)  # draws whenever it may
    assert (tmp_path / "whole" / MEASURES).stat().st_size > 2000
    assert command(values, tmp_path / "run", 15)[0] == 143
    assert command(values, tmp_path / "run")[0] == 0
    assert "measures.f64: has" in caplog.text and "nothing is drawn" in caplog.text
    assert caplog.text.count("nothing is drawn") <= 2, "once a process"
    monkeypatch.undo()
    whole, run = left(tmp_path / "whole"), left(tmp_path / "run")
    assert {name for name in whole if whole[name] != run[name]} <= {SUMMARY}  # its diagnosis
    assert Run(tmp_path / "run").summary["status"] == "completed"


# --- R1: in processes of their own


@pytest.mark.parametrize(
    "triple",
    [("lstm", "adam", "zclip"), ("bn_rnn", "rmsprop", "spike_skip"), ("gru", "sgd", "quantile")],
    ids="-".join,
)
def test_killed_twice_a_run_goes_on_bit_for_bit_in_new_processes(
    triple: tuple[str, ...], processes: Processes, tmp_path: Path
) -> None:
    parts = dict(zip(("cell", "optim", "clip"), triple, strict=True))
    own = {"measure": "standard", "trainer.checkpoint_every": 3, "trainer.checkpoint_keep": 2}
    line = [f"{key}={value}" for key, value in small(parts | own).items()]
    line += ["trainer.clip_audit=[autoclip]", "seed=7"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert processes.run(tmp_path, *line, f"hydra.run.dir={whole}")[0] == 0
    line += [f"hydra.run.dir={run}"]
    kill = {"arrange": kill_at, "using": (5,)}
    assert processes.run(tmp_path, *line, **kill)[0] == -signal.SIGKILL
    code, said = processes.run(tmp_path, f"resume={run}", **kill | {"using": (11,)})
    assert code == -signal.SIGKILL and re.search("run goes on after step \\d+\n", said)
    again = [f"resume={run}"] if parts["cell"] == "lstm" else line
    code, said = processes.run(tmp_path, *again)
    assert code == 0 and re.search("run goes on after step \\d+\n", said)
    assert differing(whole, run) == []  # with TensorBoard's own reader, too
    assert differences(everything(whole), everything(run)) == []


# --- R1: a run that is made longer


LONGER = small({"cell": "rnn", "measure": "standard", "trainer.log_every": 3})
"""Evaluated at every fifth step."""


def longer_or_not(saved: dict[str, Any], folder: Path, steps: list[int], often: float) -> list[str]:
    """In what a run that was made longer, again and again, differs from one of 11 steps.

    Each time it is interrupted when it has asked ``often``, then goes on.
    """
    whole, longer = folder / "whole", folder / "longer"
    values = composed(LONGER | saved | {"trainer.steps": steps[0]})
    command(values, longer, often)
    for wanted in [*steps[1:], 11]:
        if command(values, longer, often, again=True, steps=wanted)[0] != 0:
            command(values, longer, often, again=True)
    assert command(values, longer, again=True)[0] == 0
    assert Run(longer).summary["planned_steps"] == 11
    assert command(composed(LONGER | saved | {"trainer.steps": 11}), whole)[0] == 0
    there, here = everything(whole), everything(longer)
    first = ("config/text_summary", 0)  # the configuration as it was when the run began
    assert there.pop(first) != here.pop(first)
    return differences(there, here)


@pytest.mark.parametrize(
    ("steps", "every"),
    [([1], None), ([4], None), ([5], 2), ([6], "2h"), ([4, 7], None), ([1, 2, 9], 2)],
    ids=str,
)
def test_a_run_made_longer_is_the_run_that_was_as_long_from_the_start(
    steps: list[int], every: int | str | None, tmp_path: Path
) -> None:
    saved = {"trainer.checkpoint_every": every, "trainer.checkpoint_keep": 2}
    assert longer_or_not(saved, tmp_path, steps, math.inf) == []


@pytest.mark.parametrize("often", [0, *range(9, 18, 2)])
def test_so_it_is_interrupted_at_its_old_end_or_as_it_goes_on(often: int, tmp_path: Path) -> None:
    saved = {"trainer.checkpoint_every": None, "trainer.checkpoint_keep": 2}
    assert longer_or_not(saved, tmp_path, [4], often) == []


def test_so_it_is_killed_at_any_moment_of_becoming_longer(tmp_path: Path) -> None:
    saved = {"trainer.checkpoint_every": None, "trainer.checkpoint_keep": 2}
    values, longer = composed(LONGER | saved | {"trainer.steps": 4}), tmp_path / "longer"
    command(values, longer)
    command(values, longer, again=True, steps=7)
    with killed_at_every_moment(longer, tmp_path / "killed") as copies:
        command(values, longer, again=True, steps=11)
    assert len(copies) > 20
    whole = everything(longer)
    for copy in copies:
        assert command(values, copy, again=True)[0] == 0
        assert differences(whole, everything(copy)) == [], copy


def test_an_evaluation_at_the_old_end_does_not_take_the_best_one_before_with_it(
    tmp_path: Path,
) -> None:
    """Evaluated at 5, 10 and the end, each time better; in a run of 14 not at 12."""
    own = {"trainer.checkpoint_every": "2h", "trainer.checkpoint_keep": 2, "task": "cliff"}
    own |= {"task.length": 2, "cell.nonlinearity": "sigmoid", "cell.hidden_size": 1}
    own |= {"optim.lr": 0.05}
    values = composed(LONGER | own | {"trainer.steps": 12})
    command(values, tmp_path / "run")
    assert best_step(tmp_path / "run" / "checkpoint") == 12
    command(values, tmp_path / "run", 1, again=True, steps=14)
    assert best_step(tmp_path / "run" / "checkpoint") == 10


def test_without_its_summary_a_run_that_was_made_longer_still_knows_how_long_it_is(
    tmp_path: Path,
) -> None:
    values = composed(LONGER | {"trainer.steps": 4})
    command(values, tmp_path / "run")
    command(values, tmp_path / "run", again=True, steps=11)
    whole = everything(tmp_path / "run")
    for text in (None, "", "{}", '{"planned_steps": "many"}'):
        summary = tmp_path / "run" / "summary.json"
        summary.unlink() if text is None else summary.write_text(text)
        assert command(values, tmp_path / "run")[0] == 0
        assert differences(whole, everything(tmp_path / "run")) == []


# --- R3: the comparison sees whatever was not saved, or saved wrongly


WATCHED = {
    "name": "full",
    "when": "evaluated",
    "contributions": True,
    "clip_effects": True,
    **dict.fromkeys(("inputs", "units", "spectrum", "parameters", "gates", "noise_scale"), False),
    "smoothness": False,
    **dict.fromkeys(("lag_anchors", "lyapunov_exponents", "jacobians"), 0),
}
NEVER_MIND = {
    "optimizer/groups/list/0/lr": "is set anew at every step",
    "progress/loss": "is the next update's",
    "progress/evaluation/loss": "is the next evaluation's",
    "progress/evaluation/accuracy": "is the next evaluation's",
    "progress/in_a_row": "is 0 after the next update, as that is finite",
    "random/cuda": "there is none",
}
"""What may be changed, and why; of a run whose batches do not go on from each other also:"""
OF_NO_STREAM = {
    "carried": "is given to no batch",
    "random/numpy/list/3": "whether a second normal number is there: 2 is yes, as 1 is",
}


def leaves(tree: Any, path: tuple[Any, ...] = (), name: str = "") -> Iterator[tuple[Any, str]]:
    """Paths to what a tree holds, and their names."""
    if isinstance(tree, dict) and [*tree] == ["mapping"]:
        for i, (key, part) in enumerate(tree["mapping"]):
            yield from leaves(part, (*path, "mapping", i, 1), f"{name}/{key}")
    elif isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, (*path, key), f"{name}/{key}")
    else:
        yield path, name[1:]


def another(value: Any) -> Any:
    """Another value of the same kind, if there is one."""
    if isinstance(value, bool | type(None)):
        return not value
    if isinstance(value, float):
        return -1.5 * value - 1 if math.isfinite(value) else 0.25
    return value + 1 if isinstance(value, int) else f"{value}x"


def with_another_value(loaded: Loaded, path: tuple[Any, ...]) -> Loaded:
    tree: Any = loaded.values
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = another(tree[path[-1]])
    return loaded


def with_a_bit_flipped(loaded: Loaded, name: str) -> Loaded:
    """In the entry in the middle: the lowest of an integer, one in the middle of a float."""
    tensor = loaded.tensors[name].reshape(-1)
    size = tensor.element_size()
    byte = size - 2 if tensor.is_floating_point() else 0
    tensor.view(torch.uint8)[len(tensor) // 2 * size + byte] ^= 1
    loaded.tensors[name] = tensor.reshape(loaded.tensors[name].shape)
    return loaded


def mutants(whole: Uninterrupted, step: int) -> Iterator[tuple[str, Loaded]]:
    """What was saved at a step, with one thing in it changed.

    Not settings and environment, which are compared before anything goes on.
    """
    saved = whole.shelf.loaded(step)
    inside = {k: v for k, v in saved.values.items() if k not in ("settings", "environment")}
    for name in saved.tensors:
        yield name, with_a_bit_flipped(whole.shelf.loaded(step), name)
    for path, name in leaves(inside):
        yield name, with_another_value(whole.shelf.loaded(step), path)


def unseen(changes: dict[str, Any], step: int, folder: Path) -> set[str]:
    """What can be changed in what was saved at a step, and the run ends as it did nevertheless."""
    whole, found = Uninterrupted(changes, folder / "whole"), set()
    for name, mutant in mutants(whole, step):
        try:
            if not whole.resumed(step, folder / "mutant", mutant):
                found.add(name)
        except (NothingUsable, ValueError, TypeError, LookupError, AttributeError, RuntimeError):
            pass
        shutil.rmtree(folder / "mutant")
    return found


def test_whatever_is_changed_in_what_was_saved_of_a_stream_is_seen(
    tmp_path: Path, no_board: None
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog and then " * 4)
    audit = [{"name": "quantile", "history_length": 12}]
    changes = small({"cell": "lstm", "clip": "zclip", "trainer.clip_audit": audit})
    changes |= {"task": "chars", "task.path": str(text), "measure": WATCHED, "trainer.steps": 8}
    found = unseen(changes, 6, tmp_path)
    assert {name for name in found if not name.startswith((*NEVER_MIND,))} == set()


def test_whatever_is_changed_of_statistics_and_global_streams_is_seen(
    tmp_path: Path, no_board: None
) -> None:
    CLIPS.register("wobble")(Wobble)
    changes = small({"cell": "bn_rnn", "optim": "sgd", "cell.max_steps": 6})
    found = unseen(changes | {"clip": {"name": "wobble"}}, 5, tmp_path)
    never_mind = (*NEVER_MIND, *OF_NO_STREAM)
    assert {name for name in found if not name.startswith(never_mind)} == set()
