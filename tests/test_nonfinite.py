"""What is not finite is met before the update, named, and leaves nothing behind."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from rnngrad.cells import CELLS, CellPart, RNNCell
from rnngrad.checkpoint import load
from rnngrad.config import experiment
from rnngrad.model import SequenceModel
from rnngrad.parts import InputError
from rnngrad.regularization import Orthogonality
from rnngrad.runs import Run
from rnngrad.task import Batch
from rnngrad.tasks.adding import Adding
from rnngrad.tasks.chars import Chars
from rnngrad.training import Training
from tests.sameness import (
    Shelf,
    Uninterrupted,
    command,
    composed,
    differences,
    left,
    read,
    small,
    train,
    without_tensorboard,
)

T, AT = 6, 3
NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass
class Poison:
    """Puts a number where it does not belong, at some steps of training alone.

    Args:
        place: ``loss``, ``gradient``, ``weight``, ``x`` or ``delta``.
        number: What is put there; the loss is multiplied by it.
        steps: At which.
        evaluations: After which steps the loss of an evaluation is ``number`` as well.
    """

    place: str
    number: float
    steps: Collection[int]
    evaluations: Collection[int] = ()
    step: int = field(default=0, init=False)
    evaluates: bool = field(default=False, init=False)
    weight: Tensor | None = field(default=None, init=False)
    calls: int = field(default=0, init=False)

    def is_due(self, place: str) -> bool:
        return self.place == place and self.step in self.steps and not self.evaluates

    @contextmanager
    def __call__(self) -> Iterator[None]:
        batch, evaluation = Adding.training_batch, Adding.evaluation_batch
        loss, build = Adding.loss, Training.__init__

        def training_batch(task: Adding, seed: int, step: int, size: int) -> Batch:
            self.step, self.evaluates, self.calls = step, False, 0
            made = batch(task, seed, step, size)
            if self.is_due("x"):
                made.inputs[AT, 0, 0] = self.number
            if self.is_due("weight") and self.weight is not None:
                with torch.no_grad():
                    self.weight[0, 0] = self.number
            return made

        def evaluation_batch(task: Adding, index: int, size: int) -> Batch:
            self.evaluates = True
            return evaluation(task, index, size)

        def poisoned_loss(task: Adding, outputs: Tensor, targets: Tensor) -> Tensor:
            bad = self.step in self.evaluations if self.evaluates else self.is_due("loss")
            return loss(task, outputs, targets) * (self.number if bad else 1)

        def built(training: Training, *arguments: Any, **options: Any) -> None:
            build(training, *arguments, **options)
            (self.weight,) = (p for n, p in training.model.named_parameters() if "weight_hh" in n)
            self.weight.register_hook(self.on_gradient)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Adding, "training_batch", training_batch)
            patch.setattr(Adding, "evaluation_batch", evaluation_batch)
            patch.setattr(Adding, "loss", poisoned_loss)
            patch.setattr(Training, "__init__", built)
            patch.setattr(Frail, "poison", self)
            yield

    def on_gradient(self, grad: Tensor) -> Tensor:
        return with_one(grad, self.number) if self.is_due("gradient") else grad

    def on_state(self, grad: Tensor) -> Tensor:
        return with_one(grad, self.number) if self.is_due("delta") else grad


def with_one(grad: Tensor, number: float) -> Tensor:
    grad = grad.clone()
    grad[0, 0] = number
    return grad


class Frail(RNNCell):
    """A cell whose state's gradient can be poisoned at one time step."""

    poison: Poison | None = None

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = super().forward(x, state)
        if self.poison is not None:
            if self.poison.calls % T == AT and state.requires_grad:
                state.register_hook(self.poison.on_state)
            self.poison.calls += 1
        return state


@dataclass(frozen=True)
class FrailPart(CellPart):
    def cell(self, input_size: int) -> torch.nn.Module:
        return Frail(input_size, self.hidden_size)


@pytest.fixture(autouse=True)
def _small_and_quick() -> Iterator[None]:
    CELLS.register("frail")(FrailPart)
    with without_tensorboard():
        yield


FRAIL = small({"optim": "sgd", "clip": "zclip"}) | {
    "cell": {"name": "frail", "hidden_size": 4, "num_layers": 1},
    "measure": {
        **dict.fromkeys(("inputs", "units", "spectrum", "parameters", "gates"), False),
        **dict.fromkeys(("lag_anchors", "lyapunov_exponents", "jacobians"), 0),
        **dict.fromkeys(("contributions", "clip_effects"), True),
        **{"name": "full", "when": "logged", "noise_scale": False, "smoothness": False},
    },
    "trainer.log_every": 1,
    "trainer.clip_audit": [{"name": "quantile", "history_length": 5}, "autoclip"],
}
"""Everything in it that remembers gradients is at work at every step."""
del FRAIL["cell.hidden_size"]

STATES = ("optimizer", "extra", "clipper", "audit", "observer", "random")
"""What an update that is not made leaves as it was, beside the tensors."""


def states(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Of a snapshot: all but how far the run is, and what only a stream goes on with."""
    loaded = read(contents, 0)
    tensors = {k: tensor for k, tensor in loaded.tensors.items() if not k.startswith("carried")}
    return {**tensors, **{name: loaded.values[name] for name in STATES}}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return one.numpy().tobytes() == other.numpy().tobytes()
        return bool(one == other)

    return {name for name in before if not equal(before[name], after[name])}


def poisoned(
    poison: Poison, folder: Path, changes: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Training, list[dict[str, Any]]]:
    """A run, its states after each step, and last where it ended."""
    shelf = Shelf()
    with poison():
        training = train(experiment(composed(FRAIL | changes)), folder / "run", shelf)
    return training, [states(contents) for contents in (*shelf.contents.values(), shelf.ended)]


PASCANU = {"trainer.nonfinite": "pascanu", "optim.momentum": 0.0}
SAID = {
    "loss": "the loss is .* while every output is finite",
    "gradient": r"gradient of rnn.cells.0.weight_hh is not finite$",
    "weight": r"parameter rnn.cells.0.weight_hh is not finite$",
    "x": rf"the input is not finite at t = {AT} of {T}$",
    "delta": rf"gradient of .*weight_hh.* going back, .*cells.0.l0 is not finite from t = {AT} on$",
}
PLACES = pytest.mark.parametrize("place", SAID)
EACH = pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)


@EACH
@PLACES
def test_a_run_stops_before_the_update_and_says_where(
    place: str, number: float, tmp_path: Path
) -> None:
    training, at = poisoned(Poison(place, number, [5]), tmp_path)
    result = training.result()
    assert result.status == "diverged" and result.steps == 4 and result.nonfinite == 1
    assert result.reason is not None and re.match(f"step 5: {SAID[place]}", result.reason)
    expected = {"model/rnn.cells.0.weight_hh"} if place == "weight" else set()
    assert changed(at[4], at[-1]) == expected
    row = Run(tmp_path / "run").metrics
    assert row["step"].tolist() == [1, 2, 3, 4, 5]
    assert not math.isfinite(row["loss"][-1]) or not math.isfinite(row["grad_norm_pre"][-1])


@EACH
@PLACES
def test_a_skipped_update_leaves_every_bit_and_every_history(
    place: str, number: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training, at = poisoned(Poison(place, number, [5]), tmp_path, {"trainer.nonfinite": "skip"})
    result = training.result()
    expected = {"model/rnn.cells.0.weight_hh"} if place == "weight" else set()
    assert changed(at[4], at[5]) == expected
    assert re.search(f"step 5: {SAID[place][:-1]}", caplog.text)
    if place == "weight":  # which nothing mends
        assert result.status == "diverged" and result.steps == 7 and result.nonfinite == 4
    else:
        assert result.status == "completed" and result.nonfinite == 1
        assert {"optimizer/slots/0/momentum_buffer", *STATES[2:5]} <= changed(at[5], at[6])
        counts = training.audit.counts.values() if training.audit else ()
        assert {count.steps for count in counts} == {11}
    assert result.skip_fraction == 0, "that is of clip rules"


@EACH
@PLACES
def test_pascanus_way_shrinks_the_recurrent_weights_in_place_of_the_update(
    place: str, number: float, tmp_path: Path
) -> None:
    poison = Poison(place, number, [5])
    training, at = poisoned(poison, tmp_path, PASCANU)
    before, after = at[4], at[5]
    name = "model/rnn.cells.0.weight_hh"
    assert changed(before, after) == {name}
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[0, 0] = place != "weight"
    expected = before[name] - 0.02 * (0.02 * before[name])  # learning rate, then the equation's
    torch.testing.assert_close(after[name][kept], expected[kept], rtol=1e-6, atol=0)
    assert training.result().nonfinite == (4 if place == "weight" else 1)


# --- histories of what is finite, and not usable nevertheless


def test_a_norm_over_1e10_is_pascanus_too_and_no_rule_remembers_it(tmp_path: Path) -> None:
    training, at = poisoned(Poison("loss", 1e14, [5]), tmp_path, PASCANU)
    assert changed(at[4], at[5]) == {"model/rnn.cells.0.weight_hh"}
    rows = Run(tmp_path / "run").metrics
    assert 1e11 < rows["grad_norm_pre"][4] < math.inf and rows["skipped"].sum() == 0
    assert training.result().nonfinite == 1
    rows = Run(tmp_path / "run").metrics
    shrinking = 0.02 * at[4]["model/rnn.cells.0.weight_hh"].double().norm()
    assert rows["grad_norm_post"][4] == pytest.approx(float(shrinking), rel=1e-6)


def test_a_norm_over_1e10_is_a_gradient_like_any_other_elsewhere(tmp_path: Path) -> None:
    training, at = poisoned(Poison("loss", 1e14, [5]), tmp_path, {"trainer.nonfinite": "skip"})
    assert training.result().nonfinite == 0
    assert {"clipper", "audit", "observer"} <= changed(at[4], at[5])


def test_a_penalty_that_is_not_finite_leaves_no_history_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison("penalty", math.inf, [5])
    add = Orthogonality.add_

    def poisoned_add(self: Orthogonality, rnn: torch.nn.Module, *others: Any) -> float:
        penalty = add(self, rnn, *others)
        if poison.is_due("penalty"):
            for parameter in rnn.parameters():
                parameter.grad = with_one(
                    torch.zeros_like(parameter).view(-1, 1), math.nan
                ).view_as(parameter)
        return penalty

    monkeypatch.setattr(Orthogonality, "add_", poisoned_add)
    changes = {"regularizer": "orthogonality", "trainer.nonfinite": "skip"}
    training, at = poisoned(poison, tmp_path, changes)
    assert training.result().nonfinite == 1
    assert changed(at[4], at[5]) == set()


@pytest.mark.parametrize("place", ["x", "loss"])
@pytest.mark.parametrize("policy", ["stop", "skip", "pascanu"])
def test_batch_statistics_do_not_learn_from_an_update_that_is_not_made(
    place: str, policy: str, tmp_path: Path
) -> None:
    own = {"cell": "bn_rnn", "cell.max_steps": 4, "trainer.nonfinite": policy}
    shelf = Shelf()
    settings = small({"optim": "sgd", "optim.momentum": 0.0, **own})
    with Poison(place, math.nan, [5])():
        train(experiment(composed(settings)), tmp_path / "run", shelf)
    after = shelf.ended if policy == "stop" else shelf.contents[5]
    found = changed(states(shelf.contents[4]), states(after))
    assert found == ({"model/rnn.cells.0.weight_hh"} if policy == "pascanu" else set())


# --- streams


@pytest.mark.parametrize("steps", [[1], [1, 2], [4], [8], [8, 9]], ids=str)
@pytest.mark.parametrize("policy", ["skip", "pascanu"])
def test_a_stream_goes_on_from_before_what_was_skipped(
    policy: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog and then " * 4)
    given: dict[int, Any] = {}
    batch, forward = Chars.training_batch, SequenceModel.forward
    now = [0]

    def training_batch(task: Chars, seed: int, step: int, size: int) -> Batch:
        now[0] = step
        made = batch(task, seed, step, size)
        if step in steps:
            made.inputs[0, 0, 0] = math.nan
        return made

    def watched(model: SequenceModel, inputs: Tensor, state: Any = None) -> Any:
        if model.training:
            given.setdefault(now[0], state)
        return forward(model, inputs, state)

    monkeypatch.setattr(Chars, "training_batch", training_batch)
    monkeypatch.setattr(SequenceModel, "forward", watched)
    stream = {"task": "chars", "task.path": str(text), "task.valid_fraction": 0.3}
    settings = small({"cell": "gru", **stream, "trainer.nonfinite": policy})
    spec = experiment(composed(settings))
    continues = {step: spec.task.training_batch(0, step, 3).continues for step in range(1, 13)}
    assert [step for step in continues if not continues[step]] == [1, 8]
    training = train(spec, tmp_path / "run", Shelf())
    assert training.result().status == "completed"
    assert training.result().nonfinite == len(steps)
    for step in range(2, 13):
        before = step - 1
        if not continues[step]:
            assert given[step] is None
        elif before in steps:
            assert given[step] is given[before] or torch.equal(given[step], given[before])
        else:
            assert given[step] is not None


# --- patience


@pytest.mark.parametrize(
    ("bad", "status", "steps"), [((4, 5, 6), "completed", 12), ((4, 5, 6, 7), "diverged", 6)]
)
@pytest.mark.parametrize("policy", ["skip", "pascanu"])
def test_patience_lets_three_in_a_row_pass_and_ends_with_the_fourth(
    policy: str, bad: tuple[int, ...], status: str, steps: int, tmp_path: Path
) -> None:
    own = {"trainer.nonfinite": policy, "trainer.checkpoint_every": None}
    values = composed(small({"cell": "rnn", **own}))
    with Poison("x", math.nan, bad)():
        code, _ = command(values, tmp_path / "run")
    summary = Run(tmp_path / "run").summary
    assert (summary["status"], summary["steps"]) == (status, steps)
    assert code == {"completed": 0, "diverged": 3}[status] and summary["nonfinite"] == len(bad)
    if status == "completed":
        return
    assert (
        "step 7: the input is not finite at t = 3 of 6 (and the 3 updates before"
        in summary["reason"]
    )
    saved = load(tmp_path / "run" / "checkpoint")
    assert saved.step == 6 and saved.values["progress"]["in_a_row"] == 3
    assert all(bool(tensor.isfinite().all()) for tensor in saved.tensors.values())
    with Poison("x", math.nan, bad)():  # it is as bad as it was
        assert command(values, tmp_path / "run", again=True)[0] == 3
    assert Run(tmp_path / "run").summary == summary
    with Poison("x", math.nan, bad[:3])():
        assert command(values, tmp_path / "run")[0] == 3  # typed again, it is left as it is
        assert command(values, tmp_path / "run", again=True)[0] == 0
        command(values, tmp_path / "whole")
    assert differences(left(tmp_path / "run"), left(tmp_path / "whole")) == []


def test_one_that_is_finite_is_the_end_of_a_row_and_without_patience_there_is_no_end(
    tmp_path: Path,
) -> None:
    training, _ = poisoned(
        Poison("x", math.nan, {2, 3, 4, 6, 7, 8}), tmp_path / "a", {"trainer.nonfinite": "skip"}
    )
    assert training.result().status == "completed" and training.result().nonfinite == 6
    endless = {"trainer.nonfinite": "skip", "trainer.nonfinite_patience": None}
    training, _ = poisoned(Poison("x", math.nan, range(2, 13)), tmp_path / "b", endless)
    assert training.result().status == "completed" and training.result().nonfinite == 11


@pytest.mark.parametrize("policy", ["skip", "pascanu"])
def test_a_run_with_updates_that_were_not_made_goes_on_bit_for_bit(
    policy: str, tmp_path: Path
) -> None:
    changes = FRAIL | {"trainer.nonfinite": policy, "trainer.eval_every": 4}
    with Poison("delta", math.nan, {2, 5, 6, 9, 12}, evaluations={8})():
        whole = Uninterrupted(changes, tmp_path / "whole")
        different = {k: whole.resumed(k, tmp_path / str(k)) for k in range(12)}
    assert {step: names for step, names in different.items() if names} == {}


# --- evaluations


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip", "pascanu"])
def test_an_evaluation_that_is_not_finite_ends_a_run_only_if_it_is_to_stop(
    policy: str, number: float, tmp_path: Path
) -> None:
    values = composed(small({"cell": "rnn", "trainer.nonfinite": policy}))
    with Poison("", number, (), evaluations={5})():
        code, _ = command(values, tmp_path / "run")
    run = Run(tmp_path / "run")
    losses = run.metrics["eval_loss"][run.metrics["step"] == 5]
    assert len(losses) == 1 and not math.isfinite(losses[0])
    if policy == "stop":
        assert code == 3 and run.summary["steps"] == 5 and run.summary["eval_loss"] is None
        assert run.summary["reason"].startswith("evaluation after step 5: ")
        with Poison("", number, (), evaluations={5})():
            assert command(values, tmp_path / "run")[0] == 3
        assert Run(tmp_path / "run").summary == run.summary
    else:
        assert code == 0 and run.summary["steps"] == 12 and run.summary["nonfinite"] == 0
        assert math.isfinite(run.summary["eval_loss"])


# --- numbers at the ends of their range


@pytest.mark.parametrize("optim", ["adam", "sgd", "rmsprop"])
def test_a_learning_rate_of_1e20_ends_as_diverged_with_a_finite_state_saved(
    optim: str, tmp_path: Path
) -> None:
    own = {"optim": optim, "optim.lr": 1e20, "cell": "rnn", "cell.nonlinearity": "relu"}
    values = composed(small({**own, "clip": "none", "trainer.checkpoint_every": None}))
    code, _ = command(values, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert code == 3 and run.summary["status"] == "diverged"
    saved = load(tmp_path / "run" / "checkpoint")
    model = [tensor for name, tensor in saved.tensors.items() if name.startswith("model/")]
    assert all(bool(tensor.isfinite().all()) for tensor in model)


def test_a_norm_whose_square_overflows_is_reported_as_it_is(tmp_path: Path) -> None:
    training, _ = poisoned(Poison("loss", 1e25, [5]), tmp_path, {"trainer.nonfinite": "skip"})
    row = Run(tmp_path / "run").metrics
    assert 1e24 < row["grad_norm_pre"][4] < 1e28 and training.result().nonfinite == 0
    assert row["grad_norm_post"][4] < 10


def test_pascanus_way_needs_a_recurrent_matrix() -> None:
    with pytest.raises(InputError, match="trainer.nonfinite=pascanu: needs a recurrent weight"):
        experiment(composed(small({"cell": "indrnn", "trainer.nonfinite": "pascanu"})))


def test_a_run_interrupted_with_weights_that_are_not_finite_says_what_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = {"cell": "rnn", "trainer.nonfinite": "skip", "trainer.nonfinite_patience": None}
    values = composed(small({**own, "trainer.checkpoint_every": 1}))
    with Poison("weight", math.nan, [4])():
        assert command(values, tmp_path / "run", 12)[0] == 143
    assert 4 < Run(tmp_path / "run").summary["steps"] < 12
    said = "is not finite; saved is that of step 3: rnngrad resume="
    assert said in capsys.readouterr().err
    assert caplog.text.count("not saved") == 1, "a line, not one a step"
    assert load(tmp_path / "run" / "checkpoint").step == 3
    command(values, tmp_path / "whole")
    assert command(values, tmp_path / "run")[0] == 0
    assert differences(left(tmp_path / "run"), left(tmp_path / "whole")) == []
