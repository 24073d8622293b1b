"""The command ``rnngrad-reproduce``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rnngrad.reproduce import store
from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import EXPERIMENTS
from rnngrad.reproduce.page import kept, page
from rnngrad.reproduce.running import Failed, run
from rnngrad.stored import Unreadable, printable
from rnngrad.written import replace as write_whole


def main() -> None:
    """Runs published experiments again; prints what was measured beside what was published.

    Exits with 1 if a criterion of a published claim does not hold, or something failed. Runs that
    are finished are not trained again: the same command goes on where it was stopped.
    """
    arguments = _arguments()
    chosen = [_known(name) for name in arguments.names] or [*EXPERIMENTS.values()]
    seeds = _seeds(arguments.seeds)
    if arguments.list:
        try:
            print(_listed(chosen), flush=True)
        except BrokenPipeError:  # who reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    out, runs = Path(arguments.out), Path(arguments.out, "runs")
    if arguments.quick:
        out, runs = out / "quick", runs / "quick"
    failed = False
    for experiment in chosen:
        try:
            failed |= not _reproduced(experiment, seeds, out, runs, quick=arguments.quick)
        except (Failed, OSError, Unreadable) as error:
            _say(f"{experiment.name}: {error}")
            failed = True
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rnngrad-reproduce", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="an experiment; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a form of each of under a minute")
    parser.add_argument("--seeds", default="", help="as 0,1,2, to run in place of its own")
    parser.add_argument("--out", default="runs/reproduce", help="default: %(default)s")
    return parser.parse_args()


def _seeds(text: str) -> list[int]:
    seeds = text.split(",") if text else []
    if not all(seed.isascii() and seed.isdigit() for seed in seeds):
        _refuse(f"--seeds={text}: must be whole numbers >= 0, as 0,1,2")
    return [int(seed) for seed in seeds]


def _known(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        _refuse(f"{name!r}: must be one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def _listed(experiments: Sequence[Experiment]) -> str:
    lines = []
    for e in experiments:
        lines += [
            f"{e.name} ({e.minutes:g} min): {e.title}",
            f"    {e.paper}",
            f"    {e.claim}",
        ]
    return "\n".join(lines)


def _reproduced(
    experiment: Experiment, seeds: Sequence[int], out: Path, runs: Path, *, quick: bool
) -> bool:
    """Runs one, says what came out, and writes it down; whether all criteria hold."""
    about = "under a minute" if quick else f"about {experiment.minutes:g} min"
    print(f"\n{experiment.name}: {experiment.title} ({about})\n{experiment.paper}", flush=True)
    path = out / "results" / f"{experiment.name}.json"
    before = store.read(path)  # if it cannot be read, nothing is run
    results = before.joined(run(experiment, runs / experiment.name, seeds, quick=quick), experiment)
    store.write(path, results)
    criteria = experiment.quick.criteria if quick else experiment.criteria
    seen = [criterion.judge(results.rows) for criterion in criteria]
    for criterion, one in zip(criteria, seen, strict=True):
        print(f"  {'holds' if one.holds else 'FAILS'}  {criterion.statement}")
        print(f"         measured   {one.text}\n         published  {criterion.published.figure}")
    print(f"  {experiment.verdict(seen)}")
    if not quick:
        _draw(experiment, results, out)
        _write_page(out)
    return experiment.finding or all(one.holds for one in seen)


def _draw(experiment: Experiment, results: store.Results, out: Path) -> None:
    from rnngrad.report.published import published_figure

    figure = out / "results" / f"{experiment.name}.png"
    published_figure(experiment.draw(results.rows)).savefig(figure, dpi=120)
    print(f"  figure     {figure}")


def _write_page(out: Path) -> None:
    write_whole(out / "results.md", page(kept(out / "results"), [*EXPERIMENTS.values()]))
    print(f"  page       {out / 'results.md'}")


def _say(line: str) -> None:
    print(f"rnngrad-reproduce: {printable(line)}", file=sys.stderr)


def _refuse(line: str) -> NoReturn:
    _say(line)
    sys.exit(2)
