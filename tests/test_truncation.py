"""Truncated back-propagation against a loop that says what it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rnngrad.bptt import record
from rnngrad.bptt_clip import BPTT_CLIPS
from rnngrad.cells import CELLS
from rnngrad.cells.base import Unrolled
from rnngrad.init import INITS
from rnngrad.model import SequenceModel, build_model
from rnngrad.nn import unroll
from rnngrad.norms import norms
from rnngrad.task import TASKS, Task, training_generator
from rnngrad.truncation import truncated_backward

CASES = [(1, 1), (2, 2), (2, 5), (3, 3), (3, 4), (5, 5), (4, 9), (9, 9), (1, 7), (10, 12)]


def made(cell: str, task: Task, layers: int = 1) -> SequenceModel:
    part = CELLS.default(cell, hidden_size=4, num_layers=layers)
    return build_model(part, task, INITS.default("torch"), seed=0).double()


def batch_of(task: Task) -> tuple[Tensor, Tensor]:
    inputs, targets = task.batch(3, training_generator(0, 1))
    return inputs.double(), targets.double() if targets.is_floating_point() else targets


def by_the_definition(
    model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, k1: int, k2: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and ∂L/∂h_t of one layer of cells, one loss at a time cut k2 steps before its end.

    Of a forward with everything in one graph: where a way back must not go on, the gradient that
    arrives at the state is replaced by 0.
    """
    steps, cell = len(inputs), model.rnn.cells[0]
    grads = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    sums = torch.zeros(steps, inputs.shape[1], 4, dtype=torch.float64)
    ends = [*range(k1, steps, k1), steps]
    for own, end in zip([0, *ends], ends, strict=False):
        model.zero_grad()
        state: Any = None
        hidden = []
        for t in range(steps):
            if t == max(0, end - k2) and state is not None:
                state = (
                    tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
                )
            state = cell(inputs[t], state)
            h = state[0] if isinstance(state, tuple) else state
            h.retain_grad()
            hidden.append(h)
        # the losses of other steps look at copies that lead nowhere
        shown = [h if own <= t < end else h.detach() for t, h in enumerate(hidden)]
        reads = shown[-1] if model.last_step_only else torch.stack(shown)
        loss = task.loss(model.readout(reads), targets)
        if reads.requires_grad:
            loss.backward()
        for t, h in enumerate(hidden):
            sums[t] += 0 if h.grad is None else h.grad
        for name, parameter in model.rnn.named_parameters():
            if parameter.grad is not None:
                grads[f"rnn.{name}"] += parameter.grad
    model.zero_grad()
    task.loss(model(inputs).outputs, targets).backward()
    for name, parameter in model.readout.named_parameters():
        assert parameter.grad is not None
        grads[f"readout.{name}"] = parameter.grad
    return grads, sums


def cells_of(model: SequenceModel) -> SequenceModel:
    """The same model with its layer of rnngrad.nn as a cell."""
    kinds = {"RNN_TANH": "rnn", "LSTM": "lstm", "GRU": "gru"}
    part = CELLS.default(kinds[model.rnn.mode], hidden_size=4)
    cell = part.cell(model.rnn.input_size).double()
    for name, parameter in cell.named_parameters():
        parameter.data = getattr(model.rnn, f"{name}_l0").data.clone()

    class Cells(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = torch.nn.ModuleList([cell])

        def forward(self, x: Tensor, state: Any = None) -> Any:
            outputs, last = unroll(self.cells[0], x, None if state is None else state[0])
            return outputs, [last]

    return SequenceModel(Cells(), model.readout, model.last_step_only)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("task", ["adding", "copy"])
@pytest.mark.parametrize(("k1", "k2"), CASES)
def test_it_is_what_the_definition_says(cell: str, task: str, k1: int, k2: int) -> None:
    kind = TASKS.default(task, length=10 if task == "adding" else 1)
    model = made(cell, kind)
    inputs, targets = batch_of(kind)
    expected, states = by_the_definition(cells_of(model), kind, inputs, targets, k1, k2)
    model.zero_grad()
    passed, loss, records = truncated_backward(
        model, kind, inputs, targets, None, k1=k1, k2=k2, recorded=True
    )
    for name, parameter in model.named_parameters():
        key = name.replace("rnn.", "rnn.cells.0.").removesuffix("_l0")
        scale = expected[key].abs().max()
        assert (parameter.grad - expected[key]).abs().max() <= 1e-12 * scale, name
    torch.testing.assert_close(records["rnn.l0"].hidden_norm, norms(states), rtol=1e-9, atol=0)
    whole = model(inputs)
    torch.testing.assert_close(passed.outputs, whole.outputs, rtol=1e-12, atol=1e-14)
    assert loss.item() == pytest.approx(kind.loss(whole.outputs, targets).item(), rel=1e-12)


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_truncating_nothing_is_the_full_gradient_and_its_record(cell: str) -> None:
    """To rounding; training does not come here then, and is bitwise the same."""
    task = TASKS.default("copy", length=1)
    model = made(cell, task, layers=2)
    if any("running_mean" in name for name, _ in model.named_buffers()):
        pytest.skip("has statistics over the batch: refused with tbptt")
    inputs, targets = batch_of(task)
    _, _, records = truncated_backward(
        model, task, inputs, targets, None, k1=5, k2=1000, recorded=True
    )
    truncated = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with record(model) as tape:
        task.loss(model(inputs).outputs, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(truncated[name], parameter.grad, rtol=1e-9, atol=1e-15)
    for name, layer in tape.items():
        torch.testing.assert_close(records[name].hidden_norm, layer.hidden_norm, rtol=1e-9, atol=0)
        if layer.cell_norm is not None:
            torch.testing.assert_close(records[name].cell_norm, layer.cell_norm, rtol=1e-9, atol=0)
    *lower, top = tape
    torch.testing.assert_close(records[top].direct_norm, tape[top].direct_norm, rtol=1e-9, atol=0)
    assert all(records[name].direct_norm.isnan().all() for name in lower)


class Clockwork(torch.nn.Module):
    """A cell that is another one at every step."""

    takes_time = True

    def __init__(self) -> None:
        super().__init__()
        self.weight_hh = torch.nn.Parameter(torch.randn(10, 10, dtype=torch.float64) / 4)

    def forward(self, x: Tensor, h: Tensor | None, t: int) -> Tensor:
        return (x * (t % 3) + (0 if h is None else h @ self.weight_hh)).tanh()


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (3, 7), (5, 1000)])
def test_a_cell_that_asks_for_the_time_step_is_told_the_right_one(k1: int, k2: int) -> None:
    task = TASKS.default("copy", length=1)
    torch.manual_seed(0)
    model = SequenceModel(Unrolled([Clockwork()]), torch.nn.Linear(10, 9).double(), False)
    inputs, targets = batch_of(task)
    passed, _, _ = truncated_backward(
        model, task, inputs, targets, None, k1=k1, k2=k2, recorded=False
    )
    torch.testing.assert_close(passed.outputs, model(inputs).outputs, rtol=1e-12, atol=1e-14)
    if k2 == 1000:
        truncated = model.rnn.cells[0].weight_hh.grad.clone()
        model.zero_grad()
        task.loss(model(inputs).outputs, targets).backward()
        torch.testing.assert_close(truncated, model.rnn.cells[0].weight_hh.grad)


@pytest.mark.parametrize("site", ["preact", "state", "carry"])
@pytest.mark.parametrize("layers", [1, 2])
def test_recorded_or_not_and_clipped_within_the_gradients_are_the_ways_sum(
    site: str, layers: int
) -> None:
    task = TASKS.default("copy", length=1)
    part = CELLS.default("lstm", hidden_size=4, num_layers=layers)
    within = BPTT_CLIPS.default("norm", site=site, max_norm=1e-3)
    model = build_model(part, task, INITS.default("torch"), 0, bptt_clip=within).double()
    inputs, targets = batch_of(task)
    state = tuple(torch.randn(layers, 3, 4, dtype=torch.float64) for _ in range(2))
    found = []
    for recorded in (True, False):
        model.zero_grad()
        truncated_backward(model, task, inputs, targets, state, k1=5, k2=8, recorded=recorded)
        found.append([p.grad.clone() for p in model.rnn.parameters()])
    expected = [torch.zeros_like(p) for p in model.rnn.parameters()]
    for own, end in ((0, 5), (5, 10), (10, 15), (15, 20), (20, 21)):
        start, first = max(0, end - 8), state
        with torch.no_grad():
            if start:
                first = model.rnn(inputs[:start], state)[1]
            before = model.rnn(inputs[:own], state)[0] if own else inputs.new_zeros(0, 3, 4)
            whole = model(inputs, state).hidden
        hidden, _ = model.rnn(inputs[start:end], first)
        shown = torch.cat([before, hidden[own - start :], whole[end:]])
        grads = torch.autograd.grad(
            task.loss(model.readout(shown), targets), list(model.rnn.parameters())
        )
        expected = [a + b for a, b in zip(expected, grads, strict=True)]
    for one, other, right in zip(*found, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("k1", "k2"), [(0, 5), (-1, 5), (5, 3), (0, 0)])
def test_more_steps_between_ways_back_than_a_way_has_are_refused(k1: int, k2: int) -> None:
    """The losses of the steps in between would go back nowhere."""
    task = TASKS.default("copy", length=1)
    model = made("rnn", task)
    inputs, targets = batch_of(task)
    with pytest.raises(ValueError, match=f"1 <= k1 <= k2, got k1 = {k1} and k2 = {k2}"):
        truncated_backward(model, task, inputs, targets, None, k1=k1, k2=k2, recorded=False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ways_apart_keep_the_direct_norm_of_every_layer() -> None:
    task = TASKS.default("copy", length=1)
    model = made("lstm", task, layers=2)
    inputs, targets = batch_of(task)
    _, _, records = truncated_backward(
        model, task, inputs, targets, None, k1=7, k2=7, recorded=True
    )
    assert all(layer.direct_norm.isfinite().all() for layer in records.values())


def test_a_given_state_is_where_it_starts() -> None:
    task = TASKS.default("copy", length=1)
    model = made("gru", task)
    inputs, targets = batch_of(task)
    state = torch.randn(1, 3, 4, dtype=torch.float64)
    passed, _, _ = truncated_backward(
        model, task, inputs, targets, state, k1=3, k2=6, recorded=False
    )
    torch.testing.assert_close(passed.hidden, model(inputs, state).hidden, rtol=1e-12, atol=0)
    torch.testing.assert_close(passed.state, model(inputs, state).state, rtol=1e-12, atol=0)
