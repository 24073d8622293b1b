"""What the report says of one run: which figures, in which order, and what is not there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from rnngrad.diagnosis import diagnose_run
from rnngrad.report import inside, progress, through_time
from rnngrad.report.exhibit import Exhibit, Table, code, number, percent
from rnngrad.report.reading import Reading

STANDARD = "`measure=standard` measures it, unless back-propagation is truncated"
FULL = "`measure=full` measures it"

FIGURES: tuple[tuple[Callable[[Reading], Exhibit | None], str, str], ...] = (
    (progress.loss, "loss", ""),
    (through_time.gradients, "gradient through time", "no step was recorded"),
    (through_time.heatmap, "the field over the training", "no step was recorded"),
    (through_time.lag, "the lag-resolved curve", STANDARD),
    (progress.norms, "the gradient's norm", "no update was done"),
    (progress.thresholds, "thresholds to try", "too few updates, 20 are needed"),
    (progress.audit, "the clip audit", "`trainer.clip_audit=[value,agc,zclip]` makes one"),
    (progress.clip_effect, "what each clip rule does to each time step", FULL),
    (through_time.within, "", ""),
    (through_time.layers, "layers and time steps", "there is one layer"),
    (through_time.contribution, "weight contribution and attribution", STANDARD),
    (through_time.inputs, "which input mattered", STANDARD),
    (through_time.gate_norms, "gradient by gate", FULL),
    (inside.gates, "saturation of gates and units", STANDARD),
    (inside.updates, "updates beside weights", STANDARD),
    (inside.spectrum, "spectral radius and singular values", STANDARD),
    (inside.lyapunov, "Lyapunov exponents and one-step Jacobian", FULL),
    (
        progress.noise,
        "gradient noise scale",
        f"{FULL}; nor can one that came out negative be drawn",
    ),
)
"""What draws, what it is called where it is left out, and why that may be."""


def exhibits(run: Reading) -> Iterator[Exhibit]:
    """The sections of one run's report; those whose data are not there become one remark."""
    yield ending(run)
    yield verdict(run)
    left_out = []
    for draw, name, why in FIGURES:
        found = draw(run)
        if found is not None:
            yield found
        elif name:
            left_out.append(f"{name} ({why})")
    if left_out:
        yield Exhibit("left_out", "Not shown", "For want of data: " + "; ".join(left_out) + ".")


def ending(run: Reading) -> Exhibit:
    """How the run ended, in numbers."""
    summary = run.summary
    solved = summary.get("solved_at")
    rows = [
        ("status", str(summary["status"])),
        ("updates", str(summary["steps"])),
        ("last training loss", number(summary.get("loss"), 4)),
        ("last evaluation loss", number(summary.get("eval_loss"), 4)),
        ("last evaluation accuracy", percent(summary.get("eval_accuracy"))),
        ("loss of a guess without memory (chance)", number(summary.get("chance_loss"), 4)),
        ("solved at update", "never" if solved is None else str(solved)),
        ("updates clipped", percent(summary.get("clip_fraction"))),
        ("updates skipped", percent(summary.get("skip_fraction"))),
    ]
    if summary.get("bptt_clip_fraction") is not None:
        rows.append(("clipped inside back-propagation", percent(summary["bptt_clip_fraction"])))
    for length, scores in (summary.get("eval_at") or {}).items():
        rows.append((f"evaluation loss at length {length}", number(scores.get("loss"), 4)))
    if summary.get("reason"):
        rows.append(("what went wrong", str(summary["reason"])))
    return Exhibit("summary", "How it ended", "", tables=[Table(("", ""), rows)])


LEVELS = {"alarm": "✗ alarm", "warning": "! warning", "unknown": "? unknown", "ok": "✓ ok"}


def verdict(run: Reading) -> Exhibit:
    """The verdict of the diagnosis, and each finding with what it rests on."""
    diagnosis = run.summary.get("diagnosis")
    so_far = ""
    if diagnosis is None:
        if not len(run.metrics["step"]):
            return Exhibit("verdict", "Verdict", "None: nothing has been logged yet.")
        diagnosis = diagnose_run(run).as_dict()
        so_far = f" up to step {run.metrics['step'][-1]}"
    order = list(LEVELS)
    findings = sorted(
        diagnosis.get("findings") or (),
        key=lambda found: order.index(found.get("level")) if found.get("level") in order else 9,
    )
    rows = [
        (
            LEVELS.get(found.get("level"), str(found.get("level"))),
            str(found.get("symptom", "")),
            _shown(found.get("value")),
            _shown(found.get("threshold")),
            _shown(found.get("evidence")),
            _steps(found.get("steps")),
            ", ".join(_remedies(found)),
        )
        for found in findings
    ]
    head = ("level", "symptom", "value", "threshold", "evidence", "training steps", "what to try")
    tables = [Table(head, rows)] if rows else []
    text = ""
    if because := diagnosis.get("because"):
        text = f"Decided by: {', '.join(because)}."
    return Exhibit("verdict", f"Verdict{so_far}: {diagnosis['verdict']}", text, tables=tables)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return number(float(value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return ", ".join(map(_shown, value))


def _steps(value: Any) -> str:
    """Training steps; of many the first and the last."""
    steps = value if isinstance(value, list) else [] if value is None else [value]
    words = [str(step) for step in steps]
    return ", ".join(words) if len(words) <= 4 else f"{words[0]}, {words[1]}, ... {words[-1]}"


def _remedies(found: Mapping[str, Any]) -> Iterator[str]:
    """What to try, and which words of the run's command it takes the place of."""
    remedies = found.get("remedies") or ()
    for remedy, instead in zip_longest(remedies, found.get("in_place_of") or ()):
        yield _override(remedy) + (f" in place of {_override(instead)}" if instead else "")


def _override(remedy: Any) -> str:
    """As code, if it can be typed."""
    text = str(remedy)
    return code(text) if re.fullmatch(r"(\+?[\w.]+=\S+)( \+?[\w.]+=\S+)*", text) else text
