"""Several trainings as one program: a step of each at a time, their recurrences in one kernel call.

What small runs spend their time on is the price of each call. Stacked on a leading axis ``R``, the
recurrences of runs of the same shape are one call, and their optimisers' steps another. What a
matrix product might round otherwise in another shape, read-out and loss, each run does by itself,
and so its clip rule, its files and its end: to the last bit it is the run that it is alone on one
thread.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.bptt import LayerRecord
from rnngrad.bptt_clip import clip_of
from rnngrad.kernels import kernel_for
from rnngrad.kernels.interface import Incoming, Recording, Walk, Wanted, Weights
from rnngrad.model import Passed
from rnngrad.nn import GRU, LSTM, RNN
from rnngrad.training import Step, Training, Update, Work, draw

Works = Generator[Work, None, Any]
"""A run that leaves its work to others: ``Training.works``, or a generator around it."""

ADVANCING: ContextVar[Hashable] = ContextVar("rnngrad_advancing", default=None)
"""Which run of a stack is having its own code run."""


class _Entry(NamedTuple):
    """A run, by the name it was given, and what it asks for."""

    name: Hashable
    works: Works
    work: Work


class Stack:
    """Trains runs in lockstep. One that ends, in whatever way, makes room for the next.

    Args:
        take: Gives the name and the works of a run that is to begin; ``None`` if there is none now.
        ended: Is told the name of a run that has ended, and what it returned or raised.
        room: Runs at a time.
    """

    def __init__(
        self,
        take: Callable[[], tuple[Hashable, Works] | None],
        ended: Callable[[Hashable, Any, BaseException | None], None],
        room: int,
    ) -> None:
        self._take, self._ended, self._room = take, ended, room
        self._asking: list[_Entry] = []
        self._optimizers = _Optimizers(2 * room)
        self._members: WeakKeyDictionary[Training, _Member] = WeakKeyDictionary()
        # runs that differ in something else than their seed train on the same batches
        self._batch = lru_cache(2 * room)(draw)

    def run(self) -> None:
        """Until there is no run left, and none to take."""
        while self._fill():
            steps = [entry for entry in self._asking if isinstance(entry.work, Step)]
            # who has left a step out is ahead, and waits until the others are there
            now = steps or self._asking
            self._asking = [e for e in self._asking if steps and not isinstance(e.work, Step)]
            failed = self._do([entry.work for entry in now])
            for name, works, work in now:
                self._advance(name, works, failed.get(work))

    def _fill(self) -> bool:
        """Takes runs as long as there is room; whether there is any."""
        while len(self._asking) < self._room and (taken := self._take()) is not None:
            self._advance(*taken)
        return bool(self._asking)

    def _advance(self, name: Hashable, works: Works, failed: Exception | None = None) -> None:
        """Has a run go on to what it asks for next."""
        token = ADVANCING.set(name)
        try:
            work = next(works) if failed is None else works.throw(failed)
        except StopIteration as end:
            self._ended(name, end.value, None)
        except BaseException as error:  # of this run alone; a plugin's exit too
            self._ended(name, None, error)
        else:
            self._asking.append(_Entry(name, works, work))
        finally:
            ADVANCING.reset(token)

    def _do(self, works: Sequence[Work]) -> dict[Work, Exception]:
        """Does what is asked for, together where that can be; what could not be done, and why."""
        steps = [work for work in works if isinstance(work, Step)]
        failed: dict[Work, Exception] = self._optimizers.step(steps)
        groups: dict[Hashable, list[Update]] = defaultdict(list)
        for work in works:
            if isinstance(work, Update):
                groups[self._shape(work)].append(work)
        for shape, updates in groups.items():
            if shape is None or len(updates) == 1:
                failed |= _alone(updates)
            else:
                failed |= self._together(updates)
        return failed

    def _together(self, updates: Sequence[Update]) -> dict[Work, Exception]:
        """Updates of the same shape in one call; if that fails, whoever can does it alone."""
        try:
            return _there_and_back(updates, [self._members[u.training] for u in updates])
        except Exception:
            for update in updates:
                for parameter in update.training.parameters:
                    parameter.grad = None
            return _alone(updates)

    def _shape(self, update: Update) -> Hashable:
        """Updates of the same shape can be one call; ``None``: only alone."""
        member = self._members.get(update.training)
        if member is None:
            member = self._members[update.training] = _Member(update.training)
            update.training.draw = self._batch
        recorded = update.recorded
        if member.kind is None or (recorded is not None and any(recorded.values())):
            return None
        return member.kind, update.inputs.shape, update.before is None, recorded is None


def _alone(updates: Sequence[Update]) -> dict[Work, Exception]:
    """Each by itself; those that failed, and why."""
    failed: dict[Work, Exception] = {}
    for update in updates:
        try:
            update.alone()
        except Exception as error:
            failed[update] = error
    return failed


class _Member:
    """What is asked of a training at every step and is always the same.

    Asked of its modules, it takes as long as a small matrix product.

    Attributes:
        kind: Of its layers, all that is the same for one call; ``None`` if they have to be alone.
            What is asked for this is asked of settings in ``rnngrad.stacking``.
        layers: The parameters of each, as ``_PARAMETERS``.
        readout: Of the model.
    """

    def __init__(self, training: Training) -> None:
        rnn: Any = training.model.rnn
        readout: Any = training.model.readout
        self.readout: Callable[[Tensor], Tensor] = readout
        if type(readout) is torch.nn.Linear:
            self.readout = partial(linear, weight=readout.weight, bias=readout.bias)
        self.kind = _kind(training)
        self.layers: list[list[Any]] = []
        if self.kind is not None:
            self.layers = [
                [getattr(rnn, f"{name}_l{layer}", None) for name in _PARAMETERS]
                for layer in range(rnn.num_layers)
            ]


def _kind(training: Training) -> Hashable:
    rnn: Any = training.model.rnn
    tbptt = training.tbptt
    if training.regularizer.needs_gradients:
        return None
    if not isinstance(rnn, RNN | LSTM | GRU) or rnn.recompute_segments != 1:
        return None
    if tbptt is not None and tbptt[1] < training.task.time_steps:
        return None
    weight: Any = rnn.weight_hh_l0
    if not kernel_for(rnn.mode, weight, projected=rnn.proj_size > 0).takes_runs:
        return None
    return rnn.mode, rnn.num_layers, weight.shape, weight.dtype, rnn.bptt_clip


class _Way(NamedTuple):
    """What one layer's way back needs."""

    x: Tensor
    weights: Weights
    saved: tuple[Tensor, ...]


def _there_and_back(updates: Sequence[Update], members: Sequence[_Member]) -> dict[Work, Exception]:
    """What ``Update.alone`` does, for several of the same shape; those that failed, and why."""
    rnn: Any = updates[0].training.model.rnn
    walk, clip = Walk(len(updates[0].inputs)), clip_of(rnn)
    with torch.no_grad():
        states = _initial_states(updates)
        x = torch.stack([update.inputs for update in updates])
        kernel = kernel_for(rnn.mode, x, projected=False)
        ways, last = [], []
        for layer in range(rnn.num_layers):
            weights = Weights(*_stacked([member.layers[layer] for member in members]))
            h_0, *c_0 = (state[:, layer] for state in states)
            passed = kernel.forward(walk, x, h_0, c_0[0] if c_0 else None, weights, keep=True)
            ways.append(_Way(x, weights, passed.saved))
            last.append([t for t in (passed.h_n, passed.c_n) if t is not None])
            x = passed.output
        final = [torch.stack(parts, 1) for parts in zip(*last, strict=True)]
    grads, failed = _read_out(updates, members, x, final)
    with torch.no_grad():
        top = updates[0].training.model.last_step_only
        incoming = Incoming(None if top else grads, grads if top else None, None)
        logs = updates[0].recorded is not None
        for layer in reversed(range(rnn.num_layers)):
            wanted = Wanted(
                x=layer > 0, ih=True, hh=True, hr=False, norms=logs, full=False, weight=False
            )
            back = kernel.backward(walk, *ways.pop(), incoming, wanted, clip)
            grads_of_layer = (back.ih, back.hh, back.b_ih, back.b_hh)
            _hand_out([member.layers[layer] for member in members], grads_of_layer)
            if back.recording is not None:
                if clip is not None and clip.site == "carry":
                    walk.clear_first(back.recording.clipped)  # nobody gets what is clipped there
                _record(updates, layer, back.recording)
            incoming = Incoming(back.x, None, None)
    for update in updates:
        if not math.isfinite(update.loss):  # then there is no way back
            update.records = {}
            for parameter in update.training.parameters:
                parameter.grad = None
    return failed


_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _stacked(layers: Sequence[Sequence[Any]]) -> list[Any]:
    """The parameters of one layer of all runs, ``[R, ...]`` each."""
    columns = zip(*layers, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def _hand_out(layers: Sequence[Sequence[Any]], grads: Sequence[Tensor | None]) -> None:
    """Gives each run its own ``[R, ...]`` of a layer's gradients."""
    for index, stacked in enumerate(grads):
        if stacked is not None:
            for parameters, grad in zip(layers, stacked.contiguous().unbind(), strict=True):
                parameters[index].grad = grad


def _initial_states(updates: Sequence[Update]) -> list[Tensor]:
    """``h_0`` and, of an LSTM, ``c_0`` of all layers ``[R, L, B, H]``."""
    models = [update.training.model for update in updates]
    rnn: Any = models[0].rnn
    given = [m.first_state(u.inputs, u.before) for m, u in zip(models, updates, strict=True)]
    if given[0] is None:
        shape = (len(updates), rnn.num_layers, updates[0].inputs.shape[1], rnn.hidden_size)
        zeros = rnn.weight_hh_l0.new_zeros(shape)
        return [zeros, zeros] if rnn.mode == "LSTM" else [zeros]
    if isinstance(given[0], Tensor):
        return [torch.stack(given)]
    return [torch.stack(parts) for parts in zip(*given, strict=True)]


def _read_out(
    updates: Sequence[Update],
    members: Sequence[_Member],
    hidden: Tensor,
    final: Sequence[Tensor],
) -> tuple[Tensor, dict[Work, Exception]]:
    """Each run's read-out and loss, and back to the layers.

    Args:
        updates: Get what they passed and their loss.
        members: In the same order.
        hidden: Of the last layer ``[R, T, B, H]``.
        final: The last states ``[R, L, B, H]``.

    Returns:
        What goes back into ``hidden``, or with ``last_step_only`` into the last layer's last
        state; 0 where it is not to go back. And the runs that failed.
    """
    top = updates[0].training.model.last_step_only
    leaves = [
        leaf.detach().requires_grad_() for leaf in (final[0][:, -1] if top else hidden).unbind()
    ]
    outgoing = hidden.unbind(), [part.unbind() for part in final]
    losses: list[Tensor] = []
    failed: dict[Work, Exception] = {}
    for r, (update, member, leaf) in enumerate(zip(updates, members, leaves, strict=True)):
        try:
            outputs = member.readout(leaf)
            loss = update.training.task.loss(outputs, update.targets)
            update.loss = loss.item()
        except Exception as error:
            failed[update] = error
            continue
        state = tuple(part[r] for part in outgoing[1])
        update.passed = Passed(
            outputs.detach(), outgoing[0][r], state if len(state) > 1 else state[0]
        )
        if math.isfinite(update.loss):
            losses.append(loss)
    if losses:
        torch.autograd.backward(losses)
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return torch.stack(grads), failed


def _record(updates: Sequence[Update], layer: int, recording: Recording) -> None:
    """Gives each run its own of a layer's norms ``[R, T, B]``."""
    for r, update in enumerate(updates):
        own = {
            name: None if values is None else values[r]
            for name, values in recording._asdict().items()
            if name in ("hidden_norm", "direct_norm", "cell_norm", "clipped")
        }
        update.records = {f"rnn.l{layer}": LayerRecord(**own), **update.records}  # type: ignore[arg-type]


class _Optimizers:
    """Steps of several optimisers in one call for those of the same kind and settings.

    Args:
        kept: Groups of them that are remembered.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._merged: dict[tuple[int, ...], tuple[Any, Sequence[torch.optim.Optimizer]]] = {}

    def step(self, steps: Iterable[Step]) -> dict[Work, Exception]:
        """Makes them; those that failed, and why."""
        groups: dict[Hashable, list[Step]] = defaultdict(list)
        for step in steps:
            groups[_settings(step.optimizer)].append(step)
        failed: dict[Work, Exception] = {}
        for group in groups.values():
            try:
                self._of([step.optimizer for step in group]).step()
            except Exception as error:
                failed |= dict.fromkeys(group, error)
        return failed

    def _of(self, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """An optimiser of all parameters of several, which works on their own states."""
        if len(optimizers) == 1:
            return optimizers[0]
        key = tuple(map(id, optimizers))
        if key not in self._merged:
            if len(self._merged) > self._kept:  # of stacks that are no more
                self._merged.clear()
            # the originals are kept, so that no other object gets their number
            self._merged[key] = _merged(optimizers), optimizers
        merged = self._merged[key][0]
        merged.param_groups[0] |= {
            name: value for name, value in optimizers[0].param_groups[0].items() if name != "params"
        }
        return merged  # type: ignore[no-any-return]


def _settings(optimizer: torch.optim.Optimizer) -> Hashable:
    """What those have in common that can step together; a first step makes what the others have."""
    (group,) = optimizer.param_groups
    begun = any(optimizer.state.values())
    return type(optimizer), begun, *(v for name, v in group.items() if name != "params")


def _merged(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    merged = copy.copy(optimizers[0])
    merged.param_groups = [copy.copy(optimizers[0].param_groups[0])]
    merged.param_groups[0]["params"] = [
        parameter for optimizer in optimizers for parameter in optimizer.param_groups[0]["params"]
    ]
    merged.state = defaultdict(dict)
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            merged.state[parameter] = optimizer.state[parameter]  # the same mapping
    return merged
