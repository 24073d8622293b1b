"""``rnngrad-check``: every gradient beside float64 autograd and finite differences.

Two oracles, neither of which shares code with the layers: cells in a Python loop (torch.nn's own,
sequence by sequence, for layers), taken back by autograd with every state kept; and, for
``∂L/∂h_t``, the central difference of the loss along a random direction added to ``h_t`` in that
loop.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnngrad.bptt import LayerRecord, record
from rnngrad.cells import CELLS, CellPart, RNNCell
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.nn import GRU, LSTM, RNN, unroll
from rnngrad.parts import MISSING, InputError

TOLERANCE = 1e-10
"""Largest relative difference to float64 autograd."""
DIFFERENCE_TOLERANCE = 1e-6
"""Largest relative difference to central differences, whose own error is about 1e-9."""
SEED = 0


@dataclass
class Trace:
    """One layer and direction as the loop saw it, in tensors that keep their gradients.

    ``(t, b)`` -> ``[n, H]``: the state after step ``t`` of the ``n`` sequences from ``b`` on.
    """

    weight: list[Tensor]  # W_hh, an alias a step; none if it is no plain parameter
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    cell: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    leaving: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def norms(self) -> dict[str, Tensor]:
        """The norms of a ``LayerRecord``; NaN beyond a sequence's end."""
        steps = 1 + max(t for t, _ in self.hidden)
        batch = max(b + len(h) for (_, b), h in self.hidden.items())
        grads: dict[str, dict[tuple[int, int], Any]] = {
            "hidden_norm": {key: _grad(h) for key, h in self.hidden.items()},
            "cell_norm": {key: _grad(c) for key, c in self.cell.items()},
            "direct_norm": {key: sum(map(_grad, out)) for key, out in self.leaving.items()},
        }
        norms = {}
        for name, kept in grads.items():
            if kept:
                norms[name] = torch.full((steps, batch), math.nan, dtype=torch.float64)
                for (t, b), grad in kept.items():
                    norms[name][t, b : b + len(grad)] = torch.linalg.vector_norm(grad, dim=-1)
        if self.weight:
            norms["weight_norm"] = torch.stack(
                [torch.linalg.vector_norm(_grad(w)) for w in self.weight]
            )
        return norms


@dataclass(frozen=True)
class Nudge:
    """Something to add to one ``h_t [H]`` of the loop."""

    layer: str
    t: int
    b: int
    by: Tensor


def loop_rows(
    cell: nn.Module,
    x: Tensor,
    state: Any,
    times: Iterable[int],
    trace: Trace,
    b: int = 0,
    nudge: Nudge | None = None,
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """The sequences ``x [T, n, I]``, of which the first is number ``b``, through a cell.

    Never an unbatched one: torch.nn.LSTMCell hands that a view of ``c_t``, whose gradient lacks the
    path through ``h_t``.

    Returns:
        Outputs by time step, and the last state.
    """
    outputs: dict[int, Tensor] = {}
    for t in times:
        arguments = (x[t], state, t) if getattr(cell, "takes_time", False) else (x[t], state)
        weight = {"weight_hh": trace.weight[t]} if trace.weight else {}
        state = torch.func.functional_call(cell, weight, arguments)
        h, *c = state if isinstance(state, tuple) else (state,)
        if nudge is not None and nudge.t == t and b <= nudge.b < b + len(h):
            row = torch.arange(b, b + len(h)) == nudge.b
            h = h + row.unsqueeze(1) * nudge.by
            state = (h, *c) if c else h
        trace.hidden[t, b] = _kept(h)
        trace.cell |= {(t, b): _kept(c[0])} if c else {}
        outputs[t] = _kept(h.clone())
        trace.leaving[t, b] = [outputs[t]]
    last = _kept(h.clone())
    trace.leaving[t, b].append(last)
    return outputs, [last, *c]


def loop_layer(
    layer: nn.RNNBase,
    x: Tensor,
    states: list[Tensor] | None = None,
    lengths: list[int] | None = None,
    nudge: Nudge | None = None,
) -> tuple[Tensor, list[Tensor], dict[str, Trace]]:
    """A torch.nn layer as a Python loop of torch.nn's cells.

    Args:
        layer: Gives weights and shape; is not called.
        x: ``[T, B, I]``.
        states: ``h_0`` and, for an LSTM, ``c_0``, ``[L·D, B, H]``; zeros if omitted.
        lengths: Of each sequence; ``T`` if omitted.
        nudge: Is added to one state.

    Returns:
        Output ``[T, B, D·H]`` (0 beyond the ends), final states, and a trace by layer.
    """
    steps, batch = x.shape[:2]
    traces: dict[str, Trace] = {}
    final: list[list[Tensor]] = []
    for number in range(layer.num_layers):
        columns = []
        for direction in range(2 if layer.bidirectional else 1):
            name = f"l{number}" + ("_reverse" if direction else "")
            cell = _cell_of(layer, name, x.shape[-1])
            trace = traces[name] = Trace([_kept(cell.weight_hh.clone()) for _ in range(steps)])
            rows, lasts = [], []
            for b in range(batch):
                times = range(steps if lengths is None else lengths[b])
                state: Any = None
                if states is not None:
                    given = [s[len(final), b : b + 1] for s in states]
                    state = tuple(given) if len(given) == 2 else given[0]
                outputs, last = loop_rows(
                    cell,
                    x[:, b : b + 1],
                    state,
                    reversed(times) if direction else times,
                    trace,
                    b,
                    nudge if nudge is not None and nudge.layer == name else None,
                )
                zero = torch.zeros_like(last[0])
                rows.append(torch.stack([outputs.get(t, zero) for t in range(steps)]))
                lasts.append(last)
            columns.append(torch.cat(rows, 1))
            final.append([torch.cat(s) for s in zip(*lasts, strict=True)])
        x = torch.cat(columns, -1)
    return x, [torch.stack(s) for s in zip(*final, strict=True)], traces


def compare_layer(
    layer: nn.RNNBase,
    x: Tensor,
    states: list[Tensor] | None = None,
    lengths: list[int] | None = None,
    *,
    difference: bool = True,
) -> dict[str, float]:
    """The largest relative difference between a layer and the loop, by quantity.

    Args:
        layer: Of ``rnngrad.nn``, in float64.
        x: ``[T, B, I]``, whatever the layer's ``batch_first``.
        states: Initial states ``[L·D, B, H]``.
        lengths: Of each sequence, in any order: the layer is given a packed sequence.
        difference: Also take central differences, which run the loop twice per layer.
    """
    leaves = [x, *(states or []), *layer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    expected_output, expected_states, traces = loop_layer(layer, x, states, lengths)
    _loss(expected_output, expected_states).backward()
    expected_grads = [_taken(leaf) for leaf in leaves]

    with record(layer, full=True, weight=True) as tape:
        output, last = _call(layer, x, states, lengths)
        _loss(output, last).backward()
    grads = [_taken(leaf) for leaf in leaves]

    errors = {"output": _error(output, expected_output)}
    errors["state"] = max(map(_error, last, expected_states))
    errors["gradients"] = max(map(_error, grads, expected_grads))
    for name, trace in traces.items():
        for quantity, expected in trace.norms().items():
            error = _error(getattr(tape[name], quantity), expected, element_wise=True)
            errors[quantity] = max(errors.get(quantity, 0.0), error)
        if difference:
            error = _difference_error(layer, x, states, lengths, name, tape[name])
            errors["hidden_diff"] = max(errors.get("hidden_diff", 0.0), error)
    return errors


def compare_cell(cell: nn.Module, x: Tensor) -> dict[str, float]:
    """The same for a cell run by ``unroll`` over ``x [T, B, I]``.

    The loop takes the whole batch at once, as a cell may couple its rows (batch normalisation
    does); ``weight_norm`` is compared where ``weight_hh`` is a plain parameter.
    """
    weight = dict(cell.named_parameters(recurse=False)).get("weight_hh")
    with record(cell, full=True, weight=weight is not None) as tape:
        output, state = unroll(cell, x)
        states = list(state) if isinstance(state, tuple) else [state]
        _loss(output, states).backward()
    grads = [_taken(p) for p in cell.parameters()]

    def looped(nudge: Nudge | None = None) -> tuple[Tensor, Trace]:
        trace = Trace([] if weight is None else [_kept(weight.clone()) for _ in range(len(x))])
        outputs, lasts = loop_rows(cell, x, None, range(len(x)), trace, nudge=nudge)
        return _loss(torch.stack(list(outputs.values())), lasts), trace

    loss, trace = looped()
    loss.backward()
    errors = {"gradients": max(map(_error, grads, [_taken(p) for p in cell.parameters()]))}
    for quantity, expected in trace.norms().items():
        errors[quantity] = _error(getattr(tape["l0"], quantity), expected, element_wise=True)
    errors["hidden_diff"] = _central_difference(lambda n: looped(n)[0], "l0", tape["l0"])
    return errors


def cell_variants(name: str, **changes: Any) -> Iterator[tuple[str, CellPart]]:
    """A registered cell as its yaml has it, then with every other value of each choice it offers.

    A choice is a field that is one of some words, or true or false. Where a value refuses another
    field's default, that field is null.
    """
    part = CELLS.default(name, **changes)
    yield name, part
    hints = get_type_hints(type(part))
    for key in (f.name for f in fields(part)):
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        choices = (True, False) if hints[key] is bool else choices
        for value in choices:
            if value != getattr(part, key):
                word = str(value).lower() if isinstance(value, bool) else value
                yield f"{name} {key}={word}", _built(name, changes | {key: value})


def _built(name: str, changes: dict[str, Any]) -> CellPart:
    try:
        return CELLS.default(name, **changes)
    except InputError as error:
        key = error.key.rpartition(".")[2]
        if changes.get(key, MISSING) is None or error.value is None:
            raise
        return _built(name, changes | {key: None})


def _call(
    layer: nn.RNNBase, x: Tensor, states: list[Tensor] | None, lengths: list[int] | None
) -> tuple[Tensor, list[Tensor]]:
    """The layer's output ``[T, B, ·]`` and final states, through the interface a user has."""
    hx: Any = None if states is None else tuple(states) if len(states) == 2 else states[0]
    data: Any = x.transpose(0, 1) if layer.batch_first else x
    if lengths is not None:
        data = pack_padded_sequence(data, lengths, layer.batch_first, enforce_sorted=False)
    output, last = layer(data, hx)
    if lengths is not None:
        output, _ = pad_packed_sequence(output, layer.batch_first, total_length=len(x))
    output = output.transpose(0, 1) if layer.batch_first else output
    return output, list(last) if isinstance(last, tuple) else [last]


def _loss(output: Tensor, states: Iterable[Tensor]) -> Tensor:
    """Every output and state counts, each differently."""
    loss = torch.zeros((), dtype=output.dtype)
    for tensor in (output, *states):
        weights = torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view_as(tensor)
        loss = loss + (weights * tensor + tensor.square()).sum()
    return loss


def _difference_error(
    layer: nn.RNNBase,
    x: Tensor,
    states: list[Tensor] | None,
    lengths: list[int] | None,
    name: str,
    kept: LayerRecord,
) -> float:
    def loss(nudge: Nudge) -> Tensor:
        output, last, _ = loop_layer(layer, x, states, lengths, nudge)
        return _loss(output, last)

    return _central_difference(loss, name, kept)


def _central_difference(loss: Any, name: str, kept: LayerRecord, epsilon: float = 1e-5) -> float:
    """``<∂L/∂h_t, v>`` against ``(L(h_t + εv) - L(h_t - εv)) / 2ε`` at the first time step."""
    assert kept.hidden_grad is not None
    grad = kept.hidden_grad[0, 0]
    v = torch.randn(grad.shape, dtype=grad.dtype, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        up, down = (loss(Nudge(name, 0, 0, sign * epsilon * v)).item() for sign in (1, -1))
    measured = (up - down) / (2 * epsilon)
    return float(abs(measured - grad @ v) / (grad.norm() * v.norm()))


def _cell_of(layer: nn.RNNBase, name: str, input_size: int) -> Any:
    """torch.nn's cell, or ours if it has none, with one layer's own parameters."""
    sizes = (input_size, layer.hidden_size, layer.bias)
    cell: Any
    if layer.mode in ("LSTM", "GRU"):
        cell = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[layer.mode](*sizes)
    elif layer.mode in ("RNN_TANH", "RNN_RELU"):
        cell = nn.RNNCell(*sizes, nonlinearity=layer.mode.removeprefix("RNN_").lower())
    else:
        cell = RNNCell(*sizes, nonlinearity=str(layer.nonlinearity))
    for kind in dict(cell.named_parameters()):
        setattr(cell, kind, getattr(layer, f"{kind}_{name}"))
    return cell.to(layer.weight_hh_l0.dtype)


def _kept(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        tensor.retain_grad()
    return tensor


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _taken(leaf: Tensor) -> Tensor:
    """A leaf's gradient, which is reset."""
    grad = _grad(leaf).clone()
    leaf.grad = None
    return grad


def _error(ours: Tensor, expected: Tensor, element_wise: bool = False) -> float:
    """Largest difference relative to the largest entry, or entry by entry; NaN must match NaN."""
    ours, expected = ours.detach(), expected.detach()
    if ours.shape != expected.shape or not torch.equal(ours.isnan(), expected.isnan()):
        return math.inf
    difference = (ours - expected).abs().nan_to_num()
    size = expected.abs().nan_to_num()
    size = size if element_wise else size.max()
    return (difference / size.clamp_min(1e-300)).max().item()


def all_checks() -> Iterator[tuple[str, dict[str, float]]]:
    """What ``rnngrad-check`` compares: a line's name, and the differences by quantity."""
    torch.manual_seed(SEED)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    kinds: list[tuple[type[Any], dict[str, Any]]] = [
        *((RNN, {"nonlinearity": name} if name != "tanh" else {}) for name in ACTIVATIONS),
        (LSTM, {}),
        (GRU, {}),
    ]
    shapes: list[dict[str, Any]] = [{}, {"num_layers": 3}, {"bidirectional": True}, {"bias": False}]
    for make, kind in kinds:
        for shape in shapes:
            for lengths in (None, [3, 5, 1]):
                layer = make(4, 6, dtype=torch.float64, **kind, **shape)
                words = [*kind.values(), *(f"{k}={v}" for k, v in shape.items())]
                words += ["packed"] if lengths else []
                name = f"rnngrad.nn.{make.__name__}({', '.join(map(str, words))})"
                yield name, compare_layer(layer, x.clone(), lengths=lengths)
    for name in sorted(CELLS.load()):
        for variant, part in cell_variants(name, hidden_size=6):
            yield f"cell {variant}, unrolled", compare_cell(part.cell(4).double(), x)
    for torch_cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        cell = torch_cell(4, 6, dtype=torch.float64)
        yield f"torch.nn.{torch_cell.__name__}, unrolled", compare_cell(cell, x)


def main() -> None:
    """Prints a line per layer and cell; exits with 1 if one differs too much."""
    parser = argparse.ArgumentParser(prog="rnngrad-check", description=main.__doc__)
    parser.parse_args()
    start = time.perf_counter()
    columns = (
        "gradients",
        "hidden_norm",
        "cell_norm",
        "direct_norm",
        "weight_norm",
        "hidden_diff",
    )
    print(
        f"Largest relative difference to float64 autograd (at most {TOLERANCE:g} is right), and of"
    )
    print(f"<dL/dh_1, v> to a central difference (hidden_diff, at most {DIFFERENCE_TOLERANCE:g})\n")
    print(" " * 56 + "".join(column.rjust(13) for column in columns))
    wrong = 0
    count = 0
    for name, errors in all_checks():
        count += 1
        right = is_right(errors)
        wrong += not right
        cells = [f"{errors[c]:.1e}" if c in errors else "-" for c in columns]
        print(name.ljust(56) + "".join(cell.rjust(13) for cell in cells), "" if right else "WRONG")
    print(f"\n{count - wrong} right, {wrong} wrong, in {time.perf_counter() - start:.0f} s")
    sys.exit(1 if wrong else 0)


def is_right(errors: dict[str, float]) -> bool:
    """Whether every difference is within its tolerance."""
    return all(
        error <= (DIFFERENCE_TOLERANCE if quantity == "hidden_diff" else TOLERANCE)
        for quantity, error in errors.items()
    )


if __name__ == "__main__":
    main()
