"""TensorBoard's scalars, by tag: ``group/name``, and its unit at the end where it has one.

Each tag becomes a column of the table of runs as well, so there are few: a vector over time is
shown as picture and histogram, and of it two or three numbers here. No brackets: TensorBoard's
custom charts take what is in them for the name of a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rnngrad.dynamics import decay, horizon
from rnngrad.runs import Floats

TAGS = {
    "loss": "loss/train",
    "accuracy": "accuracy/train",
    "eval_loss": "loss/eval",
    "eval_accuracy": "accuracy/eval",
    "grad_norm_pre": "grad_norm/pre_clip",
    "grad_norm_post": "grad_norm/post_clip",
    "clip_coef": "clip/coef",
    "clipped": "clip/clipped",
    "clip_threshold": "clip/threshold",
    "skipped": "clip/skipped",
    "lr": "optim/lr",
    "penalty": "loss/penalty",
}

_LAYER = re.compile(r"(l\d+(?:_reverse)?)/.*")
_IN_LAYER = re.compile(r".*_(l\d+)(?:_reverse)?")
_IN_CELL = re.compile(r".*\bcells\.(\d+)\..*")


def tag(column: str) -> str:
    """TensorBoard's tag of a column of metrics.csv.

    >>> tag("grad_norm_pre"), tag("eval_loss_at_200"), tag("audit_agc_coef")
    ('grad_norm/pre_clip', 'loss/eval_at_200', 'clip_audit_coef/agc')
    """
    if column.startswith("audit_"):
        label, _, quantity = column.removeprefix("audit_").rpartition("_")
        return f"clip_audit_{quantity}/{label}"
    kind, _, length = column.partition("_at_")
    return f"{TAGS[kind]}_at_{length}" if length else TAGS[column]


def of_profile(layer: str, hidden: Floats) -> dict[str, float]:
    """``log10 ‖∂L/∂h_t‖`` of a layer at the first and the last time step.

    Args:
        layer: Its name.
        hidden: The profile ``[T]``, which ends where it is NaN.

    >>> of_profile("l0", np.array([-9.0, -4.0, -1.0, math.nan]))  # doctest: +NORMALIZE_WHITESPACE
    {'bptt_hidden_pre_clip/l0_first_log10': -9.0, 'bptt_hidden_pre_clip/l0_last_log10': -1.0}
    """
    there = hidden[~np.isnan(hidden)]
    if not len(there):
        return {}
    ends = {"first": there[0], "last": there[-1]}
    return {f"bptt_hidden_pre_clip/{layer}_{end}_log10": float(v) for end, v in ends.items()}


def of_measures(quantities: Mapping[str, Any]) -> dict[str, float]:
    """What was measured at a step, in a few numbers a layer; what is not known is left out.

    ``spectral_radius`` is the largest of the gates', ``gates_fraction`` the share of their values
    under .1 or over .9, and a layer's update the norm over all its parameters.

    Args:
        quantities: By name, as ``Tracker.measured`` takes them.
    """
    found: dict[str, float] = {}
    layers = {match[1] for name in quantities if (match := _LAYER.fullmatch(name))}
    for layer in sorted(layers):
        mine = {
            name.removeprefix(f"{layer}/"): value
            for name, value in quantities.items()
            if name.startswith(f"{layer}/")
        }
        found |= _of_layer(layer, mine)
    found |= _update_ratios(quantities)
    if "clip/cosine" in quantities:
        found["clip/cosine"] = _number(quantities["clip/cosine"])
    return {tag: value for tag, value in found.items() if not math.isnan(value)}


def _of_layer(layer: str, mine: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "lag" in mine:
        curve = np.asarray(mine["lag"])
        found[f"lag/{layer}_slope_decades_per_step"] = decay(curve).slope
        if not np.isnan(curve).all():
            found[f"lag/{layer}_horizon_steps"] = horizon(curve)
    for name, unit in (("saturated", "hidden"), ("dead", "dead")):
        if name in mine:
            found[f"saturation/{layer}_{unit}_fraction"] = _number(mine[name])
    low, high = _under(mine, "gate_low/"), _under(mine, "gate_high/")
    if low and len(low) == len(high):
        found[f"saturation/{layer}_gates_fraction"] = (sum(low) + sum(high)) / len(low)
    if radii := _under(mine, "spectral_radius"):
        found[f"recurrence/{layer}_spectral_radius"] = max(radii)
    if "lyapunov" in mine:
        first = float(np.atleast_1d(mine["lyapunov"])[0])
        found[f"recurrence/{layer}_lyapunov_nats_per_step"] = first
    return found


def _update_ratios(quantities: Mapping[str, Any]) -> dict[str, float]:
    """``log10`` of the norm of an update beside that of what it changed, by layer."""
    squares: dict[str, tuple[float, float]] = {}
    for name, value in quantities.items():
        if name.startswith("parameter/") and name.endswith("/update_norm"):
            parameter = name.removeprefix("parameter/").removesuffix("/update_norm")
            layer = parameter_layer(parameter)
            update, norm = squares.get(layer, (0.0, 0.0))
            before = _number(quantities[f"parameter/{parameter}/norm"])
            squares[layer] = math.hypot(update, _number(value)), math.hypot(norm, before)
    return {
        f"update_ratio/{layer}_log10": math.log10(update / norm) if update else -math.inf
        for layer, (update, norm) in squares.items()
        if norm > 0
    }


def parameter_layer(name: str) -> str:
    """The layer that a parameter belongs to, both directions together; else its module.

    >>> [parameter_layer(f"rnn.{p}") for p in ("weight_hh_l1", "bias_ih_l0_reverse")]
    ['l1', 'l0']
    >>> parameter_layer("rnn.cells.2.norm.weight"), parameter_layer("readout.bias")
    ('l2', 'readout')
    """
    if cell := _IN_CELL.fullmatch(name):
        return f"l{cell[1]}"
    layer = _IN_LAYER.fullmatch(name)
    return layer[1] if layer else name.rpartition(".")[0] or name


def _under(mine: Mapping[str, Any], prefix: str) -> list[float]:
    values = (_number(value) for name, value in mine.items() if name.startswith(prefix))
    return [value for value in values if not math.isnan(value)]


def _number(value: Any) -> float:
    return float(np.asarray(value).item())


class NoiseScale:
    """``B_simple = S / |G|²`` of a run so far: both are averaged before they are divided.

    Reference: McCandlish et al. 2018, An Empirical Model of Large-Batch Training.
    """

    def __init__(self) -> None:
        self._signal = self._variance = 0.0

    def add(self, quantities: Mapping[str, Any]) -> dict[str, float]:
        """Takes a step's ``noise/signal`` and ``noise/variance``; the scale, if it is one."""
        signal, variance = (
            _number(quantities.get(f"noise/{name}", math.nan)) for name in ("signal", "variance")
        )
        if not (math.isfinite(signal) and math.isfinite(variance)):
            return {}
        self._signal += signal
        self._variance += variance
        if self._signal <= 0:
            return {}
        return {"noise/scale_sequences": self._variance / self._signal}
