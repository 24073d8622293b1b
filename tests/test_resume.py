"""A run that was interrupted and went on is, bit for bit, the run that was not."""

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS
from tests.sameness import CONF, Uninterrupted, defaults, small, without_tensorboard

# --- R1: at every step, whatever the run is made of

CELL_NAMES = sorted(CELLS.load())
OPTIM_NAMES = sorted(path.stem for path in CONF.glob("optim/*.yaml"))
CLIP_NAMES = sorted(CLIPS.load())
STATEFUL = [name for name in CLIP_NAMES if CLIPS.default(name).initial_state()]
TRIPLES = list(product(CELL_NAMES, OPTIM_NAMES, STATEFUL))


def pairwise(triples: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """As few as will do for every two parts to meet."""

    def pairs(triple: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {*combinations(triple, 2)}

    missing = set().union(*map(pairs, triples))
    chosen = []
    while missing:
        chosen.append(max(triples, key=lambda triple: len(pairs(triple) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


MET = pairwise(TRIPLES) + [
    (CELL_NAMES[i % len(CELL_NAMES)], OPTIM_NAMES[i % len(OPTIM_NAMES)], clip)
    for i, clip in enumerate(sorted({*CLIP_NAMES} - {*STATEFUL}))
]


@pytest.fixture
def no_board() -> Iterator[None]:
    with without_tensorboard():
        yield


def killed_at_every_step(changes: dict[str, Any], folder: Path) -> dict[int, list[str]]:
    """By the step that a run went on after: in what it then differed from one never killed."""
    whole = Uninterrupted(changes, folder / "whole")
    assert whole.end >= 12
    found = {k: whole.resumed(k, folder / str(k)) for k in range(whole.end)}
    return {step: different for step, different in found.items() if different}


@pytest.mark.parametrize("triple", MET, ids="-".join)
def test_killed_at_any_step_every_cell_optimiser_and_clip_rule_goes_on_bit_for_bit(
    triple: tuple[str, ...], tmp_path: Path, no_board: None
) -> None:
    parts = dict(zip(("cell", "optim", "clip"), triple, strict=True))
    assert killed_at_every_step(small(parts), tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("triple", sorted({*TRIPLES} - {*MET}), ids="-".join)
def test_so_does_every_combination_of_the_three(
    triple: tuple[str, ...], tmp_path: Path, no_board: None
) -> None:
    parts = dict(zip(("cell", "optim", "clip"), triple, strict=True))
    assert killed_at_every_step(small(parts), tmp_path) == {}
