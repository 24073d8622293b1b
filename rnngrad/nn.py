"""``RNN``, ``LSTM`` and ``GRU`` that are torch.nn's, but for a backward that can be recorded.

Constructor, parameters, initial values, ``state_dict`` and call are inherited; only what happens
over time is our own. ``convert`` turns the layers of an existing model into these, ``unroll`` runs
any cell over time through autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnngrad import bptt
from rnngrad.bptt_clip import BPTTClip, RunClip, clip_of, running
from rnngrad.kernels.activations import ACTIVATIONS, mode_of
from rnngrad.kernels.interface import Walk
from rnngrad.recurrence import Recurrence

State = Tensor | tuple[Tensor, Tensor]
"""``h``, or ``(h, c)``."""

Module = TypeVar("Module", bound=torch.nn.Module)


class _Layer(torch.nn.RNNBase, bptt.Recordable):
    """What the three layers share: the way from torch.nn's arguments to the recurrence.

    The README lists where they differ from torch.nn's.
    """

    recompute_segments = 1
    """Parts of the sequence that the backward runs forward once more, one at a time, before it goes
    back through them: only the states between them are kept. 1 keeps everything, √T least."""

    bptt_clip: BPTTClip | None = None
    """Clips the error at every step of its way back; see ``rnngrad.bptt_clip``. ``None`` leaves it
    exact."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Runs the layer over time; arguments, shapes and errors are torch.nn's."""
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            self._check_export()
            return super().forward(input, hx)  # an exported graph is torch.nn's, with our weights
        if "torch._dynamo" in sys.modules:
            # a kernel is compiled already; dynamo's import costs a second, so only where somebody
            # else has paid for it
            return _run_uncompiled(self, input, hx)
        return self._run(input, hx)

    def __prepare_scriptable__(self) -> torch.nn.RNNBase:
        """TorchScript cannot script a hand-written backward: it gets torch.nn's layer instead."""
        self._check_export()
        kind: Any = _TORCH[self.mode]
        plain: torch.nn.RNNBase = kind.__new__(kind)
        plain.__dict__.update(self.__dict__)
        return plain

    def _check_export(self) -> None:
        """Refuses to hand out torch.nn's layer where that computes something else."""
        if self.mode not in _TORCH:
            raise NotImplementedError(
                f"{type(self).__name__}: torch.nn has no layer of mode {self.mode} that could be "
                "scripted, traced or exported; rnngrad.cells.RNNCell through rnngrad.nn.unroll can "
                "be traced and exported, for one length of the sequence"
            )

    def _run(self, input: Any, hx: Any) -> Any:
        """Any accepted input -> ``[T, B, I]`` -> the layers -> the form the input came in."""
        self._update_flat_weights()
        if type(self.recompute_segments) is not int or self.recompute_segments < 1:
            raise ValueError(
                f"{type(self).__name__}: recompute_segments must be an integer >= 1, got "
                f"{self.recompute_segments!r}"
            )
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        unbatched = input.dim() == 2
        states = self._given(hx)
        if any(s.dim() != input.dim() for s in states):
            kind = "unbatched 2-D" if unbatched else "batched 3-D"
            raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D")
        if unbatched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            states = tuple(s.unsqueeze(1) for s in states)
        states = self._initial(input, input.shape[0 if self.batch_first else 1], states)
        self.check_forward_args(input, self._as_hx(states), None)  # type: ignore[arg-type]
        x = input.transpose(0, 1) if self.batch_first else input
        if len(x) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, states = self._layers(x, states, None, None)
        if unbatched:
            return output.squeeze(1), self._as_hx(tuple(s.squeeze(1) for s in states))
        return output.transpose(0, 1) if self.batch_first else output, self._as_hx(states)

    def _run_packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, unsorted = input
        given = self._given(hx)
        if order is not None:
            given = tuple(s.index_select(1, order) for s in given)
        states = self._initial(data, int(batch_sizes[0]), given)
        self.check_forward_args(data, self._as_hx(states), batch_sizes)  # type: ignore[arg-type]
        # without its order the packed sequence pads in the order of lengths, which Walk expects
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, states = self._layers(x, states, lengths, unsorted)
        packed = pack_padded_sequence(output, lengths)
        if unsorted is not None:
            states = tuple(s.index_select(1, unsorted) for s in states)
        return PackedSequence(packed.data, batch_sizes, order, unsorted), self._as_hx(states)

    def _layers(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        lengths: Tensor | None,
        columns: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers and directions: ``x [T, B, I] -> [T, B, D·P]`` and the final states."""
        dtype = self._flat_weights[0].dtype  # type: ignore[union-attr]
        if x.dtype != dtype or states[0].dtype != dtype:  # under autocast
            x, states = x.to(dtype), tuple(s.to(dtype) for s in states)
        directions = 2 if self.bidirectional else 1
        final: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"l{layer}" + ("_reverse" if direction else "")
                walk = Walk(len(x), lengths, reverse=direction == 1)
                index = layer * directions + direction
                output, *last = self._direction(
                    suffix, walk, x, tuple(s[index] for s in states), columns
                )
                outputs.append(output)
                final.append(tuple(last))
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
        if len(final) == 1:
            return x, tuple(state.unsqueeze(0) for state in final[0])
        return x, tuple(torch.stack(s) for s in zip(*final, strict=True))

    def _direction(
        self,
        suffix: str,
        walk: Walk,
        x: Tensor,
        states: tuple[Tensor, ...],
        columns: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """One layer and direction: output ``[T, B, P]``, ``h_n``, and ``c_n`` of an LSTM."""
        w_ih, w_hh, b_ih, b_hh, w_hr = (
            getattr(self, f"{name}_{suffix}", None)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        )
        tensors = (x, *states, *([None] if len(states) == 1 else []), w_ih, w_hh, b_ih, b_hh, w_hr)
        differentiable = any(t is not None and t.requires_grad for t in tensors)
        clip = clip_of(self)
        call = bptt.open_call(
            self,
            suffix,
            differentiable=differentiable,
            clips=clip is not None,
            beyond=None if walk.lengths is None else walk.beyond(),
            columns=columns,
        )
        if call is not None:
            call.follow(self, suffix, x, states, lengths=walk.lengths)
        sentinel = None if call is None else call.sentinel
        keep = differentiable and torch.is_grad_enabled()
        output, h_n, c_n, *_ = Recurrence.run(
            self.mode, walk, self.recompute_segments, clip, keep, call, *tensors, sentinel
        )
        if call is not None:
            call.expect(output, walk.steps, states)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    def _initial(self, x: Tensor, batch: int, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The initial states ``[L·D, B, ·]``, zeros where none are given."""
        if given:
            return given
        count = self.num_layers * (2 if self.bidirectional else 1)
        widths = [self.proj_size or self.hidden_size]
        if self.mode == "LSTM":
            widths.append(self.hidden_size)
        return tuple(x.new_zeros(count, batch, width) for width in widths)

    def _given(self, hx: Any) -> tuple[Tensor, ...]:
        """The initial states a caller has given, if any."""
        states, count = _as_tuple(hx), 2 if self.mode == "LSTM" else 1
        if hx is None:
            return states
        if isinstance(hx, Tensor) == (count == 2) or len(states) != count:
            expected = "(h_0, c_0)" if count == 2 else "the tensor h_0"
            raise TypeError(f"{type(self).__name__}: hx must be {expected}")
        dtype = self.weight_hh_l0.dtype
        if any(s.dtype != dtype for s in states) and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{type(self).__name__}: hx must be {dtype}, as the weights are")
        return states

    def _as_hx(self, states: tuple[Tensor, ...]) -> State:
        return (states[0], states[1]) if self.mode == "LSTM" else states[0]


_UNCOMPILED: list[Callable[[_Layer, Any, Any], Any]] = []


def _run_uncompiled(layer: _Layer, input: Any, hx: Any) -> Any:
    if not _UNCOMPILED:
        _UNCOMPILED.append(torch.compiler.disable(_Layer._run))
    return _UNCOMPILED[0](layer, input, hx)


# torch.nn's class comes after ours, so that its forward is what `super().forward` means
class RNN(_Layer, torch.nn.RNN):
    """Elman's layer, ``h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``; see torch.nn.RNN.

    ``nonlinearity`` may also be ``sigmoid``, ``linear`` (``φ(a) = a``), ``leaky_relu`` with slope
    0.01, or ``elu`` with α = 1. torch.nn has no layer that such a one could be exported as.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if given not in ACTIVATIONS:
            raise ValueError(
                f"RNN: nonlinearity must be one of {', '.join(ACTIVATIONS)}, got {given!r}"
            )
        if mode_of(given) in _TORCH:
            super().__init__(*args, **kwargs)
            return
        # torch.nn's constructor refuses the others; what it makes is the same for all of them
        if len(args) > 3:
            args = (*args[:3], "tanh", *args[4:])
        else:
            kwargs = kwargs | {"nonlinearity": "tanh"}
        super().__init__(*args, **kwargs)
        self.nonlinearity, self.mode = given, mode_of(given)

    def flatten_parameters(self) -> None:
        """Lays the weights out for cuDNN, which has none but torch.nn's two nonlinearities."""
        if self.mode in _TORCH:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        shown = "" if self.mode in _TORCH else f", nonlinearity={self.nonlinearity}"
        return super().extra_repr() + shown


class LSTM(_Layer, torch.nn.LSTM):
    """Long short-term memory with forget gate, optionally projected; see torch.nn.LSTM."""


class GRU(_Layer, torch.nn.GRU):
    """Gated recurrent unit with the reset gate after the product; see torch.nn.GRU."""


_OURS: dict[type[torch.nn.RNNBase], type[_Layer]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
}
_TORCH = {
    "RNN_TANH": torch.nn.RNN,
    "RNN_RELU": torch.nn.RNN,
    "LSTM": torch.nn.LSTM,
    "GRU": torch.nn.GRU,
}


def convert(model: Module) -> Module:
    """Makes every torch.nn.RNN, LSTM and GRU in ``model`` one of ours, in place.

    Only a layer's ``__class__`` changes: parameters, hooks, optimiser references, deepcopy and
    pickle stay as they are.

    Args:
        model: Any module; it may itself be such a layer.

    Returns:
        ``model``.

    Raises:
        TypeError: A layer is of a subclass or parametrised, so that its forward may differ from
            torch.nn's. Nothing is converted then.

    Example:
        >>> model = convert(torch.nn.Sequential(torch.nn.GRU(3, 4)))
        >>> type(model[0]).__module__
        'rnngrad.nn'
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.RNNBase) or isinstance(module, _Layer):
            continue
        if type(module) not in _OURS:
            raise TypeError(
                f"convert: {path or 'the model'} is a {type(module).__name__}, a subclass of "
                "torch.nn's layer or parametrised; only layers whose type is exactly "
                "torch.nn.RNN, LSTM or GRU can be converted"
            )
        found.append(module)
    for module in found:
        module.__class__ = _OURS[type(module)]
    return model


def unroll(
    cell: Callable[..., Any], x: Tensor, state: State | None = None, start: int = 0
) -> tuple[Tensor, State]:
    """Runs a cell over time, through autograd: the one loop for every cell without a kernel.

    A module's attribute ``bptt_clip`` says how its error is clipped on the way back.

    Args:
        cell: A module called as torch.nn.LSTMCell or RNNCell is: ``cell(x_t, state)`` returns
            ``h``, or ``(h, c)``; ``state`` is ``None`` at the first step unless given here. For
            ``∂L/∂c_t`` to be whole, ``c`` must be the tensor that ``h`` was computed from. A cell
            whose attribute ``takes_time`` is true is called ``cell(x_t, state, t)``.
        x: ``[T, B, I]``, or ``[T, I]`` for one sequence.
        state: Initial state.
        start: ``t`` of the first step, where ``x`` goes on with a sequence.

    Returns:
        The outputs ``h_t [T, B, H]`` and the last state.

    Raises:
        TypeError: The cell returns something else, or a ``c_t`` that cannot be recorded.
        RuntimeError: The cell changes in place a state that it has returned; or its pre-activations
            are to be clipped, which it does not show.
        ValueError: There is no time step; or, under ``record(weight=True)``, no trainable
            parameter ``weight_hh``.

    Example:
        >>> outputs, h = unroll(torch.nn.GRUCell(3, 4), torch.zeros(5, 2, 3))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    if len(x) == 0:
        raise ValueError("unroll: x has no time steps; its shape is [T, B, I]")
    rows = clip_of(cell)
    call = None
    if isinstance(cell, torch.nn.Module):
        call = bptt.open_unrolled(cell, clips=rows is not None)
        if call is not None:
            call.follow(cell, "l0", x, _as_tuple(state), start=start)
    clip = None if rows is None else RunClip(rows, call)
    watched = call is not None or (clip is not None and clip.total)
    states = states_over_time(cell, x, state, start, call=call, clip=clip, watched=watched)
    outputs, last = torch.stack([h for h, *_ in states]), states[-1][0]
    # ways out of their own, so that what arrives there can be told from what comes back in time,
    # and may be changed in place
    if call is None:
        last = last.clone()
    else:
        outputs, last = call.way_out("outputs", outputs), call.way_out("last", last)
        if not outputs.requires_grad:
            call.drop()
    return outputs, (last, states[-1][1].clone()) if len(states[-1]) == 2 else last


def states_over_time(
    cell: Callable[..., Any],
    x: Tensor,
    state: State | None,
    start: int,
    *,
    call: bptt.UnrolledCall | None = None,
    clip: RunClip | None = None,
    watched: bool = True,
) -> list[tuple[Tensor, ...]]:
    """The loop inside ``unroll``: the state of every step, ``(h_t,)`` or ``(h_t, c_t)``.

    Each is a tensor of its own, whose gradient is that state's in total.

    Args:
        cell: As for ``unroll``, whose errors it raises; its attribute ``bptt_clip`` is not looked
            at.
        x: ``[T, B, I]`` or ``[T, I]``.
        state: Initial state.
        start: ``t`` of the first step.
        call: Is told of every state.
        clip: Clips their gradients.
        watched: Whether gradients of single states are wanted.
    """
    if x.device.type != "cpu" or x.dim() == 2:
        cell = _without_fused_steps(cell, watched)
    states: list[tuple[Tensor, ...]] = []
    versions: list[tuple[int | None, ...]] = []
    given = _as_tuple(state)  # kept alive: identities are compared below
    seen = {id(tensor) for tensor in given}
    takes_time = getattr(cell, "takes_time", False)
    with running(clip):
        for t in range(len(x)):
            entering = state if clip is None else clip.enter(t, state)
            given_now = {id(part) for part in _as_tuple(entering)}
            arguments = (x[t], entering, start + t) if takes_time else (x[t], entering)
            if call is not None and call.wants_weight:
                state = _step_watching_weight(cell, arguments, call, t)
            else:
                state = cell(*arguments)
            state = _own_tensors(cell, state, seen, given_now)
            if clip is not None:
                clip.leave(state)
            parts = _as_tuple(state)
            versions.append(tuple(map(_version, parts)))
            states.append(parts)
            if call is not None:
                for kind, part in zip(("hidden", "cell"), parts, strict=False):
                    call.watch(kind, t, part)
    if clip is not None:
        clip.close(cell)
    if versions != [tuple(map(_version, parts)) for parts in states]:
        raise RuntimeError(
            f"unroll: {type(cell).__name__} changes in place a state that it has returned"
        )
    return states


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; not counted under ``inference_mode``."""
    return None if tensor.is_inference() else tensor._version


def _own_tensors(cell: Any, state: Any, seen: set[int], entering: set[int]) -> State:
    """The state as tensors that nothing else is or was, so that each has a gradient of its own.

    Args:
        cell: For the error's text.
        state: What the cell has returned.
        seen: Identities of all earlier states, which are alive; these are added.
        entering: Identities of the state that the cell was given.
    """
    parts = state if isinstance(state, tuple) else (state,)
    if len(parts) > 2 or not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"unroll: {type(cell).__name__} must return h or (h, c) as tensors; it returned "
            f"{type(state).__name__} of {len(parts)} ({kinds})"
        )
    own = []
    for part in reversed(parts):  # c first: if h is the same tensor, h is its alias
        if id(part) in seen or id(part) in entering or (part.is_leaf and part.requires_grad):
            part = part.view_as(part)
        seen.add(id(part))
        own.append(part)
    return (own[1], own[0]) if len(own) == 2 else own[0]


def _step_watching_weight(
    cell: Any, arguments: tuple[Any, ...], call: bptt.UnrolledCall, t: int
) -> Any:
    """One step with an alias of ``weight_hh`` that no other step uses: its gradient is ``G_t``."""
    # a parameter proper: one that is computed, as by pruning or parametrisation, cannot be replaced
    weight = getattr(cell, "_parameters", {}).get("weight_hh")
    if weight is None:
        raise ValueError(
            f"record(weight=True): {type(cell).__name__} has no parameter weight_hh; "
            "name the recurrent weight so, or record without weight=True"
        )
    if not weight.requires_grad:
        raise ValueError(f"record(weight=True): weight_hh of {type(cell).__name__} is frozen")
    alias = weight.view_as(weight)
    call.watch("weight", t, alias)
    return torch.func.functional_call(cell, {"weight_hh": alias}, arguments)


def _without_fused_steps(cell: Any, watched: bool) -> Any:
    """torch.nn.LSTMCell as its equation.

    Fused on a GPU, or given an unbatched sequence, torch's step hands out a ``c_t`` that is not
    the one ``h_t`` was computed from: its gradient would lack the path through ``h_t``.
    """
    from rnngrad.cells.lstm import LSTMCell  # the cells are built on this module

    if getattr(type(cell), "forward", None) is torch.nn.LSTMCell.forward:
        equation = LSTMCell.__new__(LSTMCell)
        equation.__dict__ = cell.__dict__
        return equation
    inside = cell.modules() if watched else ()
    if any(isinstance(m, torch.nn.LSTMCell) and not isinstance(m, LSTMCell) for m in inside):
        raise TypeError(
            f"unroll: on a GPU or unbatched, the torch.nn.LSTMCell in {type(cell).__name__} gives "
            "a c_t whose gradient cannot be recorded or clipped; use rnngrad.cells.LSTMCell in its "
            "place"
        )
    return cell


def _as_tuple(hx: Any) -> tuple[Tensor, ...]:
    if hx is None:
        return ()
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)
