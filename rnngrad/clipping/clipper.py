"""A rule at work: finite first, then the rule, then a report that was measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnngrad.clipping.base import Clip, ClipReport, Gradient
from rnngrad.clipping.norms import total_norm


class Clipper:
    """A clip rule at work on a model; call it between ``backward()`` and ``step()``.

    >>> from rnngrad.clipping import CLIPS
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> clipper = Clipper(CLIPS.default("norm", max_norm=1.0), model.named_parameters())
    >>> (100 * model(torch.ones(1, 1))).sum().backward()
    >>> report = clipper()
    >>> report.norm_pre, report.norm_post, report.clipped
    (100.0, 1.0, True)

    Args:
        clip: The rule.
        named_parameters: As from ``model.named_parameters()``.

    Raises:
        InputError: The rule does not suit these parameters.
    """

    def __init__(self, clip: Clip, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.clip = clip
        self._names, self._parameters = split(named_parameters)
        clip.check(self._names)
        self._state = clip.initial_state()

    def __call__(self) -> ClipReport:
        """Clips the gradients in place. If the report says skipped, do not step.

        Raises:
            RuntimeError: No parameter has a gradient, as before ``backward()``; or the gradient
                does not keep to the threshold afterwards.
        """
        with torch.no_grad():
            return apply(self.clip, measure(self._names, self._parameters), self._state)

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as JSON has it: numbers, and lists of them."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: It is the state of another rule.
        """
        self._state = checked(self.clip, state)


def split(named: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, ...], list[Tensor]]:
    """Names and parameters apart."""
    pairs = list(named)
    return tuple(name for name, _ in pairs), [parameter for _, parameter in pairs]


def measure(names: Sequence[str], parameters: Sequence[Tensor]) -> Gradient:
    """The gradient as it is, and its norm, which says if it is finite.

    Raises:
        RuntimeError: No parameter has a gradient.
    """
    grads = [grad for p in parameters if (grad := p.grad) is not None]
    if not grads:
        raise RuntimeError(
            "clip: no parameter has a gradient; clip between loss.backward() and optimizer.step()"
        )
    if len(grads) < len(parameters):
        names = tuple(n for n, p in zip(names, parameters, strict=True) if p.grad is not None)
        parameters = [p for p in parameters if p.grad is not None]
    return Gradient(names, parameters, grads, total_norm(grads))


def apply(clip: Clip, gradient: Gradient, state: dict[str, Any]) -> ClipReport:
    """Applies a rule to a gradient that may be anything."""
    pre = gradient.norm
    if not math.isfinite(pre):
        return ClipReport(pre, pre, 1.0, clipped=False, finite=False)
    if pre == 0:
        return ClipReport(0.0, 0.0, 1.0, clipped=False, finite=True)
    clipped, threshold, skip, post = clip.clip_(gradient, state)
    if skip:
        for grad in gradient.grads:
            grad.zero_()
        return ClipReport(
            pre, 0.0, 0.0, clipped=True, finite=True, threshold=threshold, skipped=True
        )
    if post is None:
        post = total_norm(gradient.grads) if clipped else pre
    return ClipReport(pre, post, post / pre, clipped, finite=True, threshold=threshold)


def checked(clip: Clip, state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a rule's saved state.

    Raises:
        ValueError: It is not this rule's.
    """
    needed, given = sorted(clip.initial_state()), sorted(state)
    if given != needed:
        raise ValueError(f"clip: the saved state holds {given}, {type(clip).__name__} has {needed}")
    return copy.deepcopy(dict(state))
