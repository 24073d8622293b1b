"""Every cell beside its paper's equation, float64 autograd, and torch.nn's normalisers."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnngrad.bptt import record
from rnngrad.cells import CELLS, CellPart, IndRNNCell, OrthogonalRNNCell
from rnngrad.cells.base import Unrolled
from rnngrad.cells.batch_norm import BatchNormOverTime
from rnngrad.check import cell_variants, compare_cell, is_right
from rnngrad.nn import RNN, unroll
from rnngrad.parts import InputError
from tests.small import documented

VARIANTS: dict[str, CellPart] = {
    variant: part
    for name in sorted(CELLS.load())
    for variant, part in cell_variants(name, hidden_size=5, num_layers=2)
}
every_variant = pytest.mark.parametrize("part", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(steps: int = 6, batch: int = 4, size: int = 3) -> Tensor:
    return torch.randn(steps, batch, size, dtype=torch.float64)


def scrambled(module: nn.Module) -> Any:
    """In float64, and with no parameter at a special value such as 0 or 1."""
    module.double()
    for name, parameter in module.named_parameters():
        if "parametrizations" not in name:
            nn.init.uniform_(parameter, -0.6, 0.6)
    return module


# --- what holds for every one of them


@every_variant
def test_gradients_and_recorded_norms_are_those_of_float64_autograd(part: CellPart) -> None:
    errors = compare_cell(scrambled(part.cell(3)), inputs())
    assert is_right(errors), errors
    assert {"gradients", "hidden_norm", "direct_norm", "hidden_diff"} <= set(errors)


@every_variant
def test_stacked_layers_train_and_each_is_recorded(part: CellPart) -> None:
    layers = part.layers(3)
    with record(layers, full=True) as tape:
        output, _ = layers(inputs().float())
        output[-1].square().sum().backward()
    assert output.shape == (6, 4, 5) and output.dtype == torch.float32
    assert len(tape) == 2
    assert all(tape[name].hidden_norm.sum() > 0 for name in tape)
    for name, parameter in layers.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_variant
def test_a_sequence_in_two_parts_is_the_sequence(part: CellPart) -> None:
    layers, x = scrambled(part.layers(3)).eval(), inputs()
    whole, last = layers(x)
    first, state = layers(x[:2])
    second, state = layers(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state, last)


@every_variant
def test_one_sequence_is_its_column_of_the_batch(part: CellPart) -> None:
    if any(isinstance(m, BatchNormOverTime) for m in part.cell(3).modules()):
        pytest.skip("normalises a batch")
    cell, x = scrambled(part.cell(3)), inputs()
    torch.testing.assert_close(unroll(cell, x[:, 1])[0], unroll(cell, x)[0][:, 1])


@every_variant
def test_layers_recompute_segments_exactly_where_the_part_says_so(part: CellPart) -> None:
    assert hasattr(part.layers(3), "recompute_segments") == part.recomputes


@pytest.mark.parametrize("variant", [name for name, part in VARIANTS.items() if part.recomputes])
def test_layers_with_kernels_are_the_cell_over_time(variant: str) -> None:
    layers, x = VARIANTS[variant].layers(3).double(), inputs()
    cells = Unrolled(VARIANTS[variant].cell(size).double() for size in (3, 5))
    with torch.no_grad():
        for ours, theirs in zip(cells.parameters(), layers.parameters(), strict=True):
            ours.copy_(theirs)
    torch.testing.assert_close(cells(x)[0], layers(x)[0])


@every_variant
def test_every_preactivation_passes_the_place_where_its_gradient_can_be_clipped(
    part: CellPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def cut(a: Tensor, gates: int) -> Tensor:
        seen.append(gates)
        assert a.shape == (4, gates * 5)
        return a.detach()

    for name, module in list(sys.modules.items()):
        if name.startswith("rnngrad.cells.") and hasattr(module, "preactivation"):
            monkeypatch.setattr(module, "preactivation", cut)
    cell: Any = part.cell(3).double()
    outputs, _ = unroll(cell, inputs(steps=1))
    names = {name for name, kind in CELLS.items() if kind is type(part)}
    if not seen and not names & documented("cell"):
        pytest.skip("does not show its pre-activations")
    assert 5 * sum(seen) == len(cell.weight_ih)
    outputs, _ = unroll(cell, inputs())
    if outputs.requires_grad:  # by parameters behind the pre-activations
        outputs.sum().backward()
    for name, parameter in cell.named_parameters():
        if name.startswith(("weight", "bias")) or "weight_hh" in name:
            assert parameter.grad is None, name


# --- equations, restated


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


SCALARS: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid": sigmoid,
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    "elu": lambda a: a if a > 0 else math.exp(a) - 1,
    "linear": lambda a: a,
}


def product(weight: Tensor, vector: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in weight.tolist()]


def phi(cell: Any, nonlinearity: str, unit: int, a: float) -> float:
    if nonlinearity == "modrelu":
        return math.copysign(max(abs(a) + cell.phi.bias[unit].item(), 0.0), a)
    if nonlinearity == "prelu":
        return a if a > 0 else cell.phi.weight.item() * a
    return SCALARS[nonlinearity](a)


def preactivations(cell: Any, x: list[float], h: list[float]) -> list[float]:
    """``W_ih x + b_ih + W_hh h + b_hh``, whichever of them there are."""
    total = product(cell.weight_ih, x)
    recurrent = (
        [u * v for u, v in zip(cell.weight_hh.tolist(), h, strict=True)]
        if cell.weight_hh.dim() == 1
        else product(cell.weight_hh, h)
    )
    for part in (recurrent, *(getattr(cell, b, None) for b in ("bias_ih", "bias_hh"))):
        if part is not None:
            part = part.tolist() if isinstance(part, Tensor) else part
            total = [t + p for t, p in zip(total, part, strict=True)]
    return total


def blocks(values: list[float]) -> Iterator[list[float]]:
    for start in range(0, len(values), 5):
        yield values[start : start + 5]


UNGATED = [v for v in VARIANTS if v.split()[0] in ("rnn", "indrnn", "orthogonal")]


@pytest.mark.parametrize("variant", UNGATED)
def test_an_ungated_cell_is_its_equation(variant: str) -> None:
    part: Any = VARIANTS[variant]
    cell, x = scrambled(part.cell(3)), inputs(batch=1)
    outputs, _ = unroll(cell, x)
    h = [0.0] * 5
    for t in range(len(x)):
        a = preactivations(cell, x[t, 0].tolist(), h)
        h = [phi(cell, part.nonlinearity, unit, a[unit]) for unit in range(5)]
        assert outputs[t, 0].tolist() == pytest.approx(h, rel=1e-12, abs=1e-15)


def test_modrelu_cells_have_no_other_bias_where_the_paper_has_none() -> None:
    assert OrthogonalRNNCell(3, 5, "modrelu").bias_ih is None
    assert OrthogonalRNNCell(3, 5, "tanh").bias_ih is not None


@pytest.mark.parametrize("forget_gate", [True, False])
def test_the_lstm_is_its_equation_with_and_without_forget_gate(forget_gate: bool) -> None:
    part = CELLS.default("lstm", hidden_size=5, forget_gate=forget_gate, forget_bias=None)
    cell, x = scrambled(part.cell(3)), inputs(batch=1)
    outputs, (_, last) = unroll(cell, x)
    h, c = [0.0] * 5, [0.0] * 5
    for t in range(len(x)):
        a = list(blocks(preactivations(cell, x[t, 0].tolist(), h)))
        i, *f, g, o = a
        keep = [sigmoid(v) for v in f[0]] if forget_gate else [1.0] * 5
        c = [keep[u] * c[u] + sigmoid(i[u]) * math.tanh(g[u]) for u in range(5)]
        h = [sigmoid(o[u]) * math.tanh(c[u]) for u in range(5)]
        assert outputs[t, 0].tolist() == pytest.approx(h, rel=1e-12)
    assert last[0].tolist() == pytest.approx(c, rel=1e-12)


def test_the_gru_is_its_equation() -> None:
    cell, x = scrambled(CELLS.default("gru", hidden_size=5).cell(3)), inputs(batch=1)
    outputs, _ = unroll(cell, x)
    h = [0.0] * 5
    for t in range(len(x)):
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (
            blocks([v + b for v, b in zip(product(weight, of), bias.tolist(), strict=True)])
            for weight, of, bias in (
                (cell.weight_ih, x[t, 0].tolist(), cell.bias_ih),
                (cell.weight_hh, h, cell.bias_hh),
            )
        )
        r = [sigmoid(a + b) for a, b in zip(r_x, r_h, strict=True)]
        z = [sigmoid(a + b) for a, b in zip(z_x, z_h, strict=True)]
        n = [math.tanh(n_x[u] + r[u] * n_h[u]) for u in range(5)]
        h = [(1 - z[u]) * n[u] + z[u] * h[u] for u in range(5)]
        assert outputs[t, 0].tolist() == pytest.approx(h, rel=1e-12)


def normalisers(name: str, cell: nn.Module, steps: int) -> Callable[[str, int], nn.Module]:
    """torch.nn's modules with the cell's gains: one for all steps, or one a step."""
    made: dict[tuple[str, int], nn.Module] = {}

    def get(which: str, t: int) -> nn.Module:
        ours = getattr(cell, which)
        size = len(ours.weight)
        key = (which, t if name.startswith("bn") else 0)
        if key not in made:
            made[key] = (  # over few batches, plain means
                nn.BatchNorm1d(size, momentum=None) if name.startswith("bn") else nn.LayerNorm(size)
            )
            made[key].double().weight.data = ours.weight.data
            if ours.bias is not None:
                made[key].bias.data = ours.bias.data
        return made[key]

    return get


def normalised(
    name: str, cell: Any, x: Tensor, get: Callable[[str, int], nn.Module]
) -> list[Tensor]:
    """Ba et al. (2016), eq. 4 and 20-22; Cooijmans et al. (2017), section 3."""
    h = c = x.new_zeros(x.shape[1], 5)
    outputs = []
    for t in range(len(x)):
        from_x, from_h = x[t] @ cell.weight_ih.T, h @ cell.weight_hh.T
        if name.endswith("rnn"):
            h = torch.tanh(get("norm", t)(from_x + from_h) + cell.bias_ih)
        else:
            gates = get("norm_hh", t)(from_h) + get("norm_ih", t)(from_x) + cell.bias_ih
            i, f, g, o = gates[:, :5], gates[:, 5:10], gates[:, 10:15], gates[:, 15:]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(get("norm_c", t)(c))
        outputs.append(h)
    return outputs


@pytest.mark.parametrize("name", ["ln_rnn", "ln_lstm", "bn_rnn", "bn_lstm"])
def test_a_normalised_cell_is_its_equation_with_torchs_normaliser(name: str) -> None:
    cell, x = scrambled(CELLS.default(name, hidden_size=5).cell(3)), inputs()
    get = normalisers(name, cell, len(x))
    torch.testing.assert_close(unroll(cell, x)[0], torch.stack(normalised(name, cell, x, get)))


# --- gates' biases


@pytest.mark.parametrize("name", ["lstm", "ln_lstm", "bn_lstm"])
def test_the_forget_bias_is_that_of_every_layer(name: str) -> None:
    part = CELLS.default(name, hidden_size=5, num_layers=2, forget_bias=1.5)
    layers = part.layers(3)
    part.adjust_(layers)
    biases = [(key, b) for key, b in layers.named_parameters() if "bias_" in key]
    for layer in range(2):
        of_layer = [b for key, b in biases if f"l{layer}" in key or f"cells.{layer}" in key]
        assert of_layer and (sum(b[5:10] for b in of_layer) == 1.5).all()


def test_chrono_initialisation_spreads_the_lstms_memories_up_to_its_length() -> None:
    part = CELLS.default("lstm", hidden_size=1000, chrono_length=100)
    layers: Any = nn.LSTM(1, 1000, 2)
    before = layers.bias_ih_l0[2000:].clone()
    part.adjust_(layers)
    for layer in "01":
        bias = getattr(layers, f"bias_ih_l{layer}") + getattr(layers, f"bias_hh_l{layer}")
        forget = bias[1000:2000]
        assert torch.equal(bias[:1000], -forget)
        length = forget.exp()
        assert length.min() >= 1 and length.max() <= 99.001
        assert length.mean().item() == pytest.approx(50, rel=0.06), "uniform, of 1 to 99"
        assert length.std().item() == pytest.approx(98 / math.sqrt(12), rel=0.06)
    assert torch.equal(layers.bias_ih_l0[2000:], before)
    assert not torch.equal(layers.bias_ih_l0[1000:2000], layers.bias_ih_l1[1000:2000])


def test_the_grus_update_gate_keeps_the_state_where_its_bias_says_so() -> None:
    part = CELLS.default("gru", hidden_size=500, update_bias=4.0)
    layers: Any = nn.GRU(1, 500)
    part.adjust_(layers)
    assert (layers.bias_ih_l0 + layers.bias_hh_l0)[500:1000].eq(4).all()
    cell: Any = nn.GRUCell(1, 500)
    part.adjust_(cell)
    for weight in (cell.weight_ih, cell.weight_hh):
        nn.init.zeros_(weight)
    h, zero = torch.full((1, 500), 5.0), torch.zeros(1, 1)
    assert cell(zero, h).mean() > 0.97 * 5, "at z = σ(4) = 0.98 nearly all of it"

    part = CELLS.default("gru", hidden_size=500, chrono_length=100)
    part.adjust_(layers)
    keep = (layers.bias_ih_l0 + layers.bias_hh_l0)[500:1000].exp()
    assert 1 <= keep.min() and keep.max() < 99.001
    assert keep.mean().item() == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("forget_gate", [True, False])
def test_each_input_bias_is_that_of_its_share_of_the_units(forget_gate: bool) -> None:
    part = CELLS.default(
        "lstm", hidden_size=6, forget_gate=forget_gate, forget_bias=None, input_bias=[-2, -4.5, 1]
    )
    layers = part.layers(3)
    before = {key: parameter.clone() for key, parameter in layers.named_parameters()}
    part.adjust_(layers)
    after = dict(layers.named_parameters())
    both = [after[key] for key in after if "bias" in key]
    assert sum(b[:6] for b in both).tolist() == [-2, -2, -4.5, -4.5, 1, 1]
    for key, parameter in after.items():
        rest = slice(6, None) if "bias" in key else slice(None)
        assert torch.equal(parameter[rest], before[key][rest])


def test_input_biases_cannot_be_none_at_all() -> None:
    with pytest.raises(
        InputError, match=r"input_bias=\[\]: must have a number or more, or be null"
    ):
        CELLS.default("lstm", input_bias=[])


def test_a_forget_gate_that_float32_has_all_open_is_none() -> None:
    part = CELLS.default("lstm", hidden_size=5, forget_bias=100.0)
    layers, x = part.layers(3), inputs().float()
    part.adjust_(layers)
    old: Any = CELLS.default("lstm", hidden_size=5, forget_gate=False, forget_bias=None).cell(3)
    names = [name for name, _ in old.named_parameters()]
    with torch.no_grad():
        for name in names:
            i, _, g, o = getattr(layers, f"{name}_l0").chunk(4)
            getattr(old, name).copy_(torch.cat([i, g, o]))
    outputs, expected = layers(x)[0], unroll(old, x)[0]
    torch.testing.assert_close(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for name in names:
        i, f, g, o = getattr(layers, f"{name}_l0").grad.chunk(4)
        torch.testing.assert_close(torch.cat([i, g, o]), getattr(old, name).grad)
        assert f.eq(0).all(), "so that it never closes"


@pytest.mark.parametrize("key", ["forget_bias", "chrono_length"])
def test_without_forget_gate_nothing_may_be_asked_of_it(key: str) -> None:
    asked = {"forget_bias": None, "chrono_length": None} | {key: 5}
    with pytest.raises(InputError, match=f"{key}=5.*: must be null where forget_gate is false"):
        CELLS.default("lstm", forget_gate=False, **asked)


# --- batch normalisation


def test_evaluation_takes_each_steps_population_statistics() -> None:
    cell = scrambled(CELLS.default("bn_lstm", hidden_size=5).cell(3))
    get = normalisers("bn_lstm", cell, 6)
    for _ in range(4):
        x = inputs()
        unroll(cell, x)
        normalised("bn_lstm", cell, x, get)
    for t in range(6):
        for which in ("norm_ih", "norm_hh", "norm_c"):
            ours, theirs = getattr(cell, which), get(which, t)
            torch.testing.assert_close(ours.running_mean[t], theirs.running_mean)
            torch.testing.assert_close(ours.running_var[t], theirs.running_var)
            theirs.eval()
    cell.eval()
    x = inputs(batch=1)  # one sequence will do
    expected = torch.stack(normalised("bn_lstm", cell, x, get))
    evaluated = cell.norm_c.running_mean.clone()
    torch.testing.assert_close(unroll(cell, x)[0], expected)
    assert torch.equal(cell.norm_c.running_mean, evaluated), "evaluation changes none of them"


@pytest.mark.parametrize(("max_steps", "trained"), [(100, 4), (4, 4), (4, 6)])
def test_later_steps_take_the_last_ones_statistics(max_steps: int, trained: int) -> None:
    norm = BatchNormOverTime(3, True, gamma=0.5, max_steps=max_steps, momentum=0.3).double()
    for t in range(trained):
        norm(t + torch.randn(50, 3, dtype=torch.float64), t)
    norm.eval()
    a = torch.randn(2, 3, dtype=torch.float64)
    last = norm(a, 3)
    assert torch.equal(norm(a, 4), last) and torch.equal(norm(a, 1000), last)
    assert not torch.allclose(norm(a, 2), last)


def test_a_steps_statistics_are_plain_means_at_first_and_then_moving_ones() -> None:
    norm = BatchNormOverTime(1, False, gamma=1.0, max_steps=3, momentum=0.25).double()
    batches = torch.randn(7, 5, 1, dtype=torch.float64)
    for batch in batches:
        norm(batch, 1)
    expected = 0.0
    for count, batch in enumerate(batches, 1):
        share = max(0.25, 1 / count)
        expected += share * (batch.mean().item() - expected)
    assert norm.running_mean[1].item() == pytest.approx(expected)
    assert norm.running_mean[[0, 2]].eq(0).all() and norm.num_batches_tracked == [0, 7, 0]
    other = BatchNormOverTime(1, False, gamma=1.0, max_steps=3, momentum=0.25).double()
    other.load_state_dict(norm.state_dict())
    assert other.num_batches_tracked == [0, 7, 0]
    a = torch.randn(2, 1, dtype=torch.float64)
    assert torch.equal(other.eval()(a, 5), norm.eval()(a, 5))


def test_a_single_sequence_has_no_batch_statistics() -> None:
    cell = CELLS.default("bn_rnn", hidden_size=5).cell(3)
    with pytest.raises(ValueError, match="at least 2 sequences in training"):
        unroll(cell, torch.randn(4, 1, 3))


def test_a_large_gain_makes_the_gradient_of_batch_normalised_rnns_vanish() -> None:
    """The order of Cooijmans et al. (2017), figure 1a; on noise, so not its numbers."""
    decades = []
    for gamma in (0.5, 0.8, 1.0):
        torch.manual_seed(1)
        cell = CELLS.default("bn_rnn", hidden_size=30, gamma=gamma).cell(1)
        with torch.no_grad():
            cell.weight_hh.copy_(torch.eye(30))
        with record(cell) as tape:
            unroll(cell, torch.rand(60, 20, 1))[0][-1].square().sum().backward()
        norm = tape["l0"].hidden_norm.mean(1)
        decades.append((norm[-1] / norm[5]).log10().item())
    assert decades == sorted(decades) and decades[-1] > decades[0] + 3, decades


# --- orthogonal recurrent weights


def orthogonality(weight: Tensor) -> float:
    return (weight.T @ weight - torch.eye(len(weight), dtype=weight.dtype)).abs().max().item()


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("size", [4, 7])
def test_an_orthogonal_weight_stays_orthogonal_while_it_trains(
    orthogonal_map: str, size: int
) -> None:
    part = CELLS.default("orthogonal", hidden_size=size, orthogonal_map=orthogonal_map)
    layers: Any = part.layers(3).double()
    (cell,) = layers.cells
    cell.reset_parameters()
    start = cell.weight_hh.detach().clone()
    assert orthogonality(start) < 1e-14
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.1)
    x = inputs()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (layers(x)[0] - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert orthogonality(cell.weight_hh.detach()) < 1e-12
    assert (cell.weight_hh - start).abs().max() > 0.05 and losses[-1] < losses[0]


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_the_gradient_goes_through_the_map_to_orthogonal_matrices(orthogonal_map: str) -> None:
    cell = OrthogonalRNNCell(2, 3, "tanh", orthogonal_map).double()
    trained: Any = cell.parametrizations.weight_hh.original
    x, start = inputs(4, 2, 2), trained.detach().clone()

    def loss(value: Tensor) -> Tensor:
        with torch.no_grad():
            trained.copy_(value)
        return unroll(cell, x)[0].square().sum()

    loss(start).backward()
    for index in [(1, 0), (2, 0), (2, 1)]:
        step = torch.zeros_like(start)
        step[index] = 1e-6
        difference = (loss(start + step) - loss(start - step)) / 2e-6
        assert trained.grad[index].item() == pytest.approx(difference.item(), rel=1e-6)
    assert trained.grad.abs().max() > 0


def test_the_orthogonal_weight_is_computed_once_a_sequence() -> None:
    layers: Any = CELLS.default("orthogonal", hidden_size=4).layers(3)
    calls = []
    layers.cells[0].parametrizations.weight_hh[0].register_forward_hook(lambda *_: calls.append(1))
    layers(torch.randn(9, 2, 3))
    assert len(calls) == 1
    layers(torch.randn(9, 2, 3))
    assert len(calls) == 2, "and anew for the next: the weight may have changed"


def test_orthogonal_and_linear_keep_the_gradients_norm() -> None:
    cell = OrthogonalRNNCell(3, 6, "linear").double()
    cell.reset_parameters()
    with record(cell) as tape:
        unroll(cell, inputs(200))[0][-1].square().sum().backward()
    norm = tape["l0"].hidden_norm
    torch.testing.assert_close(norm / norm[-1], torch.ones_like(norm), rtol=1e-11, atol=0)


# --- the bound of the IndRNN


def test_an_update_beyond_the_bound_is_taken_back_at_the_next_sequence() -> None:
    part = CELLS.default("indrnn", hidden_size=4, bound=2.0, bound_length=10)
    cell: Any = part.cell(3)
    limit = 2 ** (1 / 10)
    assert ((cell.weight_hh >= 0) & (cell.weight_hh <= limit)).all()
    wild = torch.tensor([-9.0, -0.5, 0.25, 3.0])
    cell.weight_hh.data.copy_(wild)
    x = torch.randn(3, 2, 3)
    with record(cell, weight=True) as tape:
        outputs, _ = unroll(cell, x)
        (outputs.sum() + unroll(cell, x)[0].sum()).backward()  # two sequences, one backward
    assert cell.weight_hh.tolist() == pytest.approx([-limit, -0.5, 0.25, limit])
    assert len(tape.calls("l0")) == 2
    assert torch.equal(cell.weight_hh[1:3], wild[1:3])
    held = IndRNNCell(3, 4, max_abs=limit)
    held.load_state_dict(cell.state_dict())
    torch.testing.assert_close(unroll(held, x)[0], outputs)


def test_without_a_bound_the_recurrent_weight_is_left_alone() -> None:
    cell: Any = CELLS.default("indrnn", hidden_size=4, bound=None).cell(3)
    cell.weight_hh.data.fill_(5)
    unroll(cell, torch.randn(3, 2, 3))
    assert (cell.weight_hh == 5).all()


def test_what_a_unit_remembers_is_its_own_weight_to_the_power_of_the_lag() -> None:
    cell: Any = CELLS.default("indrnn", hidden_size=4, bound=None).cell(1).double()
    nn.init.constant_(cell.weight_ih, 1.0)
    with record(cell, full=True) as tape:
        unroll(cell, torch.rand(8, 1, 1, dtype=torch.float64))[0][-1].sum().backward()
    lags = torch.arange(7, -1, -1, dtype=torch.float64)
    expected = cell.weight_hh.detach() ** lags.unsqueeze(1)
    torch.testing.assert_close(tape["l0"].hidden_grad[:, 0], expected)


def test_a_kernel_runs_only_what_it_has() -> None:
    for name, kind in (("tanh", RNN), ("sigmoid", RNN), ("prelu", Unrolled), ("modrelu", Unrolled)):
        layers = CELLS.default("rnn", hidden_size=4, nonlinearity=name).layers(3)
        assert type(layers) is kind, name
