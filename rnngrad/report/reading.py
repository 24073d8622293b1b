"""One run, whose files are read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rnngrad.report.style import Floats, spread
from rnngrad.runs import LayerHistory, Run, settings

LAYERS = 4
"""Layers and directions shown, the first and the last among them."""


def shown_of(layers: Sequence[str], at_most: int = LAYERS) -> list[str]:
    """As many of them as there is room for."""
    return [layers[i] for i in spread(len(layers), at_most)]


class Reading(Run):
    """A run as it is now, in memory, and the questions that its figures ask of it."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        return super().summary

    @cached_property
    def metrics(self) -> dict[str, npt.NDArray[Any]]:
        return super().metrics

    @cached_property
    def bptt(self) -> dict[str, LayerHistory]:
        return super().bptt

    @cached_property
    def measures(self) -> dict[str, npt.NDArray[Any]]:
        return super().measures

    @cached_property
    def updates(self) -> dict[str, npt.NDArray[Any]]:
        return super().updates

    @cached_property
    def settings(self) -> dict[str, Any]:
        return settings(self)

    @property
    def layers(self) -> list[str]:
        """All layers and directions, recorded or measured."""
        measured = [name.split("/")[0] for name in self.measures if _is_layer(name.split("/")[0])]
        return list(dict.fromkeys([*self.bptt, *measured]))

    def measured(self, name: str) -> tuple[npt.NDArray[np.int64], Floats]:
        """A measured quantity with the steps ``[M]`` at which it is not missing."""
        values = self.measures.get(name)
        if values is None:
            return np.empty(0, np.int64), np.empty((0, 0))
        there = ~np.isnan(values).reshape(len(values), -1).all(1)
        return self.measures["step"][there], values[there]

    def vectors(self, name: str) -> tuple[npt.NDArray[np.int64], Floats]:
        """Likewise, ``[M, n]`` also for a vector of one number."""
        step, values = self.measured(name)
        return step, values[:, None] if values.ndim == 1 else values

    def with_ending(self, ending: str) -> list[str]:
        """Names of measured quantities that end so and have any value."""
        return [n for n in self.measures if n.endswith(ending) and len(self.measured(n)[0])]

    def with_start(self, start: str) -> list[str]:
        """Names of measured quantities that start so and have any value."""
        return [n for n in self.measures if n.startswith(start) and len(self.measured(n)[0])]

    def tidy(
        self, kinds: Mapping[str, str], place: str = "t", layers: Sequence[str] | None = None
    ) -> dict[str, list[Any]]:
        """Measured vectors as columns of a table, a row a layer, measured step and place.

        Args:
            kinds: Column and what stands behind the layer in the quantity's name.
            place: What the vectors go along.
            layers: With any of these quantities; ``None``: all. ``""`` is the whole model.
        """
        data: dict[str, list[Any]] = {name: [] for name in ("step", "layer", place, *kinds)}
        for layer in self.layers if layers is None else layers:
            names = {column: f"{layer}/{kind}".lstrip("/") for column, kind in kinds.items()}
            found = {c: np.atleast_2d(self.measures[n].T).T for c, n in names.items()
                     if n in self.measures}  # fmt: skip
            if not found:
                continue
            steps, width = len(self.measures["step"]), max(v.shape[1] for v in found.values())
            columns = np.full((len(kinds), steps, width), np.nan)
            for row, column in zip(columns, kinds, strict=True):
                if column in found:
                    row[:, : found[column].shape[1]] = found[column]
            there = ~np.isnan(columns).all(0)
            at, along = np.nonzero(there)
            data["step"] += self.measures["step"][at].tolist()
            data["layer"] += [layer] * len(at)
            data[place] += along.tolist()
            for row, column in zip(columns, kinds, strict=True):
                data[column] += row[there].tolist()
        return data

    @property
    def norms_are(self) -> str:
        """Of what: with ``bptt_clip``, of the error as it was clipped on its way."""
        within = any(layer.clipped is not None for layer in self.bptt.values())
        return "as clipped at every t" if within else "before clipping"


def _is_layer(key: str) -> bool:
    return key.removesuffix("_reverse")[:1] == "l" and key.removesuffix("_reverse")[1:].isdigit()
