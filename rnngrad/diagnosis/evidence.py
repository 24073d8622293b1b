"""What detectors look at, whether it comes from a run's directory or from one pass of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rnngrad.dynamics import TRANSIENT
from rnngrad.runs import LayerHistory, Run
from rnngrad.stored import yaml_tree

Floats = npt.NDArray[np.float64]
Outcome = Literal["solved", "learnt", "learning", "stuck", "diverged", "unknown"]

OVERRIDES = ".hydra/overrides.yaml"
LARGEST = 38.5
"""``log10`` of float32's end."""
NO_LAG = "no lag was measured"

AT_CHANCE = 0.1
"""A loss less than this part under chance counts as chance: an evaluation of 1,000 sequences is
itself off by some 4 % (adding), and short lags alone give a few percent."""
HAD_LEARNT = 0.25
"""A loss this part under chance was no accident of one evaluation."""
LEARNT = 0.5
"""A loss under half of chance has been learnt from what the task hides."""
STALLED = 0.01
"""A loss that falls by less than this part of itself over a tenth of the budget stands still."""
SHORTEST = 20
"""Updates under which nothing is said about where the loss is going."""


class Overflow(NamedTuple):
    """A state that grew until float32 could not hold it.

    Args:
        layer: Name of the layer.
        t: First time step whose state is not finite.
        slope: Decades a step up to there.
    """

    layer: str
    t: int
    slope: float


class Improvement(NamedTuple):
    """By what part of itself the loss fell over a tenth of the budget.

    Args:
        fall: Under 0 if it rose; NaN if there are too few updates.
        error: Its standard error.
    """

    fall: float
    error: float

    @property
    def sure(self) -> float:
        """``fall``, or 0 where noise alone could have made it: under two standard errors."""
        return 0.0 if abs(self.fall) < 2 * self.error else self.fall

    @property
    def most(self) -> float:
        """The largest fall that these numbers allow."""
        return self.fall + 2 * self.error


class Curve(NamedTuple):
    """One layer's lag-resolved curve at one training step.

    Args:
        step: Training step; 0 before training.
        layer: Name of the layer.
        values: ``log10`` of what of an error at ``h_τ`` arrives ``k`` steps back ``[K]``, the
            median; finite or ``-inf``.
        low: The 5th percentile over sequences and anchors; ``None`` if only the median is known.
        high: The 95th.
    """

    step: int
    layer: str
    values: Floats
    low: Floats | None = None
    high: Floats | None = None

    @property
    def lag(self) -> int:
        """The longest lag."""
        return len(self.values) - 1


@dataclass(frozen=True)
class Evidence:
    """A run's files, or one pass of a model in the same form; whatever is missing is empty.

    Args:
        config: As ``Run.config``.
        summary: As ``Run.summary``.
        metrics: As ``Run.metrics``.
        updates: As ``Run.updates``.
        measures: As ``Run.measures``.
        bptt: As ``Run.bptt``.
        overrides: What was typed.
        no_lag: Why no lag was measured, if none was.
        overflow: Of a model's states; of a run see ``grown``.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    updates: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    measures: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    bptt: Mapping[str, LayerHistory] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    no_lag: str = NO_LAG
    overflow: Overflow | None = None

    @classmethod
    def of_run(cls, run: Run) -> Evidence:
        """Whatever of a run's files can be read."""
        return cls(
            _read(lambda: run.config),
            _read(lambda: run.summary),
            _read(lambda: run.metrics),
            _read(lambda: run.updates),
            _read(lambda: run.measures),
            _read(lambda: run.bptt),
            _typed(run.path / OVERRIDES),
        )

    def setting(self, key: str, default: Any = None) -> Any:
        """``config["optim"]["lr"]`` by the name ``optim.lr``; ``default`` if there is none."""
        return setting(self.config, key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A setting that is computed with."""
        return number(self.config, key, default)

    @property
    def grown(self) -> Overflow | None:
        """A forward in which the state grew beyond float32 before there was any update.

        Of a run its reason tells: finite for a while, and then not, of units that know no bound.
        """
        reason = str(self.summary.get("reason"))
        said = re.search(r"hidden state of (?:the )?(.+?) \(.* not finite from t = (\d+) ", reason)
        bounded = self.setting("cell.nonlinearity", "tanh") in ("tanh", "sigmoid")
        if self.overflow or said is None or bounded or self.summary.get("steps") != 0:
            return self.overflow
        t = int(said[2])
        return Overflow(said[1], t, LARGEST / t) if t >= TRANSIENT else None

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The training steps at which something was measured ``[M]``."""
        return self.measures.get("step", np.empty(0, np.int64))

    def layers(self, quantity: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """A quantity of every layer that has it: ``(layer, values)``, from the bottom up."""
        for name in sorted(self.measures, key=_natural):
            layer, _, rest = name.partition("/")
            if rest == quantity and layer != "parameter":
                yield layer, self.measures[name]

    def parameters(self, quantity: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """``norm``, ``grad_norm`` or ``update_norm`` of every parameter: ``(name, [M])``."""
        for name, values in self.measures.items():
            if name.startswith("parameter/") and name.endswith(f"/{quantity}"):
                yield name.removeprefix("parameter/").removesuffix(f"/{quantity}"), values

    def by_layer(self, quantity: str) -> dict[tuple[str, int], Floats]:
        """The L2 norm over all weights of each recurrent layer ``[M]``, the lowest first.

        By the name of the module that the layers are of, and the layer's number.
        """
        squares: dict[tuple[str, int], Floats] = {}
        for name, values in self.parameters(quantity):
            layer = re.match(r"(.*?)(?:weight_\w+?_l|cells\.)(\d+)", name)
            if layer is not None and "weight" in name:
                key = (layer[1].replace("parametrizations.", ""), int(layer[2]))
                with np.errstate(over="ignore"):
                    squares[key] = squares.get(key, np.zeros(len(values))) + np.square(values)
        return {key: np.sqrt(squares[key]) for key in sorted(squares)}

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The lag-resolved curves, step by step and layer by layer; of an LSTM also those of c."""
        return tuple(_measured_curves(self)) or tuple(_recorded_curves(self))

    @cached_property
    def last_curves(self) -> tuple[Curve, ...]:
        """Those of the last step that has any."""
        last = max((curve.step for curve in self.curves), default=0)
        return tuple(curve for curve in self.curves if curve.step == last)

    @property
    def time_steps(self) -> int:
        """``T`` of the longest sequence seen; 0 if unknown."""
        seen = [curve.lag + 1 for curve in self.curves]
        return max(seen + [history.hidden.shape[1] for history in self.bptt.values()], default=0)

    @cached_property
    def log10_grad_norm(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """Steps ``[N]`` and ``log10`` of the gradient's norm before clipping, as often as known."""
        if len(self.updates.get("step", ())):
            return self.updates["step"], self.updates["log10_grad_norm"]
        if len(self.metrics.get("grad_norm_pre", ())):
            return self.metrics["step"], _log10(self.metrics["grad_norm_pre"])
        squares = [np.square(values) for _, values in self.parameters("grad_norm")]
        if not squares:
            return np.empty(0, np.int64), np.empty(0)
        return self.steps, _log10(np.sqrt(np.sum(squares, 0)))

    @cached_property
    def losses(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """Steps and training losses, as often as they are known."""
        source = self.updates if len(self.updates.get("step", ())) else self.metrics
        return source.get("step", np.empty(0, np.int64)), source.get("loss", np.empty(0))

    @property
    def chance(self) -> float:
        """The loss of a predictor without memory; NaN if unknown."""
        value = self.summary.get("chance_loss")
        return float(value) if isinstance(value, int | float) else math.nan

    @cached_property
    def final_loss(self) -> float:
        """The last evaluation's, else the mean of the last tenth of the training losses."""
        evaluated = self.metrics.get("eval_loss", np.empty(0))
        evaluated = evaluated[~np.isnan(evaluated)]
        if len(evaluated):
            return float(evaluated[-1])
        _, losses = self.losses
        return float(np.mean(losses[-max(1, len(losses) // 10) :])) if len(losses) else math.nan

    @property
    def progress(self) -> float:
        """How far the loss is under chance: 0 at chance, 1 at a loss of 0; NaN if unknown."""
        return 1 - self.final_loss / self.chance if self.chance > 0 else math.nan

    @property
    def forgot(self) -> bool:
        """Whether an evaluation was well under chance and the last one is at chance again."""
        evaluated = self.metrics.get("eval_loss", np.empty(0))
        evaluated = evaluated[np.isfinite(evaluated)]
        if not len(evaluated) or not self.chance > 0:
            return False
        return bool(1 - evaluated.min() / self.chance >= HAD_LEARNT and self.progress < AT_CHANCE)

    @property
    def too_early(self) -> bool:
        """Whether too few updates were made for a word on where the loss is."""
        steps, _ = self.losses
        return not len(steps) or int(steps[-1]) < SHORTEST

    def improvement(self, part: float) -> Improvement:
        """How fast the loss fell at the end of the budget.

        Args:
            part: How much of the budget, at its end, is looked at: the second half of it is
                compared with the first.
        """
        _, losses = self.losses
        window = losses[len(losses) - int(part * len(losses)) :]
        window = window[np.isfinite(window)]
        half = len(window) // 2
        if len(losses) < SHORTEST or half < 3:
            return Improvement(math.nan, math.nan)
        before, after = window[:half], window[half:]
        fall = before.mean() - after.mean()
        error = math.hypot(before.std() / math.sqrt(half), after.std() / math.sqrt(len(after)))
        unit = max(abs(before.mean()), 1e-300) * (part / 2) / 0.1
        return Improvement(float(fall / unit), float(error / unit))

    @property
    def first_nonfinite(self) -> int | None:
        """The first step whose loss or gradient is not finite."""
        steps, losses = self.losses
        bad = ~np.isfinite(losses)
        if len(self.updates.get("step", ())):
            norms = self.updates["log10_grad_norm"]
            bad |= np.isnan(norms) | np.isposinf(norms)
        return int(steps[bad][0]) if bad.any() else None

    @cached_property
    def everywhere(self) -> bool:
        """Whether the loss looks at every step and not at the last alone, as far as is known."""
        top = self.bptt[max(self.bptt, key=_natural)] if self.bptt else None
        if top is None or not len(top.direct):
            return False
        there = top.direct[-1][~np.isnan(top.direct[-1])]
        return bool(np.isfinite(there[:-1]).any())

    @cached_property
    def outcome(self) -> Outcome:
        """What has come of the training."""
        if self.summary.get("status") == "diverged" or self.first_nonfinite is not None:
            return "diverged"
        if not len(self.losses[1]) or math.isnan(self.progress):
            return "unknown"
        if self.summary.get("solved_at") is not None and self.progress >= AT_CHANCE:
            return "solved"
        if self.progress >= LEARNT:
            return "learnt"
        if self.too_early:
            return "unknown"
        moves = self.improvement(0.5).sure >= STALLED or self.everywhere
        return "learning" if self.progress >= AT_CHANCE and moves else "stuck"

    @property
    def learns(self) -> bool:
        """Whether something good has come of it so far."""
        return self.outcome in ("solved", "learnt", "learning")


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """``config["optim"]["lr"]`` by the name ``optim.lr``; ``default`` if there is none.

    Nor is a list or a mapping one: stored by a part of the user's own, or by nobody.
    """
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return default if isinstance(value, list | dict) else value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """A setting that is computed with; ``default`` if there is none, or something else."""
    value = setting(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    return value if isinstance(value, float) or abs(value) < 2**63 else default


def _read(part: Callable[[], Any]) -> Any:
    """A part of a run, or nothing if the run was cut short before it was whole."""
    try:
        found = part()
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _typed(path: Path) -> tuple[str, ...]:
    """The words of a run's command, as Hydra keeps them."""
    try:
        found = yaml_tree(path)
    except (OSError, ValueError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _measured_curves(evidence: Evidence) -> Iterator[Curve]:
    for quantity in ("lag", "lag_cell"):
        for layer, table in evidence.layers(quantity):
            name = layer if quantity == "lag" else f"{layer} (c)"
            kinds = (f"{layer}/{quantity}{end}" for end in ("_p5", "_p95"))
            spread = [evidence.measures[kind] for kind in kinds if kind in evidence.measures]
            for step, row, *ends in zip(evidence.steps, table, *spread, strict=True):
                row = np.atleast_1d(row)  # of one time step, a number
                length = int((~np.isnan(row)).sum())
                if length > 1 and not np.isnan(row[:length]).any():
                    both = [end[:length] for end in ends] if len(ends) == 2 else []
                    yield Curve(int(step), name, row[:length], *both)


def _recorded_curves(evidence: Evidence) -> Iterator[Curve]:
    """Of the top layer, if the loss looks at the last step alone: what was recorded is the curve.

    Not of a gradient that was clipped on its way, or cut off.
    """
    if not evidence.bptt or evidence.everywhere or evidence.setting("trainer.tbptt_k2"):
        return
    layer = max((name for name in evidence.bptt if "reverse" not in name), key=_natural, default="")
    if not layer or evidence.bptt[layer].clipped is not None:
        return
    history = evidence.bptt[layer]
    for kind, table in (("", history.hidden), (" (c)", history.cell)):
        for step, row in zip(history.step, () if table is None else table, strict=False):
            curve = row[~np.isnan(row)][::-1]
            if len(curve) > 1 and np.isfinite(curve[0]):
                curve = curve - curve[0]
                yield Curve(int(step), f"{layer}{kind}", curve)


def _natural(name: str) -> tuple[int, str]:
    """``l2`` before ``l10``."""
    number = re.search(r"\d+", name)
    return (int(number[0]) if number else -1, name)


def _log10(values: npt.NDArray[Any]) -> Floats:
    with np.errstate(divide="ignore"):
        found: Floats = np.log10(values)
    return found
