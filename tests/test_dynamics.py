"""A layer's dynamics along its trajectory, beside autograd through a loop of cells in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnngrad.bptt import LayerRecord, record
from rnngrad.bptt_clip import BPTT_CLIPS, install
from rnngrad.cells import CELLS
from rnngrad.dynamics import (
    decay,
    gate_names,
    horizon,
    jacobian_norms,
    lag_curves,
    lyapunov,
    spectrum,
    units,
)
from rnngrad.nn import GRU, LSTM, RNN, unroll

over_kernels = pytest.mark.usefixtures("every_kernel")

LAYERS: dict[str, Any] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
TORCH_CELLS: dict[type, Any] = {RNN: nn.RNNCell, LSTM: nn.LSTMCell, GRU: nn.GRUCell}
CELL_NAMES = sorted(CELLS.load())

State = tuple[Tensor, ...]


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest, every_kernel: str) -> Any:
    return LAYERS[request.param]


@pytest.fixture(params=CELL_NAMES)
def cell(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return CELLS.default(request.param, hidden_size=6).cell(4).double()


def loop(cell: nn.Module, x: Tensor, state: State = ()) -> list[State]:
    """Every step's state, each with a gradient of its own."""
    states: list[State] = []
    given: Any = None if not state else state if len(state) == 2 else state[0]
    for t, x_t in enumerate(x):
        arguments = (x_t, given, t) if getattr(cell, "takes_time", False) else (x_t, given)
        given = cell(*arguments)
        states.append(given if isinstance(given, tuple) else (given,))
    return states


def curves_by_autograd(
    cell: nn.Module, x: Tensor, error: Tensor, position: int, state: State = ()
) -> tuple[Tensor, ...]:
    """``log10`` of the norms by lag, of ``error [B, P]`` at the ``h`` of one position."""
    states = loop(cell, x, state)[: position + 1]
    curves = []
    for part in zip(*states, strict=True):
        grads = torch.autograd.grad(
            states[-1][0], part, error, retain_graph=True, allow_unused=True
        )
        norm = torch.stack([g.norm(dim=-1) for g in grads if g is not None]).flip(0)
        curves.append((norm / norm[0]).log10())
    return tuple(curves)


def recorded(layer: Any, given: Any, name: str = "l0", hx: Any = None) -> LayerRecord:
    with record(layer, full=True, trajectory=True) as tape:
        output = (layer(given) if hx is None else layer(given, hx))[0]
        output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
        output.square().sum().backward()
    return tape[name]


def cell_of(layer: Any, suffix: str, input_size: int) -> Any:
    """torch's cell with one layer's weights."""
    made = TORCH_CELLS[type(layer)](input_size, layer.hidden_size, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(made, name, getattr(layer, f"{name}_{suffix}"))
    return made


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def linear(g: float, size: int = 8, dtype: torch.dtype = torch.float64) -> RNN:
    """``h_t = g Q h_{t-1} + x_t``, ``Q`` orthogonal."""
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    layer = RNN(size, size, nonlinearity="linear", bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(g * q)
        layer.weight_ih_l0.copy_(torch.eye(size))
    return layer


# --- lag-resolved curves


@pytest.mark.parametrize("suffix", ["l0", "l0_reverse", "l1", "l1_reverse"])
def test_lag_curves_of_any_layer_are_autograds(make: Any, suffix: str) -> None:
    torch.manual_seed(0)
    layer = make(3, 5, 2, bidirectional=True, dtype=torch.float64)
    layer.recompute_segments = 4
    x = torch.randn(70, 3, 3, dtype=torch.float64)
    kept = recorded(layer, x, suffix)
    assert kept.trajectory is not None and kept.hidden_grad is not None
    reverse = suffix.endswith("_reverse")
    entering = kept.trajectory.input
    if suffix.startswith("l0"):
        assert torch.equal(entering, x)
    cell = cell_of(layer, suffix, entering.shape[-1])
    anchors = [69, 30, 0]
    found = lag_curves(kept.trajectory, kept.hidden_grad, anchors, sequences=2)
    assert found.hidden.shape == (70, 6) and found.hidden.dtype == torch.float64
    assert (found.cell is not None) == (make is LSTM)
    for n, anchor in enumerate(anchors):
        position = 69 - anchor if reverse else anchor
        expected = curves_by_autograd(
            cell,
            entering.flip(0) if reverse else entering,
            kept.hidden_grad[anchor],
            position,
        )
        for ours, theirs in zip(found, expected, strict=False):
            assert ours is not None
            column = ours[:, 2 * n : 2 * n + 2]
            close(column[: position + 1], theirs[:, :2])
            assert column[position + 1 :].isnan().all()


@over_kernels
def test_lag_curves_of_a_projected_layer_are_those_of_its_loop() -> None:
    torch.manual_seed(0)
    layer = LSTM(3, 6, proj_size=2, dtype=torch.float64)
    x = torch.randn(9, 2, 3, dtype=torch.float64)

    class Projected(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Any:
            h, c = (x.new_zeros(2, 2), x.new_zeros(2, 6)) if state is None else state
            w = layer
            a = x @ w.weight_ih_l0.T + w.bias_ih_l0 + h @ w.weight_hh_l0.T + w.bias_hh_l0
            i, f, g, o = a.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return (o.sigmoid() * c.tanh()) @ w.weight_hr_l0.T, c

    kept = recorded(layer, x)
    found = lag_curves(kept.trajectory, kept.hidden_grad, [8])
    for ours, theirs in zip(
        found, curves_by_autograd(Projected(), x, kept.hidden_grad[8], 8), strict=True
    ):
        close(ours, theirs)


def unrolled(cell: nn.Module, x: Tensor, start: int = 0) -> LayerRecord:
    with record(cell, full=True, trajectory=True) as tape:
        unroll(cell, x, start=start)[0].square().sum().backward()
    return tape["l0"]


def test_lag_curves_of_any_cell_are_autograds(cell: nn.Module) -> None:
    """Batch normalisation's too: there every sequence's error goes through the whole batch."""
    x = torch.randn(12, 5, 4, dtype=torch.float64)
    reference = copy.deepcopy(cell)
    kept = unrolled(cell, x)
    found = lag_curves(kept.trajectory, kept.hidden_grad, [11, 4], sequences=3)
    assert found.hidden.shape == (12, 6)
    for n, anchor in enumerate((11, 4)):
        expected = curves_by_autograd(reference, x, kept.hidden_grad[anchor], anchor)
        for ours, theirs in zip(found, expected, strict=False):
            assert ours is not None
            close(ours[: anchor + 1, 3 * n : 3 * n + 3], theirs[:, :3])


@pytest.mark.parametrize("make_cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_torchs_own_cells_and_unbatched_input_have_curves(make_cell: Any) -> None:
    torch.manual_seed(0)
    cell = make_cell(3, 5, dtype=torch.float64)
    x = torch.randn(8, 1, 3, dtype=torch.float64)
    curves = []
    for data in (x, x[:, 0]):
        kept = unrolled(cell, data)
        curves.append(lag_curves(kept.trajectory, kept.hidden_grad, [7]))
    close(curves[0].hidden, curves[1].hidden)
    for ours, theirs in zip(
        curves[0], curves_by_autograd(cell, x, kept.hidden_grad[7], 7), strict=False
    ):
        close(ours, theirs)


def test_a_call_that_goes_on_from_a_state_is_gone_over_from_there(make: Any) -> None:
    torch.manual_seed(0)
    layer = make(3, 5, dtype=torch.float64)
    state = torch.randn(2 if make is LSTM else 1, 1, 4, 5, dtype=torch.float64)
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    kept = recorded(layer, x, hx=tuple(state) if make is LSTM else state[0])
    expected = tuple(part[0].clone() for part in state)
    state.zero_()  # the caller may go on with it
    found = lag_curves(kept.trajectory, kept.hidden_grad, [8])
    theirs = curves_by_autograd(cell_of(layer, "l0", 3), x, kept.hidden_grad[8], 8, expected)
    close(found.hidden, theirs[0])


def test_a_cell_that_takes_time_is_told_the_time_of_the_call() -> None:
    class Clock(nn.Module):
        takes_time = True

        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor, h: Tensor | None, t: int) -> Tensor:
            return x if h is None else x + self.rate * h / (t + 1)

    kept = unrolled(Clock(), torch.ones(4, 1, 1, dtype=torch.float64), start=6)
    curve = lag_curves(kept.trajectory, kept.hidden_grad, [3]).hidden[:, 0]
    steps = torch.tensor([0.5 / (t + 1) for t in (9, 8, 7)], dtype=torch.float64)
    close(curve[1:], steps.log10().cumsum(0))


def test_packed_sequences_of_full_length_have_the_curves_they_have_alone(make: Any) -> None:
    torch.manual_seed(0)
    layer = make(3, 5, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(7, 4, 3, dtype=torch.float64), [2, 7, 4, 7]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for name, anchor in (("l0", 6), ("l0_reverse", 0)):
        kept, alone = recorded(layer, packed, name), recorded(layer, x[:, [1, 3]], name)
        found = lag_curves(kept.trajectory, kept.hidden_grad, [anchor])
        assert found.hidden.shape == (7, 2)
        close(found.hidden, lag_curves(alone.trajectory, alone.hidden_grad, [anchor]).hidden)


def test_batch_first_changes_no_curve(make: Any) -> None:
    torch.manual_seed(0)
    layer, x = make(3, 5, dtype=torch.float64), torch.randn(7, 2, 3, dtype=torch.float64)
    found = []
    for batch_first in (False, True):
        layer.batch_first = batch_first
        kept = recorded(layer, x.transpose(0, 1) if batch_first else x)
        found.append(lag_curves(kept.trajectory, kept.hidden_grad, [6]).hidden)
    close(*found)


# --- far beyond the range of numbers


@over_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("g", [1e-7, 0.01, 0.9, 1.0, 1.3, 1e7])
def test_a_linear_recurrence_has_a_curve_of_slope_log10_g(g: float, dtype: torch.dtype) -> None:
    """Up to 10^±1393, in either precision."""
    torch.manual_seed(0)
    layer = linear(g, dtype=dtype)
    x = torch.zeros(200, 2, 8, dtype=dtype)
    kept = recorded(layer, x)
    error = torch.randn(200, 2, 8, dtype=dtype)
    curve = lag_curves(kept.trajectory, error, [199]).hidden
    lag = torch.arange(200, dtype=torch.float64).unsqueeze(1)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    close(curve / lag.clamp_min(1), (lag > 0).double() * math.log10(g) + 0 * curve, atol=rounding)
    line = decay(curve[:, 0])
    assert line.slope == pytest.approx(math.log10(g), abs=rounding) and line.points == 190
    assert line.r2 > 1 - 1e-6 or g == 1


@over_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_default_rnn_at_2000_steps_is_straight_down_past_1e_400(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = RNN(7, 64, dtype=dtype)
    kept = recorded(layer, torch.randn(2000, 4, 7, dtype=dtype))
    curve = lag_curves(kept.trajectory, kept.hidden_grad, [1999]).hidden.median(1).values
    line = decay(curve)
    assert curve.isfinite().all() and curve[-1] < -400
    assert line.r2 > 0.9999 and line.points == 1990 and not line.floor_reached
    lag = torch.arange(2000)
    assert (curve - line.slope * lag).abs().max() < 5, "no cliff anywhere"


@over_kernels
@pytest.mark.parametrize("unrolls", [False, True])
def test_fast_decay_in_float32_is_that_of_float64(unrolls: bool) -> None:
    """Two decades a step: float32 would be 0 after 22 steps."""
    torch.manual_seed(0)
    x = torch.randn(100, 3, 4)
    curves = []
    module: Any = nn.RNNCell(4, 6) if unrolls else RNN(4, 6)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.mul_(0.05 if "weight_hh" in name else 1)
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        kept = (unrolled if unrolls else recorded)(module, x.to(dtype))
        error = torch.ones(100, 3, 6, dtype=dtype)
        curves.append(lag_curves(kept.trajectory, error, [99]).hidden)
    assert curves[1][-1].max() < -150
    torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-4)


@over_kernels
def test_an_error_that_dies_is_an_exact_0_from_there_on() -> None:
    """A relu that is off at one step lets nothing through; the other sequence goes on."""
    layer = RNN(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(0.5)
        layer.weight_ih_l0.fill_(1)
    x = torch.ones(90, 2, 1)
    x[40, 0] = -100
    kept = recorded(layer, x)
    curve = lag_curves(kept.trajectory, torch.ones(90, 2, 1), [89]).hidden
    lag = torch.arange(90.0, dtype=torch.float64)
    close(curve[:, 1], lag * math.log10(0.5))
    close(curve[:50, 0], lag[:50] * math.log10(0.5))
    assert (curve[50:, 0] == -math.inf).all()
    assert decay(curve[:, 0]) == decay(curve[:50, 0])._replace(floor_reached=True)


@over_kernels
def test_an_error_of_0_and_one_that_is_not_finite_have_no_curve_and_harm_no_other() -> None:
    torch.manual_seed(0)
    layer = LSTM(2, 3)
    kept = recorded(layer, torch.randn(20, 4, 2))
    error = torch.ones(20, 4, 3)
    alone = lag_curves(kept.trajectory, error, [19])
    error[19, 0], error[19, 1, 0], error[19, 2, 1] = 0, math.nan, math.inf
    found = lag_curves(kept.trajectory, error, [19])
    for ours, theirs in zip(found, alone, strict=True):
        assert ours[:, :3].isnan().all()
        assert torch.equal(ours[:, 3], theirs[:, 3])


# --- nothing is left behind


def test_dynamics_leave_no_trace(cell: nn.Module) -> None:
    """No gradient, no statistics, no random numbers, and no record in an open block."""
    other = unrolled(cell, torch.randn(5, 3, 4, dtype=torch.float64))
    cell.zero_grad()
    before = copy.deepcopy(cell.state_dict())
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    with record(cell) as tape:
        outputs, _ = unroll(cell, x)
        after_forward = copy.deepcopy(cell.state_dict())
        lag_curves(other.trajectory, other.hidden_grad, [4])
        outputs.square().sum().backward()
        assert all(
            torch.equal(value, after_forward[name]) for name, value in cell.state_dict().items()
        )
        grads = [p.grad.clone() for p in cell.parameters() if p.grad is not None]
        lag_curves(other.trajectory, other.hidden_grad, [4])
    assert len(tape.calls("l0")) == 1
    assert torch.equal(torch.get_rng_state(), state)
    now = [p.grad for p in cell.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, now, strict=True))
    assert before.keys() == cell.state_dict().keys()


def test_a_layers_curves_leave_no_gradient_and_no_record(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(5, 2, 3)
    other = recorded(layer, x)
    layer.zero_grad()
    with record(layer) as tape:
        output = layer(x)[0]
        lag_curves(other.trajectory, other.hidden_grad, [4])
        assert all(p.grad is None for p in layer.parameters())
        output.sum().backward()
    assert len(tape.calls("l0")) == 1


@over_kernels
@pytest.mark.parametrize("unrolls", [False, True])
@pytest.mark.parametrize("site", ["preact", "state", "carry"])
def test_curves_are_of_the_error_before_bptt_clip(unrolls: bool, site: str) -> None:
    torch.manual_seed(0)
    module: Any = CELLS.default("gru", hidden_size=4)
    module = module.cell(3) if unrolls else module.layers(3)
    x = torch.randn(9, 2, 3)
    error = torch.ones(9, 2, 4)
    found = []
    for name, changes in (("none", {}), ("norm", {"site": site, "max_norm": 1e-3})):
        install(module, BPTT_CLIPS.default(name, **changes))
        kept = (unrolled if unrolls else recorded)(module, x)
        found.append(lag_curves(kept.trajectory, error, [8]).hidden)
    assert torch.equal(*found)


def test_an_input_changed_since_is_not_gone_over(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(5, 2, 3)
    x.add_(1)
    kept = recorded(layer, x)
    lag_curves(kept.trajectory, kept.hidden_grad, [4])
    twin = copy.deepcopy(kept)
    x.zero_()
    with pytest.raises(RuntimeError, match="input has been changed in place"):
        lag_curves(kept.trajectory, kept.hidden_grad, [4])
    lag_curves(twin.trajectory, twin.hidden_grad, [4])


def test_what_cannot_be_gone_over_is_named(make: Any) -> None:
    layer = make(3, 4)
    kept = recorded(layer, torch.randn(5, 2, 3))
    with record(layer, full=True) as tape:
        layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert tape["l0"].trajectory is None
    with pytest.raises(ValueError, match=r"record\(model, trajectory=True\)"):
        lag_curves(tape["l0"].trajectory, kept.hidden_grad, [4])
    for anchor in (5, -1):
        with pytest.raises(ValueError, match=f"0 to 4, got {anchor}"):
            lag_curves(kept.trajectory, kept.hidden_grad, [anchor])
    with pytest.raises(ValueError, match="anchors must be time steps, got none"):
        lag_curves(kept.trajectory, kept.hidden_grad, [])
    with pytest.raises(ValueError, match=r"\[5, 2, P\], got \[4, 2, 4\]"):
        lag_curves(kept.trajectory, kept.hidden_grad[1:], [3])
    with pytest.raises(ValueError, match="sequences must be at least 1, got 0"):
        lag_curves(kept.trajectory, kept.hidden_grad, [4], sequences=0)


# --- lines through curves


@pytest.mark.parametrize(
    ("make_layer", "published"), [(RNN, -0.2361), (LSTM, -0.1934)], ids=["rnn", "lstm"]
)
def test_default_layers_decay_as_fast_as_measured_elsewhere(
    make_layer: Any, published: float
) -> None:
    """64 units, weights ``U(±1/8)``, normal input of 7 values, 400 steps; ten seeds."""
    slopes = []
    for seed in range(10):
        torch.manual_seed(seed)
        layer = make_layer(7, 64)
        kept = recorded(layer, torch.randn(400, 4, 7))
        curve = lag_curves(kept.trajectory, kept.hidden_grad, [399]).hidden.median(1).values
        slopes.append(decay(curve).slope)
    assert np.mean(slopes) == pytest.approx(published, rel=0.05)


@settings(max_examples=100, deadline=None)
@given(
    slope=st.floats(-3, 3),
    noise=st.floats(0, 2),
    points=st.integers(2, 200),
    first=st.integers(0, 20),
    end=st.sampled_from([-math.inf, math.nan, math.inf, None]),
)
def test_decay_is_numpys_least_squares_up_to_the_first_hole(
    slope: float, noise: float, points: int, first: int, end: float | None
) -> None:
    rng = np.random.default_rng(points)
    lag = np.arange(first + points)
    curve = slope * lag + noise * rng.standard_normal(len(lag))
    hole = [] if end is None else [end, 0.0, 1.0]
    line = decay([*curve, *hole], first)
    expected, residual, *_ = np.polyfit(lag[first:], curve[first:], 1, full=True)
    assert line.slope == pytest.approx(expected[0], abs=1e-9)
    assert line.points == points and line.floor_reached == (end == -math.inf)
    if line.slope < 0:
        assert line.half_life == pytest.approx(math.log10(2) / -line.slope)
    else:
        assert line.half_life == math.inf
    if len(residual) and np.var(curve[first:]) > 1e-6:
        r2 = 1 - residual[0] / np.square(curve[first:] - curve[first:].mean()).sum()
        assert line.r2 == pytest.approx(r2, abs=1e-6)


@pytest.mark.parametrize("curve", [[], [0.0] * 11, [0.0, math.nan] + [0.0] * 30])
def test_too_few_points_have_no_line(curve: Sequence[float]) -> None:
    line = decay(curve)
    assert math.isnan(line.slope) and math.isnan(line.r2) and math.isnan(line.half_life)
    assert line.points < 2 and not line.floor_reached


def test_a_flat_curve_has_an_infinite_half_life() -> None:
    assert decay(torch.zeros(30)) == (0.0, 1.0, math.inf, 20, False)


@pytest.mark.parametrize(
    ("curve", "ratio", "expected"),
    [
        ([0.0, -1, -2, -3, -4, -1], 1e-3, 3),
        ([0.0, -1, -2, -3, -4], 1e-1, 1),
        ([0.0, 1, 2, 3], 1e-3, 3),
        ([0.0, -1, math.nan, math.nan], 1e-3, 1),
        ([0.0, -math.inf], 1e-3, 0),
        ([-4.0, 0.0], 1e-3, -1),
        ([math.nan] * 3, 1e-3, -1),
        ([], 1e-3, -1),
    ],
)
def test_the_horizon_is_the_last_lag_before_the_curve_falls_under(
    curve: Sequence[float], ratio: float, expected: int
) -> None:
    assert horizon(torch.tensor(curve), ratio) == expected


# --- the recurrent weight


def test_the_spectrum_of_matrices_that_are_known() -> None:
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    orthogonal = spectrum(0.7 * q)
    assert orthogonal == pytest.approx((0.7, 0.7, 0.0), abs=1e-7)
    nilpotent = spectrum(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert nilpotent == pytest.approx((0.0, 3.0, 1.0))
    assert spectrum(torch.tensor([[1.0, 2.0], [0.0, -3.0]])).nonnormality == pytest.approx(
        2 / math.sqrt(14)
    )
    assert spectrum(torch.tensor([0.5, -0.9])) == pytest.approx((0.9, 0.9, 0.0))
    assert spectrum(torch.zeros(3, 3)) == (0, 0, 0)
    assert spectrum(1e-200 * q) == pytest.approx((1e-200, 1e-200, 0.0), abs=1e-7)
    assert all(map(math.isnan, spectrum(torch.full((2, 2), math.nan))))


def test_the_spectrum_of_any_matrix_is_numpys() -> None:
    w = torch.randn(9, 9)
    values = np.linalg.eigvals(w.double().numpy())
    size = np.linalg.norm(w.double().numpy())
    found = spectrum(nn.Parameter(w))
    assert found.radius == pytest.approx(np.abs(values).max())
    assert found.norm == pytest.approx(np.linalg.svd(w.double().numpy())[1][0])
    departure = math.sqrt(size**2 - np.square(np.abs(values)).sum()) / size
    assert found.nonnormality == pytest.approx(departure)


def test_a_weight_that_is_not_square_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match=r"square \[H, H\].*got \[8, 2\]"):
        spectrum(torch.zeros(8, 2))


# --- Lyapunov exponents


def jacobians(cell: Any, x: Tensor, state: State = ()) -> list[Tensor]:
    """``∂s_t/∂s_{t-1} [n, n]`` of one sequence ``x [T, I]`` by torch.func, from the second step."""
    takes_time = getattr(cell, "takes_time", False)
    states = loop(cell, x.unsqueeze(1), state)
    found = []
    for t in range(1, len(x)):
        before = torch.cat([part.detach()[0] for part in states[t - 1]])
        widths = [part.shape[-1] for part in states[t - 1]]

        def step(s: Tensor, t: int = t, widths: list[int] = widths) -> Tensor:
            parts = tuple(part.unsqueeze(0) for part in s.split(widths))
            given = parts if len(parts) == 2 else parts[0]
            arguments = (x[t : t + 1], given, t) if takes_time else (x[t : t + 1], given)
            after = cell(*arguments)
            return torch.cat([p[0] for p in (after if isinstance(after, tuple) else (after,))])

        found.append(torch.func.jacrev(step)(before))
    return found


def exponents(factors: Sequence[Tensor], count: int, frame: Tensor, dropped: int) -> Tensor:
    """QR at every step of the product of ``factors``, the first ones of which turn the frame."""
    growth = torch.zeros(count, dtype=torch.float64)
    for n, factor in enumerate(factors):
        frame, triangle = torch.linalg.qr(factor @ frame)
        if n >= dropped:
            growth += triangle.diagonal().abs().log()
    return growth / (len(factors) - dropped)


def frame_of(size: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(start)[0]


@pytest.mark.parametrize("suffix", ["l0", "l0_reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lyapunov_exponents_are_those_of_explicit_jacobians(
    make: Any, suffix: str, dtype: torch.dtype
) -> None:
    """From the same frame, in the same order, with an orthonormalisation at every step."""
    torch.manual_seed(0)
    layer = make(3, 5, bidirectional=True, dtype=dtype)
    kept = recorded(layer, torch.randn(42, 3, 3, dtype=dtype), suffix)
    layer = copy.deepcopy(layer).double()
    x = kept.trajectory.input.double()
    size = 10 if make is LSTM else 5
    for count in (1, 3, size):
        each = []
        for b in range(2):
            entering = x[:, b].flip(0) if suffix.endswith("_reverse") else x[:, b]
            back = [j.T for j in jacobians(cell_of(layer, suffix, 3), entering)[::-1]]
            each.append(exponents(back, count, frame_of(size, count), 41 - 42 * 9 // 10 + 1))
        found = lyapunov(kept.trajectory, count, sequences=2)
        assert found.dtype == torch.float64 and found.shape == (count,)
        expected = torch.stack(each).mean(0).sort(descending=True).values
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_lyapunov_exponents_are_those_of_forward_products_from_any_frame(make: Any) -> None:
    """The other order of the product, and another start: the same in the limit."""
    torch.manual_seed(0)
    layer = make(3, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0 *= 2
    kept = recorded(layer, torch.randn(900, 1, 3, dtype=torch.float64))
    factors = jacobians(cell_of(layer, "l0", 3), kept.trajectory.input[:, 0])
    size = 8 if make is LSTM else 4
    expected = exponents(factors, 3, frame_of(size, 3, seed=1), 90)
    torch.testing.assert_close(lyapunov(kept.trajectory, 3), expected, rtol=0, atol=0.02)


@over_kernels
@pytest.mark.parametrize("g", [1e-90, 0.3, 1.0, 1.7])
def test_all_exponents_of_a_scaled_rotation_are_log_g(g: float) -> None:
    torch.manual_seed(0)
    kept = recorded(linear(g), torch.zeros(50, 2, 8, dtype=torch.float64))
    expected = torch.full((8,), math.log(g), dtype=torch.float64)
    torch.testing.assert_close(lyapunov(kept.trajectory, 8), expected, rtol=1e-12, atol=1e-12)


def test_exponents_that_differ_by_tens_of_nats_are_all_right() -> None:
    """Plain QR every five steps would lose the small ones to the rounding of the large ones."""
    torch.manual_seed(0)
    layer = linear(1.0, size=4)
    diagonal = torch.tensor([1.5, 0.5, 1e-9, 1e-20], dtype=torch.float64)
    q = layer.weight_hh_l0.detach().clone()
    with torch.no_grad():
        layer.weight_hh_l0.copy_(q @ diagonal.diag() @ q.T)
    kept = recorded(layer, torch.zeros(60, 2, 4, dtype=torch.float64))
    found = lyapunov(kept.trajectory, 4)
    torch.testing.assert_close(found[:2], diagonal[:2].log(), rtol=1e-9, atol=1e-9)
    # further down, the weight itself has rounded them away, though not what is left of each step
    assert found[2] < -15 and found[3] < -15


def test_a_direction_that_dies_has_exponent_minus_infinity() -> None:
    layer = linear(0.5, size=3)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.diag(torch.tensor([0.5, 0.25, 0.0])))
    kept = recorded(layer, torch.zeros(300, 2, 3, dtype=torch.float64))
    found = lyapunov(kept.trajectory, 3)
    expected = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    torch.testing.assert_close(found[:2], expected, rtol=1e-9, atol=1e-9)
    assert found[2] == -math.inf


def blocks(cell: nn.Module, x: Tensor, times: Sequence[int]) -> list[Tensor]:
    """``∂s_t/∂s_{t-1} [B, n, n]`` of each sequence with the others held, by autograd."""
    states = loop(cell, x)
    found = []
    for t in times:
        widths = [part.shape[-1] for part in states[t - 1]]

        def step(s: Tensor, t: int = t, widths: list[int] = widths) -> Tensor:
            parts = s.split(widths, -1)
            given = parts if len(parts) == 2 else parts[0]
            time = (t,) if getattr(cell, "takes_time", False) else ()
            after = cell(x[t], given, *time)
            return torch.cat(after if isinstance(after, tuple) else (after,), -1)

        before = torch.cat(states[t - 1], -1).detach()
        whole = torch.autograd.functional.jacobian(step, before)
        found.append(torch.stack([whole[b, :, b] for b in range(x.shape[1])]))
    return found


def test_lyapunov_exponents_of_any_cell_are_those_of_its_jacobians(cell: nn.Module) -> None:
    """Of batch normalisation in training, those of each sequence with the others held."""
    x = torch.randn(12, 3, 4, dtype=torch.float64)
    reference = copy.deepcopy(cell)
    kept = unrolled(cell, x)
    factors = torch.stack(blocks(reference, x, range(11, 0, -1)), 1).mT
    each = [exponents(of, 3, frame_of(of.shape[-1], 3), 2) for of in factors[:2]]
    expected = torch.stack(each).mean(0).sort(descending=True).values
    found = lyapunov(kept.trajectory, 3, sequences=2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_what_has_no_exponents_is_named(make: Any) -> None:
    layer = make(3, 4)
    kept = recorded(layer, torch.randn(5, 2, 3))
    size = 8 if make is LSTM else 4
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        lyapunov(kept.trajectory, 0)
    assert lyapunov(kept.trajectory, size + 1).isnan().tolist() == [False] * size + [True]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        lyapunov(kept.trajectory, 1, every=0)
    with pytest.raises(ValueError, match="at least 2 time steps"):
        lyapunov(recorded(layer, torch.randn(1, 2, 3)).trajectory, 1)


@pytest.mark.parametrize("steps", [2, 3, 30])
@pytest.mark.parametrize("w", [0.5, 2.0])
def test_a_linear_unit_grows_by_its_weight_however_short_the_sequence(steps: int, w: float) -> None:
    layer = RNN(1, 1, nonlinearity="linear").double()
    torch.nn.init.constant_(layer.weight_hh_l0, w)
    kept = recorded(layer, torch.randn(steps, 2, 1, dtype=torch.float64))
    assert lyapunov(kept.trajectory, 1).item() == pytest.approx(math.log(w), rel=1e-12)


# --- one step's Jacobian


@pytest.mark.parametrize("suffix", ["l0", "l0_reverse"])
def test_jacobian_norms_are_the_largest_singular_values(make: Any, suffix: str) -> None:
    torch.manual_seed(0)
    layer = make(3, 5, bidirectional=True)
    kept = recorded(layer, torch.randn(9, 3, 3), suffix)
    layer = copy.deepcopy(layer).double()
    zeros = torch.zeros(1, 5, dtype=torch.float64)
    first = (zeros, zeros) if make is LSTM else (zeros,)
    norms = []
    for b in range(2):
        x = kept.trajectory.input[:, b].double()
        x = x.flip(0) if suffix.endswith("_reverse") else x
        # one step more at the beginning, so that the first one has a predecessor
        of = jacobians(_From(cell_of(layer, suffix, 3), first), torch.cat([x[:1], x]))
        norms.append(torch.stack([torch.linalg.svdvals(j)[0] for j in of]))
    by_position = torch.stack(norms).mean(0)
    expected = by_position.flip(0) if suffix.endswith("_reverse") else by_position
    found = jacobian_norms(kept.trajectory, [0, 3, 8, 3], sequences=2)
    torch.testing.assert_close(found, expected[[0, 3, 8, 3]], rtol=1e-10, atol=0)


class _From(nn.Module):
    """A cell whose first step only returns a state."""

    def __init__(self, cell: nn.Module, state: State) -> None:
        super().__init__()
        self.cell, self.state = cell, state

    def forward(self, x: Tensor, state: Any) -> Any:
        if state is None:
            return self.state if len(self.state) == 2 else self.state[0]
        return self.cell(x, state)


def test_jacobian_norms_of_any_cell_are_those_of_autograd(cell: nn.Module) -> None:
    """In training: of batch normalisation the blocks on the diagonal of the whole batch's."""
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    reference = copy.deepcopy(cell)
    kept = unrolled(cell, x)
    expected = [torch.linalg.svdvals(of[:3])[:, 0].mean() for of in blocks(reference, x, (2, 5))]
    found = jacobian_norms(kept.trajectory, [2, 5], sequences=3)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)
    first = jacobian_norms(kept.trajectory, [0])
    assert first.isfinite().all(), "it begins with zeros"


def test_the_first_step_of_a_cell_that_learns_its_state_has_no_jacobian() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h0 = nn.Parameter(torch.ones(2, 1))

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return (self.h0 if h is None else h) / 2

    kept = unrolled(Learned(), torch.zeros(3, 2, 1))
    found = jacobian_norms(kept.trajectory, [0, 1])
    assert found[0].isnan() and found[1] == 0.5


def test_a_step_that_is_none_has_no_jacobian(make: Any) -> None:
    kept = recorded(make(3, 4), torch.randn(5, 2, 3))
    for t in (5, -1):
        with pytest.raises(ValueError, match=f"0 to 4, got {t}"):
            jacobian_norms(kept.trajectory, [t])


# --- units and gates


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_units_are_those_of_the_loop(make: Any, packed: bool, projected: bool) -> None:
    if projected and make is not LSTM:
        pytest.skip("has no proj_size")
    torch.manual_seed(0)
    size = {"proj_size": 2} if projected else {}
    layer = make(3, 5, 2, bidirectional=True, dtype=torch.float64, **size)
    x, lengths = torch.randn(7, 4, 3, dtype=torch.float64), [2, 7, 4, 7] if packed else [7] * 4
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        kept = recorded(layer, given, suffix)
        found = units(kept.trajectory)
        hidden = {"lstm": "ifo", "gru": "rz", "rnn": ""}[make.__name__.lower()]
        assert "".join(found.gates) == hidden
        for b, length in enumerate(lengths):
            rows = gates_by_hand(layer, suffix, kept.trajectory.input[:length, b : b + 1])
            for name, values in {"hidden": found.hidden, **found.gates}.items():
                torch.testing.assert_close(values[:length, b], rows[name], rtol=1e-10, atol=1e-12)
                assert values[length:, b].isnan().all()


def gates_by_hand(layer: Any, suffix: str, x: Tensor) -> dict[str, Tensor]:
    """States and gates of one sequence, by torch.nn's documentation."""
    w_ih, w_hh, b_ih, b_hh, w_hr = (
        getattr(layer, f"{name}_{suffix}", None)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )
    h = x.new_zeros(1, w_hh.shape[1])
    c = x.new_zeros(1, layer.hidden_size)
    rows: dict[str, list[Tensor]] = {"hidden": []}
    times = range(len(x))
    for t in reversed(times) if suffix.endswith("_reverse") else times:
        a_x, a_h = x[t] @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        gates: dict[str, Tensor] = {}
        if layer.mode == "LSTM":
            i, f, g, o = (a_x + a_h).chunk(4, -1)
            gates = {"i": i.sigmoid(), "f": f.sigmoid(), "o": o.sigmoid()}
            c = gates["f"] * c + gates["i"] * g.tanh()
            h = gates["o"] * c.tanh()
            h = h if w_hr is None else h @ w_hr.T
        elif layer.mode == "GRU":
            (r_x, z_x, n_x), (r_h, z_h, n_h) = a_x.chunk(3, -1), a_h.chunk(3, -1)
            gates = {"r": (r_x + r_h).sigmoid(), "z": (z_x + z_h).sigmoid()}
            h = (1 - gates["z"]) * (n_x + gates["r"] * n_h).tanh() + gates["z"] * h
        else:
            h = (a_x + a_h).tanh()
        for name, value in {"hidden": h, **gates}.items():
            rows.setdefault(name, []).append(value[0].detach())
    backwards = suffix.endswith("_reverse")
    return {n: torch.stack(values[::-1] if backwards else values) for n, values in rows.items()}


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("torchs", [False, True])
def test_units_of_a_cell_are_those_of_its_layer(name: str, torchs: bool) -> None:
    torch.manual_seed(0)
    part = CELLS.default(name, hidden_size=5)
    layer = part.layers(3).double()
    cell: Any = part.cell(3).double()
    if torchs:
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[name](3, 5).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    ours, theirs = units(unrolled(cell, x).trajectory), units(recorded(layer, x).trajectory)
    assert list(ours.gates) == list(theirs.gates)
    close(ours.hidden, theirs.hidden)
    for gate, values in ours.gates.items():
        close(values, theirs.gates[gate])


def test_units_of_any_cell_are_what_it_computes(cell: nn.Module) -> None:
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    reference = copy.deepcopy(cell)
    found = units(unrolled(cell, x).trajectory)
    close(found.hidden, torch.stack([h for h, *_ in loop(reference, x)]).detach())
    assert list(found.gates) == [n for n in gate_names(cell) if n in ("i", "f", "o", "r", "z")]
    for values in found.gates.values():
        assert values.shape == (6, 4, 6) and ((values > 0) & (values < 1)).all()
    if "f" in found.gates:  # c_t = f c_{t-1} + i g: where i is not 0, |c_t - f c_{t-1}| < i
        c = torch.stack([c for _, c in loop(reference, x)])
        left = (c[1:] - found.gates["f"][1:] * c[:-1]).abs()
        assert (left <= found.gates["i"][1:] + 1e-12).all()


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_units_of_a_cell_go_on_from_the_state_it_was_given(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS.default(name, hidden_size=5).cell(3)
    x = torch.randn(8, 2, 3)
    whole = units(unrolled(cell, x).trajectory)
    _, state = unroll(cell, x[:3])
    with record(cell, trajectory=True) as tape:
        unroll(cell, x[3:], state)[0].sum().backward()
    rest = units(tape["l0"].trajectory)
    for part, values in {"hidden": rest.hidden, **rest.gates}.items():
        expected = whole.hidden if part == "hidden" else whole.gates[part]
        assert torch.equal(values, expected[3:])


@pytest.mark.parametrize("unrolls", [False, True])
def test_a_call_that_the_loss_does_not_depend_on_can_be_gone_over_too(unrolls: bool) -> None:
    module: Any = nn.GRUCell(3, 4) if unrolls else GRU(3, 4)
    with record(module, trajectory=True) as tape:
        first, _ = [
            unroll(module, x)[0] if unrolls else module(x)[0] for x in torch.randn(2, 5, 2, 3)
        ]
        first.sum().backward()
    _, unused = tape.calls("l0")
    assert (unused.hidden_norm == 0).all()
    curve = lag_curves(unused.trajectory, torch.ones(5, 2, 4), [4]).hidden
    assert (curve[0] == 0).all() and curve.isfinite().all()


def test_a_cell_without_names_for_its_gates_has_none() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3 + 4, 4)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            h = x.new_zeros(len(x), 4) if h is None else h
            return self.inner(torch.cat([x, h], -1)).tanh()

    class Named(Plain):
        gates = ("i", "o")

    for made in (Plain(), Named()):  # the second shows none of what it names
        found = units(unrolled(made, torch.randn(5, 2, 3)).trajectory)
        assert found.gates == {} and found.hidden.shape == (5, 2, 4)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.LSTM(2, 3), "ifgo"),
        (GRU(2, 3), "rzn"),
        (nn.GRUCell(2, 3), "rzn"),
        (RNN(2, 3), "h"),
        (nn.Linear(2, 3), ""),
    ],
)
def test_gates_are_named_in_the_order_of_their_rows(module: nn.Module, names: str) -> None:
    assert "".join(gate_names(module)) == names
