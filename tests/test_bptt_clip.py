"""Clipping inside back-propagation against a loop that is written out here, one row at a time."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import resources
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from rnngrad import bptt_clip
from rnngrad.bptt import LayerRecord, record
from rnngrad.bptt_clip import BPTT_CLIPS, install, preactivation
from rnngrad.cells import CELLS, GRUCell, LSTMCell, RNNCell
from rnngrad.cells.nonlinearity import NONLINEARITIES
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.nn import GRU, LSTM, RNN, convert, unroll
from rnngrad.parts import InputError
from tests.small import documented

MODES: dict[str, Any] = {
    **{f"rnn_{name}": partial(RNN, nonlinearity=name) for name in ACTIVATIONS},
    "lstm": LSTM,
    "lstm_projected": lambda *args, **kwargs: LSTM(*args, proj_size=3, **kwargs),
    "gru": GRU,
}
STANDARD = [name for name in MODES if name != "lstm_projected"]
SITES = ("preact", "state", "carry")
RULES = [(site, kind) for site in SITES for kind in ("value", "norm")]
LENGTHS = [3, 5, 1]
# under which some rows and entries are clipped, and some are not, in the loops below
THRESHOLDS = {"value": 0.25, "norm": 0.4}
NOTICE = "ignore:LSTM with projections is not supported with oneDNN"
pytestmark = pytest.mark.filterwarnings(NOTICE)


@pytest.fixture(params=RULES, ids="-".join)
def rule(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def clip(site: str, kind: str, threshold: float | None = None) -> Any:
    key = {"value": "clip_value", "norm": "max_norm"}[kind]
    threshold = THRESHOLDS[kind] if threshold is None else threshold
    return BPTT_CLIPS.default(kind, site=site, **{key: threshold})


# --- the loop: plain tensors, one sequence at a time, clipped entry by entry


class Loop:
    """Clips by hooks and counts ``{(t, b): [clipped, of so many]}``."""

    def __init__(self, site: str, kind: str, threshold: float) -> None:
        self.site, self.kind, self.threshold = site, kind, threshold
        self.counts: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])

    def clip(self, site: str, key: tuple[int, int], tensor: Tensor, gates: int = 1) -> Tensor:
        """An alias of the tensor, whose gradient is clipped if this is the site."""
        tensor = tensor.view_as(tensor)
        if site == self.site:
            things = gates if self.kind == "norm" else tensor.numel()
            self.counts[key][1] += things
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self.clipped(grad, key, gates))
        return tensor

    def clipped(self, grad: Tensor, key: tuple[int, int], gates: int) -> Tensor:
        rows = []
        for row in grad.reshape(gates, -1).tolist():
            if self.kind == "value":
                rows.append([v if abs(v) <= self.threshold or math.isnan(v)
                             else math.copysign(self.threshold, v) for v in row])  # fmt: skip
                self.counts[key][0] += sum(abs(v) > self.threshold for v in row)
            else:
                norm = math.nan if any(map(math.isnan, row)) else math.hypot(*row)
                over = self.threshold < norm < math.inf
                rows.append([v / norm * self.threshold for v in row] if over else row)
                self.counts[key][0] += over
        return torch.tensor(rows, dtype=grad.dtype).view_as(grad)


def step(layer: Any, name: str, loop: Loop, key: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    """One step ``[1, ·]`` of torch.nn's equations."""
    w_ih, w_hh = getattr(layer, f"weight_ih_{name}"), getattr(layer, f"weight_hh_{name}")
    b_ih, b_hh = getattr(layer, f"bias_ih_{name}", 0), getattr(layer, f"bias_hh_{name}", 0)
    h = loop.clip("carry", key, h)
    if layer.mode == "LSTM":
        c = loop.clip("carry", key, c)
    from_x, from_h = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if layer.mode == "LSTM":
        i, f, g, o = loop.clip("preact", key, from_x + from_h, 4).chunk(4, -1)
        c = loop.clip("state", key, f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
        h = h @ getattr(layer, f"weight_hr_{name}").T if layer.proj_size else h
    elif layer.mode == "GRU":
        size = 2 * layer.hidden_size
        rz = loop.clip("preact", key, (from_x + from_h)[:, :size], 2)
        r, z = rz.sigmoid().chunk(2, -1)
        n = loop.clip("preact", key, from_x[:, size:] + r * from_h[:, size:]).tanh()
        h = (1 - z) * n + z * h
    else:
        a = loop.clip("preact", key, from_x + from_h)
        h = NONLINEARITIES[layer.nonlinearity](layer.hidden_size)(a)
    return loop.clip("state", key, h), c


def run_loop(
    layer: Any, x: Tensor, states: list[Tensor], lengths: list[int], rule: tuple[str, str, float]
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """Outputs ``[T, B, ·]``, last states, and by name: the loop, states to be and what left."""
    final: list[list[Tensor]] = []
    seen: dict[str, Any] = {}
    for number in range(layer.num_layers):
        sides = []
        for direction in range(2 if layer.bidirectional else 1):
            name, rows, last = f"l{number}" + "_reverse" * direction, [], []
            loop, kept = Loop(*rule), {}
            for b, length in enumerate(lengths):
                h, c = (s[len(final), b : b + 1] for s in (*states, *states)[:2])
                outputs = {}
                for t in range(length)[:: -1 if direction else 1]:
                    h, c = step(layer, name, loop, (t, b), x[t, b : b + 1], h, c)
                    outputs[t] = h.clone()
                    leaving = [outputs[t]]
                    for tensor in (h, c, outputs[t]):
                        tensor.retain_grad()
                    kept[t, b] = (h, c, leaving)
                leaving.append(h.clone())
                leaving[-1].retain_grad()
                last.append([leaving[-1], c])
                zero = torch.zeros_like(h)
                rows.append(torch.stack([outputs.get(t, zero) for t in range(len(x))]))
            sides.append(torch.cat(rows, 1))
            final.append([torch.cat(s) for s in zip(*last, strict=True)])
            seen[name] = (loop, kept)
        x = torch.cat(sides, -1)
    lasts = [torch.stack(s) for s in zip(*final, strict=True)]
    return x, lasts if layer.mode == "LSTM" else lasts[:1], seen


def loop_records(seen: dict[str, Any], steps: int, is_lstm: bool) -> dict[str, dict[str, Tensor]]:
    """What is to be recorded, by layer and quantity; NaN beyond the ends."""
    records = {}
    for name, (loop, kept) in seen.items():
        batch = 1 + max(b for _, b in kept)
        found = {
            quantity: torch.full((steps, batch), math.nan, dtype=torch.float64)
            for quantity in ("hidden_norm", "direct_norm", "cell_norm", "clipped")
        }
        for key, (h, c, leaving) in kept.items():
            found["hidden_norm"][key] = math.hypot(*grad_of(h).flatten().tolist())
            found["cell_norm"][key] = math.hypot(*grad_of(c).flatten().tolist())
            direct = sum(map(grad_of, leaving), torch.zeros_like(h))
            found["direct_norm"][key] = math.hypot(*direct.flatten().tolist())
            clipped, things = loop.counts[key]
            found["clipped"][key] = clipped / things
        if not is_lstm:
            del found["cell_norm"]
        records[name] = found
    return records


def grad_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach()


def weighted(output: Tensor, states: list[Tensor]) -> Tensor:
    """A loss in which everything counts, each differently."""
    tensors = [output, *states]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in tensors]
    losses = [(w * v + v.square()).sum() for w, v in zip(weights, tensors, strict=True)]
    return torch.stack(losses).sum()


SHAPES: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "two_layers_both_ways": {"num_layers": 2, "bidirectional": True},
    "packed": {"lengths": LENGTHS, "bidirectional": True},
    "no_bias": {"bias": False},
}


def problem(mode: str, shape: str) -> tuple[Any, Tensor, list[Tensor], list[int] | None]:
    """A layer, inputs, initial states and lengths; the same at every call."""
    torch.manual_seed(3)
    options = dict(SHAPES[shape])
    lengths = options.pop("lengths", None)
    layer = MODES[mode](2, 4, dtype=torch.float64, **options)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    widths = [layer.proj_size or 4, *([4] if layer.mode == "LSTM" else [])]
    return layer, x, [torch.randn(count, 3, w, dtype=torch.float64) for w in widths], lengths


@cache
def expected(mode: str, shape: str, site: str, kind: str) -> Any:
    """Gradients of the leaves and records, from the loop."""
    layer, x, states, lengths = problem(mode, shape)
    leaves = [x, *states, *layer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    rule = (site, kind, THRESHOLDS[kind])
    output, last, seen = run_loop(layer, x, states, lengths or [5] * 3, rule)
    weighted(output, last).backward()
    return [grad_of(leaf) for leaf in leaves], loop_records(seen, 5, layer.mode == "LSTM")


def outcome(
    layer: Any, x: Tensor, states: list[Tensor], lengths: list[int] | None, **kind: bool
) -> tuple[list[Tensor], dict[str, LayerRecord]]:
    """The same from a layer."""
    leaves = [x, *states, *layer.parameters()]
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    hx: Any = tuple(states) if len(states) == 2 else states[0]
    data: Any = x
    if lengths is not None:
        data = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with record(layer, **kind) as tape:
        output, last = layer(data, hx)
        if lengths is not None:
            output, _ = pad_packed_sequence(output, total_length=len(x))
        weighted(output, list(last) if isinstance(last, tuple) else [last]).backward()
    return [grad_of(leaf) for leaf in leaves], dict(tape)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert ours.shape == theirs.shape and torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    size = theirs[theirs.isfinite()].abs().max() if theirs.isfinite().any() else 0.0
    difference = (ours - theirs)[theirs.isfinite()].abs()
    assert (difference <= tolerance * size).all()


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    """Outcomes of two layers agree, records included."""
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_close(a, b, tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name in ours[1]:
        for quantity, value in vars(ours[1][name]).items():
            other = getattr(theirs[1][name], quantity)
            assert (value is None) == (other is None), quantity
            if isinstance(value, Tensor):
                assert_close(value, other, tolerance)


# --- the layers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_norms_and_fractions_are_those_of_the_loop(
    every_kernel: str, mode: str, shape: str, rule: tuple[str, str]
) -> None:
    grads, records = expected(mode, shape, *rule)
    layer, *data = problem(mode, shape)
    install(layer, clip(*rule))
    found, tape = outcome(layer, *data, full=True)
    for ours, theirs in zip(found, grads, strict=True):
        assert_close(ours, theirs)
    assert tape.keys() == records.keys()
    for name, quantities in records.items():
        for quantity, value in quantities.items():
            assert_close(getattr(tape[name], quantity), value)
        hidden = tape[name].hidden_grad
        assert hidden is not None
        assert_close(hidden.norm(dim=-1), quantities["hidden_norm"])


@pytest.mark.parametrize("mode", MODES)
def test_the_loops_thresholds_clip_some_and_not_all(mode: str, rule: tuple[str, str]) -> None:
    clipped = [
        fractions["clipped"].nan_to_num().mean().item()
        for shape in SHAPES
        for fractions in expected(mode, shape, *rule)[1].values()
    ]
    assert min(clipped) < 1
    # a sigmoid's slope is at most 1/4: in some of its loops nothing is as large as the threshold
    assert 0 < (max(clipped) if mode == "rnn_sigmoid" else min(clipped))


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_that_nothing_reaches_changes_nothing(
    every_kernel: str, mode: str, rule: tuple[str, str]
) -> None:
    layer, *data = problem(mode, "packed")
    without = outcome(layer, *data, full=True, weight=True)
    assert all(kept.clipped is None for kept in without[1].values())
    install(layer, clip(*rule, threshold=1e300))
    grads, tape = outcome(layer, *data, full=True, weight=True)
    for kept in tape.values():
        assert kept.clipped is not None and (kept.clipped.nan_to_num() == 0).all()
    for name, kept in without[1].items():
        tape[name] = LayerRecord(**(vars(tape[name]) | {"clipped": kept.clipped}))
    # the same operations in the same order, but where a GRU's n is clipped first; there are more
    # places to round together in the compiled code, and one compiler to decide for all of them
    exact = mode != "gru"
    assert_same((grads, tape), without, 0 if exact else 1e-14)


@pytest.mark.parametrize("mode", STANDARD)
def test_recording_beside_clipping_changes_nothing(
    every_kernel: str, mode: str, rule: tuple[str, str]
) -> None:
    layer, x, states, _ = problem(mode, "two_layers_both_ways")
    install(layer, clip(*rule))
    recorded, _ = outcome(layer, x, states, None, full=True, weight=True)
    for leaf in (leaves := [x, *states, *layer.parameters()]):
        leaf.grad = None
    output, last = layer(x, tuple(states) if len(states) == 2 else states[0])
    weighted(output, list(last) if isinstance(last, tuple) else [last]).backward()
    assert all(torch.equal(grad_of(a), b) for a, b in zip(leaves, recorded, strict=True))


@pytest.mark.parametrize("shape", ["two_layers_both_ways", "packed"])
@pytest.mark.parametrize("mode", STANDARD)
def test_segments_change_nothing_but_rounding(
    every_kernel: str, mode: str, shape: str, rule: tuple[str, str]
) -> None:
    layer, *data = problem(mode, shape)
    install(layer, clip(*rule))
    whole = outcome(layer, *data, full=True, weight=True)
    layer.recompute_segments = 3
    assert_same(outcome(layer, *data, full=True, weight=True), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clips_at_the_rounded_threshold(dtype: torch.dtype) -> None:
    layer = RNN(2, 3, dtype=dtype)
    install(layer, clip("state", "value", 0.3))
    with record(layer, full=True) as tape:
        layer(torch.zeros(1, 1, 2, dtype=dtype))[0].sum().backward()
    assert (tape["l0"].hidden_grad == torch.tensor(0.3, dtype=dtype)).all()
    install(layer, clip("state", "value", 1e300))
    with record(layer, full=True) as tape:
        layer(torch.zeros(1, 1, 2, dtype=dtype))[0].sum().backward()
    assert (tape["l0"].hidden_grad == 1).all()


def test_activation_checkpointing_clips_as_well(rule: tuple[str, str]) -> None:
    layer, x, states, _ = problem("gru", "one_layer")
    install(layer, clip(*rule))
    grads = []
    for run in (layer, lambda x, h: checkpoint(layer, x, h, use_reentrant=False)):
        layer.zero_grad()
        run(x, states[0])[0].square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- numbers that are none, and tiny and huge ones


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", STANDARD)
def test_nan_stays_and_infinity_is_clamped_or_left(
    every_kernel: str, mode: str, rule: tuple[str, str], special: float
) -> None:
    """It arrives at one state of three sequences; the other two have what they always had."""
    site, kind = rule
    layer, x, states, _ = problem(mode, "one_layer")
    plain, _ = grads_of_arriving(layer, x, states, 0.0)
    install(layer, clip(*rule, threshold=1e3))
    grads, tape = grads_of_arriving(layer, x, states, special)
    assert_close(grads[:, 1:], plain[:, 1:], 1e-12)
    kept = tape["l0"]
    assert kept.clipped is not None
    hidden = kept.hidden_grad[2, 0]
    clamped = site == "state" and kind == "value" and not math.isnan(special)
    expected = math.copysign(1e3, special) if clamped else special
    assert hidden[1].isnan() if math.isnan(special) else hidden[1] == expected
    assert (kept.clipped[3:] == 0).all()
    if kind == "norm":
        assert kept.clipped[2, 0] == 0, "a row without a norm is left"
    reaches = site == "state" or (site == "preact" and mode != "rnn_relu")  # whose unit is off
    if kind == "value" and reaches and not math.isnan(special):
        assert kept.clipped[2, 0] > 0
    if clamped:
        assert grads.isfinite().all()


def grads_of_arriving(layer: Any, x: Tensor, states: list[Tensor], value: float) -> Any:
    x.grad = None
    with record(layer, full=True) as tape:
        output, _ = layer(x.requires_grad_(), tuple(states) if len(states) == 2 else states[0])
        arriving = torch.linspace(-0.1, 0.1, output.numel(), dtype=x.dtype).view_as(output)
        if value != 0:
            arriving[2, 0, 1] = value
        output.backward(arriving)
    return grad_of(x).clone(), tape


# --- cells, unrolled


@pytest.fixture(params=sorted(CELLS.load()))
def cell(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = CELLS.default(request.param, hidden_size=6).cell(4).double()
    if "rule" in request.fixturenames and request.getfixturevalue("rule")[0] == "preact":
        install(made, clip("preact", "value"))
        try:
            unroll(made, torch.zeros(1, 2, 4, dtype=torch.float64))
        except RuntimeError:
            assert request.param not in documented("cell")
            pytest.skip("does not show its pre-activations")
        install(made, BPTT_CLIPS.default("none"))
        torch.manual_seed(0)
        made = CELLS.default(request.param, hidden_size=6).cell(4).double()
    return made


def unrolled(cell: nn.Module, x: Tensor, state: Any = None, **kind: bool) -> Any:
    """Gradients of inputs and weights, and the record."""
    cell.zero_grad()
    x = x.detach().requires_grad_()
    with record(cell, **kind) as tape:
        outputs, last = unroll(cell, x, state)
        weighted(outputs, list(last) if isinstance(last, tuple) else [last]).backward()
    return [x.grad, *(grad_of(p) for p in cell.parameters())], tape["l0"]


class Shown:
    """In the place of a run of ``unroll``: clips what a cell shows, as the loop does."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.t = loop, 0

    def preactivation(self, a: Tensor, gates: int) -> Tensor:
        rows = a.view(*a.shape[:-1], gates, -1).unbind(0)
        clipped = [self.loop.clip("preact", (self.t, b), row, gates) for b, row in enumerate(rows)]
        return torch.stack(clipped).view_as(a)


def looped(cell: nn.Module, x: Tensor, site: str, kind: str) -> Any:
    """What ``unrolled`` finds: the cell called in a loop of this file, row by row clipped."""
    cell.zero_grad()
    x = x.detach().requires_grad_()
    loop = Loop(site, kind, THRESHOLDS[kind])
    shown = Shown(loop)
    state: Any = None
    outputs, kept = [], []

    def by_row(at: str, t: int, tensor: Tensor) -> Tensor:
        return torch.stack([loop.clip(at, (t, b), row) for b, row in enumerate(tensor)])

    with bptt_clip.running(shown):  # type: ignore[arg-type]
        for t, x_t in enumerate(x):
            shown.t = t
            parts = () if state is None else state if isinstance(state, tuple) else (state,)
            entering = tuple(by_row("carry", t, part) for part in parts)
            state = cell(x_t, None if not parts else entering if len(parts) == 2 else entering[0])
            parts = state if isinstance(state, tuple) else (state,)
            for part in parts:
                if site == "state":
                    part.register_hook(
                        lambda grad, t=t: torch.stack(
                            [loop.clipped(row, (t, b), 1) for b, row in enumerate(grad)]
                        )
                    )
                    for b in range(x.shape[1]):
                        loop.counts[t, b][1] += 1 if kind == "norm" else part.shape[-1]
                part.retain_grad()
            kept.append(parts)
            outputs.append(parts[0])
    last = [part.clone() for part in kept[-1]]
    weighted(torch.stack(outputs), last).backward()
    clipped = torch.zeros(x.shape[:2], dtype=torch.float64)
    for key, (count, things) in loop.counts.items():
        clipped[key] = count / things
    norms = [torch.stack([parts[i].grad.norm(dim=-1) for parts in kept]) for i in range(len(last))]
    return [x.grad, *(grad_of(p) for p in cell.parameters())], clipped, norms


def test_every_cell_is_clipped_as_in_a_loop_of_its_own(
    cell: nn.Module, rule: tuple[str, str]
) -> None:
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    grads, clipped, norms = looped(cell, x, *rule)
    install(cell, clip(*rule))
    found, kept = unrolled(cell, x)
    for ours, theirs in zip(found, grads, strict=True):
        assert_close(ours, theirs)
    assert_close(kept.clipped, clipped)
    assert clipped.max() > 0
    assert_close(kept.hidden_norm, norms[0])
    if len(norms) == 2:
        assert_close(kept.cell_norm, norms[1])


@pytest.mark.parametrize("name", sorted(CELLS.load()))
@pytest.mark.parametrize("given_state", [False, True])
def test_a_cell_unrolled_is_its_layer(name: str, rule: tuple[str, str], given_state: bool) -> None:
    """Hooks of autograd beside the layer's hand-written backward."""
    torch.manual_seed(0)
    part = CELLS.default(name, hidden_size=6)
    layer, cell = part.layers(4).double(), part.cell(4).double()
    if not isinstance(layer, nn.RNNBase):
        pytest.skip("has no layer of its own")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    count = 2 if layer.mode == "LSTM" else 1
    states = [torch.randn(3, 6, dtype=torch.float64) for _ in range(count)]
    found = []
    for module, run in ((layer, layer), (cell, lambda *args: unroll(cell, *args))):
        install(module, clip(*rule))
        leaves = [state.clone().requires_grad_() for state in states] if given_state else []
        rows = [leaf.unsqueeze(0) if module is layer else leaf for leaf in leaves]
        hx = () if not rows else (tuple(rows),) if count == 2 else (rows[0],)
        with record(module, full=True, weight=True) as tape:
            output, last = run(x, *hx)
            last = last if isinstance(last, tuple) else (last,)
            weighted(output, [part.reshape(3, 6) for part in last]).backward()
        grads = [p.grad for p in (*leaves, *module.parameters())]
        kept = dict(vars(tape["l0"]))
        found.append([*grads, *(value for value in kept.values() if isinstance(value, Tensor))])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_a_threshold_that_nothing_reaches_leaves_a_cell_as_it_is(
    cell: nn.Module, rule: tuple[str, str]
) -> None:
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    plain, without = unrolled(cell, x, full=True)
    install(cell, clip(*rule, threshold=1e300))
    found, kept = unrolled(cell, x, full=True)
    assert without.clipped is None and (kept.clipped == 0).all()
    # an alias between two steps may have autograd add up in another order
    for ours, theirs in zip([*found, kept.hidden_grad], [*plain, without.hidden_grad], strict=True):
        assert_close(ours, theirs, 1e-13)


def test_unbatched_and_unrecorded_cells_are_clipped_too(
    cell: nn.Module, rule: tuple[str, str]
) -> None:
    if any("running_mean" in name for name, _ in cell.named_buffers()):
        pytest.skip("normalises a batch")
    x = torch.randn(5, 1, 4, dtype=torch.float64)
    install(cell, clip(*rule))
    found, kept = unrolled(cell, x)
    alone, unbatched = unrolled(cell, x[:, 0])
    assert_close(alone[0], found[0][:, 0])
    for ours, theirs in zip(alone[1:], found[1:], strict=True):
        assert_close(ours, theirs)
    assert_close(unbatched.clipped, kept.clipped)
    cell.zero_grad()
    outputs, last = unroll(cell, x)
    weighted(outputs, list(last) if isinstance(last, tuple) else [last]).backward()
    for parameter, grad in zip(cell.parameters(), found[1:], strict=True):
        assert torch.equal(grad_of(parameter), grad)


class Lazy(nn.Module):
    """Returns its state as it is at every other step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.step = inner, 0

    def forward(self, x: Tensor, state: Any) -> Any:
        self.step += 1
        return state if self.step % 2 == 0 and state is not None else self.inner(x, state)


@pytest.mark.parametrize("make_cell", [GRUCell, LSTMCell])
def test_a_cell_that_returns_its_state_unchanged_is_clipped_at_every_step(make_cell: Any) -> None:
    """Every ``∂L/∂h_t`` but the last is a carried gradient plus nothing, which is clipped."""
    cell = Lazy(make_cell(3, 4).double())
    install(cell, clip("carry", "value", 1e-3))
    with record(cell, full=True) as tape:
        outputs, _ = unroll(cell, torch.randn(6, 2, 3, dtype=torch.float64))
        outputs[-1].sum().backward()
    hidden = tape["l0"].hidden_grad
    assert hidden is not None
    assert (hidden[-1] == 1).all() and (hidden[-2] == 1e-3).all()
    assert (hidden[:-1].abs() <= 1e-3).all() and (hidden[0] != 0).any()


class Silent(nn.Module):
    """A user's own cell, which shows no pre-activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(len(x), 4) if h is None else h
        return 0.9 * h + 0.1 * self.inner(torch.cat([x, h], -1)).tanh()


class Spoken(Silent):
    """The same, which does."""

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(len(x), 4) if h is None else h
        return 0.9 * h + 0.1 * preactivation(self.inner(torch.cat([x, h], -1)), gates=1).tanh()


def test_a_cell_that_shows_no_preactivation_is_refused_at_that_site_alone() -> None:
    cell, x = Silent(), torch.randn(5, 2, 3)
    for site in ("state", "carry"):
        install(cell, clip(site, "value", 1e-3))
        unroll(cell, x)[0].sum().backward()
    install(cell, clip("preact", "value", 1e-3))
    with pytest.raises(RuntimeError, match=r"Silent never calls rnngrad\.bptt_clip\.preactivation"):
        unroll(cell, x)
    cell = Spoken()
    install(cell, clip("preact", "value", 1e-3))
    with record(cell) as tape:
        unroll(cell, x)[0].sum().backward()
    assert (tape["l0"].clipped == 1).all()
    assert cell.inner.bias.grad.abs().max() <= 5 * 2 * 1e-3 + 1e-9


def test_what_a_cell_shows_outside_unroll_or_within_another_run_is_not_clipped() -> None:
    a = torch.zeros(2, 4, requires_grad=True)
    assert preactivation(a, gates=1) is a

    class Outer(nn.Module):
        """Runs another cell over time inside its own step."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = [RNNCell(3, 3)]  # not a child: `install` does not see it
            self.outer = RNNCell(3, 4)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            features, _ = unroll(self.inner[0], x.expand(2, *x.shape))
            return self.outer(features[-1], h)

    torch.manual_seed(0)
    cell, x = Outer(), torch.randn(1, 2, 3)
    install(cell, clip("preact", "value", 1e-3))
    with record(cell.inner[0]) as tape:
        (1e3 * unroll(cell, x)[0]).sum().backward()
    assert tape["l0"].clipped is None
    assert cell.outer.bias_ih.grad.abs().max() <= 2.1e-3
    torch.testing.assert_close(tape["l0"].direct_norm[-1] <= 1e-3 * 4, torch.tensor([True, True]))


def test_a_run_that_the_loss_does_not_depend_on_has_fraction_0(cell: nn.Module) -> None:
    layer = LSTM(4, 6, dtype=torch.float64)
    last = RNN(4, 6, dtype=torch.float64)
    model = nn.ModuleDict({"cell": cell, "layer": layer, "last": last})
    install(model, clip("state", "value", 1e-9))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with record(model) as tape:
        unroll(cell, x)
        layer(x)
        last(x)[0].sum().backward()
    for name in ("cell.l0", "layer.l0"):
        assert tape[name].clipped.shape == (5, 3) and (tape[name].clipped == 0).all()


def test_a_fused_cell_that_hides_a_path_is_refused_where_its_state_is_clipped() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTMCell(3, 4)

        def forward(self, x: Tensor, state: Any) -> Any:
            return self.inner(x, state)

    cell, x = Wrapped(), torch.randn(5, 3)
    install(cell, clip("state", "value"))
    with pytest.raises(TypeError, match=r"cannot be recorded or clipped"):
        unroll(cell, x)
    install(cell, clip("carry", "value"))
    unroll(cell, x)[0].sum().backward()


def test_a_second_derivative_goes_through_what_was_clipped(cell: nn.Module) -> None:
    install(cell, clip("state", "norm"))
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(unroll(cell, x)[0].square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


# --- install and the rules


def test_install_reaches_every_layer_and_cell_and_none_takes_it_back() -> None:
    model = nn.ModuleDict(
        {"a": LSTM(3, 4, 2), "b": nn.ModuleList([GRUCell(3, 4), Silent()]), "c": nn.Linear(3, 3)}
    )
    rule = clip("carry", "norm")
    install(model, rule)
    layers: list[Any] = [model["a"], *model["b"].children()]
    assert all(layer.bptt_clip is rule for layer in layers)
    assert not hasattr(model["c"], "bptt_clip")
    twin = copy.deepcopy(model)
    assert twin["a"].bptt_clip == rule
    assert model.state_dict().keys() == nn.ModuleDict(dict(model.items())).state_dict().keys()
    install(model, BPTT_CLIPS.default("none"))
    assert all(layer.bptt_clip is None for layer in layers)
    layers[0].bptt_clip = BPTT_CLIPS.default("none")  # by hand
    with record(model) as tape:
        model["a"](torch.zeros(2, 1, 3))[0].sum().backward()
    assert tape["a.l0"].clipped is None


def test_torchs_own_layers_are_refused_by_name_and_nothing_is_installed() -> None:
    model = nn.ModuleDict({"ours": GRU(3, 4), "theirs": nn.GRU(3, 4)})
    with pytest.raises(TypeError, match=r"theirs is a GRU of torch\.nn's.*convert\(model\) first"):
        install(model, clip("carry", "norm"))
    assert model["ours"].bptt_clip is None
    install(model, BPTT_CLIPS.default("none"))
    install(convert(model), clip("carry", "norm"))
    cell = nn.GRUCell(3, 4)
    with pytest.raises(TypeError, match=r"GRUCell of torch\.nn's.*rnngrad\.cells, or another site"):
        install(cell, clip("preact", "norm"))
    install(cell, clip("state", "norm"))


def test_there_must_be_something_to_clip_in() -> None:
    with pytest.raises(ValueError, match="no recurrent layer or cell"):
        install(nn.Linear(3, 4), clip("carry", "norm"))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        install([], clip("carry", "norm"))  # type: ignore[arg-type]
    cases: list[tuple[Any, Any]] = [(RNN(2, 3), lambda m, x: m(x)), (RNNCell(2, 3), unroll)]
    for module, run in cases:
        module.bptt_clip = 1.0
        with pytest.raises(TypeError, match=r"bptt_clip must be None or a rule.*got 1\.0"):
            run(module, torch.zeros(4, 1, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_layer_with_a_rule_is_exported_as_torchs() -> None:
    layer, x = LSTM(3, 4), torch.randn(5, 2, 3)
    install(layer, clip("carry", "norm"))
    for exported in (torch.jit.trace(layer, (x,)), torch.jit.script(nn.Sequential(layer))):
        file = io.BytesIO()
        torch.jit.save(exported, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x)[0], layer(x)[0])


def presets() -> Iterator[str]:
    for file in (resources.files("rnngrad.conf") / "bptt_clip").iterdir():
        yield file.name.removesuffix(".yaml")


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_yaml_gives_all_fields_of_a_rule_and_it_runs(name: str) -> None:
    file = resources.files("rnngrad.conf") / "bptt_clip" / f"{name}.yaml"
    rule = BPTT_CLIPS.build(yaml.safe_load(file.read_text(encoding="utf-8")))
    layer = RNN(2, 3)
    install(layer, rule)
    with record(layer) as tape:
        (1e3 * layer(torch.randn(4, 2, 2))[0]).sum().backward()
    assert (tape["l0"].clipped is None) == (name == "none")
    assert name == "none" or tape["l0"].clipped.max() > 0


def test_every_rule_of_the_registry_has_a_yaml_of_its_name() -> None:
    assert set(BPTT_CLIPS.load()) <= set(presets())


@pytest.mark.parametrize(("kind", "key"), [("value", "clip_value"), ("norm", "max_norm")])
@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan, "1", None, True])
def test_a_threshold_that_is_no_positive_number_is_refused(kind: str, key: str, bad: Any) -> None:
    with pytest.raises(InputError, match=rf"bptt_clip\.{key}.*must be a finite number > 0"):
        BPTT_CLIPS.default(kind, **{key: bad})
    with pytest.raises(InputError, match=r"bptt_clip\.site.*one of preact, state, carry"):
        BPTT_CLIPS.default(kind, site="output")


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(
            st.floats(width=32) | st.sampled_from([0.0, math.nan, math.inf, 1e-40, 3e38]),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(["value", "norm"]),
    threshold=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_are_clipped_as_written_and_a_second_time_changes_nothing(
    rows: list[list[float]], kind: str, threshold: float, dtype: torch.dtype
) -> None:
    once: Callable[[Tensor], Any] = clip("state", kind, threshold).rows()
    given_rows = torch.tensor(rows, dtype=dtype)
    clipped, counts = once(given_rows)
    loop = Loop("state", kind, torch.tensor(threshold, dtype=dtype).item())
    for row, ours, count in itertools.zip_longest(given_rows, clipped, counts.tolist()):
        theirs = loop.clipped(row, (0, 0), 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
        assert loop.counts.pop((0, 0))[0] == count or kind == "norm"
    again, _ = once(clipped)
    torch.testing.assert_close(again, clipped, rtol=1e-6, atol=0, equal_nan=True)
