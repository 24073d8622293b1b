"""Record the exact gradient at every time step: ``‖∂L/∂h_t‖₂``, during an ordinary backward.

A recurrent layer's ``δ_t = ∂L/∂h_t`` has two parts: ``e_t``, what arrives at ``h_t`` from outside
the layer's own recurrence (the loss, the layer above, ``h_n``), and what comes back through
``h_{t+1}``. ``out.grad`` of a fused layer holds the first part only; here is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rnngrad.contribution import Contribution, StepGradients
from rnngrad.kernels.interface import Recording
from rnngrad.norms import norms

_LEAF = torch.zeros((), requires_grad=True)
"""What every tape's sentinel comes from."""


class Recordable:
    """Marks a layer that reports its own gradients over time (those of ``rnngrad.nn``)."""


@dataclass(frozen=True)
class Trajectory:
    """What it takes to go over a layer's call again; see ``rnngrad.dynamics``.

    Weights are the module's, as they are when the call is gone over. Columns are in the caller's
    order.

    Args:
        module: The layer or cell, itself.
        suffix: ``l<layer>``, with ``_reverse`` for the direction from the end; ``l0`` of a cell.
        input: What came in ``[T, B, I]``. It shares the call's memory.
        state: The initial ``(h_0,)`` or ``(h_0, c_0)``, ``[B, ·]``; empty if a cell was given none.
        start: ``t`` of the first step, which a cell with ``takes_time`` is told.
        lengths: Of packed sequences ``[B]``.
    """

    module: nn.Module
    suffix: str
    input: Tensor
    state: tuple[Tensor, ...]
    start: int = 0
    lengths: Tensor | None = None
    version: int = field(default=0, repr=False)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        suffix: str,
        x: Tensor,
        state: tuple[Tensor, ...],
        start: int = 0,
        lengths: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Trajectory:
        """That of a call with ``x [T, B, I]``; ``columns`` puts its rows in the caller's order."""
        x, state = x.detach(), tuple(part.detach().clone() for part in state)
        if x.dim() == 2:  # one sequence, unbatched
            x, state = x.unsqueeze(1), tuple(part.unsqueeze(0) for part in state)
        if columns is not None:
            x, state = x[:, columns], tuple(part[columns] for part in state)
            lengths = None if lengths is None else lengths[columns.cpu()]
        return cls(module, suffix, x, state, start, lengths, x._version)

    @property
    def reverse(self) -> bool:
        """Whether the call went from the last step to the first."""
        return self.suffix.endswith("_reverse")


@dataclass(frozen=True)
class LayerRecord:
    """What one backward sent through one layer and direction (or one cell).

    If the loss is a mean over the batch, every norm carries the factor ``1/B``; index ``t`` is the
    input's time, also for ``_reverse``, whose predecessor is ``t + 1``. Columns are in the caller's
    order; beyond a packed sequence's end stands NaN. Where ``bptt_clip`` clips ``∂L/∂h_t`` or
    ``∂L/∂c_t`` the norms are of the clipped ones, which go on; ``direct_norm`` is of what arrives.

    Args:
        hidden_norm: ``‖∂L/∂h_t‖₂ [T, B]``, float64 on the CPU: the total derivative.
        direct_norm: Norm ``[T, B]`` of what arrives from outside the layer's own recurrence.
        cell_norm: ``‖∂L/∂c_t‖₂ [T, B]``, the path through ``h_t`` included; ``None`` without cell
            state.
        weight_norm: ``‖G_t‖_F [T]``, ``G_t = Σ_b α_{t,b} ⊗ h_{t-1,b}``: what step ``t`` adds to
            ``∂L/∂W_hh``, all gates; ``None`` unless ``record(weight=True)``.
        hidden_grad: ``∂L/∂h_t [T, B, H]`` in the layer's dtype and device; ``None`` unless
            ``record(full=True)``.
        cell_grad: ``∂L/∂c_t [T, B, H]``, likewise.
        clipped: Fraction ``[T, B]``, float64 on the CPU, of what ``bptt_clip`` looked at that it
            changed: by value of the entries, by norm of the rows, which are the gates', or those of
            ``h`` and ``c``. At site ``carry`` index ``t`` is the step that sends back. ``None``
            without clipping.
        attribution: ``s_t = ⟨G_t, g⟩ / ‖g‖² [T]``, ``g = Σ_t G_t``, float64 on the CPU: the share
            of the first-order drop in loss, of a step of ``W_hh`` against ``g``, that is due to
            step ``t``. They sum to 1; NaN if ``g`` is exactly 0. ``None`` unless
            ``record(weight=True)``.
        contribution: ``G_t`` themselves; ``None`` unless ``record(full=True, weight=True)``.
        trajectory: What it takes to go over the call again; ``None`` unless
            ``record(trajectory=True)``.
    """

    hidden_norm: Tensor
    direct_norm: Tensor
    cell_norm: Tensor | None = None
    weight_norm: Tensor | None = None
    hidden_grad: Tensor | None = None
    cell_grad: Tensor | None = None
    clipped: Tensor | None = None
    attribution: Tensor | None = None
    contribution: Contribution | None = None
    trajectory: Trajectory | None = None

    def norms_only(self) -> LayerRecord:
        """Without what takes memory in the order of the sequence's states."""
        return replace(self, hidden_grad=None, cell_grad=None, trajectory=None, contribution=None)


class record:  # lower case like torch.no_grad: it reads as a statement
    """Records one backward through the recurrent layers of ``model``.

    Recording changes nothing: loss, gradients and random streams are bitwise the same without it.

    Args:
        model: Any module that holds ``rnngrad.nn`` layers, or cells run by ``rnngrad.nn.unroll``.
        full: Also keep the gradients themselves; of the weight's, a step's own too.
        weight: Also measure each step's contribution to ``∂L/∂W_hh``; costs a good part of a pass.
            A cell that uses ``weight_hh`` twice in a step then has its sum over steps in another
            order, and so rounded differently.
        trajectory: Also keep each call's input and initial state, for ``rnngrad.dynamics``.

    Raises:
        ValueError: There is nothing to record in the model.
        TypeError: The model is no module, or spread over several devices by ``DataParallel``.
        RuntimeError: On entering inside another block; on a second backward; at the end of a block
            that saw no backward.

    Example:
        The recurrence ``h_t = h_{t-1} / 2`` halves the gradient at every step back.

        >>> from rnngrad.nn import RNN
        >>> rnn = RNN(1, 1, nonlinearity="relu", bias=False)
        >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
        >>> _ = torch.nn.init.constant_(rnn.weight_ih_l0, 1.0)
        >>> with record(rnn) as tape:
        ...     output, _ = rnn(torch.ones(4, 1, 1))
        ...     output[-1].sum().backward()
        >>> tape["l0"].hidden_norm.squeeze(1)
        tensor([0.1250, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
        >>> tape["l0"].direct_norm.squeeze(1)
        tensor([0., 0., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        full: bool = False,
        weight: bool = False,
        trajectory: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"record: model must be a torch.nn.Module, got {type(model).__name__}")
        paths = {}
        for path, module in model.named_modules():
            _refuse_data_parallel(module)
            paths[id(module)] = path
        if not any(may_record(module) for module in model.modules()):
            raise ValueError(_nothing_to_record(model))
        self._model, self._paths = model, paths
        self._kept = {"full": full, "weight": weight, "trajectory": trajectory}

    def __enter__(self) -> Tape:
        if _ACTIVE.get() is not None:
            raise RuntimeError("record: blocks do not nest; end the first one before the second")
        self._tape = Tape(self._model, self._paths, **self._kept)
        _ACTIVE.set(self._tape)
        return self._tape

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _ACTIVE.set(None)
        self._tape._close(failed=error is not None)


class Tape(Mapping[str, LayerRecord]):
    """What one ``record`` block saw: layer name -> ``LayerRecord``.

    A layer's name is its module path, then ``.l<layer>``, then ``_reverse`` for the direction from
    the end; ``l0`` when the model is the layer itself. A cell run by ``unroll`` is ``<path>.l0``.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: dict[int, str],
        *,
        full: bool = False,
        weight: bool = False,
        trajectory: bool = False,
    ) -> None:
        self.full = full
        self.weight = weight
        self.trajectory = trajectory
        self._model = model
        self._paths = paths  # of the modules, by their id
        self._calls: dict[str, list[Call]] = {}
        self._skipped: dict[str, str] = {}  # why a call of a layer was not recorded
        self._backward: int | None = None  # autograd's number of the one backward
        self._closed = False
        # an input of every recorded call: only a backward told to stop early does not reach it
        with torch.enable_grad():
            self.sentinel = _LEAF.view(())
        self._sentinel_node: Any = self.sentinel.grad_fn
        self.whole = True

    def __getitem__(self, name: str) -> LayerRecord:
        records = self.calls(name)
        if len(records) > 1:
            raise RuntimeError(
                f"{name!r} was called {len(records)} times in this block; "
                f"tape.calls({name!r}) lists the records in call order"
            )
        return records[0]

    def calls(self, name: str) -> list[LayerRecord]:
        """The records of every call of a layer, in call order (shared layers, decoders)."""
        if name not in self._calls:
            raise KeyError(self._unknown(name))
        if self._backward is None:
            raise RuntimeError("nothing recorded yet: call loss.backward() inside the record block")
        return [call.result(name) for call in self._calls[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} x{len(calls)}" for name, calls in self._calls.items())
        return f"Tape({counts or 'nothing called yet'})"

    def _name(self, module: nn.Module, suffix: str, differentiable: bool) -> str | None:
        """The name under which a call of ``module`` is recorded, if it is."""
        path = self._paths.get(id(module))
        if path is None:
            return None
        name = f"{path}.{suffix}" if path else suffix
        if not torch.is_grad_enabled():
            self._skipped[name] = "was called under no_grad alone"
        elif _running_backward() is not None:
            # activation checkpointing, which does the first forward again
            self._skipped[name] = "was checkpointed; use_reentrant=False can be recorded"
        elif torch._C._are_functorch_transforms_active():
            self._skipped[name] = "was called inside torch.vmap, which cannot be recorded"
        elif not differentiable:
            self._skipped[name] = _FROZEN
        else:
            return name
        return None

    def _add(self, name: str, call: _AnyCall) -> _AnyCall:
        self._calls.setdefault(name, []).append(call)
        return call

    def _drop(self, call: Call) -> None:
        """Takes back a call that turns out to depend on nothing that requires a gradient."""
        for name, calls in list(self._calls.items()):
            if call in calls:
                calls.remove(call)
                self._skipped[name] = _FROZEN
                if not calls:
                    del self._calls[name]

    def _enter_backward(self) -> bool:
        """Called from inside every backward that reaches a recorded call; refuses the second."""
        if self._closed:
            return False
        running = _running_backward()
        if self._backward is None:
            self._backward = running
            self.whole = _will_run(self._sentinel_node)
            for calls in self._calls.values():
                for call in calls:
                    call.await_nodes()
        elif running != self._backward:
            raise RuntimeError(
                "record: a second backward in one block; a block records one backward "
                "(add the losses up, or open a block for each)"
            )
        return True

    def _close(self, failed: bool) -> None:
        self._closed = True
        for name, calls in self._calls.items():
            for call in calls:
                call.settle(name)
        self.sentinel, self._sentinel_node = self.sentinel.detach(), None
        if failed:
            return
        if self._backward is None:
            recordable = any(isinstance(module, Recordable) for module in self._model.modules())
            if not (self._calls or self._skipped or recordable):
                raise ValueError(_nothing_to_record(self._model))
            reasons = "".join(f"; {name} {why}" for name, why in self._skipped.items())
            raise RuntimeError(
                "record: the block ended without a backward through a recorded layer; call the "
                f"model and loss.backward() inside the block{reasons}"
            )

    def _unknown(self, name: str) -> str:
        path = name.rpartition(".")[0]
        module = dict(self._model.named_modules()).get(path)
        if isinstance(module, nn.RNNBase) and not isinstance(module, Recordable):
            return f"{name!r}: {path or 'the model'} is a torch.nn layer; call rnngrad.nn.convert"
        why = self._skipped.get(name, "was not called in this block")
        return f"{name!r} {why}; recorded: {', '.join(self) or 'nothing'}"


class Call:
    """One call of a layer and direction whose backward is still to come, then its record."""

    def __init__(
        self,
        tape: Tape,
        *,
        clips: bool = False,
        beyond: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self._tape = tape
        self._clips = clips
        self._beyond = beyond  # [T, B], where a packed sequence has ended
        self._columns = columns  # the caller's order, for packed input
        self._trajectory: Trajectory | None = None
        self._record: LayerRecord | None = None
        self._error: RuntimeError | None = None
        self._node: Any = None
        self._shape: tuple[int, tuple[Tensor, ...]] | None = None
        self._awaited = False
        self._late = tape._backward is not None

    @property
    def full(self) -> bool:
        """Whether the gradients themselves are wanted."""
        return self._tape.full

    @property
    def weight(self) -> bool:
        """Whether each step's contribution to ``∂L/∂W_hh`` is wanted."""
        return self._tape.weight

    @property
    def sentinel(self) -> Tensor:
        """To be an input, with gradient ``None``, of every node that reports to this call."""
        return self._tape.sentinel

    def expect(self, output: Tensor, steps: int, states: tuple[Tensor, ...]) -> None:
        """What comes out after how many steps, and what is shaped as ``h_t [B, P]`` and ``c_t``."""
        self._node, self._shape = output.grad_fn, (steps, states)

    def follow(
        self,
        module: nn.Module,
        suffix: str,
        x: Tensor,
        state: tuple[Tensor, ...],
        *,
        start: int = 0,
        lengths: Tensor | None = None,
    ) -> None:
        """What goes into the call: kept if trajectories are wanted."""
        if self._tape.trajectory:
            self._trajectory = Trajectory.of(
                module, suffix, x, state, start, lengths, self._columns
            )

    def await_nodes(self) -> None:
        """Called as the backward begins: notes whether it will come here."""
        self._awaited = _will_run(self._node)

    def enter_backward(self) -> bool:
        """True if what this backward sends through the call is to be recorded."""
        return self._tape._enter_backward()

    def fill(self, recording: Recording) -> None:
        """Takes what the backward has sent through the call."""
        self._record = self._arranged(recording)

    def settle(self, name: str) -> None:
        """Ends the call with its block: keeps its record, or why it has none, and nothing else."""
        try:
            self.result(name)
        except RuntimeError as error:
            self._error = error.with_traceback(None)
        self._release()
        self._tape = _CLOSED  # no cycle: what was recorded goes when the tape does, not later

    def _release(self) -> None:
        self._node = self._shape = self._trajectory = None

    def result(self, name: str) -> LayerRecord:
        """The record; a call that the loss does not depend on has gradient 0 at every step."""
        if self._error is not None:
            raise self._error
        if self._record is None:
            self._record = self._assemble(name)
        return self._record

    def _assemble(self, name: str) -> LayerRecord:
        """The record of a call that the backward has not filled in."""
        self._refuse_unreached(name, self._awaited)
        if self._shape is None:
            raise RuntimeError(f"{name!r}: the forward of this call ended in an error")
        steps, states = self._shape
        hidden, *cells = (state.new_zeros(()).expand(steps, *state.shape) for state in states)
        cell = cells[0] if cells else None
        nothing = (
            StepGradients([None] * len(hidden), hidden.new_zeros(1)) if self._tape.weight else None
        )
        return self._measured(hidden, hidden, cell, nothing)

    def _refuse_unreached(self, name: str, awaited: bool) -> None:
        """What the backward did not reach is 0 only if it went everywhere it could."""
        if self._late:
            raise RuntimeError(f"{name!r}: this call came after the block's one backward")
        if awaited:
            raise RuntimeError(f"{name!r}: the backward ended in an error before it was through")
        if not self._tape.whole:
            raise RuntimeError(
                f"{name!r}: this backward was told to stop early (inputs=, autograd.grad) and did "
                "not go through all of it; use loss.backward()"
            )

    def _measured(
        self, hidden: Tensor, direct: Tensor, cell: Tensor | None, weight: Contribution | None
    ) -> LayerRecord:
        return self._arranged(
            Recording(
                norms(hidden),
                norms(direct),
                None if cell is None else norms(cell),
                hidden.clone() if self.full else None,
                cell.clone() if self.full and cell is not None else None,
                self._clipped(*hidden.shape[:2]) if self._clips else None,
                weight if self.full else None,
                None if weight is None else weight.norms().squeeze(-1),
                None if weight is None else weight.attribution(),
            )
        )

    def _clipped(self, steps: int, batch: int) -> Tensor:
        """The fraction that was clipped ``[T, B]`` of what did arrive, not through a kernel."""
        return torch.zeros(steps, batch, dtype=torch.float64)

    def _arranged(self, recording: Recording) -> LayerRecord:
        """NaN beyond the ends, columns in the caller's order; changes the recording in place."""
        found = recording._asdict()
        for name in _BY_ROW:
            if found[name] is not None and self._beyond is not None:
                found[name][self._beyond.to(found[name].device)] = math.nan
            if found[name] is not None and self._columns is not None:
                found[name] = found[name][:, self._columns.to(found[name].device)]
        return LayerRecord(**found, trajectory=self._trajectory)


_BY_ROW = ("hidden_norm", "direct_norm", "cell_norm", "hidden_grad", "cell_grad", "clipped")


class UnrolledCall(Call):
    """A cell's run over time, whose gradients arrive one hook at a time."""

    def __init__(self, tape: Tape, *, clips: bool = False) -> None:
        super().__init__(tape, clips=clips)
        self.wants_weight = tape.weight
        self._watched: dict[tuple[str, int], tuple[Tensor, Any]] = {}  # with its node
        self._arrived: dict[tuple[str, int], Tensor] = {}
        self._awaited_steps: set[tuple[str, int]] = set()
        self._clippable: dict[int, int] = {}  # by step: things that there are to clip of a sequence
        self._counts: dict[int, Tensor] = {}  # and how many were

    def watch(self, kind: str, t: int, tensor: Tensor) -> None:
        """Keeps the gradient of ``hidden``, ``cell`` or ``weight`` (an alias) of step ``t``."""
        self._watched[kind, t] = (tensor, tensor.grad_fn)
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._keep(kind, t, grad))

    def way_out(self, kind: str, tensor: Tensor) -> Tensor:
        """A copy that leaves the recurrence: what arrives at it is part of the direct gradient."""
        if not tensor.requires_grad:
            return tensor.clone()
        out: Tensor = _WayOut.apply(tensor, self.sentinel, self, kind)  # type: ignore[no-untyped-call]
        return out

    def expect_clipping(self, t: int, things: int) -> None:
        """Says that at step ``t`` there will be so many more things to clip of each sequence."""
        self._clippable[t] = self._clippable.get(t, 0) + things

    def keep_clipped(self, t: int, counts: Tensor) -> None:
        """Takes how many of them were clipped, ``[B]`` or, unbatched, one number."""
        if self.enter_backward():
            counts = counts.detach()
            self._counts[t] = self._counts[t] + counts if t in self._counts else counts

    def _clipped(self, steps: int, batch: int) -> Tensor:
        fraction = torch.zeros(steps, batch, dtype=torch.float64)
        for t, counts in self._counts.items():
            fraction[t] = counts.cpu().double() / self._clippable[t]
        return fraction

    def await_nodes(self) -> None:
        self._awaited_steps = {key for key, (_, node) in self._watched.items() if _will_run(node)}

    def drop(self) -> None:
        """The run turned out to depend on nothing that requires a gradient."""
        self._tape._drop(self)

    def _release(self) -> None:
        super()._release()
        self._watched.clear()
        self._arrived.clear()

    def _keep(self, kind: str, t: int, grad: Tensor) -> None:
        if self.enter_backward():
            # at once: the caller may change the gradient in place afterwards
            self._arrived[kind, t] = grad.clone()

    def _assemble(self, name: str) -> LayerRecord:
        if not self._of("hidden"):
            raise RuntimeError(f"{name!r}: the forward of this call ended in an error")
        hidden = _batched(torch.stack([h.detach() for h in self._of("hidden")]).zero_())
        cells = self._of("cell")
        cell = _batched(torch.stack([c.detach() for c in cells]).zero_()) if cells else None
        direct = hidden.clone()
        weights: list[Tensor | None] = [None] * len(hidden)
        for (kind, t), (tensor, _) in self._watched.items():
            grad = self._arrived.get((kind, t))
            if grad is None and tensor.requires_grad:
                self._refuse_unreached(name, (kind, t) in self._awaited_steps)
            elif grad is None and kind != "weight":
                grad = torch.full_like(tensor, math.nan)  # exists, but autograd does not compute it
            if grad is None:
                continue
            if kind == "hidden":
                hidden[t] = grad
            elif kind == "cell" and cell is not None:
                cell[t] = grad
            else:
                weights[t] = grad
        if self.wants_weight and len(hidden) > 1:
            arrived = {kind for kind, _ in self._arrived}
            if "hidden" in arrived and "weight" not in arrived:
                raise RuntimeError(f"{name!r}: the cell does not use its parameter weight_hh")
        if ("outputs", 0) in self._arrived:
            direct += _batched(self._arrived["outputs", 0])
        if ("last", 0) in self._arrived:
            direct[-1] += self._arrived["last", 0]
        weight = StepGradients(weights, self._of("weight")[0]) if self.wants_weight else None
        return self._measured(hidden, direct, cell, weight)

    def _of(self, kind: str) -> list[Tensor]:
        return [tensor for (of, _), (tensor, _) in self._watched.items() if of == kind]


class _WayOut(torch.autograd.Function):
    """The identity; its backward tells an unrolled call what arrives, after the caller's hooks."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, sentinel: Tensor, call: UnrolledCall, kind: str
    ) -> Tensor:
        ctx.call, ctx.kind = call, kind
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call._keep(ctx.kind, 0, grad.detach())
        return grad, None, None, None


def _batched(states: Tensor) -> Tensor:
    """``[T, H]`` of unbatched cells as ``[T, 1, H]``."""
    return states.unsqueeze(1) if states.dim() == 2 else states


_CLOSED = Tape(nn.Module(), {})
_CLOSED._close(failed=True)
_AnyCall = TypeVar("_AnyCall", bound=Call)
_FROZEN = "was called with nothing that requires a gradient (frozen)"
_ACTIVE: ContextVar[Tape | None] = ContextVar("rnngrad_tape", default=None)


def open_call(
    module: nn.Module,
    suffix: str,
    *,
    differentiable: bool,
    clips: bool = False,
    beyond: Tensor | None = None,
    columns: Tensor | None = None,
) -> Call | None:
    """A call to fill in during the backward, if an open block records ``module``.

    Args:
        module: The layer being called.
        suffix: ``l<layer>``, with ``_reverse`` for the direction from the end.
        differentiable: Whether anything the call depends on requires a gradient.
        clips: Whether its rows are clipped on the way back.
        beyond: Mask ``[T, B]`` of what lies beyond the sequences' ends.
        columns: Index ``[B]`` that puts the columns in the caller's order.
    """
    tape = _ACTIVE.get()
    name = None if tape is None else tape._name(module, suffix, differentiable)
    if tape is None or name is None:
        return None
    return tape._add(name, Call(tape, clips=clips, beyond=beyond, columns=columns))


def open_unrolled(cell: nn.Module, *, clips: bool) -> UnrolledCall | None:
    """Like ``open_call``, for a cell run by ``unroll``."""
    tape = _ACTIVE.get()
    name = None if tape is None else tape._name(cell, "l0", differentiable=True)
    if tape is None or name is None:
        return None
    return tape._add(name, UnrolledCall(tape, clips=clips))


def _running_backward() -> int | None:
    """Autograd's number of the backward that this thread is inside of, if any.

    Private, but what torch's own ``register_multi_grad_hook`` relies on.
    """
    number: int = torch._C._current_graph_task_id()
    return None if number == -1 else number


def _will_run(node: Any) -> bool:
    """Whether the running backward goes through an autograd node, now or later."""
    return node is not None and torch._C._will_engine_execute_node(node)


def may_record(module: nn.Module) -> bool:
    """Whether the module reports its gradients, or could be a cell run by ``unroll``."""
    if isinstance(module, Recordable | nn.RNNCellBase):
        return True
    own_class = not type(module).__module__.startswith("torch.")
    return own_class and not any(isinstance(child, nn.RNNBase) for child in module.modules())


def _nothing_to_record(model: nn.Module) -> str:
    found = [
        f"{path or 'the model'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
    ]
    return (
        "record: nothing to record in the model: "
        + (f"torch.nn layers {', '.join(found)}" if found else "no recurrent layer")
        + "; call rnngrad.nn.convert(model) first, or run cells by rnngrad.nn.unroll"
    )


def _refuse_data_parallel(module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise TypeError(
            "record: torch.nn.DataParallel runs copies of the layers that cannot be recorded; "
            "use torch.nn.parallel.DistributedDataParallel"
        )
