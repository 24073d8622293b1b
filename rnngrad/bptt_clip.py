"""Clipping inside back-propagation: at every time step, before the gradient goes further back.

Clip rules of the group ``clip`` change the gradient of the weights, once back-propagation is done.
Here the error itself is clipped while it goes back through time, so that what one step inflates
does not reach all the steps before it. What comes out is no longer the gradient of any function.

A row is what is clipped as one: a vector of ``H`` units of one sequence at one step. Where rows are
clipped, the site, is

- ``preact``: ``∂L/∂`` the pre-activations, a row a gate, as it arises: the weights' gradients and
  what goes on to the step before come from the clipped one. In a GRU the new state's gate comes
  first; what it sends to the reset gate comes from its clipped gradient.
- ``state``: ``∂L/∂h_t`` in total, then in an LSTM ``∂L/∂c_t``, computed with it; all else comes
  from the clipped ones.
- ``carry``: what goes from step ``t`` to ``t - 1`` alone, of ``h`` and of ``c``, the initial
  state's gradient included. What arrives from outside the recurrence is left as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from rnngrad.bptt import Recordable, UnrolledCall, may_record
from rnngrad.kernels.rowclip import RowClip
from rnngrad.parts import POSITIVE, Part, Registry


@dataclass(frozen=True)
class BPTTClip(Part, ABC):
    """A rule for clipping inside back-propagation; ``install`` puts it to work."""

    @abstractmethod
    def rows(self) -> RowClip | None:
        """What is done to the rows, if anything."""


BPTT_CLIPS: Registry[BPTTClip] = Registry("bptt_clip", "rnngrad.bptt_clip")


@BPTT_CLIPS.register("none")
@dataclass(frozen=True)
class NoBPTTClip(BPTTClip):
    """The exact gradient: nothing is clipped inside back-propagation."""

    def rows(self) -> None:
        return None


@BPTT_CLIPS.register("value")
@dataclass(frozen=True)
class ValueBPTTClip(BPTTClip):
    """Clamps every entry of a row to ``[-clip_value, clip_value]``, an infinite one too.

    Args:
        site: ``preact`` clips the gradient of the pre-activations, ``state`` that of the states,
            ``carry`` only what goes on to the step before.
        clip_value: The largest magnitude left.

    Reference:
        Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013,
        section 2.1: at the pre-activations, in sections 3.1 and 3.2 with 1.
    """

    site: Literal["preact", "state", "carry"]
    clip_value: Annotated[float, POSITIVE]

    def rows(self) -> RowClip:
        return RowClip(self.site, "value", self.clip_value)


@BPTT_CLIPS.register("norm")
@dataclass(frozen=True)
class NormBPTTClip(BPTTClip):
    """Scales every row by ``min(1, max_norm / ‖row‖₂)``; its direction stays.

    A row with a NaN or an infinity is left as it is: an overflow stays to be seen.

    Args:
        site: ``preact`` clips the gradient of the pre-activations, ``state`` that of the states,
            ``carry`` only what goes on to the step before.
        max_norm: ``C``, of one sequence's row at one step.

    Reference:
        Row by row as ``ClipGradientComponent`` of Kaldi's nnet3 with ``norm-based-clipping=true``
        (Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011), which stands on the
        recurrent connections, with 30, where the loss is a sum; in its LSTM ``∂L/∂c_t`` is
        clipped in total.
    """

    site: Literal["preact", "state", "carry"]
    max_norm: Annotated[float, POSITIVE]

    def rows(self) -> RowClip:
        return RowClip(self.site, "norm", self.max_norm)


def install(module: nn.Module, clip: BPTTClip) -> None:
    """Has every recurrent layer and cell inside ``module`` clip from now on, or no longer.

    It sets their attribute ``bptt_clip``, which can be set by hand as well. A module that may be a
    cell of the user's own gets it too; ``unroll`` reads it.

    Args:
        module: Holds layers of ``rnngrad.nn``, or cells run by ``rnngrad.nn.unroll``.
        clip: The rule; ``none`` takes back another one.

    Raises:
        TypeError: There is a layer or cell of torch.nn's own, into whose backward nobody can
            reach. Nothing is installed then.
        ValueError: There is nothing recurrent in the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"install: module must be a torch.nn.Module, got {type(module).__name__}")
    rows = clip.rows()
    found = []
    for path, part in module.named_modules():
        if rows is not None:
            _refuse_torchs_own(path or "the model", part, rows)
        if may_record(part):
            found.append(part)
    if rows is not None and not found:
        raise ValueError("install: no recurrent layer or cell in the model to clip in")
    for part in found:
        part.bptt_clip = None if rows is None else clip


def clip_of(module: Any) -> RowClip | None:
    """What a layer or cell is to do to its rows, by its attribute ``bptt_clip``."""
    clip = getattr(module, "bptt_clip", None)
    if clip is None:
        return None
    if not isinstance(clip, BPTTClip):
        raise TypeError(
            f"{type(module).__name__}: bptt_clip must be None or a rule of BPTT_CLIPS, got {clip!r}"
        )
    return clip.rows()


def preactivation(a: Tensor, gates: int) -> Tensor:
    """Says that ``a`` is a cell's pre-activation, whose gradient can be clipped at ``preact``.

    A cell calls it on what goes into its nonlinearities, as often as it likes, and goes on with
    what it returns: ``a`` itself, unless ``unroll`` is running a cell that is to be clipped there.

    Args:
        a: ``[B, gates · H]``, or without the batch.
        gates: How many rows it holds for each sequence.
    """
    run = _RUN.get()
    return a if run is None else run.preactivation(a, gates)


class RunClip:
    """Clips what goes back through one run of ``unroll``, by hooks on its tensors.

    Args:
        clip: What to do.
        call: Is told what was clipped, if the run is recorded.
    """

    def __init__(self, clip: RowClip, call: UnrolledCall | None) -> None:
        self._clip, self._call = clip, call
        self._step = 0
        self._seen_preactivation = False

    @property
    def total(self) -> bool:
        """Whether it is the states' total gradients that are clipped."""
        return self._clip.site == "state"

    def enter(self, step: int, state: Any) -> Any:
        """The state as step ``step`` is to see it: what comes back to it is that step's alone."""
        self._step = step
        if self._clip.site != "carry" or state is None:
            return state
        parts = (state,) if isinstance(state, Tensor) else state
        aliases = tuple(part.view_as(part) for part in parts)
        for alias in aliases:
            self._hook(alias)
        return aliases[0] if isinstance(state, Tensor) else aliases

    def leave(self, state: Any) -> None:
        """Takes the state that the step has returned."""
        if self._clip.site == "state":
            for part in (state,) if isinstance(state, Tensor) else state:
                self._hook(part)

    def preactivation(self, a: Tensor, gates: int) -> Tensor:
        """The pre-activation with its gradient clipped."""
        if self._clip.site != "preact":
            return a
        self._seen_preactivation = True
        alias = a.view_as(a)  # what else the cell does with `a` is not the gate's
        self._hook(alias, gates)
        return alias

    def close(self, cell: Any) -> None:
        """Refuses a cell that has not said what its pre-activations are."""
        if self._clip.site == "preact" and not self._seen_preactivation:
            raise RuntimeError(
                f"unroll: bptt_clip at site preact, but {type(cell).__name__} never calls "
                "rnngrad.bptt_clip.preactivation on its pre-activations; choose another site, or "
                "for a cell of torch.nn's that of rnngrad.cells"
            )

    def _hook(self, tensor: Tensor, gates: int = 1) -> None:
        clip, call, step = self._clip, self._call, self._step
        if call is not None:
            call.expect_clipping(step, gates * clip.count(tensor.shape[-1] // gates))
        if not tensor.requires_grad:
            return

        def clipped(grad: Tensor) -> Tensor:
            rows, counts = clip(grad.unflatten(-1, (gates, -1)))
            if call is not None:
                call.keep_clipped(step, counts.sum(-1))
            return rows.flatten(-2)

        tensor.register_hook(clipped)


@contextmanager
def running(run: RunClip | None) -> Iterator[None]:
    """Inside, it is this run that ``preactivation`` speaks to, and not one around it."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


_RUN: ContextVar[RunClip | None] = ContextVar("rnngrad_bptt_clip", default=None)


def _refuse_torchs_own(path: str, module: nn.Module, clip: RowClip) -> None:
    if isinstance(module, nn.RNNBase) and not isinstance(module, Recordable):
        raise TypeError(
            f"install: {path} is a {type(module).__name__} of torch.nn's, whose backward cannot be "
            "clipped inside; call rnngrad.nn.convert(model) first"
        )
    own = type(module).__module__.startswith("torch.")
    if isinstance(module, nn.RNNCellBase) and own and clip.site == "preact":
        raise TypeError(
            f"install: {path} is a {type(module).__name__} of torch.nn's, which does not show its "
            "pre-activations; use that of rnngrad.cells, or another site"
        )
