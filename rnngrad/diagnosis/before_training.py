"""The diagnosis of a model before it is trained, from one pass over one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnngrad.bptt import LayerRecord, Tape, Trajectory, record
from rnngrad.diagnosis.detectors import examine
from rnngrad.diagnosis.evidence import NO_LAG, Evidence, Floats, Overflow
from rnngrad.diagnosis.findings import Diagnosis
from rnngrad.dynamics import TRANSIENT, units
from rnngrad.measure import at_their_ends, lags
from rnngrad.norms import log10_mean, log10_rms, norms
from rnngrad.replay import statistics_kept
from rnngrad.runs import LayerHistory

ANCHORS = 4
"""Steps at most whose error is followed back, the last one among them."""


def diagnose(model: nn.Module, batch: tuple[Any, Any], loss: Callable[..., Tensor]) -> Diagnosis:
    """What the gradient of a model of one's own does, before a long training finds out.

    One forward and one backward are recorded, of a copy of the batch. Gradients, random streams,
    mode and buffers (such as a batch normalisation's averages) are left as they were, in the model,
    the loss and whatever the batch was made by.

    Args:
        model: Holds layers of ``rnngrad.nn`` (``convert`` makes them), or cells run by ``unroll``.
        batch: Inputs and targets; a tuple of inputs is given to the model one by one.
        loss: Called with what the model returns and the targets; returns a scalar.

    Raises:
        ValueError: There is nothing to record in the model.

    Example:
        >>> from rnngrad.nn import LSTM
        >>> class Last(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rnn = LSTM(3, 16)
        ...     def forward(self, x):
        ...         return self.rnn(x)[0][-1]
        >>> batch = torch.zeros(200, 4, 3), torch.ones(4, 16)
        >>> diagnose(Last(), batch, torch.nn.functional.mse_loss).verdict
        'vanishing'
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _left_as_it_was(model, loss):
        leaves: list[Tensor] = [*parameters.values()]
        inputs, targets = (_apart(part, leaves) for part in batch)
        several = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
        with record(model, full=True, trajectory=True) as tape:
            value = loss(model(*inputs) if several else model(inputs), targets)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
        gradients = dict(zip(parameters, grads, strict=False))
        evidence = _evidence(model, tape, float(value.detach()), gradients)
    return examine(evidence)


@contextmanager
def _left_as_it_was(model: nn.Module, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Buffers and random streams are afterwards as before."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        for module in (model, loss):
            if isinstance(module, nn.Module):
                stack.enter_context(statistics_kept(module))
        stack.enter_context(torch.enable_grad())
        yield


def _apart(value: Any, leaves: list[Tensor]) -> Any:
    """A copy that no graph leads out of; what requires a gradient still does, in ``leaves``."""
    if isinstance(value, Tensor):
        leaf = value.detach().requires_grad_(value.requires_grad)
        if value.requires_grad:
            leaves.append(leaf)
        return leaf.clone()
    if isinstance(value, PackedSequence):
        return value._replace(data=_apart(value.data, leaves))
    if isinstance(value, Mapping):
        return {key: _apart(part, leaves) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_apart(part, leaves) for part in value)
    return value


def _evidence(
    model: nn.Module, tape: Tape, value: float, gradients: Mapping[str, Tensor | None]
) -> Evidence:
    """What a run would have measured at its first step."""
    measures: dict[str, Floats] = {"step": np.zeros(1, np.int64)}
    histories = {}
    squares = 0.0
    for name, parameter in model.named_parameters():
        gradient = gradients.get(name)
        if gradient is not None:
            norm, grad_norm = (
                float(norms(tensor.detach().reshape(1, -1))) for tensor in (parameter, gradient)
            )
            measures[f"parameter/{name}/norm"] = np.array([norm])
            measures[f"parameter/{name}/grad_norm"] = np.array([grad_norm])
            squares = math.hypot(squares, grad_norm)
    parts, layers = [], []
    for name in tape:
        calls = tape.calls(name)
        layer = max(calls, key=lambda call: len(call.hidden_norm))
        assert layer.trajectory is not None
        layers.append(layer.trajectory)
        found: dict[str, Any] = dict(at_their_ends(layer.trajectory))
        if _in_parts(calls):
            parts.append(f"{name} was called {len(calls)} times, on a part of the sequence each")
        else:
            histories[name] = _history(layer)
            found |= lags(layer, ANCHORS)
        measures |= {f"{name}/{kind}": np.asarray(row)[None] for kind, row in found.items()}
    updates = {
        "step": np.zeros(1, np.int64),
        "loss": np.array([value]),
        "log10_grad_norm": np.array([math.log10(squares) if squares else -math.inf]),
        "clip_coef": np.ones(1),
    }
    return Evidence(
        config=_config(model),
        updates=updates,
        measures=measures,
        bptt=histories,
        no_lag="; ".join(parts) or NO_LAG,
        overflow=next((found for found in map(_overflow, tape, layers) if found), None),
    )


def _in_parts(calls: Sequence[LayerRecord]) -> bool:
    """Whether one call went on from a state, as the next step or chunk of a sequence does."""
    states = [call.trajectory.state for call in calls if call.trajectory is not None]
    return len(calls) > 1 and any(bool(part.any()) for state in states for part in state)


def _overflow(name: str, trajectory: Trajectory) -> Overflow | None:
    """How a layer's state grew until it was not finite, if nothing that is none went in."""
    hidden = units(trajectory).hidden.flatten(1)
    if trajectory.lengths is not None or not trajectory.input.isfinite().all():
        return None
    hidden = hidden.flip(0) if trajectory.reverse else hidden
    broken = (~hidden.isfinite()).any(1).nonzero()
    t = int(broken[0]) if len(broken) else 0
    if t < TRANSIENT:
        return None
    sizes = hidden[:t].abs().amax(1).double().log10()
    slope = float(sizes[-1] - sizes[0]) / (t - 1)
    return Overflow(name, t, slope) if math.isfinite(slope) else None


def _history(layer: LayerRecord) -> LayerHistory:
    """One record, as a run keeps it."""
    return LayerHistory(
        step=np.zeros(1, np.int64),
        hidden=log10_rms(layer.hidden_norm).numpy()[None],
        direct=log10_rms(layer.direct_norm).numpy()[None],
        hidden_mean=log10_mean(layer.hidden_norm).numpy()[None],
        cell=None if layer.cell_norm is None else log10_rms(layer.cell_norm).numpy()[None],
    )


def _config(model: nn.Module) -> Mapping[str, Any]:
    """As much of a configuration as the first recurrent layer tells."""
    for module in model.modules():
        cell: dict[str, Any] = {"num_layers": getattr(module, "num_layers", 1)}
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            return {"cell": cell | {"name": "lstm", "forget_bias": _gate_bias(module, 1)}}
        if isinstance(module, nn.GRU | nn.GRUCell):
            return {"cell": cell | {"name": "gru", "update_bias": _gate_bias(module, 1)}}
        if isinstance(module, nn.RNN | nn.RNNCell):
            return {"cell": cell | {"name": "rnn", "nonlinearity": module.nonlinearity}}
    return {}


def _gate_bias(module: nn.Module, gate: int) -> float:
    """The mean of one gate's biases, the sum of torch's two."""
    size = int(module.hidden_size)  # type: ignore[arg-type]
    biases = [
        parameter.detach()[gate * size : (gate + 1) * size].double().mean().item()
        for name, parameter in module.named_parameters()
        if name in ("bias_ih", "bias_hh", "bias_ih_l0", "bias_hh_l0")
    ]
    return math.fsum(biases)
