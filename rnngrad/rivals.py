"""What a user would reach for instead of rnngrad, written as well as it can be, for the benchmark.

Every function returns a step without arguments: one forward and backward over the same data, or
one update of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnngrad.task import Task

Step = Callable[[], object]
CELLS = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}


def plain_layer(layer: nn.RNNBase, x: Tensor) -> Step:
    """torch.nn's layer, without any recording: there is no way to have one."""

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x)[0].square().mean().backward()

    return step


def loop_of_cells(layer: nn.RNNBase, x: Tensor) -> Step:
    """torch.nn's cell in a loop, every state with ``retain_grad``: today's only exact way."""
    cell = CELLS[type(layer)](layer.input_size, layer.hidden_size)
    named = {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
    cell.load_state_dict(named)

    def step() -> list[Tensor]:
        cell.zero_grad()
        x.grad = None
        state: Any = None
        hidden: list[Tensor] = []
        memory: list[Tensor] = []
        for x_t in x:
            state = cell(x_t, state)
            h, *c = state if isinstance(state, tuple) else (state,)
            for kept, tensor in ((hidden, h), *((memory, m) for m in c)):
                tensor.retain_grad()
                kept.append(tensor)
        torch.stack(hidden).square().mean().backward()
        return [
            torch.stack([tensor.grad for tensor in kept if tensor.grad is not None]).norm(dim=-1)
            for kept in (hidden, memory)
            if kept
        ]

    return step


def jax_scan(layer: nn.RNNBase, x: Tensor) -> Step:
    """A jitted ``jax.lax.scan`` with the same norms, as gradients of zeros added to the states.

    Raises:
        ImportError: JAX is not installed.
    """
    import jax
    import jax.numpy as jnp

    w_ih, w_hh, b_ih, b_hh = (jnp.asarray(p.detach().numpy()) for p in layer.parameters())
    weights, inputs, wants_x = (w_ih, w_hh, b_ih, b_hh), jnp.asarray(x.detach()), x.requires_grad
    kind, shape = type(layer), (*x.shape[:2], layer.hidden_size)

    def advance(w_hh: Any, b_hh: Any, state: Any, given: Any) -> Any:
        h, c = state
        from_input, add_h, add_c = given
        sums = h @ w_hh.T + b_hh
        if kind is nn.RNN:
            h = jnp.tanh(from_input + sums)
        elif kind is nn.LSTM:
            i, f, g, o = jnp.split(from_input + sums, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g) + add_c
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        else:
            r_x, z_x, n_x = jnp.split(from_input, 3, -1)
            r_h, z_h, n_h = jnp.split(sums, 3, -1)
            z = jax.nn.sigmoid(z_x + z_h)
            n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
            h = (1 - z) * n + z * h
        h = h + add_h
        return (h, c), h

    def loss(weights: Any, inputs: Any, hidden: Any, cell: Any, direct: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh = weights
        start = jnp.zeros(shape[1:], inputs.dtype)
        given = (inputs @ w_ih.T + b_ih, hidden, cell)
        _, outputs = jax.lax.scan(
            lambda state, now: advance(w_hh, b_hh, state, now), (start, start), given
        )
        return jnp.square(outputs + direct).mean()

    def gradients(weights: Any, inputs: Any) -> Any:
        zeros = jnp.zeros(shape, inputs.dtype)
        wanted = (0, 2, 4) + ((3,) if kind is nn.LSTM else ()) + ((1,) if wants_x else ())
        grads = jax.grad(loss, wanted)(weights, inputs, zeros, zeros, zeros)
        recorded = grads[1 : 4 if kind is nn.LSTM else 3]
        norms = [jnp.sqrt(jnp.square(grad).sum(-1)) for grad in recorded]
        return grads[0], norms, grads[-1] if wants_x else None

    compiled: Any = jax.jit(gradients)
    ready: Any = jax.block_until_ready
    return lambda: ready(compiled(weights, inputs))


class Model(nn.Module):
    """torch.nn's layer and a linear read-out."""

    def __init__(self, layer: nn.RNNBase, task: Task) -> None:
        super().__init__()
        self.rnn, self.last = layer, task.last_step_only
        self.readout = nn.Linear(layer.hidden_size, task.output_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(x)[0]
        outputs: Tensor = self.readout(hidden[-1] if self.last else hidden)
        return outputs


def loop_by_hand(layer: nn.RNNBase, task: Task, batch_size: int) -> Step:
    """A training step as one writes it: new data, Adam, clipping by norm, the loss as a number."""
    model = Model(layer, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        inputs, targets = task.batch(batch_size, generator)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step
