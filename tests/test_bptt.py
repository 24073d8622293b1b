"""``record`` and ``unroll``: every sentence of what they promise."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import weakref
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.check import compare_cell, is_right
from rnngrad.contribution import OuterProducts
from rnngrad.nn import GRU, LSTM, RNN, convert, unroll
from rnngrad.norms import log10_mean, log10_rms, norms, weight_norms

pytestmark = pytest.mark.usefixtures("every_kernel")

LAYERS: dict[str, Any] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


@pytest.fixture(params=sorted(CELLS.load()))
def cell(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return CELLS.default(request.param, hidden_size=6).cell(4).double()


# --- closed forms


@pytest.mark.parametrize("g", [0.5, 0.9, 1.0, 1.1])
def test_a_linear_recurrence_has_slope_log10_g(g: float) -> None:
    """``h_t = g Q h_{t-1}`` with ``Q`` orthogonal: norms shrink by exactly ``g`` a step."""
    size, steps = 8, 200
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    layer = RNN(size, size, nonlinearity="relu", bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(g * q)
        layer.weight_ih_l0.copy_(torch.eye(size))
    h = torch.ones(2, size, dtype=torch.float64)
    inputs = [h] + [h - g * h @ q.T] * (
        steps - 1
    )  # which hold the state at h, so that relu is linear
    with record(layer) as tape:
        output, _ = layer(torch.stack(inputs))
        assert (output > 0).all()
        output[-1].sum().backward()
    slope = log10_rms(tape["l0"].hidden_norm).diff()
    torch.testing.assert_close(slope, torch.full_like(slope, -math.log10(g)), rtol=0, atol=1e-12)


def test_the_recipe_of_the_forums_sees_the_direct_part_alone() -> None:
    layer = LSTM(3, 4)
    with record(layer) as tape:
        output, _ = layer(torch.randn(6, 2, 3))
        output.retain_grad()
        output[-1].sum().backward()
    assert output.grad is not None
    direct = output.grad.double().norm(dim=-1)
    torch.testing.assert_close(tape["l0"].direct_norm, direct)
    assert (direct[:-1] == 0).all() and (tape["l0"].hidden_norm > 0).all()


# --- the tape


def test_norms_are_float64_on_the_cpu_time_major_whatever_batch_first(make: Any) -> None:
    for batch_first in (False, True):
        layer = make(3, 4, 2, batch_first=batch_first, bidirectional=True)
        with record(layer) as tape:
            layer(torch.randn((2, 7, 3) if batch_first else (7, 2, 3)))[0].sum().backward()
        assert list(tape) == ["l0", "l0_reverse", "l1", "l1_reverse"]
        for layer_record in tape.values():
            for norm in (layer_record.hidden_norm, layer_record.direct_norm):
                assert norm.dtype == torch.float64 and norm.device.type == "cpu"
                assert norm.shape == (7, 2)
            assert (layer_record.cell_norm is not None) == (make is LSTM)
            assert layer_record.weight_norm is None and layer_record.hidden_grad is None


def test_unbatched_input_has_one_column(make: Any) -> None:
    layer = make(3, 4)
    with record(layer) as tape:
        layer(torch.randn(7, 3))[0].sum().backward()
    assert tape["l0"].hidden_norm.shape == (7, 1)


def test_packed_columns_are_the_callers_and_nan_beyond_the_end(make: Any) -> None:
    torch.manual_seed(0)
    layer = make(3, 4, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(7, 3, 3, dtype=torch.float64), [2, 7, 4]
    with record(layer, full=True) as tape:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        layer(packed)[0].data.sum().backward()
    for name in ("l0", "l0_reverse"):
        for b, length in enumerate(lengths):
            with record(layer) as alone:
                layer(x[:length, b])[0].sum().backward()
            column = tape[name].hidden_norm[:, b]
            torch.testing.assert_close(column[:length], alone[name].hidden_norm[:, 0])
            assert column[length:].isnan().all()
        grad = tape[name].hidden_grad
        assert grad is not None
        torch.testing.assert_close(grad.norm(dim=-1), tape[name].hidden_norm, equal_nan=True)


def test_projected_states_have_the_projections_width_and_the_right_norms() -> None:
    """Beside the loop written out: torch.nn has no projected cell."""
    torch.manual_seed(0)
    layer = LSTM(3, 6, proj_size=2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with record(layer, full=True, weight=True) as tape:
        output, (h_n, c_n) = layer(x)
        (output.square().sum() + h_n.sum() + c_n.prod()).backward()
    h, c = x.new_zeros(2, 2), x.new_zeros(2, 6)
    hidden, cells, weights = [], [], []
    for x_t in x:
        w = layer.weight_hh_l0.detach().clone().requires_grad_()
        i, f, g, o = (
            x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ w.T + layer.bias_hh_l0
        ).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ layer.weight_hr_l0.T
        for kept in (c, h):
            kept.retain_grad()
        hidden.append(h)
        cells.append(c)
        weights.append(w)
    (torch.stack(hidden).square().sum() + h.sum() + c.prod()).backward()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=0)  # noqa: E731
    close(tape["l0"].hidden_grad, torch.stack([h.grad for h in hidden]))
    close(tape["l0"].cell_grad, torch.stack([c.grad for c in cells]))
    close(tape["l0"].weight_norm[1:], torch.stack([w.grad.norm() for w in weights])[1:])


def test_full_keeps_the_gradients_in_the_layers_dtype(make: Any) -> None:
    layer = make(3, 4)
    with record(layer, full=True) as tape:
        layer(torch.randn(7, 2, 3))[0].sum().backward()
    kept = tape["l0"]
    assert kept.hidden_grad is not None and kept.hidden_grad.dtype == torch.float32
    torch.testing.assert_close(kept.hidden_grad.double().norm(dim=-1), kept.hidden_norm)
    assert (kept.cell_grad is not None) == (make is LSTM)


def test_weight_norm_is_exactly_0_at_the_first_step_from_state_0(make: Any) -> None:
    layer = make(3, 4, bidirectional=True)
    with record(layer, weight=True) as tape:
        layer(torch.randn(7, 2, 3))[0].sum().backward()
    forward, backward = tape["l0"].weight_norm, tape["l0_reverse"].weight_norm
    assert forward is not None and backward is not None
    assert forward[0] == 0 and (forward[1:] > 0).all()
    assert backward[-1] == 0 and (backward[:-1] > 0).all()


def test_a_mean_loss_carries_one_over_the_batch_size(make: Any) -> None:
    layer, x = make(3, 4, dtype=torch.float64), torch.randn(7, 5, 3, dtype=torch.float64)
    recorded = []
    for reduce in (torch.sum, torch.mean):
        with record(layer) as tape:
            reduce(layer(x)[0][-1].sum(-1)).backward()
        recorded.append(tape["l0"].hidden_norm)
    torch.testing.assert_close(recorded[0] / 5, recorded[1])


def test_recording_changes_nothing_over_20_steps(make: Any) -> None:
    """Loss, gradients, parameters and the random stream, bit for bit."""
    histories = []
    everything = {"full": True, "weight": True, "trajectory": True}
    for options in (None, {}, {"full": True}, {"weight": True}, everything):
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": make(3, 8, 2, dropout=0.2), "out": nn.Linear(8, 1)})
        optimizer = torch.optim.Adam(model.parameters())
        history: list[Tensor] = []
        for _ in range(20):
            x = torch.randn(9, 4, 3)

            def closure(x: Tensor = x, model: Any = model) -> Tensor:
                model.zero_grad()
                loss: Tensor = model["out"](model["rnn"](x)[0]).square().mean()
                loss.backward()
                return loss.detach()

            if options is None:
                history.append(closure())
            else:
                with record(model, **options):
                    history.append(closure())
            history += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
        histories.append([*history, *model.parameters(), torch.rand(3)])
    for other in histories[1:]:
        assert all(torch.equal(a, b) for a, b in zip(histories[0], other, strict=True))


# --- what each step adds to the recurrent weight's gradient


def steps_gradients(layer: Any, x: Tensor, suffix: str, loss: Any) -> Tensor:
    """``G_t [T, gH, P]`` by autograd: a loop of cells with a copy of the weight for every step."""
    kind: Any = {RNN: nn.RNNCell, LSTM: nn.LSTMCell, GRU: nn.GRUCell}[type(layer)]
    cell = kind(x.shape[-1], layer.hidden_size, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, nn.Parameter(getattr(layer, f"{name}_{suffix}").detach().double()))
    times = range(len(x))
    weights = {t: cell.weight_hh.detach().clone().requires_grad_() for t in times}
    state: Any = None
    outputs: dict[int, Tensor] = {}
    for t in reversed(times) if suffix.endswith("_reverse") else times:
        arguments = (x[t].double(), state)
        state = torch.func.functional_call(cell, {"weight_hh": weights[t]}, arguments)
        outputs[t] = state[0] if isinstance(state, tuple) else state
    loss(torch.stack([outputs[t] for t in times])).backward()
    return torch.stack([weights[t].grad for t in times])


def shares(grads: Tensor) -> Tensor:
    g = grads.sum(0)
    return (grads * g).flatten(1).sum(1) / g.square().sum()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("suffix", ["l0", "l0_reverse"])
def test_attribution_and_contributions_are_those_of_autograd(
    make: Any, suffix: str, full: bool, segments: int
) -> None:
    torch.manual_seed(0)
    layer = make(3, 4, bidirectional=True, dtype=torch.float64)
    layer.recompute_segments = segments
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    loss = lambda h: (h.square().sum((1, 2)) * torch.arange(7)).sum()  # noqa: E731
    with record(layer, full=full, weight=True) as tape:
        output = layer(x)[0]
        loss(output[..., 4:] if suffix.endswith("_reverse") else output[..., :4]).backward()
    kept, grads = tape[suffix], steps_gradients(layer, x, suffix, loss)
    assert kept.attribution is not None and kept.attribution.dtype == torch.float64
    torch.testing.assert_close(kept.attribution, shares(grads), rtol=1e-10, atol=1e-13)
    assert kept.attribution.sum().item() == pytest.approx(1, abs=1e-12)
    assert (kept.contribution is not None) == full
    if kept.contribution is None:
        return
    gates = layer.weight_hh_l0.shape[0] // 4
    by_gate = grads.unflatten(1, (gates, 4)).norm(dim=(2, 3))
    for count, expected in ((gates, by_gate), (1, grads.norm(dim=(1, 2)).unsqueeze(1))):
        torch.testing.assert_close(kept.contribution.norms(count), expected, rtol=1e-10, atol=0)
    direction = torch.randn_like(layer.weight_hh_l0)
    along = (grads * direction.detach()).sum((1, 2))
    torch.testing.assert_close(kept.contribution.along(direction), along, rtol=1e-10, atol=1e-13)


def test_attribution_of_packed_sequences_is_of_the_steps_that_they_have(make: Any) -> None:
    torch.manual_seed(0)
    layer = make(3, 4, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(7, 3, 3, dtype=torch.float64), [2, 7, 4]
    kept = {}
    for segments in (1, 3):
        layer.recompute_segments = segments
        with record(layer, weight=True) as tape:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            layer(packed)[0].data.square().sum().backward()
        kept[segments] = dict(tape)
    for name in ("l0", "l0_reverse"):
        parts = [
            (steps_gradients(layer, x[:n, b : b + 1], name, lambda h: h.square().sum()), n)
            for b, n in enumerate(lengths)
        ]
        grads = torch.stack([nn.functional.pad(g, (0, 0, 0, 0, 0, 7 - n)) for g, n in parts]).sum(0)
        for segments in (1, 3):
            found = kept[segments][name].attribution
            torch.testing.assert_close(found, shares(grads), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", [1, 7])
def test_attributions_sum_to_1_however_fast_the_gradient_vanishes(
    make: Any, dtype: torch.dtype, segments: int
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = make(3, 32, dtype=dtype)
        layer.recompute_segments = segments
        with record(layer, weight=True) as tape:
            layer(torch.randn(300, 4, 3, dtype=dtype))[0][-1].sum().backward()
        found = tape["l0"].attribution
        assert found is not None and abs(found.sum().item() - 1) < 1e-12
        assert (found != 0).sum() > 150


@pytest.mark.parametrize("unrolls", [False, True])
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_attribution_does_not_depend_on_the_size_of_the_loss(
    make: Any, scale: float, unrolls: bool
) -> None:
    torch.manual_seed(0)
    part = {RNN: "rnn", LSTM: "lstm", GRU: "gru"}[make]
    cell = CELLS.default(part, hidden_size=4)
    module = (cell.cell(3) if unrolls else cell.layers(3)).double()
    x, found = torch.randn(6, 3, 3, dtype=torch.float64), []
    for by in (1.0, scale):
        with record(module, full=True, weight=True) as tape:
            output = unroll(module, x)[0] if unrolls else module(x)[0]
            (output.sum() * by).backward()
        found.append(tape["l0"])
    torch.testing.assert_close(found[0].attribution, found[1].attribution, rtol=1e-9, atol=1e-12)
    one, other = (kept.contribution for kept in found)
    torch.testing.assert_close(one.norms(), other.norms() / scale, rtol=1e-9, atol=0)
    direction = torch.randn(one.total().matrix.shape, dtype=torch.float64)
    along = other.along(direction / scale)  # of which the products are neither 0 nor infinite
    torch.testing.assert_close(one.along(direction), along, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unrolls", [False, True])
def test_attribution_of_a_gradient_that_is_exactly_0_is_nan(unrolls: bool) -> None:
    """Where a first step from state 0 is all there is; where the loss does not reach the layer."""
    module: nn.Module = nn.GRUCell(3, 4) if unrolls else GRU(3, 4)
    with record(module, full=True, weight=True) as tape:
        inputs = torch.randn(1, 2, 3), torch.randn(3, 2, 3)
        outputs = [unroll(module, x)[0] if unrolls else module(x)[0] for x in inputs]
        outputs[0].sum().backward()
    for kept, steps in zip(tape.calls("l0"), (1, 3), strict=True):
        assert kept.attribution.isnan().all() and kept.attribution.shape == (steps,)
        assert (kept.weight_norm == 0).all()
        assert torch.equal(kept.contribution.norms(3), torch.zeros(steps, 3, dtype=torch.float64))
        assert (kept.contribution.along(torch.ones(12, 4)) == 0).all()


def test_contributions_of_a_cell_are_the_gradients_of_its_weight_at_each_step(
    cell: nn.Module,
) -> None:
    weight = dict(cell.named_parameters(recurse=False)).get("weight_hh")
    if weight is None:
        pytest.skip("its weight_hh is computed")
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with record(cell, full=True, weight=True) as tape:
        unroll(cell, x)[0].square().sum().backward()
    kept, direction = tape["l0"], torch.randn_like(weight)
    assert kept.contribution is not None and kept.attribution is not None
    assert weight.grad is not None
    along = kept.contribution.along(direction)
    assert along.sum().item() == pytest.approx((weight.grad * direction).sum().item())
    assert kept.attribution.sum().item() == pytest.approx(1, abs=1e-12)
    parts = kept.contribution.along(weight.grad) / weight.grad.square().sum()
    torch.testing.assert_close(kept.attribution, parts, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(kept.contribution.norms()[:, 0], kept.weight_norm)
    blocks = len(weight) // 6
    by_gate = kept.contribution.norms(blocks)
    torch.testing.assert_close(by_gate.norm(dim=1), kept.weight_norm)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 6),
    batch=st.integers(1, 5),
    gates=st.integers(1, 4),
    hidden=st.integers(1, 5),
    exponents=st.lists(st.integers(-150, 100), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_contributions_of_any_size_are_those_of_the_outer_products(
    steps: int, batch: int, gates: int, hidden: int, exponents: list[int], seed: int
) -> None:
    """Beside exact fractions, for sizes whose squares are far beyond the range."""
    generator = torch.Generator().manual_seed(seed)
    a, h = (
        torch.randn(steps, batch, n, dtype=torch.float64, generator=generator)
        for n in (gates * hidden, hidden)
    )
    a = a * 10.0 ** torch.tensor(exponents[:steps], dtype=torch.float64).view(-1, 1, 1)
    exact, states = (np.vectorize(Fraction, otypes=[object])(part.numpy()) for part in (a, h))
    built = [exact[t].T @ states[t] for t in range(steps)]
    g = sum(built)
    found = OuterProducts(a, h).attribution()
    for t in range(steps):
        expected = float((built[t] * g).sum() / (g * g).sum())
        assert found[t].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found.sum().item() == pytest.approx(1, abs=1e-10)


# --- which calls, which backward


def test_forwards_under_no_grad_are_ignored(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(7, 2, 3)
    with record(layer) as tape:
        with torch.no_grad():
            layer(x)
        layer(x)[0].sum().backward()
    assert tape["l0"].hidden_norm.shape == (7, 2)


def test_a_layer_called_often_is_listed_in_call_order(make: Any) -> None:
    layer = make(3, 4)
    with record(layer) as tape:
        outputs = [layer(torch.randn(t, 2, 3))[0] for t in (3, 5, 4)]
        (outputs[0].sum() + outputs[1].sum()).backward()
    with pytest.raises(RuntimeError, match=r"called 3 times.*tape\.calls\('l0'\)"):
        tape["l0"]
    assert [len(call.hidden_norm) for call in tape.calls("l0")] == [3, 5, 4]
    unused = tape.calls("l0")[2]
    assert (unused.hidden_norm == 0).all() and (unused.direct_norm == 0).all()


def test_a_second_backward_raises_at_that_backward(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(7, 2, 3)
    with record(layer):
        layer(x)[0].sum().backward()
        with pytest.raises(RuntimeError, match="second backward"):
            layer(x)[0].sum().backward()
    with record(layer):
        loss = layer(x)[0].sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()


def test_no_backward_raises_when_the_block_ends_unless_an_error_is_on_its_way(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(7, 2, 3)
    with pytest.raises(RuntimeError, match="without a backward"), record(layer):
        layer(x)
    with pytest.raises(ZeroDivisionError), record(layer):
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="without a backward"), record(layer):
        layer.requires_grad_(False)
        layer(x)


def test_reading_before_the_backward_says_so(make: Any) -> None:
    layer = make(3, 4)
    with record(layer) as tape:
        output, _ = layer(torch.randn(7, 2, 3))
        with pytest.raises(RuntimeError, match="nothing recorded yet"):
            tape["l0"]
        output.sum().backward()
        assert tape["l0"].hidden_norm.shape == (7, 2)


def test_blocks_do_not_nest_and_can_follow_each_other(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(7, 2, 3)
    with record(layer):
        with pytest.raises(RuntimeError, match="do not nest"), record(layer):
            pass
        layer(x)[0].sum().backward()
    with record(layer) as tape:
        layer(x)[0].sum().backward()
    assert "l0" in tape


@pytest.mark.parametrize(
    "model",
    [nn.LSTM(3, 4), nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)), nn.Linear(3, 4)],
    ids=["itself", "inside", "none"],
)
def test_a_model_with_nothing_to_record_raises_and_names_convert(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"nothing to record.*rnngrad\.nn\.convert"):
        record(model)


class Own(nn.Module):
    """A user's model: nothing tells from outside that it is not a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def test_a_users_module_that_turns_out_to_have_nothing_raises_when_the_block_ends() -> None:
    model = Own()
    with pytest.raises(ValueError, match="nothing to record"), record(model):
        model(torch.ones(2, 3)).sum().backward()


def test_an_unknown_name_lists_the_known_ones_and_an_unconverted_layer_is_named() -> None:
    model = nn.ModuleDict({"a": RNN(3, 4), "b": nn.GRU(3, 4)})
    with record(model) as tape:
        model["a"](torch.ones(2, 1, 3))[0].sum().backward()
    with pytest.raises(KeyError, match=r"recorded: a\.l0"):
        tape["a.l7"]
    with pytest.raises(KeyError, match=r"b is a torch\.nn layer.*convert"):
        tape["b.l0"]


def test_a_shared_module_goes_by_its_first_name(make: Any) -> None:
    layer = make(3, 3)
    model = nn.ModuleDict({"first": layer, "second": layer})
    with record(model) as tape:
        x = torch.randn(5, 2, 3)
        model["second"](model["first"](x)[0])[0].sum().backward()
    assert list(tape) == ["first.l0"] and len(tape.calls("first.l0")) == 2


def test_layers_of_another_model_are_left_alone(make: Any) -> None:
    ours, other = make(3, 4), make(3, 4)
    with record(ours) as tape:
        x = torch.randn(5, 2, 3)
        (ours(x)[0].sum() + other(x)[0].sum()).backward()
    assert list(tape) == ["l0"] and len(tape.calls("l0")) == 1


def test_activation_checkpointing_records_the_layer_once(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with record(layer) as plain:
        layer(x)[0].sum().backward()
    with record(layer) as tape:
        output = torch.utils.checkpoint.checkpoint(lambda v: layer(v)[0], x, use_reentrant=False)
        output.sum().backward()
    assert torch.equal(tape["l0"].hidden_norm, plain["l0"].hidden_norm)


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that is fed its own output one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 6)
        self.decoder = nn.LSTM(1, 6)
        self.readout = nn.Linear(6, 1)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        _, state = self.encoder(x)
        y, outputs = x.new_zeros(1, x.shape[1], 1), []
        for _ in range(steps):
            hidden, state = self.decoder(y, state)
            y = self.readout(hidden)
            outputs.append(y)
        return torch.cat(outputs)


def test_an_encoder_and_a_stepwise_decoder_converted_from_torch_nn_are_recorded() -> None:
    """Beside one autograd loop of cells through both."""
    torch.manual_seed(0)
    model = Seq2Seq().double()
    reference = copy.deepcopy(model)
    convert(model)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    with record(model) as tape:
        model(x, 4).square().sum().backward()
    assert list(tape) == ["encoder.l0", "decoder.l0"]
    assert len(tape.calls("decoder.l0")) == 4

    def step(lstm: nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = (
            x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        )
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        h.retain_grad()
        c.retain_grad()
        return h, c

    h = c = x.new_zeros(2, 6)
    states, loss, y = [], x.new_zeros(()), x.new_zeros(2, 1)
    for x_t in x:
        h, c = step(reference.encoder, x_t, h, c)
        states.append((h, c))
    for _ in range(4):
        h, c = step(reference.decoder, y, h, c)
        states.append((h, c))
        y = reference.readout(h)
        loss = loss + y.square().sum()
    loss.backward()
    records = [tape["encoder.l0"], *tape.calls("decoder.l0")]
    for quantity, index in (("hidden_norm", 0), ("cell_norm", 1)):
        ours = torch.cat([getattr(r, quantity) for r in records])
        theirs = torch.stack([state[index].grad.norm(dim=-1) for state in states])  # type: ignore[union-attr]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


# --- cells and unroll


def test_cells_unrolled_agree_with_a_loop_of_their_own(cell: nn.Module) -> None:
    errors = compare_cell(cell, torch.randn(5, 3, 4, dtype=torch.float64))
    assert is_right(errors), errors


@pytest.mark.parametrize("name", sorted(CELLS.load()))
def test_a_cell_unrolled_is_its_layer(name: str) -> None:
    """The equation, through autograd, beside the layer's hand-written backward."""
    torch.manual_seed(0)
    part = CELLS.default(name, hidden_size=6)
    layer, cell = part.layers(4).double(), part.cell(4).double()
    if not isinstance(layer, nn.RNNBase):
        pytest.skip("has no layer of its own")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    tapes = []
    for module, run in ((layer, layer), (cell, lambda x: unroll(cell, x))):
        with record(module, full=True, weight=True) as tape:
            output, state = run(x)
            last = state[0] if isinstance(state, tuple) else state
            (output.square().sum() + last.sum()).backward()
        tapes.append(tape["l0"])
    for quantity in tapes[0].__dataclass_fields__.keys() - {"contribution", "trajectory"}:
        a, b = (getattr(r, quantity) for r in tapes)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("make_cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_torchs_own_cells_are_recorded_batched_and_unbatched(make_cell: Any) -> None:
    torch.manual_seed(0)
    cell = make_cell(4, 6, dtype=torch.float64)
    x = torch.randn(5, 1, 4, dtype=torch.float64)
    tapes = []
    for data in (x, x[:, 0]):
        with record(cell, weight=True) as tape:
            unroll(cell, data)[0].square().sum().backward()
        tapes.append(tape["l0"])
    for quantity in ("hidden_norm", "direct_norm", "cell_norm", "weight_norm"):
        a, b = (getattr(r, quantity) for r in tapes)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


class Leaky(nn.Module):
    """A user's own cell: no base class, no names of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(len(x), 4) if h is None else h
        return 0.9 * h + 0.1 * self.inner(torch.cat([x, h], -1)).tanh()


def test_a_users_own_cell_is_recorded_under_its_path() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaky = Leaky()

        def forward(self, x: Tensor) -> Tensor:
            return unroll(self.leaky, x)[0][-1]

    model = Model()
    x = torch.randn(5, 2, 3)
    with record(model, full=True) as tape:
        model(x).sum().backward()
    kept = tape["leaky.l0"]
    assert kept.hidden_norm.shape == (5, 2) and kept.cell_norm is None
    assert (kept.direct_norm[:-1] == 0).all() and (kept.direct_norm[-1] == 2).all()
    with pytest.raises(ValueError, match="no parameter weight_hh"), record(model, weight=True):
        model(x)


def test_recording_an_unrolled_cell_changes_nothing(cell: nn.Module) -> None:
    results = []
    plain = "weight_hh" in dict(cell.named_parameters())  # not computed from what is trained
    for options in (None, {}, {"full": True, "weight": plain, "trajectory": True}):
        cell.zero_grad()
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 3, 4).requires_grad_()
        if options is None:
            outputs, _ = unroll(cell, x)
            outputs.square().sum().backward()
        else:
            with record(cell, **options):
                outputs, _ = unroll(cell, x)
                outputs.square().sum().backward()
        grads = [p.grad.clone() for p in (x, *cell.parameters()) if p.grad is not None]
        results.append([outputs.detach(), *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unroll_has_the_double_backward_and_transforms_that_layers_have_not(
    cell: nn.Module,
) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: unroll(cell, x)[0], x)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return unroll(lambda *step: torch.func.functional_call(cell, weights, step), x)[0].sum()

    weights = {name: p.detach() for name, p in cell.named_parameters()}
    unroll(cell, x)[0].sum().backward()
    for name, grad in torch.func.grad(loss)(weights).items():
        torch.testing.assert_close(grad, cell.get_parameter(name).grad)


def test_splitting_time_and_carrying_the_state_gives_the_same_outputs(cell: nn.Module) -> None:
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    whole, _ = unroll(cell, x)
    first, state = unroll(cell, x[:2])
    second, _ = unroll(cell, x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    with pytest.raises(ValueError, match="no time steps"):
        unroll(cell, x[:0])


class Lazy(nn.Module):
    """Returns its state as it is at every other step, as clockwork and masked cells do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.step = inner, 0

    def forward(self, x: Tensor, state: Any) -> Any:
        self.step += 1
        return state if self.step % 2 == 0 and state is not None else self.inner(x, state)


@pytest.mark.parametrize("make_cell", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("given", [False, True])
def test_a_cell_that_returns_its_state_unchanged_is_recorded_step_by_step(
    make_cell: Any, given: bool
) -> None:
    torch.manual_seed(0)
    cell = Lazy(make_cell(3, 4, dtype=torch.float64))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    state: Any = (zeros, zeros) if make_cell is nn.LSTMCell else zeros
    cell.step = 1 if given else 0
    with record(cell) as tape:
        outputs, _ = unroll(cell, x, state if given else None)
        outputs.square().sum().backward()
    cell.step = 1 if given else 0
    if not given:
        state = None
    kept = []
    for x_t in x:  # the same, every state a tensor of its own
        state = cell(x_t, state)
        if cell.step % 2 == 0:
            state = tuple(s.clone() for s in state) if isinstance(state, tuple) else state.clone()
        for s in state if isinstance(state, tuple) else [state]:
            if s.requires_grad:
                s.retain_grad()
        kept.append(state if isinstance(state, tuple) else (state,))
    torch.stack([s[0] for s in kept]).square().sum().backward()
    for quantity, index in (("hidden_norm", 0), ("cell_norm", 1)):
        ours = getattr(tape["l0"], quantity)
        if ours is None:
            continue
        for t, states in enumerate(kept):
            if not states[index].requires_grad:
                assert ours[t].isnan().all(), "autograd does not compute it: not 0 but unknown"
            else:
                grad = states[index].grad
                expected = ours[t] * 0 if grad is None else grad.norm(dim=-1)
                torch.testing.assert_close(ours[t], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("unrolled", [False, True])
def test_frozen_layers_and_cells_are_named_as_frozen_not_recorded_as_0(unrolled: bool) -> None:
    model = nn.ModuleDict({"low": nn.GRUCell(3, 4) if unrolled else GRU(3, 4), "top": GRU(4, 4)})
    model["low"].requires_grad_(False)
    with record(model) as tape:
        x = torch.randn(5, 2, 3)
        h = unroll(model["low"], x)[0] if unrolled else model["low"](x)[0]
        model["top"](h)[0].sum().backward()
    with pytest.raises(KeyError, match=r"low\.l0.*requires a gradient \(frozen\)"):
        tape["low.l0"]
    assert (tape["top.l0"].hidden_norm > 0).all()


def test_a_frozen_recurrent_weight_has_no_contributions_to_record() -> None:
    cell = nn.GRUCell(3, 4)
    cell.weight_hh.requires_grad_(False)
    with (
        pytest.raises(ValueError, match="weight_hh of GRUCell is frozen"),
        record(cell, weight=True),
    ):
        unroll(cell, torch.randn(5, 2, 3))


@pytest.mark.parametrize("functional", [False, True])
def test_what_a_backward_was_told_not_to_reach_is_not_0(make: Any, functional: bool) -> None:
    layer = make(3, 4, 2)
    with record(layer) as tape:
        loss = layer(torch.randn(5, 2, 3))[0].square().sum()
        if functional:
            torch.autograd.grad(loss, [layer.weight_hh_l1])
        else:
            loss.backward(inputs=[layer.weight_hh_l1])
    assert (tape["l1"].hidden_norm > 0).all()
    with pytest.raises(RuntimeError, match=r"'l0': this backward was told to stop early"):
        tape["l0"]


def test_autograd_grad_of_all_parameters_is_recorded_whole(make: Any) -> None:
    layer, x = make(3, 4, 2), torch.randn(5, 2, 3)
    with record(layer) as tape:
        torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    with record(layer) as whole:
        layer(x)[0].square().sum().backward()
    for name in ("l0", "l1"):
        assert torch.equal(tape[name].hidden_norm, whole[name].hidden_norm)


def test_unrolled_states_that_a_backward_was_told_not_to_reach_are_not_0() -> None:
    cell = nn.GRUCell(3, 4)
    with record(cell) as tape:
        outputs, _ = unroll(cell, torch.randn(5, 2, 3))
        torch.autograd.grad(outputs.square().sum(), outputs)
        outputs.sum().backward()
    assert (tape["l0"].hidden_norm > 0).all(), "the first did not reach the recurrence at all"


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ZeroDivisionError


@pytest.mark.parametrize("unrolled", [False, True])
def test_what_a_failed_backward_did_not_reach_is_not_0(unrolled: bool) -> None:
    low: nn.Module = nn.GRUCell(3, 4) if unrolled else GRU(3, 4)
    model = nn.ModuleDict({"low": low, "top": GRU(4, 4)})
    with record(model) as tape:
        x = torch.randn(5, 2, 3)
        h = unroll(low, x)[0] if unrolled else low(x)[0]
        with pytest.raises(ZeroDivisionError):
            model["top"](Failing.apply(h))[0].sum().backward()
    assert (tape["top.l0"].hidden_norm > 0).all()
    with pytest.raises(RuntimeError, match=r"'low\.l0': the backward ended in an error"):
        tape["low.l0"]


def test_a_record_object_can_be_entered_again(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(5, 2, 3)
    block, tapes = record(layer), []
    for _ in range(2):
        with block as tape:
            layer(x)[0].sum().backward()
        tapes.append(tape)
    assert torch.equal(tapes[0]["l0"].hidden_norm, tapes[1]["l0"].hidden_norm)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTMCell(3, 4)

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.inner(x, state)


def test_a_wrapped_lstm_cell_that_hides_a_path_is_refused_rather_than_recorded_wrong() -> None:
    cell = Wrapped()
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"rnngrad\.cells\.LSTMCell in its place"), record(cell):
        unroll(cell, x)
    assert unroll(cell, x)[0].shape == (5, 4), "unrecorded it runs"
    with record(cell) as tape:
        unroll(cell, x.unsqueeze(1))[0].sum().backward()
    assert tape["l0"].cell_norm is not None and (tape["l0"].cell_norm[-1] > 0).all()


def test_a_gradient_changed_after_the_backward_was_recorded_before() -> None:
    cell = nn.GRUCell(3, 4)
    with record(cell) as tape:
        outputs, _ = unroll(cell, torch.randn(5, 2, 3))
        grad = torch.ones_like(outputs)
        outputs.backward(grad)
        grad.zero_()
    assert (tape["l0"].direct_norm == 2).all() and (tape["l0"].hidden_norm[-1] == 2).all()


@pytest.mark.parametrize("unrolled", [False, True])
def test_hooks_on_the_output_are_in_the_direct_part(unrolled: bool) -> None:
    module: nn.Module = nn.GRUCell(3, 4) if unrolled else GRU(3, 4)
    with record(module) as tape:
        x = torch.randn(5, 2, 3)
        output = unroll(module, x)[0] if unrolled else module(x)[0]
        output.register_hook(lambda grad: grad / 2)
        output[-1].sum().backward()
    assert (tape["l0"].direct_norm[-1] == 1).all() and (tape["l0"].hidden_norm[-1] == 1).all()


@pytest.mark.parametrize(
    "returned", [lambda h: (h, h, h), lambda h: [h, h], lambda h: (), lambda h: (h, None)]
)
def test_a_cell_that_returns_something_else_is_told_what_is_expected(returned: Any) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Any:
            return returned(x)

    with pytest.raises(TypeError, match=r"unroll: Odd must return h or \(h, c\) as tensors"):
        unroll(Odd(), torch.randn(5, 2, 3))


@pytest.mark.parametrize("how", ["parametrised", "pruned", "other name"])
def test_a_recurrent_weight_that_is_computed_is_refused_not_overwritten_or_read_as_0(
    how: str,
) -> None:
    cell: Any = nn.RNNCell(3, 3)
    if how == "parametrised":
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    elif how == "pruned":
        prune.l1_unstructured(cell, "weight_hh", 0.3)
    before = copy.deepcopy(cell.state_dict())
    run: nn.Module = cell
    error: type[Exception] = ValueError
    if how == "other name":

        class Other(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight_hh = nn.Parameter(torch.eye(3))
                self.kept = [self.weight_hh]

            def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
                return x if h is None else x + h @ self.kept[0]

        run, error = Other(), RuntimeError
    with pytest.raises(error, match="weight_hh"), record(run, weight=True) as tape:
        unroll(run, torch.randn(4, 2, 3))[0].sum().backward()
        tape["l0"]
    for name, value in cell.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_call_after_the_backward_is_not_0(unrolled: bool) -> None:
    module: nn.Module = nn.GRUCell(3, 4) if unrolled else GRU(3, 4)
    x = torch.randn(5, 2, 3)
    run = (lambda: unroll(module, x)[0]) if unrolled else (lambda: module(x)[0])
    with record(module) as tape:
        run().sum().backward()
        run()
    with pytest.raises(RuntimeError, match="came after the block's one backward"):
        tape.calls("l0")


class Both(nn.Module):
    """Returns one tensor as h and c."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRUCell(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor, state: Any) -> Any:
        h = self.inner(x, None if state is None else state[0])
        return h, h


@pytest.mark.parametrize("make_cell", [Both, lambda: nn.LSTMCell(3, 4, dtype=torch.float64)])
def test_the_last_state_may_be_changed_in_place_recorded_or_not(make_cell: Any) -> None:
    torch.manual_seed(0)
    cell = make_cell()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for recorded in (False, True):
        cell.zero_grad()
        with record(cell) if recorded else contextlib.nullcontext():
            outputs, (h, c) = unroll(cell, x)
            h.mul_(2)
            c.add_(1)
            loss = outputs.sum() + (h * c).sum()
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in cell.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_learned_initial_state_has_a_gradient_of_its_own_in_every_run() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h0 = nn.Parameter(torch.ones(2, 1))

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return self.h0 if h is None else h / 2

    cell, x = Learned(), torch.zeros(3, 2, 1)
    with record(cell) as tape:
        (unroll(cell, x)[0].sum() + 10 * unroll(cell, x)[0].sum()).backward()
    first, second = (call.hidden_norm[:, 0].tolist() for call in tape.calls("l0"))
    assert first == [1.75, 1.5, 1.0] and second == [17.5, 15.0, 10.0]
    assert not cell.h0._backward_hooks


def test_a_cell_that_detaches_stays_detached_when_recorded() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.GRUCell(3, 4)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return self.inner(x, h).detach()

    cell = Detached()
    with pytest.raises(RuntimeError, match="nothing that requires a gradient"), record(cell):
        assert not unroll(cell, torch.randn(5, 2, 3))[0].requires_grad


def test_a_cell_that_changes_its_state_in_place_is_refused() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return x.clone() if h is None else h.add_(x)

    with pytest.raises(RuntimeError, match="InPlace changes in place a state"):
        unroll(InPlace(), torch.randn(5, 2, 3))


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_tape_keeps_nothing_of_the_graph_and_can_be_copied(unrolled: bool) -> None:
    module: nn.Module = nn.GRUCell(3, 4) if unrolled else GRU(3, 4)
    gc.disable()
    try:
        with record(module) as tape:
            x = torch.randn(5, 2, 3)
            output = unroll(module, x)[0] if unrolled else module(x)[0]
            output.sum().backward()
        twin = pickle.loads(pickle.dumps(copy.deepcopy(tape)))  # noqa: S301
        assert torch.equal(twin["l0"].hidden_norm, tape["l0"].hidden_norm)
        alive = weakref.ref(x)
        del x, output
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_unroll_runs_without_gradients(cell: nn.Module, mode: Any) -> None:
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    with mode():
        outputs, _ = unroll(cell, x)
    assert torch.equal(outputs, unroll(cell, x)[0])


@pytest.mark.parametrize("unrolled", [False, True])
def test_an_error_in_a_forward_leaves_the_block_as_it_is(unrolled: bool) -> None:
    module: nn.Module = nn.GRUCell(3, 4) if unrolled else GRU(3, 4)
    module.register_parameter("bias_hh" if unrolled else "bias_hh_l0", nn.Parameter(torch.ones(5)))
    with pytest.raises(RuntimeError, match="size|shape|expand"), record(module):
        x = torch.randn(5, 2, 3)
        unroll(module, x) if unrolled else module(x)


def test_reentrant_checkpointing_says_what_to_use() -> None:
    layer, x = GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False can be recorded"), record(layer):
        torch.utils.checkpoint.checkpoint(
            lambda v: layer(v)[0], x, use_reentrant=True
        ).sum().backward()


@pytest.mark.parametrize("what", [None, [1], "model"])
def test_record_and_convert_take_modules(what: Any) -> None:
    for function in (record, convert):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            function(what)


# --- numbers that lie unless handled


@pytest.mark.parametrize("epsilon", [1e-4, 1e-8, 1e-10])
def test_weight_norms_keep_their_digits_where_the_rows_cancel(epsilon: float) -> None:
    torch.manual_seed(0)
    v, h = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    alpha = torch.stack([v, -v * (1 + epsilon)]).unsqueeze(0)
    direct = torch.linalg.matrix_norm(alpha[0].T @ torch.stack([h, h]))
    measured = weight_norms(alpha, torch.stack([h, h]).unsqueeze(0))[0]
    torch.testing.assert_close(measured, direct, rtol=1e-12, atol=0)
    assert measured.item() == pytest.approx(epsilon * (v.norm() * h.norm()).item(), rel=1e-5)


def test_a_norm_under_the_range_of_float32_squares_is_not_0() -> None:
    layer = RNN(2, 64)
    torch.manual_seed(0)
    layer.reset_parameters()
    with record(layer) as tape:
        layer(torch.randn(150, 4, 2))[0][-1].sum().backward()
    log_norm = log10_rms(tape["l0"].hidden_norm)
    lags = torch.arange(150).flip(0)
    assert log_norm[lags == 140].item() < -25, "the float32 norm would be 0 from lag 92 on"
    slope = log_norm[(lags >= 10) & (lags <= 140)].diff()
    assert slope.isfinite().all() and slope.std() < 0.2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(allow_nan=True, allow_infinity=True),
            st.sampled_from([0.0, -0.0, 1e-320, 1e-200, 1e300, math.inf, math.nan]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_float64_norms_neither_under_nor_overflow(values: list[float]) -> None:
    norm = norms(torch.tensor([values], dtype=torch.float64)).item()
    if any(map(math.isnan, values)):
        assert math.isnan(norm)
    else:
        assert norm == pytest.approx(math.hypot(*values), rel=1e-14, abs=5e-324)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 4),
    batch=st.integers(1, 12),
    gates=st.integers(1, 12),
    hidden=st.integers(1, 12),
    scale=st.sampled_from([1e-200, 1e-30, 1.0, 1e150]),
    seed=st.integers(0, 1000),
)
def test_weight_norms_are_those_of_the_outer_products(
    steps: int, batch: int, gates: int, hidden: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, h = (
        torch.randn(steps, batch, n, dtype=torch.float64, generator=generator)
        for n in (gates, hidden)
    )
    direct = torch.stack([torch.linalg.matrix_norm(a[t].T @ h[t]) for t in range(steps)])
    measured = weight_norms(scale * a, h)
    torch.testing.assert_close(measured / scale, direct, rtol=1e-10, atol=0)


def test_log10_over_the_batch_is_taken_in_log_space() -> None:
    values = [[1e-200, 3e-200], [0.0, 0.0], [3.0, 4.0], [math.nan, 1.0], [1.0, 1.0]]
    norm = torch.tensor(values, dtype=torch.float64)
    rms, mean = log10_rms(norm), log10_mean(norm)
    assert rms[0].item() == pytest.approx(-200 + math.log10(math.sqrt(5)))
    assert mean[0].item() == pytest.approx(-200 + math.log10(2))
    assert rms[1] == mean[1] == -math.inf
    assert rms[2].item() == pytest.approx(math.log10(math.sqrt(12.5)))
    assert rms[3].isnan() and mean[3].isnan()


def test_sequences_that_have_ended_do_not_count_and_one_that_is_nan_throughout_does() -> None:
    norm = torch.tensor([[3.0, 4.0], [2.0, math.nan], [math.nan, math.nan]], dtype=torch.float64)
    for log10, first in ((log10_rms, math.sqrt(12.5)), (log10_mean, 3.5)):
        found = log10(torch.stack([norm, norm]))
        assert found[0].tolist()[:2] == pytest.approx([math.log10(first), math.log10(2)])
        assert found[:, 2].isnan().all() and found[0, :2].equal(found[1, :2])
        assert log10(torch.tensor([[1.0, math.nan], [1.0, math.nan]]).double()).isnan().all()
