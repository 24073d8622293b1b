"""The diagnosis: every detector, what they add up to, what to try, and the calibration."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import hydra
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnngrad.cells import CELLS
from rnngrad.config import experiment
from rnngrad.diagnosis import (
    Diagnosis,
    Finding,
    Remedy,
    calibration,
    clip_thresholds,
    diagnose,
    diagnose_run,
    pascanu_range,
    remedies,
)
from rnngrad.diagnosis.detectors import DETECTORS, examine
from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import Verdict
from rnngrad.diagnosis.remedies import Setup
from rnngrad.diagnosis.typed import fitted
from rnngrad.launcher import plain
from rnngrad.nn import GRU, LSTM, RNN, convert, unroll
from rnngrad.runs import LayerHistory, Run, find_runs

ROOT = Path(__file__).parent.parent

AGAINST = {
    name: getattr(remedies, name)
    for name in (
        "against_vanishing",
        "against_exploding",
        "against_saturation",
        "against_dead_units",
        "against_nonfinite",
        "against_underflow",
        "against_jumps",
        "against_depth",
        "against_decay",
        "slower",
        "faster",
        "longer",
    )
}


def part(group: str, name: str) -> dict[str, Any]:
    """A part's yaml, presets resolved."""
    text = (ROOT / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return {key: value for key, value in found.items() if key != "defaults"}


def config(**changes: Any) -> dict[str, Any]:
    """The default configuration, but for ``group__key=value`` and ``group=name``."""
    base = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    made: dict[str, Any] = {"seed": 0, "device": "cpu"}
    for entry in base["defaults"]:
        if isinstance(entry, dict) and [*entry.values()] != [None]:
            group = next(iter(entry))
            made[group] = part(group, changes.pop(group, entry[group]))
    made["task"] |= {"length": 30}
    made["cell"] |= {"hidden_size": 5}
    for key, value in changes.items():
        group, _, inner = key.partition("__")
        assert inner in made[group], key
        made[group][inner] = value
    return made


STAYS = {
    "cell": ("hidden_size", "num_layers"),
    "optim": ("weight_decay", "schedule", "warmup_steps"),
}


def applied(settings: Mapping[str, Any], override: str) -> dict[str, Any]:
    """What the configuration is with an override typed behind the command.

    Sizes that were typed stay, and an optimiser's schedule and weight decay; what else was typed of
    a part goes with the part.
    """
    changed = deepcopy(dict(settings))
    for number, word in enumerate(override.split()):
        key, _, text = word.partition("=")
        group, _, inner = key.partition(".")
        before = deepcopy(changed[group])
        if inner:
            assert inner in changed[group], word
            changed[group][inner] = yaml.safe_load(text)
        else:
            new = part(group, text)
            kept = {k: v for k, v in before.items() if k in STAYS.get(group, ()) and k in new}
            changed[group] = new | kept
        # what follows may only say what the first word leaves open
        assert number or changed[group] != before, f"{word}: is so already"
    return changed


def setups() -> Iterator[dict[str, Any]]:
    """Configurations of every cell with many others' parts, those that are allowed."""
    cells = [path.stem for path in sorted((ROOT / "conf" / "cell").glob("*.yaml"))]
    inits = [path.stem for path in sorted((ROOT / "conf" / "init").glob("*.yaml"))]
    for cell, init in itertools.product(cells, inits):
        yield config(cell=cell, init=init)
    for cell, layers in itertools.product(cells, (1, 3)):
        yield config(cell=cell, cell__num_layers=layers, optim="sgd", optim__weight_decay=0.1)
        yield config(cell=cell, cell__num_layers=layers, clip="none", bptt_clip="norm")
        yield config(cell=cell, cell__num_layers=layers, clip="autoclip", trainer__tbptt_k2=10)
        yield config(cell=cell, regularizer="orthogonality", init__recurrent="orthogonal")
        yield config(cell=cell, trainer__recompute_segments=4)
        yield config(cell=cell, init__recurrent="orthogonal", init__recurrent_scale=1.5)
        yield config(cell=cell, init__recurrent="uniform", init__recurrent_scale=0.5)
    for phi in ("tanh", "sigmoid", "relu", "leaky_relu", "prelu", "elu", "linear", "modrelu"):
        yield config(cell="rnn", cell__nonlinearity=phi)
        yield config(cell="rnn", cell__nonlinearity=phi, regularizer="omega")
        yield config(cell="rnn", cell__nonlinearity=phi, init="irnn")
    for cell, phi in itertools.product(
        ("indrnn", "orthogonal", "ln_rnn", "bn_rnn"), ("relu", "tanh")
    ):
        yield config(cell=cell, cell__nonlinearity=phi)
    yield config(cell="lstm", cell__forget_bias=None)
    yield config(cell="lstm", cell__forget_bias=None, cell__forget_gate=False)
    yield config(cell="lstm", cell__chrono_length=30)
    yield config(cell="gru", cell__update_bias=1.0)
    yield config(cell="gru", cell__chrono_length=30)


def allowed(settings: Mapping[str, Any]) -> bool:
    try:
        experiment(settings)
    except ValueError:
        return False
    return True


SETUPS = [setup for setup in setups() if allowed(setup)]


def test_every_remedy_is_an_override_that_its_run_can_be_given_and_has_not() -> None:
    becomes: dict[str, dict[str, Any]] = {}
    for name, against in AGAINST.items():
        seen = 0
        for setup in SETUPS:
            found: tuple[Remedy, ...] = tuple(against(Setup(setup, 30, 0.25)))
            assert len({remedy.override for remedy in found}) == len(found)
            for remedy in found:
                made = applied(setup, remedy.override)
                becomes[json.dumps(made, sort_keys=True)] = made
                seen += 1
        assert seen, name
    for made in becomes.values():
        experiment(made)


COMMANDS = (
    "cell=rnn cell.nonlinearity=relu cell.hidden_size=7",
    "cell=rnn cell.nonlinearity=sigmoid cell.num_layers=2 optim=sgd optim.momentum=0.9",
    "cell=bn_rnn cell.gamma=0.2 init.recurrent=orthogonal init.recurrent_scale=1.5",
    "cell=rnn init.recurrent=identity init.recurrent_scale=2 clip=autoclip clip.percentile=20",
    "cell=rnn init.recurrent=uniform init.recurrent_scale=0.5 init.bias=zero",
    "cell=rnn init.recurrent=uniform init.recurrent_scale=1.0",
    "cell=rnn clip.norm_type=inf init=irnn cell.nonlinearity=relu init.bias=torch",
    "cell=gru bptt_clip=norm trainer.tbptt_k2=10 optim=sgd optim.schedule=cosine",
    "cell=rnn regularizer=omega regularizer.weight=2.0 ++cell.nonlinearity=relu",
    "experiment=cliff",
    "experiment=first_look clip=value ~clip.max_norm",
)


@pytest.fixture(scope="module")
def typing() -> Iterator[Callable[[Sequence[str]], dict[str, Any]]]:
    """The configuration of a command, as Hydra composes it; refused as the command refuses it."""

    def composed(words: Sequence[str]) -> dict[str, Any]:
        values = plain(hydra.compose("config", list(words)))
        experiment(values)
        return values

    with hydra.initialize_config_module("rnngrad.conf", version_base="1.3"):
        yield composed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_remedy_can_be_typed_and_does_what_it_says(
    command: str, typing: Callable[[Sequence[str]], dict[str, Any]]
) -> None:
    typed = ["task.length=30", *command.split()]
    before = typing(typed)
    found = {r for against in AGAINST.values() for r in against(Setup(before, 30, 0.25))}
    assert found
    for remedy in found:
        fit = fitted(remedy, typed)
        left = [word for word in typed if word not in fit.instead.split()]
        assert len(left) == len(typed) - len(fit.instead.split())
        after = typing([*left, *fit.override.split()])
        assert after == applied(before, remedy.override), fit


def test_what_has_to_be_left_out_is_said_beside_the_remedy() -> None:
    typed = ("cell=rnn", "cell.hidden_size=7", "cell.nonlinearity=relu", "seed=1")
    relu = config(cell="rnn", cell__nonlinearity="relu")
    run = replace(evidence(line(-0.2), loss=1.0, settings=relu), overrides=typed)
    said = "try first: cell=lstm in place of cell=rnn cell.nonlinearity=relu  ("
    assert said in examine(run).text()
    kept = found(run, "vanishing in time").as_dict()
    assert kept["remedies"][0] == "cell=lstm"
    assert kept["in_place_of"][0] == "cell=rnn cell.nonlinearity=relu"
    tanh = replace(run, overrides=typed[:2])
    assert "try first: cell=lstm  (" in examine(tanh).text()


def test_nothing_is_known_of_a_setup_without_a_configuration() -> None:
    for against in AGAINST.values():
        assert all("cell" not in r.override for r in against(Setup({}, 0, math.nan)))


# ---- detectors ----


def evidence(
    curve: Sequence[float] | None = None,
    *,
    loss: float | Sequence[float] | None = None,
    chance: float = 1.0,
    norms: Sequence[float] | None = None,
    steps: Sequence[int] = (1, 50, 100),
    measured: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **summary: Any,
) -> Evidence:
    """A run's, of the same curve at every measured step."""
    measures: dict[str, Any] = {"step": np.array(steps)}
    if curve is not None:
        row = np.array(curve, dtype=float)
        for kind in ("lag", "lag_p5", "lag_p95"):
            measures[f"l0/{kind}"] = np.tile(row, (len(steps), 1))
    for name, values in (measured or {}).items():
        measures[name] = np.broadcast_to(np.array(values, dtype=float), (len(steps),)).copy()
    updates: dict[str, Any] = {}
    if loss is not None:
        losses = (
            np.full(100, loss) if isinstance(loss, float | int) else np.array(loss, dtype=float)
        )
        count = len(losses)
        updates = {
            "step": np.arange(1, count + 1),
            "loss": losses,
            "log10_grad_norm": np.zeros(count) if norms is None else np.array(norms, dtype=float),
            "clip_coef": np.ones(count),
        }
        summary = {"chance_loss": chance, "status": "completed"} | summary
    return Evidence(
        config=config() if settings is None else settings,
        summary=summary,
        updates=updates,
        measures=measures,
    )


def line(slope: float, count: int = 100) -> list[float]:
    return [slope * lag for lag in range(count)]


def found(given_evidence: Evidence, symptom: str) -> Finding:
    return examine(given_evidence)[symptom]


def test_every_detector_finds_its_symptom_and_says_so_of_no_evidence_at_all() -> None:
    diagnosis = examine(Evidence())
    assert [finding.symptom for finding in diagnosis.findings] == [*DETECTORS]
    assert {finding.level for finding in diagnosis.findings} == {"unknown"}
    assert all(finding.evidence for finding in diagnosis.findings)
    assert diagnosis.verdict == "inconclusive" and not diagnosis.in_trouble


@pytest.mark.parametrize(
    ("end", "level"),
    [(-2.99, "ok"), (-3.01, "warning"), (-7.2, "warning"), (-7.3, "alarm"), (-math.inf, "alarm")],
)
def test_what_arrives_at_the_far_end_is_graded(end: float, level: str) -> None:
    curve = [*line(-0.01, 99), end]
    finding = found(evidence(curve), "vanishing in time")
    assert (finding.level, finding.value) == (level, end)
    assert finding.steps == ((1, 50, 100) if level != "ok" else ())
    assert bool(finding.remedies) == (level != "ok")


@pytest.mark.parametrize(
    ("slope", "count", "level"),
    [
        (0.0039, 120, "ok"),
        (0.0041, 120, "warning"),
        (0.0099, 120, "warning"),
        (0.0101, 120, "alarm"),
        (0.02, 19, "ok"),  # 2.3 times over the whole sequence
        (0.0101, 90, "warning"),  # 8 times
        (0.5, 15, "alarm"),  # too few lags for a line, and 10^7 times
    ],
)
def test_growth_is_graded_by_its_slope_if_it_comes_to_something(
    slope: float, count: int, level: str
) -> None:
    assert found(evidence(line(slope, count)), "exploding in time").level == level


def test_a_curve_that_is_no_line_has_no_slope_to_speak_of() -> None:
    noise = np.random.default_rng(0).normal(size=100)
    finding = found(evidence([0.0, *noise[:-1], 5.0]), "exploding in time")
    assert finding.level == "ok" and "R²" not in finding.evidence


def test_growth_that_levels_off_is_growth() -> None:
    bent = [min(0.25 * lag, 10.0) for lag in range(101)]
    finding = found(evidence(bent), "exploding in time")
    assert finding.alarm and finding.value == pytest.approx(0.1)
    assert "10^10.0" in finding.evidence and "R²" not in finding.evidence
    slow = [min(0.1 * lag, 0.9) for lag in range(1001)]  # 8 times in 1000 steps
    assert found(evidence(slow), "exploding in time").level == "ok"


def test_a_state_that_grows_beyond_float32_is_growth_and_not_a_bad_number() -> None:
    rnn = RNN(3, 6, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.6 * torch.eye(6))
        rnn.weight_ih_l0.abs_()
    x, y = batch(250)
    diagnosis = diagnose(Last(rnn).eval(), (x.abs(), y), nn.functional.mse_loss)
    assert diagnosis.verdict == "exploding"
    finding = diagnosis["exploding in time"]
    assert finding.value == pytest.approx(math.log10(1.6), rel=0.1)
    hidden = rnn(x.abs())[0].detach()
    first = int((~hidden.isfinite()).flatten(1).any(1).nonzero()[0])
    assert f"not finite from t = {first}" in finding.evidence
    broken = x.clone()
    broken[100] = math.nan
    said = diagnose(Last(RNN(3, 6)).eval(), (broken, y), nn.functional.mse_loss)
    assert said.verdict == "numerical"


@pytest.mark.parametrize(
    ("steps", "nonlinearity", "t", "verdict"),
    [
        (0, "relu", 130, "exploding"),
        (0, "relu", 3, "numerical"),  # too soon for growth
        (0, "tanh", 130, "numerical"),  # tanh has no state to grow
        (500, "relu", 130, "numerical"),  # a hundred steps were finite: nothing is known
    ],
)
def test_a_run_whose_first_states_grow_beyond_float32_explodes(
    steps: int, nonlinearity: str, t: int, verdict: str
) -> None:
    reason = (
        f"step {steps + 1}: hidden state of the last layer (5 units) is not finite from t = {t} "
        "of 150 on"
    )
    settings = config(cell="rnn", cell__nonlinearity=nonlinearity)
    run = evidence(loss=[math.nan], norms=[math.nan], settings=settings)
    run = replace(run, summary={"status": "diverged", "steps": steps, "reason": reason})
    diagnosis = examine(run)
    assert diagnosis.verdict == verdict
    overrides = [remedy.override for remedy in diagnosis.remedies]
    assert overrides and any(word.startswith("optim.lr=") for word in overrides) == (steps > 0)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 1.5), st.integers(0, 100))
def test_a_linear_rnn_of_an_orthogonal_matrix_keeps_its_closed_form(g: float, seed: int) -> None:
    rnn = RNN(2, 6, nonlinearity="linear").double()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nn.init.orthogonal_(rnn.weight_hh_l0, g)
    x = torch.randn(60, 3, 2, generator=torch.Generator().manual_seed(seed)).double()
    diagnosis = diagnose(rnn, (x, None), lambda out, _: out[0][-1].sum())
    end = 59 * math.log10(g)
    assert diagnosis["vanishing in time"].value == pytest.approx(end, abs=1e-9)
    if end > 0:
        assert diagnosis["exploding in time"].value == pytest.approx(math.log10(g), abs=1e-9)
    expected = "vanishing" if end <= -24 * math.log10(2) else "healthy"
    assert diagnosis.verdict == ("exploding" if end >= 1 else expected)


def test_explosion_beside_vanishing_is_seen_in_the_spread_alone() -> None:
    wide = evidence(line(0.0))
    wide.measures["l0/lag_p5"][:] = line(-0.1)  # type: ignore[index]
    wide.measures["l0/lag_p95"][:] = line(0.05)  # type: ignore[index]
    assert found(wide, "both at once").alarm
    assert examine(wide).verdict == "both"
    wide.measures["l0/lag_p95"][:] = line(0.001)  # type: ignore[index]
    assert found(wide, "both at once").level == "ok"


def test_what_was_recorded_stands_in_where_no_lag_was_measured_and_only_where_it_can() -> None:
    hidden = np.array([line(-0.3, 60)[::-1]])
    direct = np.full((1, 60), -np.inf)
    direct[0, -1] = 0.0
    history = LayerHistory(np.array([7]), hidden, direct, hidden, None)
    recorded = Evidence(bptt={"l0": history})
    assert found(recorded, "vanishing in time").value == pytest.approx(-0.3 * 59)
    assert found(recorded, "vanishing in time").steps == (7,)
    everywhere = replace(history, direct=np.zeros((1, 60)))
    assert found(Evidence(bptt={"l0": everywhere}), "vanishing in time").level == "unknown"
    clipped = replace(history, clipped=np.zeros((1, 60)))
    assert found(Evidence(bptt={"l0": clipped}), "vanishing in time").level == "unknown"
    truncated = Evidence(bptt={"l0": history}, config={"trainer": {"tbptt_k2": 5}})
    assert found(truncated, "vanishing in time").level == "unknown"


def test_the_layer_that_keeps_most_decides_whether_the_gradient_vanishes() -> None:
    two = evidence(line(-0.3))
    two.measures["l1/lag"] = two.measures["l0/lag"] / 100  # type: ignore[index]
    assert found(two, "vanishing in time").level == "ok"
    assert "l1" in found(two, "vanishing in time").evidence


@pytest.mark.parametrize(("ratio", "level"), [(9, "ok"), (11, "warning"), (101, "alarm")])
def test_the_top_layer_is_compared_with_the_lowest(ratio: float, level: str) -> None:
    measured = {"parameter/rnn.weight_hh_l0/norm": 2.0, "parameter/rnn.weight_hh_l1/norm": 4.0}
    measured["parameter/rnn.weight_hh_l0/update_norm"] = 2e-3
    measured["parameter/rnn.weight_hh_l1/update_norm"] = 4e-3 * ratio
    finding = found(evidence(measured=measured), "lower layers barely learn")
    assert finding.level == level and finding.value == pytest.approx(ratio)


def test_layers_are_compared_within_their_stack_and_by_the_numbers_that_are_told() -> None:
    measured: dict[str, Any] = {}
    for name, ratio in (("enc.weight_hh_l0", 1e-3), ("dec.weight_hh_l0", 1.0)):
        measured |= {f"parameter/{name}/norm": 1.0, f"parameter/{name}/update_norm": ratio}
    alone = found(evidence(measured=measured), "lower layers barely learn")
    assert (alone.level, alone.evidence) == ("unknown", "there is one layer only")
    measured |= {"parameter/dec.weight_hh_l1/norm": 1.0}
    measured |= {"parameter/dec.weight_hh_l1/update_norm": [1.0, 1.0, 200.0]}
    finding = found(evidence(measured=measured), "lower layers barely learn")
    assert finding.alarm and finding.value == 200 and finding.steps == (100,)
    assert "dec.l1 changes 200 times as fast as dec.l0" in finding.evidence
    assert "by 2.0e+02 of its weights beside 1.0e+00" in finding.evidence


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_sequence_of_one_step_has_no_lag(shape: tuple[int, ...]) -> None:
    run = evidence(loss=1.0)
    for kind in ("lag", "lag_p5", "lag_p95", "lag_cell"):
        run.measures[f"l0/{kind}"] = np.zeros(shape)  # type: ignore[index]
    assert found(run, "vanishing in time").level == "unknown"


def test_a_curve_without_a_spread_has_none() -> None:
    run = evidence(line(-0.2), loss=1.0)
    for kind in ("lag_p5", "lag_p95"):
        del run.measures[f"l0/{kind}"]  # type: ignore[attr-defined]
    finding = found(run, "both at once")
    assert (finding.level, finding.evidence) == ("unknown", "no spread was measured")


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
def test_weights_that_no_gradient_holds_up_are_told_from_those_that_one_does(
    name: str, momentum: float
) -> None:
    weight = torch.full((8,), 1.0, requires_grad=True)
    optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD([weight], 0.01, momentum=momentum, weight_decay=0.5),
        "adamw": lambda: torch.optim.AdamW([weight], 0.01, weight_decay=0.5),
    }
    optimizer, norms = optimizers[name](), []
    for _ in range(201 if momentum == 0 else 26):
        norms.append(weight.detach().norm().item())
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    settings = config(optim=name, optim__lr=0.01, optim__weight_decay=0.5)
    if name == "sgd":
        settings["optim"]["momentum"] = momentum
    given_evidence = replace(
        evidence(
            steps=range(1, len(norms) + 1),
            measured={"parameter/rnn.weight_hh_l0/norm": norms},
            settings=settings,
        ),
        metrics={"step": np.array([1, len(norms)]), "lr": np.array([0.01, 0.01])},
    )
    finding = found(given_evidence, "weights shrink by decay alone")
    assert finding.value == pytest.approx(norms[-1] / norms[0])
    assert finding.level == "warning" and 0.1 < finding.value < 0.5
    assert "weight decay alone would leave" in finding.evidence
    # halved as well, but not as decay would
    other = np.linspace(1, 0.4, len(norms))
    given_evidence.measures["parameter/rnn.weight_hh_l0/norm"][:] = other  # type: ignore[index]
    assert found(given_evidence, "weights shrink by decay alone").level == "ok"
    given_evidence.measures["parameter/rnn.weight_hh_l0/norm"][-1] = 0.05  # type: ignore[index]
    assert found(given_evidence, "weights shrink by decay alone").alarm


def test_noise_is_no_progress_and_a_falling_loss_is_no_stall() -> None:
    stalls = []
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(size=400)
        stalls.append(found(evidence(loss=0.95 + 0.2 * noise), "stalled").bad)
        falls = np.linspace(1.0, 0.3, 400) * (1 + 0.1 * noise)
        assert found(evidence(loss=falls), "stalled").level == "ok"
    assert sum(stalls) >= 95  # two standard errors are exceeded by chance


def test_lack_of_evidence_is_no_alarm() -> None:
    noise = np.random.default_rng(0).normal(scale=0.3, size=400)
    slow = np.linspace(1.0, 0.85, 400) + noise  # 1.5 % a tenth
    finding = found(evidence(loss=slow), "stalled")
    assert finding.level == "warning" and " ± " in finding.evidence
    still = evidence(loss=1.0 + noise / 1000)
    assert found(still, "stalled").alarm
    assert re.search(r"the loss (falls|rises) by \d\S* ± ", found(still, "stalled").evidence)
    rising = found(evidence(loss=np.linspace(1.0, 1.3, 400)), "stalled")
    assert rising.alarm and rising.value < 0 and "the loss rises by " in rising.evidence
    assert "-" not in rising.evidence


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.1, 0.2), st.integers(0, 10**6))
def test_a_fall_is_within_its_error_of_what_it_is(slope: float, seed: int) -> None:
    straight = 1.0 - slope * np.linspace(0, 1, 2000)
    noise = np.random.default_rng(seed).normal(scale=0.1, size=2000)
    exact = evidence(loss=straight).improvement(0.6)
    fall, error = evidence(loss=straight + noise).improvement(0.6)
    assert error > 0 and abs(fall - exact.fall) < 5 * error
    assert exact.fall == pytest.approx(0.1 * slope / (1 - 0.55 * slope), rel=1e-2, abs=1e-9)


def test_a_loss_that_has_converged_far_under_chance_does_not_stall() -> None:
    assert found(evidence(loss=0.1), "stalled").level == "ok"
    assert found(evidence(loss=[1.0] * 5), "stalled").level == "unknown"


@pytest.mark.parametrize(("loss", "level"), [(0.85, "ok"), (0.95, "warning"), (0.99, "alarm")])
def test_the_loss_is_compared_with_chance(loss: float, level: str) -> None:
    assert found(evidence(loss=loss), "at chance").level == level
    assert found(evidence(loss=loss, chance=math.nan), "at chance").level == "unknown"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(150, 390))
def test_a_spike_of_the_norm_is_found_where_it_is(seed: int, where: int) -> None:
    norms = np.random.default_rng(seed).normal(scale=0.1, size=400)
    assert found(evidence(loss=[1.0] * 400, norms=norms), "jumps").level == "ok"
    norms[where] = 1.7
    finding = found(evidence(loss=[1.0] * 400, norms=norms), "jumps")
    assert finding.level == "warning" and finding.steps == (where + 1,)
    norms[where] = 3.0  # an alarm if the run is off for it
    assert found(evidence(loss=[1.0] * 400, norms=norms), "jumps").level == "warning"
    assert found(evidence(loss=[1.0] * 399 + [math.nan], norms=norms), "jumps").alarm
    assert found(evidence(loss=[1.6] * 400, norms=norms), "jumps").alarm
    lost = {"step": np.array([1, 200, 400]), "eval_loss": np.array([1.0, 0.6, 1.0])}
    back = replace(evidence(loss=[1.0] * 400, norms=norms), metrics=lost)
    assert found(back, "jumps").alarm and "is lost" in found(back, "jumps").evidence


def test_a_spike_in_norms_that_vary_by_as_much_is_no_alarm() -> None:
    norms = np.random.default_rng(0).normal(size=400)
    assert norms.max() > np.median(norms) + 2
    assert not found(evidence(loss=[9.0] * 400, norms=norms), "jumps").alarm


def test_steps_out_of_proportion_to_the_weights_are_jumps() -> None:
    for ratio, level in ((0.001, "ok"), (0.09, "ok"), (0.5, "warning"), (1.1, "alarm")):
        measured = {"parameter/a/norm": 3.0, "parameter/b/norm": 4.0}
        measured |= {"parameter/a/update_norm": 3.0 * ratio, "parameter/b/update_norm": 4.0 * ratio}
        finding = found(evidence(measured=measured), "jumps")
        assert finding.level == level and finding.value == pytest.approx(ratio)


def test_one_update_as_large_as_the_weights_is_a_jump_and_adams_first_is_none() -> None:
    measured = {"parameter/a/norm": 1.0, "parameter/a/update_norm": [0.1, 0.001, 0.001]}
    assert found(evidence(measured=measured), "jumps").level == "ok"
    measured["parameter/a/update_norm"] = [0.001, 1.5, 0.001]
    finding = found(evidence(measured=measured), "jumps")
    assert finding.alarm and finding.steps == (50,) and finding.value == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_found_at_its_step(value: float) -> None:
    losses = [1.0] * 60 + [value]
    finding = found(evidence(loss=losses, status="diverged"), "loss not finite")
    assert finding.alarm and finding.steps == (61,)
    assert examine(evidence(loss=losses, status="diverged")).verdict == "numerical"


def test_a_gradient_of_exactly_0_is_finite() -> None:
    zero = evidence(loss=1.0, norms=[-math.inf] * 100)
    assert found(zero, "loss not finite").level == "ok"
    assert found(zero, "underflow").alarm and len(found(zero, "underflow").steps) == 10
    assert examine(zero).verdict == "numerical"


def test_a_weight_that_is_no_number_is_named_with_its_first_step() -> None:
    measured = {"parameter/rnn.w/norm": [1.0, math.nan, math.nan], "parameter/b/norm": 1.0}
    finding = found(evidence(measured=measured), "weights not finite")
    assert finding.alarm and finding.steps == (50,) and "rnn.w is not finite" in finding.evidence
    said = evidence(loss=1.0, status="diverged", reason="step 9: parameter rnn.w is not finite")
    assert found(said, "weights not finite").alarm


def test_steps_at_which_nothing_was_measured_are_no_nan_weights() -> None:
    measured = {"parameter/a/norm": [1.0, math.nan, 1.0], "parameter/b/norm": [1.0, math.nan, 1.0]}
    assert found(evidence(loss=1.0, measured=measured), "weights not finite").level == "ok"


@pytest.mark.parametrize("first", [0, 1, 2])
def test_weights_that_are_all_nan_are_not_finite(first: int) -> None:
    norms = [1.0] * first + [math.nan] * (3 - first)
    measured = {"parameter/a/norm": norms, "parameter/b/norm": norms}
    lost = evidence(loss=[1.0] * (0, 49, 99)[first] + [math.nan], measured=measured)
    finding = found(lost, "weights not finite")
    assert finding.alarm and finding.steps == ((1, 50, 100)[first],)
    # a loss that goes on was not made by such weights: nothing was measured there
    assert found(evidence(loss=1.0, measured=measured), "weights not finite").level == "ok"


def test_a_gradient_whose_square_float32_cannot_hold_is_an_overflow() -> None:
    assert found(evidence(loss=1.0, norms=[17.9] * 100), "overflow").level == "ok"
    assert found(evidence(loss=1.0, norms=[18.1] * 100), "overflow").alarm


def test_saturated_and_dead_units_are_those_of_the_worst_layer() -> None:
    measured = {"l0/saturated": 0.1, "l1/saturated": 0.6, "l0/dead": 0.5, "l1/dead": math.nan}
    given_evidence = evidence(measured=measured)
    assert found(given_evidence, "saturation").alarm
    assert found(given_evidence, "saturation").evidence.startswith("l1: 60 %")
    assert found(given_evidence, "dead units").level == "warning"


def test_gates_that_keep_memory_are_not_shut() -> None:
    memory = {"l0/gate_high/f": 1.0, "l0/gate_low/f": 0.0, "l0/gate_low/i": 0.99}
    memory |= {"l0/gate_low/o": 0.1}
    assert found(evidence(measured=memory), "shut gates").level == "ok"
    assert found(evidence(measured=memory | {"l0/gate_low/o": 0.97}), "shut gates").alarm
    forgets = found(evidence(measured=memory | {"l0/gate_low/f": 0.97}), "shut gates")
    assert forgets.level == "warning"
    assert found(evidence(measured={"l0/gate_high/z": 1.0}), "shut gates").level == "unknown"


@pytest.mark.parametrize(
    ("rule", "clipped", "level"),
    [
        ("norm", 95, "warning"),
        ("norm", 50, "ok"),
        ("norm", 0, "warning"),
        ("autoclip", 95, "unknown"),
        ("normalize", 100, "unknown"),
        ("none", 0, "unknown"),
    ],
)
def test_a_fixed_threshold_is_neither_always_nor_never_to_clip(
    rule: str, clipped: int, level: str
) -> None:
    run = evidence(loss=1.0, norms=np.linspace(0, 1, 100), settings=config(clip=rule))
    run.updates["clip_coef"][:clipped] = 0.5  # type: ignore[index]
    finding = found(run, "clip regime")
    assert finding.level == level
    if level == "warning":
        (remedy,) = finding.remedies
        threshold = float(remedy.override.removeprefix("clip.max_norm="))
        assert np.mean(10 ** run.updates["log10_grad_norm"] > threshold) == pytest.approx(
            0.1, abs=0.02
        )


def test_what_bptt_clip_clips_is_compared_with_one_in_a_hundred() -> None:
    symptom = "clipped on the way back"
    assert found(evidence(loss=1.0, bptt_clip_fraction=0.009), symptom).level == "ok"
    assert found(evidence(loss=1.0, bptt_clip_fraction=0.02), symptom).level == "warning"
    assert found(evidence(loss=1.0), symptom).level == "unknown"


# ---- thresholds to choose from ----


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=300), st.integers(0, 3))
def test_a_threshold_clips_the_fraction_that_it_names(norms: list[float], broken: int) -> None:
    found_thresholds = clip_thresholds(
        np.array([*norms, *[math.nan, math.inf, -math.inf][:broken]])
    )
    values = 10.0 ** np.array(norms)
    for percentile, threshold, fraction in found_thresholds:
        assert fraction <= 1 - percentile / 100 + 1 / len(norms)
        assert (
            np.mean(values > threshold * (1 + 1e-5))
            <= fraction
            <= np.mean(values > threshold * (1 - 1e-5))
        )
    assert [t.threshold for t in found_thresholds] == sorted(t.threshold for t in found_thresholds)


def test_no_norm_suggests_no_threshold() -> None:
    assert clip_thresholds(np.array([math.nan, -math.inf])) == []
    assert pascanu_range(np.empty(0)) is None


def test_pascanus_range_is_around_the_mean_norm() -> None:
    assert pascanu_range(np.log10([1.0, 2.0, 6.0])) == pytest.approx((1.5, 30.0))


# ---- the verdict ----


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([-0.5, 0.0, 0.5]),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([{"solved_at": 90}, {}]),
)
def test_no_run_that_has_learnt_is_sick(
    slope: float, saturated: float, ratio: float, summary: dict[str, int]
) -> None:
    measured = {
        "l0/saturated": saturated,
        "parameter/a/norm": 1.0,
        "parameter/a/update_norm": ratio,
    }
    run = evidence(line(slope), loss=0.2, measured=measured, **summary)
    assert examine(run).verdict == "healthy"
    assert examine(run).because == ()


def test_what_alarms_in_a_run_that_does_not_learn_is_a_warning_in_one_that_does() -> None:
    stuck, learns = evidence(line(-0.2), loss=1.0), evidence(line(-0.2), loss=0.2)
    assert found(stuck, "vanishing in time").alarm
    assert found(learns, "vanishing in time") == replace(
        found(stuck, "vanishing in time"), level="warning"
    )


def test_a_run_that_has_solved_its_task_and_then_diverged_is_not_healthy() -> None:
    run = evidence(line(0.0), loss=[*[0.01] * 99, math.nan], status="diverged", solved_at=50)
    assert examine(run).verdict == "numerical"


@pytest.mark.parametrize(
    ("slope", "measured", "losses", "verdict"),
    [
        (-0.2, {}, 1.0, "vanishing"),
        (-0.04, {}, 1.0, "vanishing"),  # a warning alone, of a run that stands still at chance
        (0.0, {}, 1.0, "inconclusive"),
        (0.05, {}, 1.0, "exploding"),
        (-0.2, {"l0/saturated": 0.9}, 1.0, "saturated"),
        (0.05, {"l0/saturated": 0.9}, 1.0, "exploding"),
        (0.05, {}, [1.0] * 99 + [math.nan], "exploding"),
        (0.0, {}, [1.0] * 99 + [math.nan], "numerical"),
        (-0.2, {}, [1.0] * 99 + [math.nan], "numerical"),
    ],
)
def test_the_verdict_of_a_run_that_does_not_learn_is_the_first_that_holds(
    slope: float, measured: dict[str, float], losses: float | list[float], verdict: str
) -> None:
    assert examine(evidence(line(slope), loss=losses, measured=measured)).verdict == verdict


@pytest.mark.parametrize(
    ("losses", "status"), [([], "failed"), ([1.0] * 3, "interrupted"), ([1.0] * 3, "running")]
)
def test_a_run_that_has_hardly_begun_is_neither_healthy_nor_at_chance(
    losses: list[float], status: str
) -> None:
    flat, lost = (evidence(line(slope), loss=losses, status=status) for slope in (0.0, -0.2))
    assert examine(flat).verdict == "inconclusive"
    assert found(flat, "at chance").level == "unknown"
    assert examine(lost).because == ("vanishing in time",)


def test_too_few_lags_for_a_line_and_nothing_else_is_inconclusive() -> None:
    assert examine(evidence([0.0] * 10, loss=1.0)).verdict == "inconclusive"


def test_the_text_says_what_is_wrong_why_and_what_to_type_first() -> None:
    diagnosis = examine(evidence(line(-0.2), loss=1.0, settings=config(cell="rnn")))
    lines = diagnosis.text().splitlines()
    assert lines[0] == "diagnosis: vanishing" and diagnosis.in_trouble
    assert "10^-19.8 arrives 99 steps before" in lines[1]
    assert any(entry.strip().startswith("try first: cell=lstm") for entry in lines)
    assert len(lines) <= 8


def test_a_learning_rate_that_throws_the_weights_off_is_answered_by_one_that_does_not() -> None:
    measured = {"parameter/a/norm": 1.0, "parameter/a/update_norm": [80.0, 0.01, 0.01]}
    run = evidence(line(0.0), loss=500.0, measured=measured, settings=config(optim__lr=10.0))
    diagnosis = examine(run)
    assert diagnosis.verdict == "exploding"
    overrides = [remedy.override for remedy in diagnosis.remedies]
    assert overrides[0] == "optim.lr=1e-3"  # 10 / 80 / 100, to one digit
    assert sum(override.startswith("optim.lr=") for override in overrides) == 1
    assert not any(override.startswith("trainer.") for override in overrides)


def test_clipping_is_suggested_at_a_norm_seen_unless_those_have_exploded() -> None:
    for level, threshold in ((-1.0, "0.1"), (6.0, "1")):
        run = evidence(line(0.05), loss=1.0, norms=[level] * 100, settings=config(clip="none"))
        assert examine(run).remedies[0].override == f"clip=norm clip.max_norm={threshold}"


def test_a_handful_of_norms_suggests_no_threshold() -> None:
    for count, threshold in ((1, "1"), (19, "1"), (100, "0.1")):
        settings = config(clip="none")
        run = evidence(line(0.05), loss=[1.0] * count, norms=[-1.0] * count, settings=settings)
        clip = examine(run)["exploding in time"].remedies[0].override
        assert clip == f"clip=norm clip.max_norm={threshold}"


def test_a_threshold_among_l2_norms_is_suggested_for_the_l2_norm() -> None:
    largest = config(clip="norm", clip__norm_type=math.inf, clip__max_norm=1.0)
    run = evidence(line(0.05), loss=1.0, norms=[-1.0] * 100, settings=largest)
    run.updates["clip_coef"][:] = 0.5  # type: ignore[index]
    for symptom in ("exploding in time", "clip regime"):
        word = found(run, symptom).remedies[0].override
        assert word == "clip.max_norm=0.1 clip.norm_type=2"


def test_three_updates_have_no_clip_regime() -> None:
    run = evidence(loss=[1.0] * 3, norms=[1.0] * 3, settings=config(clip="norm"))
    run.updates["clip_coef"][:] = 0.5  # type: ignore[index]
    assert found(run, "clip regime").level == "ok"


def test_a_number_that_is_none_out_of_the_blue_points_at_the_data() -> None:
    calm, wild = (
        evidence(loss=[1.0] * 60 + [math.nan]),
        evidence(loss=[1.0] * 60 + [math.nan], norms=[3.0] * 61),
    )
    assert "look at the data of that step" in found(calm, "loss not finite").evidence
    assert "look at the data" not in found(wild, "loss not finite").evidence


def test_a_healthy_diagnosis_is_one_line() -> None:
    assert examine(evidence(line(0.0), loss=0.1)).text() == "diagnosis: healthy"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([math.nan, math.inf, -math.inf, 0.5]), st.floats(-1, 1))
def test_a_diagnosis_can_be_kept_as_json(loss: float, slope: float) -> None:
    diagnosis = examine(evidence(line(slope), loss=[1.0] * 50 + [loss]))
    kept = json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert kept["verdict"] == diagnosis.verdict
    keys = {"symptom", "level", "value", "threshold", "evidence", "steps"}
    keys |= {"remedies", "in_place_of"}
    assert [finding["symptom"] for finding in kept["findings"]] == [*DETECTORS]
    assert all(finding.keys() == keys for finding in kept["findings"])


def test_an_unknown_symptom_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(KeyError, match="there are vanishing in time, "):
        examine(Evidence())["banana"]


# ---- a model before training ----


class Last(nn.Module):
    """Layers, batch normalisation, dropout, and the last state."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return self.drop(self.norm(scale * out[-1]))


def batch(steps: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, 4, 3, generator=generator).to(dtype)
    return x, torch.zeros(4, 6, dtype=dtype)


def everything(model: nn.Module, *tensors: Tensor) -> list[bytes]:
    kept = [*model.parameters(), *model.buffers(), *tensors]
    kept += [t.grad for t in (*model.parameters(), *tensors) if t.grad is not None]
    return [t.detach().numpy().tobytes() for t in kept] + [torch.get_rng_state().numpy().tobytes()]


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_diagnosing_a_model_leaves_it_bitwise_as_it_was(graded: bool, training: bool) -> None:
    model = Last(convert(nn.LSTM(3, 6))).train(training)
    x, y = batch()
    x.requires_grad_()
    if graded:
        nn.functional.mse_loss(model(x), y).backward()
    before = everything(model, x, y), [p.grad for p in model.parameters()]
    torch.manual_seed(1)
    state = everything(model, x, y)
    diagnose(model, (x, y), nn.functional.mse_loss)
    assert everything(model, x, y) == state
    assert all(a is b.grad for a, b in zip(before[1], model.parameters(), strict=True))
    assert model.training is training and model.drop.training is training


def test_what_lies_around_the_model_is_left_as_it_was_too() -> None:
    table, head = nn.Embedding(5, 3), nn.Linear(6, 6)
    x, y = table(torch.randint(5, (40, 4))), batch()[1].requires_grad_()

    class Counting(nn.Module):
        """A loss with parameters and a buffer, and a head that belongs to nobody."""

        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls = self.calls + 1
            loss: Tensor = (self.weight * (head(output) - target) ** 2).mean()
            return loss

    class InPlace(Last):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x.mul_(2), scale)

    model, loss = InPlace(LSTM(3, 6)), Counting()
    before = everything(head, y), x.detach().clone()
    assert diagnose(model, (x, y), loss).findings
    assert everything(head, y) == before[0] and torch.equal(x, before[1])
    assert loss.calls == 0
    assert all(p.grad is None for p in (table.weight, head.weight, loss.weight, y))
    x.sum().backward()  # the caller's graph is whole
    assert table.weight.grad is not None


def test_a_loss_that_raises_leaves_the_model_as_it_was() -> None:
    model = Last(LSTM(3, 6))
    state = everything(model)

    def refuse(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diagnose(model, batch(), refuse)
    assert everything(model) == state
    assert diagnose(model, batch(), nn.functional.mse_loss).findings


def test_a_model_can_be_diagnosed_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert diagnose(Last(GRU(3, 6)), batch(), nn.functional.mse_loss).findings
        assert not torch.is_grad_enabled()


def test_a_tuple_of_inputs_is_given_one_by_one() -> None:
    x, y = batch(100)
    weak = diagnose(Last(RNN(3, 6)).eval(), ((x, 1e-3), y + 1), nn.functional.mse_loss)
    strong = diagnose(Last(RNN(3, 6)).eval(), ((x, 1.0), y + 1), nn.functional.mse_loss)
    assert weak.verdict == strong.verdict == "vanishing"


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_converted_layer_of_torchs_own_vanishes_and_gets_remedies_of_its_kind(
    kind: Callable[[int, int], nn.RNNBase],
) -> None:
    torch.manual_seed(0)
    x, y = batch(150)
    diagnosis = diagnose(Last(convert(kind(3, 6))).eval(), (x, y + 1), nn.functional.mse_loss)
    assert diagnosis.verdict == "vanishing"
    first = {nn.RNN: "cell=lstm", nn.LSTM: "cell.forget_bias=1", nn.GRU: "cell.update_bias=1"}
    assert diagnosis.remedies[0].override == first[kind]


def test_a_cell_run_by_unroll_is_diagnosed_too() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = CELLS.default("orthogonal", hidden_size=6).cell(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = unroll(self.cell, x)[0][-1]
            return out

    x, y = batch(60)
    diagnosis = diagnose(Mine(), (x, y + 1), nn.functional.mse_loss)
    assert diagnosis.verdict == "healthy"
    assert abs(diagnosis["vanishing in time"].value) < 0.5


def test_the_lower_layers_of_a_model_are_compared_by_their_gradients() -> None:
    torch.manual_seed(0)
    x, y = batch()
    deep = RNN(3, 6, num_layers=4, nonlinearity="sigmoid")
    model = Last(deep).eval()
    diagnosis = diagnose(model, (x, y + 1), nn.functional.mse_loss)
    finding = diagnosis["lower layers barely learn"]
    norms = {}
    for layer in (0, 3):
        pair = [deep.get_parameter(f"weight_{kind}_l{layer}") for kind in ("ih", "hh")]
        nn.functional.mse_loss(model(x), y + 1).backward()
        gradient = torch.cat([p.grad.flatten() for p in pair]).norm()
        norms[layer] = gradient / torch.cat([p.detach().flatten() for p in pair]).norm()
        model.zero_grad()
    assert finding.value == pytest.approx((norms[3] / norms[0]).item(), rel=1e-5)
    assert finding.bad and "has a gradient" in finding.evidence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_loss_is_no_number_is_numerical(value: float) -> None:
    x, y = batch()
    diagnosis = diagnose(Last(LSTM(3, 6)), (x, y + value), nn.functional.mse_loss)
    assert diagnosis.verdict == "numerical"
    assert diagnosis["loss not finite"].alarm


class Chunks(nn.Module):
    """A tanh RNN called on a few steps at a time."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk, self.rnn = chunk, RNN(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for part in x.split(self.chunk):
            out, h = self.rnn(part, h)
        last: Tensor = out[-1]
        return last


@pytest.mark.parametrize("chunk", [1, 40])
def test_one_call_of_many_says_nothing_of_the_whole_sequence(chunk: int) -> None:
    x, y = batch(120)
    diagnosis = diagnose(Chunks(chunk), (x, y + 1), nn.functional.mse_loss)
    assert diagnosis.verdict == "inconclusive"
    finding = diagnosis["vanishing in time"]
    assert finding.level == "unknown"
    assert f"rnn.l0 was called {120 // chunk} times" in finding.evidence
    whole = diagnose(Chunks(120), (x, y + 1), nn.functional.mse_loss)
    assert whole.verdict == "vanishing"


def test_two_sequences_through_one_layer_are_not_one_sequence_in_two_parts() -> None:
    class Twice(Last):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) + super().forward(-x)

    x, y = batch(120)
    diagnosis = diagnose(Twice(RNN(3, 6)).eval(), (x, y + 1), nn.functional.mse_loss)
    assert diagnosis.verdict == "vanishing"
    assert "119 steps before" in diagnosis["vanishing in time"].evidence


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_units_at_their_ends_are_seen_before_training(nonlinearity: str) -> None:
    rnn = RNN(3, 6, nonlinearity=nonlinearity)
    with torch.no_grad():
        rnn.weight_ih_l0.mul_(1000)
        rnn.weight_hh_l0.mul_(50)
        if nonlinearity == "relu":
            rnn.bias_ih_l0.fill_(-1e5)
    x, y = batch()
    diagnosis = diagnose(Last(rnn).eval(), (x, y + 1), nn.functional.mse_loss)
    assert diagnosis.verdict == "saturated"


def test_a_model_with_nothing_to_record_is_refused() -> None:
    with pytest.raises(ValueError, match="convert"):
        diagnose(nn.LSTM(3, 6), batch(), lambda out, y: out[0].sum())


# ---- runs cut short ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, as the command line leaves it."""
    folder = tmp_path_factory.mktemp("cut")
    case = calibration.Case("short", "vanishing", "task.length=25 cell=rnn trainer.steps=60")
    calibration.train_case(case, [0], folder)
    (path,) = find_runs(folder)
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_run_cut_short_anywhere_still_has_a_diagnosis(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(trained, copy)
    names = sorted(str(p.relative_to(copy)) for p in copy.glob("**/*") if p.is_file())
    for name in data.draw(st.sets(st.sampled_from(names), min_size=1)):
        path = copy / name
        if path.name == "summary.json":  # written whole or not at all; its values may be missing
            summary = json.loads(path.read_text())
            kept = data.draw(st.sets(st.sampled_from(sorted(summary))))
            path.write_text(json.dumps({key: summary[key] for key in kept}))
            continue
        content = path.read_bytes()
        end = data.draw(st.one_of(st.just(-1), st.integers(0, len(content))))
        if end < 0:
            path.unlink()
        else:
            path.write_bytes(content[:end])
    diagnosis = diagnose_run(Run(copy))
    assert [finding.symptom for finding in diagnosis.findings] == [*DETECTORS]
    json.dumps(diagnosis.as_dict(), allow_nan=False)


def test_a_whole_run_knows_what_is_wrong_with_it(trained: Path) -> None:
    diagnosis = diagnose_run(Run(trained))
    assert isinstance(diagnosis, Diagnosis)
    known = {finding.symptom for finding in diagnosis.findings if finding.level != "unknown"}
    assert known >= {"vanishing in time", "at chance", "jumps", "loss not finite", "underflow"}


# ---- the calibration ----


def test_the_calibration_is_as_broad_as_it_is_said_to_be() -> None:
    cases = calibration.CASES
    healthy = [case for case in cases if case.verdict == "healthy"]
    assert len(calibration.JUDGING) == 10
    assert not {*calibration.JUDGING} & {*calibration.TUNING}
    assert len(healthy) * 10 >= 20
    assert 2 * sum(case.solves for case in healthy) >= len(healthy)
    assert {case.verdict for case in cases} == {*get_args(Verdict)}
    shown = {symptom for case in cases for symptom in case.shows}
    assert shown <= DETECTORS.keys()
    assert DETECTORS.keys() - shown == {"clipped on the way back"}
    assert len({case.name for case in cases}) == len(cases)


SHORT = ("GRU, temporal order", "tanh RNN, adding, T = 100", "orthogonal x 1.1, linear")


def test_the_calibration_in_its_shortest_form_is_right(tmp_path: Path) -> None:
    cases = [case for case in calibration.CASES if case.name in SHORT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "UNTRAINED", calibration.UNTRAINED[:5])
        judged = calibration.calibrate([0, 1], tmp_path, cases)
    assert len(judged) == 2 * (len(SHORT) + 5)
    assert all(found.right for found in judged), calibration.tables(judged, cases)


def test_the_page_shows_the_calibration_of_every_case() -> None:
    page = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(calibration.START)
    table = rest.partition(calibration.END)[0]
    for case in (*calibration.CASES, *calibration.UNTRAINED):
        assert f"| {case.name} | {case.verdict} | " in table
    found = re.findall(r"^(\d+) of (\d+) verdicts are right", table, re.M)
    assert len(found) == 2
    assert all(int(right) >= 0.95 * int(count) for right, count in found)
    assert len(re.findall(r"are: 0 of\nthese are called sick", table)) == 2


def test_the_page_names_every_symptom() -> None:
    page = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    for symptom in DETECTORS:
        assert f"### {symptom}" in page.lower().replace("### symptom by symptom", ""), symptom


class Beside(torch.nn.Module):
    """A long memory beside a short one."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = torch.nn.GRU(3, 16), torch.nn.GRU(3, 16)
        self.readout = torch.nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        ends = [self.long(x)[0][-1], self.short(x[-5:])[0][-1]]
        return self.readout(torch.cat(ends, -1))  # type: ignore[no-any-return]


def test_a_short_layer_does_not_hide_that_a_long_one_loses_everything() -> None:
    torch.manual_seed(0)
    batch = torch.randn(100, 4, 3), torch.randn(4, 1)
    found = diagnose(convert(Beside()), batch, torch.nn.functional.mse_loss)
    assert found.verdict == "vanishing"
    assert found["vanishing in time"].evidence.startswith("long.l0")
