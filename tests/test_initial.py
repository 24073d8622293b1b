"""The gradient before training: closed forms, published bands, and the page that shows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnngrad import initial
from rnngrad.cells import CELLS
from rnngrad.dynamics import decay
from rnngrad.init import INITS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.1])
def test_a_linear_orthogonal_recurrence_has_the_slope_of_its_gain(gain: float) -> None:
    cell = CELLS.default("rnn", hidden_size=8, nonlinearity="linear")
    init = INITS.default("torch", recurrent="orthogonal", recurrent_scale=gain)
    found = decay(initial.lag_profile(cell, init, initial.gaussian(60, 3), 0))
    # weights are drawn in float32
    assert found.slope == pytest.approx(np.log10(gain), abs=1e-6)
    assert gain == 1 or found.r2 == pytest.approx(1, abs=1e-9)


def test_a_profile_is_that_of_autograd_on_a_loop() -> None:
    x = initial.gaussian(30, 4)
    cell = CELLS.default("rnn", hidden_size=6, nonlinearity="tanh")
    profile = initial.lag_profile(cell, INITS.default("torch"), x, seed=3)
    torch.manual_seed(3)  # as the profile draws: layers, then the initialisation
    rnn = cell.layers(x.shape[-1])
    INITS.default("torch")(rnn)
    w = {name.removesuffix("_l0"): p.detach().double() for name, p in rnn.named_parameters()}
    h = torch.zeros(4, 6, dtype=torch.float64)
    states: list[torch.Tensor] = []
    for x_t in x:
        a = x_t @ w["weight_ih"].t() + w["bias_ih"] + h @ w["weight_hh"].t() + w["bias_hh"]
        h = a.tanh()
        h.requires_grad_() if not states else h.retain_grad()
        states.append(h)
    states[-1].sum().backward()
    norms = [s.grad.norm(dim=1).square().mean().sqrt().log10().item() for s in states]
    np.testing.assert_allclose(profile, norms[::-1], rtol=1e-9)


@pytest.mark.parametrize(
    ("cell", "changes", "init", "slope"),
    [
        ("rnn", {}, {}, -0.2361),
        ("rnn", {}, {"recurrent": "orthogonal", "recurrent_scale": 0.9}, -0.0928),
        ("rnn", {}, {"recurrent": "orthogonal"}, -0.0595),
        ("rnn", {}, {"recurrent": "orthogonal", "recurrent_scale": 1.1}, -0.0349),
        ("lstm", {"forget_bias": None}, {}, -0.1934),
    ],
)
def test_slopes_are_those_of_an_independent_measurement(
    cell: str, changes: dict[str, Any], init: dict[str, Any], slope: float
) -> None:
    """One seed each, in plain torch: so within three standard errors of a mean of ten and of it."""
    part = CELLS.default(cell, hidden_size=64, **changes)
    made = INITS.default("torch", **init)
    found = [
        decay(initial.lag_profile(part, made, initial.gaussian(seed=seed), seed)).slope
        for seed in range(10)
    ]
    mean, deviation = np.mean(found), np.std(found, ddof=1)
    assert abs(mean - slope) < 3 * deviation * np.sqrt(1 + 1 / 10)
    assert mean == pytest.approx(slope, rel=0.05)


BANDS = [
    ("lstm", {"forget_bias": 0.0}, initial.GLOROT, "cell", 0.68, 0.79),
    ("lstm", {"forget_bias": 1.0}, initial.GLOROT, "cell", 0.86, 0.98),
    ("lstm", {"forget_bias": None}, {}, "cell", 0.58, 0.70),
    ("orthogonal", {"nonlinearity": "linear"}, {}, "hidden", 0.999, 1.001),
    ("orthogonal", {"nonlinearity": "modrelu"}, {}, "hidden", 0.99, 1.005),
    ("orthogonal", {"nonlinearity": "tanh"}, {"recurrent": "orthogonal"}, "hidden", 0.70, 0.90),
]


@pytest.mark.parametrize(("cell", "changes", "init", "state", "low", "high"), BANDS)
def test_what_a_step_leaves_on_adding_lies_in_the_published_band(
    cell: str, changes: dict[str, Any], init: dict[str, str], state: str, low: float, high: float
) -> None:
    part = CELLS.default(cell, hidden_size=30, **changes)
    made = INITS.default("torch", **init)
    factors = [initial.factor_on_adding(part, made, seed, state) for seed in range(3)]
    assert low <= np.mean(factors) <= high


def test_the_larger_the_gain_of_batch_normalisation_the_faster_the_gradient_is_lost() -> None:
    """Cooijmans et al. 2017, figure 1 (a), from 0.5 on, here on sequential digits."""
    lost = []
    for gamma in (0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        profile = np.mean([initial.gamma_profile(gamma, seed) for seed in range(3)], axis=0)
        lost.append(profile[0] - profile[20])
    assert lost == sorted(lost) and lost[-1] > lost[0] + 2


def test_the_page_has_a_row_for_every_activation_and_cell() -> None:
    text = (ROOT / "docs" / "initial_gradients.md").read_text(encoding="utf-8")
    for activation in initial.ACTIVATIONS:
        assert f"\n| {activation} | " in text
    for title, name, changes in initial.CELL_ROWS:
        assert f"| {title} | " in text
        CELLS.default(name, **changes)
    title, name, changes = initial.CELL_ROWS[0]  # and one row says what is measured today
    cell = CELLS.default(name, hidden_size=64, **changes)
    slopes = [
        decay(
            initial.lag_profile(cell, INITS.default("torch"), initial.gaussian(seed=seed), seed)
        ).slope
        for seed in initial.SEEDS
    ]
    written = text.split(f"| {title} | ")[1].split(" ")[0]
    assert float(written) == pytest.approx(np.mean(slopes), abs=1e-3)
    assert {name for _, name, _ in initial.CELL_ROWS} == set(CELLS.load())
