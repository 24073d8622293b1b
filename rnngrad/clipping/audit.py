"""What other rules would have done with the same gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rnngrad.clipping.base import Clip, ClipReport
from rnngrad.clipping.clipper import apply, checked, measure, split


@dataclass
class ClipCount:
    """How often a rule would have changed the gradient, and how much.

    Args:
        steps: With a finite gradient.
        fired: Of these, how many the rule changed.
        coef_sum: Of the coefficients of those.
    """

    steps: int = 0
    fired: int = 0
    coef_sum: float = 0.0

    @property
    def fraction(self) -> float:
        """Of steps that the rule changed; NaN before the first."""
        return self.fired / self.steps if self.steps else math.nan

    @property
    def mean_coef(self) -> float:
        """Mean ``norm_post / norm_pre`` where the rule changed the gradient; NaN if nowhere."""
        return self.coef_sum / self.fired if self.fired else math.nan


class ClipAudit:
    """Rules tried out on copies of the gradient, each with a state of its own.

    Call it before the rule that counts. The gradients stay bitwise as they were, and so does
    everything else: a run with an audit is the run without it. All rules see the gradients of the
    run as it is; trained with another rule, it would have met others.

    Args:
        clips: Rules by label.
        named_parameters: As from ``model.named_parameters()``.

    Raises:
        InputError: A rule does not suit these parameters.
    """

    def __init__(
        self, clips: Mapping[str, Clip], named_parameters: Iterable[tuple[str, Tensor]]
    ) -> None:
        self._clips = dict(clips)
        self._names, self._parameters = split(named_parameters)
        for clip in self._clips.values():
            clip.check(self._names)
        self._states = {label: clip.initial_state() for label, clip in self._clips.items()}
        self.counts = {label: ClipCount() for label in self._clips}
        """By label, so far."""

    @torch.no_grad()
    def __call__(self) -> dict[str, ClipReport]:
        """What each rule does with a copy of the gradient, by label.

        Raises:
            RuntimeError: As a ``Clipper`` does.
        """
        real = measure(self._names, self._parameters)
        copies = [grad.clone() for grad in real.grads]
        gradient = real._replace(grads=copies)
        reports = {}
        for label, clip in self._clips.items():
            report = reports[label] = apply(clip, gradient, self._states[label])
            count = self.counts[label]
            count.steps += report.finite
            if report.clipped:
                count.fired += 1
                count.coef_sum += report.coef
                for mine, grad in zip(copies, real.grads, strict=True):
                    mine.copy_(grad)
        return reports

    def state_dict(self) -> dict[str, Any]:
        """States and counts by label, as JSON has it."""
        return {
            label: {"state": checked(clip, self._states[label]), **asdict(self.counts[label])}
            for label, clip in self._clips.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: It is the state of other rules.
        """
        if sorted(state) != sorted(self._clips):
            raise ValueError(
                f"clip audit: the saved state is of {sorted(state)}, the rules are "
                f"{sorted(self._clips)}"
            )
        for label, clip in self._clips.items():
            counts = dict(state[label])
            self._states[label] = checked(clip, counts.pop("state"))
            self.counts[label] = ClipCount(**counts)
