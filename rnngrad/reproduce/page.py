"""docs/results.md and the README's table, from rows that are kept in files.

``python -m rnngrad.reproduce.page``, in a clone, writes both from docs/results/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rnngrad.reproduce.experiment import Criterion, Experiment, Seen
from rnngrad.reproduce.experiments import EXPERIMENTS
from rnngrad.reproduce.store import Results, read
from rnngrad.written import replace

KNOWN = {
    "paper": "read in the paper",
    "code": "read in the authors' code",
    "log": "from a log of the authors' code",
    "derived": "follows from the paper's formulas",
    "nobody": "a question of ours",
}

TABLE_HEAD = "| experiment | paper | verdict | criteria that hold |"

HEAD = """# Published experiments, run again

`rnngrad-reproduce` runs these and writes this page. Each claim has criteria with numbers, which
were fixed before the seeds ran that are judged here: all of them hold (**reproduced**), some do
(**partly**) or none (**not reproduced**); where one was replaced, its section says so. **A
finding** answers a question of ours: its criteria are what was expected. The rows that verdicts
and figures are made of lie beside the figures in [results/](results), a file an experiment, with
the versions that made them.
"""


def kept(results: Path) -> dict[str, Results]:
    """What there is in a folder of rows, by experiment."""
    found = {name: read(results / f"{name}.json") for name in EXPERIMENTS}
    return {name: one for name, one in found.items() if one.rows}


def page(found: Mapping[str, Results], experiments: Sequence[Experiment]) -> str:
    """The whole page, of what there are rows of."""
    there = [e for e in experiments if e.name in found]
    sections = [line for e in there for line in _section(e, found[e.name])]
    return "\n".join([HEAD, *table(found, there, ""), "", *sections]).rstrip() + "\n"


def table(
    found: Mapping[str, Results], experiments: Sequence[Experiment], page: str
) -> Iterator[str]:
    """A line an experiment, with links into ``page``."""
    yield TABLE_HEAD
    yield "|---|---|---|---|"
    for experiment in experiments:
        if experiment.name not in found:
            continue
        seen = judged(experiment, found[experiment.name])
        named = f"[{experiment.title}]({page}#{anchor(experiment)})"
        verdict = experiment.verdict(one for _, one in seen)
        held = f"{sum(one.holds for _, one in seen)} of {len(seen)}"
        yield f"| {named} | {experiment.paper} | **{verdict}** | {held} |"


def judged(experiment: Experiment, results: Results) -> list[tuple[Criterion, Seen]]:
    """Each criterion, and what was seen of it."""
    return [(c, c.judge(results.rows)) for c in experiment.criteria]


def anchor(experiment: Experiment) -> str:
    """Of its section."""
    return experiment.name.replace("_", "-")


def _section(experiment: Experiment, results: Results) -> Iterator[str]:
    seen = judged(experiment, results)
    yield f'<a id="{anchor(experiment)}"></a>'
    yield f"## {experiment.title}: {experiment.verdict(one for _, one in seen)}"
    yield ""
    yield f"*{experiment.paper}.* {experiment.claim}"
    yield ""
    yield "```console"
    yield f"$ rnngrad-reproduce {experiment.name}"
    yield from (f"$ rnngrad -m {sweep}" for sweep in experiment.sweeps)
    yield "```"
    yield ""
    yield "| to be seen | published | measured | holds |"
    yield "|---|---|---|---|"
    for criterion, one in seen:
        published = f"{criterion.published.figure} [{_note(experiment, criterion)}]"
        yield f"| {criterion.statement} | {published} | {one.text} | {_yes(one.holds)} |"
    yield ""
    yield f"![{experiment.title}](results/{experiment.name}.png)"
    yield ""
    if experiment.found:
        yield f"**What was found.** {experiment.found}"
        yield ""
    yield f"Settings: {experiment.settings} Criteria: {experiment.calibrated}"
    yield ""
    yield f"Made {'; '.join(map(_made, results.made))}."
    yield ""
    for number, source in enumerate(_sources(experiment), 1):
        yield f"{number}. {source}"
    yield ""


def _sources(experiment: Experiment) -> list[str]:
    return list(
        dict.fromkeys(
            f"{c.published.source} ({KNOWN[c.published.known]})" for c in experiment.criteria
        )
    )


def _note(experiment: Experiment, criterion: Criterion) -> int:
    published = criterion.published
    return _sources(experiment).index(f"{published.source} ({KNOWN[published.known]})") + 1


def _made(one: Mapping[str, Any]) -> str:
    return (
        f"{one['day']} by rnngrad {one['rnngrad']}, torch {one['torch']}: {one['runs']:,} runs, "
        f"seeds {_seeds(one['seeds'])}, {one['minutes']:g} minutes"
    )


def _seeds(seeds: Sequence[int]) -> str:
    """A range as one.

    >>> _seeds([0, 1, 2]), _seeds([0, 2])
    ('0 to 2', '0, 2')
    """
    first, last = seeds[0], seeds[-1]
    if len(seeds) > 2 and len(seeds) == last - first + 1:
        return f"{first} to {last}"
    return ", ".join(map(str, seeds))


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def main() -> None:
    """Writes the page, and the README's table anew."""
    found, experiments = kept(Path("docs/results")), [*EXPERIMENTS.values()]
    replace(Path("docs/results.md"), page(found, experiments))
    readme = Path("README.md")
    before, _, rest = readme.read_text(encoding="utf-8").partition(f"{TABLE_HEAD}\n")
    after = rest[rest.index("\n\n") :]
    replace(readme, before + "\n".join(table(found, experiments, "docs/results.md")) + after)


if __name__ == "__main__":
    main()
