"""The diagnosis of a model before it is trained, from one pass over one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnngrad.bptt import LayerRecord, Tape, record
from rnngrad.diagnosis.detectors import examine
from rnngrad.diagnosis.evidence import Evidence, Floats
from rnngrad.diagnosis.findings import Diagnosis
from rnngrad.measure import at_their_ends, lags
from rnngrad.norms import log10_mean, log10_rms, norms
from rnngrad.replay import statistics_kept
from rnngrad.runs import LayerHistory

ANCHORS = 4
"""Steps at most whose error is followed back, the last one among them."""


def diagnose(model: nn.Module, batch: tuple[Any, Any], loss: Callable[..., Tensor]) -> Diagnosis:
    """What the gradient of a model of one's own does, before a long training finds out.

    One forward and one backward are recorded. Gradients, random streams, mode and buffers (such as
    a batch normalisation's averages) are left as they were.

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
    inputs, targets = batch
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with _left_as_it_was(model, loss, (*arguments, targets)):
        with record(model, full=True, trajectory=True) as tape:
            value = loss(model(*arguments), targets)
            value.backward()
        evidence = _evidence(model, tape, float(value.detach()))
    return examine(evidence)


@contextmanager
def _left_as_it_was(
    model: nn.Module, loss: Callable[..., Tensor], batch: tuple[Any, ...]
) -> Iterator[None]:
    """Inside, gradients are empty; afterwards they, buffers and random streams are as before."""
    leaves = [*model.parameters(), *(a for a in batch if isinstance(a, Tensor) and a.is_leaf)]
    if isinstance(loss, nn.Module):
        leaves += loss.parameters()
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    devices = {leaf.device.index for leaf in leaves if leaf.device.type == "cuda"}
    forked = torch.random.fork_rng(devices=sorted(d for d in devices if d is not None))
    with forked, statistics_kept(model):
        try:
            for leaf in leaves:
                leaf.grad = None
            with torch.enable_grad():
                yield
        finally:
            for leaf, gradient in gradients:
                leaf.grad = gradient


def _evidence(model: nn.Module, tape: Tape, value: float) -> Evidence:
    """What a run would have measured at its first step."""
    measures: dict[str, Floats] = {"step": np.zeros(1, np.int64)}
    histories = {}
    squares = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm, grad_norm = (
                float(norms(tensor.detach().reshape(1, -1)))
                for tensor in (parameter, parameter.grad)
            )
            measures[f"parameter/{name}/norm"] = np.array([norm])
            measures[f"parameter/{name}/grad_norm"] = np.array([grad_norm])
            squares = math.hypot(squares, grad_norm)
    for name in tape:
        layer = max(tape.calls(name), key=lambda call: len(call.hidden_norm))
        histories[name] = _history(layer)
        assert layer.trajectory is not None
        found = lags(layer, ANCHORS) | at_their_ends(layer.trajectory)
        measures |= {f"{name}/{kind}": np.asarray(row)[None] for kind, row in found.items()}
    updates = {
        "step": np.zeros(1, np.int64),
        "loss": np.array([value]),
        "log10_grad_norm": np.array([math.log10(squares) if squares else -math.inf]),
        "clip_coef": np.ones(1),
    }
    return Evidence(config=_config(model), updates=updates, measures=measures, bptt=histories)


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
