"""What is measured while a model trains is what it says it is, and changes nothing."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rnngrad.nn
from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS, Clipper
from rnngrad.init import INITS
from rnngrad.measure import MEASURES, Dynamics, Observation, Observer, _quantile, lags
from rnngrad.model import SequenceModel, build_model
from rnngrad.optim import OPTIMS
from rnngrad.regularization import REGULARIZERS
from rnngrad.runs import METRICS, Run
from rnngrad.task import TASKS, Task, training_generator
from rnngrad.tracking import Tracker
from rnngrad.training import Training, evaluate
from tests.small import small_task

FULL: dict[str, Any] = {
    "when": "logged",
    "lag_anchors": 3,
    "gates": True,
    "lyapunov_exponents": 2,
    "jacobians": 2,
    "noise_scale": True,
    "clip_effects": True,
    "smoothness": True,
}


def chosen(**changes: Any) -> Dynamics:
    made = MEASURES.default("standard", **changes)
    assert isinstance(made, Dynamics)
    return made


def run(
    path: Path,
    measure: Dynamics | None,
    *,
    task: str = "adding",
    cell: str = "rnn",
    layers: int = 1,
    clip: str = "norm",
    whole: bool = True,
    keys: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Run, SequenceModel]:
    made = small_task(task)
    hidden = 5 if made.reads_out else made.output_size
    part = CELLS.default(cell, hidden_size=hidden, num_layers=layers, **(keys or {}))
    model = build_model(part, made, INITS.default("torch"), 0)
    observer = None if measure is None else Observer(measure, model, made.time_steps, whole=whole)
    settings: dict[str, Any] = {
        "seed": 0,
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "eval_size": 4,
        "log_every": 2,
        "stop_when_solved": False,
    }
    with Tracker(path, made.chance_loss, made.time_steps) as tracker:
        result = Training(
            model,
            made,
            OPTIMS.default("adam", lr=0.01).build(model.parameters()),
            Clipper(CLIPS.default(clip), model.named_parameters()),
            tracker,
            observer=observer,
            **(settings | changes),
        ).run()
        tracker.finish(result)
    return Run(path), model


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_measuring_everything_changes_no_bit_of_any_cells_run(cell: str, tmp_path: Path) -> None:
    plain, untouched = run(tmp_path / "plain", None, cell=cell, layers=2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    measured, observed = run(tmp_path / "full", chosen(**FULL), cell=cell, layers=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (plain.path / METRICS).read_bytes() == (measured.path / METRICS).read_bytes()
    for a, b in zip(untouched.state_dict().values(), observed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not plain.measures
    assert measured.measures["step"].tolist() == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("task", sorted(TASKS.load()))
def test_every_task_can_be_measured(task: str, tmp_path: Path) -> None:
    made = small_task(task)
    measures = run(tmp_path, chosen(**FULL), task=task, cell="lstm")[0].measures
    for kind in ("lag", "weight_norm", "attribution"):
        assert measures[f"l0/{kind}"].shape == (5, made.time_steps)
    assert np.isfinite(measures["parameter/rnn.weight_hh_l0/update_norm"]).all()


def test_the_standard_measures_are_those_of_the_first_the_evaluated_and_the_last_step(
    tmp_path: Path,
) -> None:
    measures = run(tmp_path, chosen(), steps=7)[0].measures
    assert measures["step"].tolist() == [1, 3, 6, 7]
    assert not any("lyapunov" in name or "noise" in name for name in measures)


def test_attributions_sum_to_1_for_every_layer_at_every_step(tmp_path: Path) -> None:
    for cell in ("rnn", "lstm", "gru", "ln_lstm"):
        measures = run(tmp_path / cell, chosen(), cell=cell, layers=2)[0].measures
        for layer in ("l0", "l1"):
            np.testing.assert_allclose(measures[f"{layer}/attribution"].sum(1), 1, atol=1e-10)


def test_norms_of_the_parameters_gradients_are_together_that_of_the_whole_gradient(
    tmp_path: Path,
) -> None:
    result, model = run(tmp_path, chosen(when="logged"), cell="gru")
    measures, metrics = result.measures, result.metrics
    squares = [measures[f"parameter/{name}/grad_norm"] ** 2 for name, _ in model.named_parameters()]
    np.testing.assert_allclose(np.sqrt(sum(squares)), metrics["grad_norm_pre"], rtol=1e-6)


def test_an_updates_norm_is_how_far_the_parameter_moved(tmp_path: Path) -> None:
    measures = run(tmp_path / "a", chosen(when="logged"), steps=2)[0].measures
    before, after = run(tmp_path / "b", None, steps=1)[1], run(tmp_path / "c", None, steps=2)[1]
    for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True):
        moved, size = (two - one).norm().item(), one.norm().item()
        assert measures[f"parameter/{name}/update_norm"][1] == pytest.approx(moved, rel=1e-5)
        assert measures[f"parameter/{name}/norm"][1] == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("clip", sorted(CLIPS.load()))
def test_the_angle_between_the_gradient_before_and_after_is_0_where_the_direction_is_kept(
    clip: str, tmp_path: Path
) -> None:
    cosine = run(tmp_path, chosen(when="logged"), clip=clip)[0].measures["clip/cosine"]
    assert ((cosine > 0) | np.isnan(cosine)).all() and not (cosine > 1 + 1e-9).any()
    if clip in ("none", "norm", "normalize", "soft"):
        np.testing.assert_allclose(cosine, 1, atol=1e-6)


def test_a_clipped_value_turns_the_gradient_by_the_angle_it_says(tmp_path: Path) -> None:
    task, model, observer = _observed(chosen())
    observation = _observe(task, model, observer)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    for parameter in model.parameters():
        parameter.grad.clamp_(-0.01, 0.01)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    observation.clipped()
    angle = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0).item()
    assert 0 < angle < 0.999
    assert observation.updated()["clip/cosine"] == pytest.approx(angle, rel=1e-12)


def test_a_rule_that_scales_scales_every_steps_share_by_its_coefficient(tmp_path: Path) -> None:
    task, model, observer = _observed(chosen(**FULL))
    observation = _observe(task, model, observer)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    found = observation.updated()
    share = found["l0/attribution"]
    np.testing.assert_allclose(found["clip_effect/none"], share, rtol=1e-5, atol=1e-9)
    coef = min(1.0, 1.0 / norm)  # the default of max_norm
    np.testing.assert_allclose(found["clip_effect/norm"], coef * share, rtol=1e-5, atol=1e-9)
    assert {name.partition("/")[2] for name in found if "clip_effect" in name} == set(CLIPS)


def test_the_noise_scale_is_unbiased() -> None:
    task, model, observer = _observed(chosen(noise_scale=True))
    with torch.no_grad():
        model.readout.bias.fill_(1.1)  # the targets' mean is 1: more noise than signal
    grads = []
    for draw in range(400):  # one sequence each: their mean is G, their variance S
        inputs, targets = task.batch(1, training_generator(1, draw))
        loss = task.loss(model(inputs).outputs, targets)
        parts = torch.autograd.grad(loss, [*model.parameters()])
        grads.append(torch.cat([part.flatten() for part in parts]))
    each = torch.stack(grads).double()
    variance = each.var(0).sum().item()
    expected = {
        "noise/variance": variance,
        "noise/signal": each.mean(0).square().sum().item() - variance / 400,
    }
    measured = [_observe(task, model, observer, step).updated() for step in range(1, 301)]
    for key, value in expected.items():
        found = np.array([one[key] for one in measured])
        error = found.std() / math.sqrt(len(found))
        assert error < 0.15 * variance and abs(found.mean() - value) < 4 * error


@pytest.mark.parametrize("cell", ["rnn", "ln_lstm"])
def test_smoothness_is_how_far_the_gradient_turned_by_how_far_the_weights_moved(
    cell: str, tmp_path: Path
) -> None:
    after = run(tmp_path / "one", None, cell=cell, steps=1)[1]
    measured = run(tmp_path / "two", chosen(when="logged", smoothness=True), cell=cell, steps=2)
    task = small_task("adding")
    model = build_model(CELLS.default(cell, hidden_size=5), task, INITS.default("torch"), 0)
    inputs, targets, _ = task.training_batch(0, 1, 8)
    gradients, weights = [], []
    for each in (model.double(), after.double()):
        loss = task.loss(each(inputs.double()).outputs, targets.double())
        parts = torch.autograd.grad(loss, [*each.parameters()])
        gradients.append(torch.cat([part.flatten() for part in parts]))
        weights.append(torch.nn.utils.parameters_to_vector(each.parameters()).detach())
    turned, moved = (gradients[1] - gradients[0]).norm(), (weights[1] - weights[0]).norm()
    found = measured[0].measures["smoothness"][0]
    assert found == pytest.approx((turned / moved).item(), rel=1e-4)


def test_smoothness_is_the_losss_without_a_penalty_and_that_of_a_stream_is_of_its_batch(
    tmp_path: Path,
) -> None:
    """A penalty that outweighs the loss changes the update, and with it little of the ratio."""
    regularizer = REGULARIZERS.default("orthogonality", weight=1e4)
    measure = chosen(when="logged", smoothness=True)
    alone = run(tmp_path / "alone", measure, steps=1)[0].measures["smoothness"][0]
    beside = run(tmp_path / "beside", measure, steps=1, regularizer=regularizer)[0].measures
    assert beside["smoothness"][0] < 10 * alone
    stream = run(tmp_path / "stream", measure, task="chars")[0].measures
    assert np.isfinite(stream["smoothness"]).all()


def test_saturated_units_and_dead_ones_are_counted(tmp_path: Path) -> None:
    _, model, observer = _observed(chosen(), nonlinearity="tanh")
    with torch.no_grad():
        model.rnn.bias_ih_l0.copy_(torch.tensor([9.0, -9.0, 0, 0, 0]))
        model.rnn.weight_hh_l0.zero_()
        model.rnn.weight_ih_l0.zero_()
        model.rnn.bias_hh_l0.zero_()
    found = _observe(small_task("adding"), model, observer).updated()
    assert found["l0/saturated"] == pytest.approx(2 / 5) and math.isnan(found["l0/dead"])
    _, model, observer = _observed(chosen(), nonlinearity="relu")
    with torch.no_grad():
        model.rnn.bias_ih_l0.copy_(torch.tensor([9.0, -9.0, 9, -9, -9]))
        model.rnn.weight_hh_l0.zero_()
        model.rnn.weight_ih_l0.zero_()
        model.rnn.bias_hh_l0.zero_()
    found = _observe(small_task("adding"), model, observer).updated()
    assert found["l0/dead"] == pytest.approx(3 / 5) and math.isnan(found["l0/saturated"])


def test_an_lstms_gates_are_open_or_closed_as_its_biases_say(tmp_path: Path) -> None:
    task = small_task("adding")
    model = build_model(CELLS.default("lstm", hidden_size=5), task, INITS.default("torch"), 0)
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.zero_()
        model.rnn.bias_ih_l0[:5] = -9  # i, f, g, o
        model.rnn.bias_ih_l0[5:10] = 9
    found = _observe(task, model, Observer(chosen(), model, task.time_steps)).updated()
    assert found["l0/gate_low/i"] == 1 and found["l0/gate_high/i"] == 0
    assert found["l0/gate_low/f"] == 0 and found["l0/gate_high/f"] == 1
    assert found["l0/gate_low/o"] == found["l0/gate_high/o"] == 0


def test_errors_start_where_there_is_one(tmp_path: Path) -> None:
    """The loss is at the first step alone: no later anchor has an error to send back."""
    task, model, observer = _observed(chosen(lag_anchors=4))
    inputs, _ = task.batch(4, training_generator(0, 1))
    with record(model, **observer.recording) as tape:
        model(inputs).hidden[0].square().mean().backward()
    found = Observation(observer, tape, inputs, lambda size: torch.zeros(())).updated()
    lag = found["l0/lag"]
    assert lag[0] == 0 and np.isnan(lag[1:]).all()


def test_what_saves_memory_is_measured_by_its_parameters_alone(tmp_path: Path) -> None:
    measures = run(tmp_path, chosen(**FULL), whole=False, tbptt=(4, 4))[0].measures
    kinds = {name.split("/")[0] for name in measures}
    assert kinds == {"step", "l0", "parameter", "clip"}
    assert {name for name in measures if name.startswith("l0/")} == {
        "l0/spectral_radius",
        "l0/sigma_max",
        "l0/nonnormality",
    }


def test_a_cell_without_a_recurrent_parameter_is_measured_without_contributions(
    tmp_path: Path,
) -> None:
    measures = run(tmp_path, chosen(**FULL), cell="orthogonal")[0].measures
    assert "l0/lag" in measures and "l0/attribution" not in measures
    np.testing.assert_allclose(measures["l0/spectral_radius"], 1, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_shortest_sequences_and_the_smallest_states_are_measured(
    cell: str, length: int, tmp_path: Path
) -> None:
    task = TASKS.default("cliff", length=length)
    assert not task.reads_out and task.output_size == 1
    part = CELLS.default(cell, hidden_size=1)
    model = build_model(part, task, INITS.default("torch"), 0)
    observer = Observer(chosen(**FULL), model, task.time_steps)
    found = _observe(task, model, observer).updated()
    assert np.shape(found["l0/lyapunov"]) == (2,) and not np.isinf(found["l0/lyapunov"]).any()
    assert np.isnan(found["l0/lyapunov"][0]) == (length == 1)
    measures = run(tmp_path, chosen(**FULL), task="cliff", cell=cell)[0].measures
    assert measures["l0/lag"].ndim == measures["input_norm"].ndim == 2


def test_frozen_weights_are_measured_without_contributions() -> None:
    task, model, _ = _observed(chosen())
    model.rnn.weight_hh_l0.requires_grad_(False)
    found = _observe(task, model, Observer(chosen(**FULL), model, task.time_steps)).updated()
    assert "l0/lag" in found and "l0/attribution" not in found
    assert "parameter/rnn.weight_hh_l0/norm" not in found


def test_a_penalty_is_part_of_the_whole_gradient_and_of_no_share(tmp_path: Path) -> None:
    """Rules and noise are those of the loss; norms and the angle of what is clipped."""
    regularizer = REGULARIZERS.default("orthogonality", weight=1.0)
    measures = run(tmp_path, chosen(**FULL), regularizer=regularizer)[0]
    shares = measures.measures["clip_effect/none"].sum(1)
    np.testing.assert_allclose(shares, 1, rtol=1e-4)
    names = [n for n in measures.measures if n.endswith("grad_norm")]
    whole = np.sqrt(sum(measures.measures[name] ** 2 for name in names))
    logged = measures.metrics["grad_norm_pre"]
    np.testing.assert_allclose(whole, logged, rtol=1e-5)


def test_a_stream_has_no_noise_scale_as_another_batch_would_be_elsewhere_in_it(
    tmp_path: Path,
) -> None:
    measures = run(tmp_path, chosen(**FULL), task="chars")[0].measures
    noise = measures["noise/variance"]
    assert np.isfinite(noise[0]) and np.isnan(noise[1:]).all()  # the first batch goes on from none


def test_what_was_measured_is_let_go_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Any]] = []

    def watched(*args: Any) -> Observation:
        made = Observation(*args)
        seen.extend(weakref.ref(layer.trajectory) for layer in args[1].values())
        return made

    def then(*args: Any) -> dict[str, float]:
        gc.collect()
        assert seen and not any(one() for one in seen)
        return evaluate(*args)

    monkeypatch.setattr("rnngrad.training.Observation", watched)
    monkeypatch.setattr("rnngrad.training.evaluate", then)
    run(tmp_path, chosen())


def test_a_layer_that_goes_the_other_way_has_its_anchors_at_its_own_end() -> None:
    layer = rnngrad.nn.GRU(3, 5, bidirectional=True)
    with record(layer, full=True, trajectory=True) as tape:
        layer(torch.randn(12, 4, 3))[0].square().sum().backward()
    for name in ("l0", "l0_reverse"):
        assert np.isfinite(lags(tape[name], 1)["lag"]).all()


def test_quantiles_are_numpys_without_what_is_missing() -> None:
    values = torch.randn(40, 17, dtype=torch.float64)
    values[torch.rand(40, 17) < 0.2] = math.nan
    values[torch.rand(40, 17) < 0.2] = -math.inf
    values[3] = math.nan
    for share in (0.05, 0.5, 0.95):
        found = _quantile(values, share)
        for row, one in zip(values.numpy(), found, strict=True):
            kept = row[~np.isnan(row)]
            wanted = np.quantile(kept, share, method="inverted_cdf") if len(kept) else math.nan
            np.testing.assert_equal(one, wanted)


def test_logged_steps_can_be_evenly_spaced_in_their_logarithm(tmp_path: Path) -> None:
    result = run(tmp_path, None, steps=120, log_per_decade=3, eval_every=1000)[0]
    assert result.metrics["step"].tolist() == [1, 3, 5, 10, 22, 47, 100, 120]


def test_every_update_is_kept_whether_logged_or_not(tmp_path: Path) -> None:
    result = run(tmp_path, None, steps=7)[0]
    updates, metrics = result.updates, result.metrics
    assert updates["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    logged = metrics["step"] - 1
    np.testing.assert_allclose(updates["loss"][logged], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(
        10 ** updates["log10_grad_norm"][logged], metrics["grad_norm_pre"], rtol=1e-5
    )
    np.testing.assert_allclose(updates["clip_coef"][logged], metrics["clip_coef"], rtol=1e-6)


def _observed(measure: Dynamics, **keys: Any) -> tuple[Task, SequenceModel, Observer]:
    task = small_task("adding")
    cell = CELLS.default("rnn", hidden_size=5, **keys)
    model = build_model(cell, task, INITS.default("torch"), 0)
    return task, model, Observer(measure, model, task.time_steps)


def _observe(task: Task, model: SequenceModel, observer: Observer, step: int = 1) -> Observation:
    inputs, targets = task.batch(16, training_generator(0, step))
    if observer.wants_inputs:
        inputs.requires_grad_()
    model.zero_grad()
    with record(model, **observer.recording) as tape:
        task.loss(model(inputs).outputs, targets).backward()

    def loss_of(size: int) -> torch.Tensor:
        few, wanted = task.batch(size, training_generator(7, step))
        if size == inputs.shape[1]:
            few, wanted = inputs, targets
        return task.loss(model(few).outputs, wanted)

    return Observation(observer, tape, inputs, loss_of)
