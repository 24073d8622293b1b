"""How one run went: its loss, the norm of its gradient, and what clipping did."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.diagnosis import clip_thresholds, pascanu_range
from rnngrad.report.exhibit import Exhibit, Table, number, percent
from rnngrad.report.groups import chance
from rnngrad.report.reading import Reading
from rnngrad.report.style import (
    COLOURS,
    STEP,
    TIME,
    Floats,
    binned,
    grid,
    legend_below,
    legend_beside,
    plain,
    profile,
    series,
)

LIGHT = COLOURS[4]
"""Of what lies behind a line that matters more; light in grey, too."""
FEWEST = 20
"""Updates from which thresholds can be suggested."""


def loss(run: Reading) -> Exhibit:
    """Loss against training step, with the chance line and the moments of clipping under it."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axis, strip = figure.subplots(2, 1, sharex=True, height_ratios=(7, 1.4))
    updates, metrics, summary = run.updates, run.metrics, run.summary
    step, values = (
        (updates["step"], updates["loss"])
        if len(updates["step"])
        else (metrics["step"], metrics["loss"])
    )
    x, middle, low, high = binned(step, np.where(values > 0, values, np.nan))
    label = "training batch" + (", median and range of neighbours" if len(x) < len(step) else "")
    axis.fill_between(x, low, high, color=LIGHT, alpha=0.35, linewidth=0)
    axis.plot(x, middle, color=LIGHT, linewidth=0.8, label=label)
    there = np.isfinite(metrics["eval_loss"])
    axis.plot(metrics["step"][there], metrics["eval_loss"][there], color=COLOURS[1],
              marker="s", markersize=3.5, linestyle="--", label="evaluation")  # fmt: skip
    if np.isfinite(level := chance(summary)):
        axis.axhline(level, color="black", linestyle=":", linewidth=1,
                     label=f"chance, {level:.4g}")  # fmt: skip
    if summary.get("solved_at") is not None:
        axis.axvline(summary["solved_at"], color=COLOURS[2], linestyle="-.", linewidth=1,
                     label=f"solved at {summary['solved_at']}")  # fmt: skip
    if summary["status"] in ("diverged", "failed"):
        axis.axvline(summary["steps"] + 1, color="black", linewidth=1, label=summary["status"])
    axis.set(ylabel="loss (mean over the batch)", yscale="log")
    axis.grid(alpha=0.3)
    _draw_clipped(strip, run)
    strip.set_xlabel(STEP)
    legend_below(figure, [axis], columns=5)
    text = (
        "The loss of each update's batch, and of the evaluation, which is the same for every seed."
        " Under it, which updates were clipped: of neighbouring updates, the fraction that the clip"
        f" rule changed ({percent(summary.get('clip_fraction'))} of all"
        + (f", {percent(summary['skip_fraction'])} skipped" if summary.get("skip_fraction") else "")
        + ")."
    )
    data: dict[str, Any] = {"step": step, "loss": values}
    return Exhibit("loss", "Loss, and when the gradient was clipped", text, figure, data=data)


def _draw_clipped(axis: Axes, run: Reading) -> None:
    """The percentage of updates that were clipped, in up to 200 parts of the training."""
    updates, metrics = run.updates, run.metrics
    step, clipped = (
        (updates["step"], updates["clip_coef"] != 1)
        if len(updates["step"])
        else (metrics["step"], metrics["clipped"] == 1)
    )
    if len(step):
        parts = np.array_split(np.arange(len(step)), min(200, len(step)))
        edges = [step[part[0]] for part in parts] + [step[-1] + 1]
        axis.stairs([100 * clipped[part].mean() for part in parts], edges, fill=True, color="0.25")
    axis.set(ylabel="clipped\n(%)", ylim=(0, 100), yticks=(0, 100))


def norms(run: Reading) -> Exhibit | None:
    """The norm of the gradient before and after clipping, with the rule's threshold."""
    steps, before, after = _norms(run)
    if not np.isfinite(before).any():
        return None
    with_angle = len(run.measured("clip/cosine")[0]) > 0
    figure = Figure(figsize=(9.6, 5.0 if with_angle else 3.6), layout="constrained")
    rows = figure.subplots(
        1 + with_angle, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + with_angle]
    )
    axis = rows[0, 0]
    for values, label, colour, dashes in (
        (before, "before clipping", LIGHT, "-"),
        (after, "after clipping", COLOURS[1], "--"),
    ):
        x, middle, low, high = binned(steps, values)
        axis.fill_between(x, 10.0**low, 10.0**high, color=colour, alpha=0.35, linewidth=0)
        axis.plot(x, 10.0**middle, dashes, color=colour, linewidth=0.9, label=label)
    threshold = run.metrics["clip_threshold"]
    there = np.isfinite(threshold)
    if there.any():
        axis.plot(run.metrics["step"][there], threshold[there], color="black", linestyle="-.",
                  drawstyle="steps-post", linewidth=1.2, label="threshold of the rule")  # fmt: skip
    axis.set(ylabel="L2 norm of the gradient", yscale="log")
    axis.grid(alpha=0.3)
    legend_below(figure, [axis])
    if with_angle:
        step, cosine = run.measured("clip/cosine")
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        rows[1, 0].plot(step, angle, color=COLOURS[2], marker="^", markersize=3.5)
        rows[1, 0].set_ylabel("angle, before\nto after (°)")
        rows[1, 0].set_ylim(0, max(1.0, 1.1 * float(angle.max())))  # under 1 it is rounding
        rows[1, 0].grid(alpha=0.3)
    rows[-1, 0].set_xlabel(STEP)
    often = "every update" if len(run.updates["step"]) else "every logged update"
    text = (
        f"L2 norm of the whole gradient at {often}, before the clip rule saw it and after. Where"
        " there are more than can be drawn: the median and the range of neighbours."
    )
    euclidean = run.settings.get("clip.norm_type", 2) == 2
    if there.any() and (run.settings.get("clip.name") not in (None, "norm") or not euclidean):
        text += " The threshold is this rule's own, which may be of something else than this norm."
    data = {"step": steps, "log10_norm_before": before, "log10_norm_after": after}
    return Exhibit("norms", "Gradient norm before and after clipping", text, figure, data=data)


def _norms(run: Reading) -> tuple[Any, Floats, Floats]:
    """``log10`` of the norm before and after, at every update if that was kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(run.updates["step"]):
            before = run.updates["log10_grad_norm"]
            return run.updates["step"], before, before + np.log10(run.updates["clip_coef"])
        metrics = run.metrics
        return (
            metrics["step"],
            np.log10(metrics["grad_norm_pre"]),
            np.log10(metrics["grad_norm_post"]),
        )


def thresholds(run: Reading) -> Exhibit | None:
    """Which fraction of the updates a threshold would clip, and thresholds worth a try."""
    _, before, _ = _norms(run)
    seen = 10.0 ** before[np.isfinite(before)]
    if len(seen) < FEWEST:
        return None
    suggested = clip_thresholds(before)
    figure, (axis,) = grid(1, width=7.2, height=3.2)
    ordered = np.sort(seen)
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 500)).astype(int))
    above = 100 * (1 - (kept + 1) / len(ordered))
    axis.plot(ordered[kept], above, color=COLOURS[0], drawstyle="steps-post")
    for place, (percentile, threshold, fraction) in enumerate(suggested):
        axis.plot(threshold, 100 * fraction, color=COLOURS[1 + place % 6], linestyle="none",
                  marker="sD^vPX"[place % 6], markersize=7,
                  label=f"{threshold:.3g} ({percentile:g}th percentile)")  # fmt: skip
    if (span := pascanu_range(before)) is not None:
        axis.axvspan(*span, color="0.92", zorder=0, label="0.5 to 10 times the mean")
    used = run.metrics["clip_threshold"]
    euclidean = run.settings.get("clip.norm_type", 2) == 2
    if run.settings.get("clip.name") == "norm" and euclidean and np.isfinite(used).any():
        value = float(used[np.isfinite(used)][-1])
        axis.axvline(value, color="black", linestyle="-.", linewidth=1.2,
                     label=f"this run's, {value:.3g}")  # fmt: skip
    axis.set(xlabel="threshold on the L2 norm of the gradient", xscale="log", ylim=(-3, 103),
             ylabel="updates it would clip (%)")  # fmt: skip
    axis.grid(alpha=0.3)
    legend_beside(axis)
    rows = [
        (
            f"`clip=norm clip.max_norm={threshold:.3g}{'' if euclidean else ' clip.norm_type=2'}`",
            f"{percentile:g}",
            percent(fraction),
        )
        for percentile, threshold, fraction in suggested
    ]
    text = (
        "Of the norms that this run has seen before clipping, the fraction above a threshold. Run"
        " with another threshold, it would have met other norms. Under about 1 % clips the outliers"
        " alone; over 90 % is training with normalised gradients, where the threshold is part of"
        " the learning rate. Half to ten times the mean norm, the grey band, is where training"
        " still converges according to Pascanu et al. (2013)."
    )
    table = Table(("to type", "percentile of the norms", "updates it would clip"), rows)
    data = {"threshold": ordered[kept], "clipped_percent": above}
    return Exhibit("thresholds", "Thresholds to try", text, figure, tables=[table], data=data)


def audit(run: Reading) -> Exhibit | None:
    """What other clip rules would have done with the gradients of this run."""
    found = run.summary.get("clip_audit") or {}
    if not found:
        return None
    figure, (often, hard) = grid(2, width=9.6, height=0.9 + 0.28 * len(found), across=2)
    names = list(found)
    for axis, key, label, scale in (
        (often, "clip_fraction", "updates it would have clipped (%)", 100.0),
        (hard, "mean_coef", "norm after / before, mean where it clips", 1.0),
    ):
        for place, name in enumerate(names):
            value = found[name].get(key)
            if value is not None:
                axis.barh(place, scale * value, color=COLOURS[0], height=0.6)
                axis.annotate(f" {scale * value:.3g}", (scale * value, place), va="center")
        axis.set_yticks(range(len(names)), [plain(name) for name in names])
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.set_ylabel("clip rule")
        axis.margins(x=0.15)
    often.set_xlim(0, 112)
    rows = [
        (name, percent(count.get("clip_fraction")), number(count.get("mean_coef")))
        for name, count in found.items()
    ]
    text = (
        "Rules that watched: each saw every gradient of this run, with a state of its own, and"
        " changed none. Trained with another rule, the run would have met other gradients."
    )
    table = Table(("rule", "updates it would have clipped", "mean norm after / before"), rows)
    return Exhibit("audit", "What other clip rules would have done", text, figure, tables=[table])


def clip_effect(run: Reading) -> Exhibit | None:
    """What each rule does to the contribution of each time step, for one batch."""
    names = run.with_start("clip_effect/")
    if not names:
        return None
    layers = [name for name in run.layers if not name.endswith("_reverse")]
    step, whole = run.vectors(f"{layers[-1]}/attribution") if layers else (None, np.empty((0, 0)))
    figure, axes = grid(len(names), width=9.6, height=2.1, across=4)
    data: dict[str, Any] = {}
    for number_, (axis, name) in enumerate(zip(axes, names, strict=True)):
        rule = name.removeprefix("clip_effect/")
        at, effect = run.vectors(name)
        last = effect[-1]
        if len(whole) and step is not None and at[-1] in step:
            exact = whole[list(step).index(at[-1])]
            axis.plot(_size(exact), color="0.65", linewidth=2.8, label="unclipped")
            data |= {"t": np.arange(len(exact)), "unclipped": exact}
        axis.plot(_size(last), color=COLOURS[0], linestyle="--", linewidth=1.2,
                  label="with the rule of the panel")  # fmt: skip
        axis.set(title=f"{plain(rule)}, sum {np.nansum(last):.3g}", xlabel=TIME, yscale="log")
        if number_ % 4 == 0:
            axis.set_ylabel("share of the gradient,\nabsolute (1)")
        data[rule] = last
    high = max(axis.get_ylim()[1] for axis in axes)
    low = max(min(axis.get_ylim()[0] for axis in axes), 1e-12 * high)
    for axis in axes:
        axis.set_ylim(low, high)
        axis.grid(alpha=0.3)
    legend_below(figure, axes)
    text = (
        "For one batch: ⟨G_t, g'⟩ / ‖g‖² of the last layer's W_hh, where G_t is what time step t"
        " adds to the gradient g, and g' what the rule makes of g. Unclipped these sum to 1; some"
        " are negative, and shown are their sizes. A rule that scales the whole gradient scales"
        " every time step alike: it cannot give an early one more weight than it has."
    )
    return Exhibit("clip_effect", "What each clip rule does to each time step", text, figure,
                   data=data)  # fmt: skip


def _size(share: Floats) -> Floats:
    """What a logarithmic axis can show of it: nothing of an exact 0."""
    return np.where(share != 0, np.abs(share), np.nan)


def noise(run: Reading) -> Exhibit | None:
    """The gradient noise scale against the training step."""
    step, signal = run.measured("noise/signal")
    _, variance = run.measured("noise/variance")
    if not len(step) or len(variance) != len(signal):
        return None
    weight = np.arange(1, len(step) + 1)
    mean_signal, mean_variance = np.cumsum(signal) / weight, np.cumsum(variance) / weight
    window = max(1, len(step) // 10)
    kernel = np.ones(window) / window
    smooth = [np.convolve(values, kernel, mode="valid") for values in (signal, variance)]
    at = step[window - 1 :]
    with np.errstate(divide="ignore", invalid="ignore"):
        local, whole = smooth[1] / smooth[0], mean_variance / mean_signal
    local, whole = (np.where(values > 0, values, np.nan) for values in (local, whole))
    if not np.isfinite(local).any() and not np.isfinite(whole).any():
        return None
    figure, (axis,) = grid(1, width=7.2, height=3.0)
    profile(axis, at, local, label=f"mean of {window} measurements",
            **series(0, len(at)))  # fmt: skip
    profile(axis, step, whole, label="mean of all so far",
            **series(1, len(step)))  # fmt: skip
    batch = run.settings.get("trainer.batch_size")
    if batch:
        axis.axhline(batch, color="black", linestyle=":", linewidth=1, label=f"batch, {batch}")
    axis.set(xlabel=STEP, ylabel="gradient noise scale $S/|G|^2$\n(sequences)", yscale="log")
    axis.grid(alpha=0.3)
    legend_beside(axis)
    text = (
        "The batch size at which noise and signal of the gradient are as large as each other"
        " (McCandlish et al., 2018); numerator and denominator are averaged on their own. In a"
        " batch far below it most of the gradient is noise, far above it more sequences hardly"
        " help. A line has a gap where the estimate came out negative: there it is all noise."
    )
    lead = np.full(window - 1, np.nan)  # the first window is not full yet
    data = {"step": step, "noise_scale_window": np.r_[lead, local], "noise_scale_all": whole}
    return Exhibit("noise", "Gradient noise scale", text, figure, data=data)
