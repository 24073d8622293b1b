"""Puts a report on disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import yaml

from rnngrad.report import one, several, tables
from rnngrad.report.exhibit import Exhibit, code, save
from rnngrad.report.groups import Digest, Group, grouped, read
from rnngrad.report.overview import names, overview
from rnngrad.report.page import markdown, page
from rnngrad.report.reading import Reading
from rnngrad.report.style import STYLE
from rnngrad.runs import Run
from rnngrad.stored import is_odd

FIGURE = "gradients"
PAGE = "index.html"
TITLE = "rnngrad report: "
IN_STEPS = 10_000
"""Runs whose logged and measured steps are copied into one table each; of more, gigabytes."""
LARGEST_PAGE = 2**26
"""Bytes of an earlier page that are looked at."""
OF_A_MEAN = "Norms of ∂L/∂h_t are of a loss that is a mean over the batch."


@dataclass(frozen=True)
class Written:
    """What became of a report.

    Args:
        figure: The overview.
        page: ``index.html``.
        runs: Those in it.
        unreadable: What is wrong with those that are not, by label.
    """

    figure: Path
    page: Path
    runs: list[Run]
    unreadable: dict[str, str]


def write(runs: Sequence[Run], out: Path) -> Written:
    """The page ``index.html``, self-contained, beside its figures, tables and ``report.md``.

    The same runs give the same bytes.

    Args:
        runs: One for all about it, several for a comparison.
        out: The folder; files of an earlier report in it are replaced or removed.

    Raises:
        ValueError: None of the runs can be read.
        OSError: The folder cannot be written.
    """
    digests, unreadable = read(runs)
    if not digests:
        raise ValueError("; ".join(f"{label}: {why}" for label, why in unreadable.items()))
    out.mkdir(parents=True, exist_ok=True)
    _refuse_odd_files(out)
    _remove_earlier(out)
    groups = grouped(digests)
    kept = [digest.run for digest in digests]
    files = ["runs.csv"]
    tables.write_runs(out / "runs.csv", groups)
    if len(digests) <= IN_STEPS:
        files.append("steps.csv")
        tables.write_steps(out / "steps.csv", digests)
        if tables.write_measures(out / "measures.csv", digests):
            files.append("measures.csv")
    with matplotlib.rc_context(STYLE):
        sections = [save(exhibit, out) for exhibit in _exhibits(groups, digests, unreadable)]
    title = f"{TITLE}{names(kept)[0] if len(kept) == 1 else f'{len(kept)} runs'}"
    lead = _lead(digests, groups)
    details = ""
    if len(kept) == 1 and digests[0].settings:
        details = yaml.safe_dump(kept[0].config, sort_keys=False)
    (out / PAGE).write_text(page(title, lead, sections, files, details), encoding="utf-8")
    (out / "report.md").write_text(markdown(title, lead, sections, files), encoding="utf-8")
    return Written(out / f"{FIGURE}.png", out / PAGE, kept, unreadable)


def _refuse_odd_files(out: Path) -> None:
    """A report is written into the run's directory, which may be somebody else's work."""
    for path in out.iterdir():
        if is_odd(path):
            raise OSError(errno.ELOOP, f"{path.name} in it is a link, a pipe or a device", str(out))


def _remove_earlier(out: Path) -> None:
    """Removes the files that an earlier report's page links to: the new one may not make them."""
    if not (out / PAGE).is_file():
        return
    with (out / PAGE).open("rb") as file:
        text = file.read(LARGEST_PAGE).decode(errors="replace")
    if f"<title>{TITLE}" in text:
        for name in re.findall(r'<a href="(\w+\.(?:csv|png|svg))">', text):
            (out / name).unlink(missing_ok=True)


def _exhibits(
    groups: Sequence[Group], digests: Sequence[Digest], unreadable: dict[str, str]
) -> Iterable[Exhibit]:
    text = "Loss, and the gradient of the loss with respect to each hidden state of the last layer."
    yield Exhibit(FIGURE, "At a glance", text, overview(digests, groups))
    if len(digests) == 1:
        yield from one.exhibits(Reading(digests[0].run.path))
    else:
        yield from several.exhibits(
            groups, unreadable, code(f"rnngrad-report {digests[0].run.path}")
        )


def _lead(digests: Sequence[Digest], groups: Sequence[Group]) -> str:
    versions = sorted({
        f"rnngrad {d.summary.get('rnngrad', '?')}, torch {d.summary.get('torch', '?')}"
        for d in digests
    })  # fmt: skip
    made = f"Made with {'; '.join(versions[:4])}."
    if len(digests) == 1:
        return f"{code(digests[0].label)}. {made} {OF_A_MEAN}"
    statuses: dict[str, int] = {}
    for digest in digests:
        status = digest.summary["status"]
        statuses[status] = statuses.get(status, 0) + 1
    ended = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    steps = (
        ""
        if len(digests) <= IN_STEPS
        else (
            f" Of more than {IN_STEPS:,} runs, steps.csv and measures.csv are not written: the same"
            " numbers are in each run's own files."
        )
    )
    return f"{len(digests)} runs of {len(groups)} set-ups: {ended}. {made} {OF_A_MEAN}{steps}"
