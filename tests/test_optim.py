"""Optimisers against their update rules in plain Python, schedules against their formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnngrad.optim import OPTIMS
from rnngrad.parts import InputError

GRADS = [0.5, -2.0, 0.0, 3.0, 1e-3]
START = 1.5


def updated(name: str, **changes: Any) -> list[float]:
    """A single weight after each of the gradients."""
    weight = torch.nn.Parameter(torch.tensor([START], dtype=torch.float64))
    optimizer = OPTIMS.default(name, lr=0.1, **changes).build([weight])
    path = []
    for grad in GRADS:
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        path.append(weight.item())
    return path


def sgd(momentum: float, nesterov: bool, decay: float) -> list[float]:
    w, v, path = START, 0.0, []
    for g in GRADS:
        g = g + decay * w
        v = momentum * v + g
        w -= 0.1 * (g + momentum * v if nesterov else v)
        path.append(w)
    return path


def rmsprop(alpha: float, eps: float, start: float, momentum: float) -> list[float]:
    w, square, velocity, path = START, start, 0.0, []
    for g in GRADS:
        square = alpha * square + (1 - alpha) * g * g
        velocity = momentum * velocity + g / (math.sqrt(square) + eps)
        w -= 0.1 * velocity
        path.append(w)
    return path


def adam(decay: float, decoupled: bool) -> list[float]:
    w, m, v, path = START, 0.0, 0.0, []
    for t, g in enumerate(GRADS, 1):
        if decoupled:
            w -= 0.1 * decay * w
        else:
            g = g + decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        path.append(w)
    return path


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("sgd", {}, sgd(0, False, 0)),
        ("sgd", {"momentum": 0.9}, sgd(0.9, False, 0)),
        ("sgd", {"momentum": 0.9, "nesterov": True}, sgd(0.9, True, 0)),
        ("sgd", {"weight_decay": 0.2}, sgd(0, False, 0.2)),
        ("adam", {}, adam(0, False)),
        ("adam", {"weight_decay": 0.2}, adam(0.2, False)),
        ("adamw", {"weight_decay": 0.2}, adam(0.2, True)),
        ("rmsprop", {}, rmsprop(0.9, 1e-8, 0, 0)),
        ("rmsprop", {"momentum": 0.5}, rmsprop(0.9, 1e-8, 0, 0.5)),
        ("rmsprop_theano", {}, rmsprop(0.9, 0, 1e-3, 0)),
        ("rmsprop_theano", {"momentum": 0.5}, rmsprop(0.9, 0, 1e-3, 0.5)),
    ],
    ids=str,
)
def test_updates_are_those_of_the_rule(
    name: str, changes: dict[str, Any], expected: list[float]
) -> None:
    assert updated(name, **changes) == pytest.approx(expected, rel=1e-9)


def test_the_first_update_of_torchs_rmsprop_does_not_see_the_gradients_scale() -> None:
    """Why clipping before it does nothing; the Theano form's does see it."""

    def first(name: str, grad: float) -> float:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = OPTIMS.default(name, lr=0.1).build([weight])
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        return weight.item()

    assert first("rmsprop", 1e-2) == pytest.approx(first("rmsprop", 1e6), rel=1e-4)
    assert abs(first("rmsprop_theano", 1e-2)) < 0.5 * abs(first("rmsprop_theano", 1e6))


@pytest.mark.parametrize("name", sorted(OPTIMS))
def test_every_optimiser_takes_a_schedule_a_warm_up_and_weight_decay(name: str) -> None:
    decayed = updated(name, weight_decay=0.3)
    assert decayed[2] != updated(name, weight_decay=0.0)[2]
    part = OPTIMS.default(name, lr=1, schedule="cosine", warmup_steps=4)
    assert part.learning_rate(2, 104) == 0.5
    assert part.learning_rate(55, 104) == pytest.approx(0.5)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 30), st.integers(1, 100))
def test_a_schedule_peaks_after_the_warm_up_falls_and_never_stops(
    schedule: str, warmup: int, steps: int
) -> None:
    part = OPTIMS.default("sgd", lr=2, schedule=schedule, warmup_steps=warmup)
    rates = [part.learning_rate(step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 2 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == [2 * step / warmup for step in range(1, len(rising) + 1)]
    assert not falling or falling[0] == 2
    assert falling == sorted(falling, reverse=True)
    if schedule == "constant":
        assert set(falling) <= {2}
    elif len(falling) > 1:
        n, k = len(falling), len(falling) // 2
        half = (1 - k / n) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * k / n))
        assert falling[k] == pytest.approx(2 * half)


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("sgd", {"nesterov": True}, "optim.nesterov"),
        ("rmsprop", {"eps": 0}, "optim.eps"),
        ("adam", {"weight_decay": -1}, "optim.weight_decay"),
        ("adam", {"schedule": "step"}, "optim.schedule"),
        ("adam", {"warmup_steps": -1}, "optim.warmup_steps"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(name: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        OPTIMS.default(name, **changes)
