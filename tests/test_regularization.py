"""Penalties' gradients against float64 autograd on the formula itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.nn import LSTM
from rnngrad.regularization import REGULARIZERS, SLOPES, Omega, Orthogonality

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "linear": lambda a: a,
}


def restated(
    weight: Tensor, x: Tensor, nonlinearity: str, form: str, bound: float
) -> tuple[Tensor, Tensor]:
    """Omega and its gradient: h and δ from a loop by autograd, held constant; then the formula."""
    phi, w = ACTIVATIONS[nonlinearity], weight.detach().clone()
    h = x.new_zeros(x.shape[1:])
    before: list[Tensor] = []
    states: list[Tensor] = []
    for x_t in x:
        before.append(x_t + h @ w.t())
        h = phi(before[-1])
        h.requires_grad_() if not states else h.retain_grad()
        states.append(h)
    loss = (states[-1] ** 2).sum() + states[len(states) // 2].sum()
    loss.backward()
    w.requires_grad_()
    terms = []
    for a, state in zip(before, states, strict=True):
        for b in range(x.shape[1]):
            delta = state.grad[b] if state.grad is not None else torch.zeros_like(state[b])
            if delta.square().sum() < bound:
                continue
            row = a[b].detach().requires_grad_()
            (slope,) = torch.autograd.grad(phi(row).sum(), row)
            jacobian = slope.unsqueeze(1) * w  # ∂h_t/∂h_{t-1}
            ratio = (delta @ jacobian).square().sum() / delta.square().sum()
            terms.append((ratio - 1) ** 2 if form == "code" else (ratio.sqrt() - 1) ** 2)
    omega = torch.stack(terms).mean()
    omega.backward()
    assert w.grad is not None
    return omega.detach(), w.grad


@pytest.mark.parametrize("nonlinearity", sorted(SLOPES))
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("bound", [1e-20, 1e-3])
def test_omega_is_autograds(nonlinearity: str, form: Any, bound: float) -> None:
    torch.manual_seed(0)
    part = CELLS.default("rnn", hidden_size=4, nonlinearity=nonlinearity)
    rnn = part.layers(4).double()
    for name, parameter in rnn.named_parameters():
        if "weight_ih" in name:
            parameter.data = torch.eye(4, dtype=torch.float64)
        elif "bias" in name:
            parameter.data.zero_()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    with record(rnn, full=True) as tape:
        hidden, _ = rnn(x)
        ((hidden[-1] ** 2).sum() + hidden[3].sum()).backward()
    (layer,) = tape.values()
    weight = next(p for n, p in rnn.named_parameters() if "weight_hh" in n)
    omega, grad = restated(weight, x, nonlinearity, form, bound)
    part_ = Omega(weight=3.0, form=form, bound=bound)
    before = weight.grad.clone()
    penalty = part_.add_(rnn, hidden, layer.hidden_grad, nonlinearity)
    assert penalty == pytest.approx(3 * omega.item(), rel=1e-12)
    torch.testing.assert_close(weight.grad - before, 3 * grad, rtol=1e-10, atol=1e-14)


def test_a_gradient_that_is_0_everywhere_has_no_omega() -> None:
    part = Omega(weight=1.0, form="paper", bound=0.0)
    zeros = torch.zeros(3, 2, 4)
    omega, grad = part.penalty(torch.eye(4), zeros, zeros, "tanh")
    assert omega == 0 and not grad.any()


def test_an_orthogonal_linear_recurrence_has_no_omega_and_a_doubled_one_9() -> None:
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    h, delta = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    part = Omega(weight=1.0, form="code", bound=0.0)
    assert part.penalty(q, h, delta, "linear")[0] == pytest.approx(0, abs=1e-25)
    assert part.penalty(2 * q, h, delta, "linear")[0] == pytest.approx(9)
    paper = Omega(weight=1.0, form="paper", bound=0.0)
    assert paper.penalty(2 * q, h, delta, "linear")[0] == pytest.approx(1)


def test_soft_orthogonality_is_autograds_over_layers_and_gates() -> None:
    torch.manual_seed(0)
    lstm = LSTM(3, 4, num_layers=2, dtype=torch.float64)
    lstm(torch.randn(2, 1, 3, dtype=torch.float64))[0].sum().backward()
    before = {name: p.grad.clone() for name, p in lstm.named_parameters()}
    penalty = Orthogonality(weight=0.5).add_(lstm, torch.zeros(1), None, None)
    expected = torch.zeros((), dtype=torch.float64)
    copies = {}
    for name in ("weight_hh_l0", "weight_hh_l1"):
        copies[name] = getattr(lstm, name).detach().clone().requires_grad_()
        for gate in copies[name].chunk(4):
            expected = expected + 0.5 * (gate.t() @ gate - torch.eye(4)).square().sum()
    expected.backward()
    assert penalty == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in lstm.named_parameters():
        added = parameter.grad - before[name]
        if name in copies:
            torch.testing.assert_close(added, copies[name].grad, rtol=1e-10, atol=1e-12)
        else:
            assert not added.any()


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_the_loss_itself_is_left_alone(name: str) -> None:
    """A penalty changes recurrent weights' gradients alone, or none."""
    rnn = CELLS.default("rnn", hidden_size=4, num_layers=1).layers(2)
    with record(rnn, full=True) as tape:
        hidden, _ = rnn(torch.randn(5, 2, 2))
        hidden.sum().backward()
    before = {key: p.grad.clone() for key, p in rnn.named_parameters()}
    REGULARIZERS.default(name).add_(rnn, hidden.detach(), tape["l0"].hidden_grad, "tanh")
    changed = {key for key, p in rnn.named_parameters() if not torch.equal(p.grad, before[key])}
    assert changed == (set() if name == "none" else {"weight_hh_l0"})
