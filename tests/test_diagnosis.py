"""The diagnosis: every detector, what they add up to, what to try, and the calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rnngrad.config import experiment
from rnngrad.diagnosis import remedies
from rnngrad.diagnosis.findings import Remedy
from rnngrad.diagnosis.remedies import Setup

ROOT = Path(__file__).parent.parent

AGAINST = {
    name: getattr(remedies, name)
    for name in (
        "against_vanishing",
        "against_exploding",
        "against_saturation",
        "against_dead_units",
        "against_nonfinite",
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
        if isinstance(entry, dict) and (group := next(iter(entry))) != "experiment":
            made[group] = part(group, changes.pop(group, entry[group]))
    made["task"] |= {"length": 30}
    made["cell"] |= {"hidden_size": 5}
    for key, value in changes.items():
        group, _, inner = key.partition("__")
        assert inner in made[group], key
        made[group][inner] = value
    return made


def applied(settings: Mapping[str, Any], override: str) -> dict[str, Any]:
    """What the configuration is with an override typed behind the command.

    Sizes that were typed stay; what else was typed of a part goes with the part.
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
            kept = {k: v for k, v in before.items() if k in ("hidden_size", "num_layers")}
            changed[group] = part(group, text) | (kept if group == "cell" else {})
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


SETUPS = [settings for settings in setups() if allowed(settings)]


@pytest.mark.parametrize("against", AGAINST)
def test_every_remedy_is_an_override_that_this_run_can_be_given_and_has_not(against: str) -> None:
    seen = set()
    for settings in SETUPS:
        found: tuple[Remedy, ...] = tuple(AGAINST[against](Setup(settings, 30, 0.25)))
        assert len({remedy.override for remedy in found}) == len(found)
        for remedy in found:
            seen.add(remedy.override)
            experiment(applied(settings, remedy.override))
    assert seen


def test_nothing_is_known_of_a_setup_without_a_configuration() -> None:
    for against in AGAINST.values():
        assert all("cell" not in r.override for r in against(Setup({}, 0, math.nan)))
