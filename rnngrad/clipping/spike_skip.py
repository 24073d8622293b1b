"""Skipping the steps whose gradient is a spike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.history import empty_window, mean_std, remember
from rnngrad.parts import POSITIVE, InputError, Interval


@CLIPS.register("spike_skip")
@dataclass(frozen=True)
class SpikeSkip(Clip):
    """Skips a step whose norm is an outlier among the last norms.

    That is, more than ``sigma_factor`` deviations above their mean. A norm that drops, as when a
    task is suddenly learnt, is a step like any other. The norms of skipped steps are remembered
    too, so that a lasting rise is accepted within a few steps.

    Args:
        history_length: Norms that mean and deviation are of, this step's not included.
        sigma_factor: Deviations above the mean.
        min_observations: Nothing is skipped before so many norms are known.
        std_floor: Least deviation, in units of the mean, for norms that hardly vary.

    Reference:
        OLMo-core (github.com/allenai/OLMo-core), ``SkipStepOptimizer``, which is two-sided, looks
        at the loss as well, and has no floor.
    """

    history_length: Annotated[int, Interval(low=2, high=10**6)]
    sigma_factor: Annotated[float, POSITIVE]
    min_observations: Annotated[int, Interval(low=2)]
    std_floor: Annotated[float, POSITIVE]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_observations > self.history_length:
            raise InputError(
                "min_observations",
                self.min_observations,
                f"must be at most history_length, {self.history_length}, or it is never reached",
            )

    def initial_state(self) -> dict[str, Any]:
        return empty_window()

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        history: list[float] = state["history"]
        outcome = Outcome(clipped=False)
        if len(history) >= self.min_observations:
            mean, std = mean_std(history, ddof=1)
            threshold = mean + self.sigma_factor * max(std, self.std_floor * mean)
            spike = gradient.norm > threshold
            outcome = Outcome(spike, threshold, skip=spike)
        remember(state, gradient.norm, self.history_length)
        return outcome
