"""Clipping by the norm of each layer's gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, scale_, tensor_norms
from rnngrad.parts import POSITIVE

_SUFFIX = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)_(l\d+(?:_reverse)?)")
_CELL = re.compile(r"((?:.*\.)?cells\.\d+)\.")


@CLIPS.register("per_layer_norm")
@dataclass(frozen=True)
class PerLayerNormClip(Clip):
    """Scales each layer's gradient ``g_l`` by ``min(1, C_l / ‖g_l‖₂)``.

    A layer is one direction of one recurrent layer, with its biases, or any other module that has
    parameters of its own, like the read-out. The direction stays within a layer.

    Args:
        max_norm: ``C``.
        split: ``uniform``: ``C_l = C / √L`` of ``L`` layers, so that the whole gradient's norm is
            at most ``C``; ``none``: ``C_l = C`` of every layer.

    Reference:
        McMahan, Ramage, Talwar & Zhang, "Learning differentially private recurrent language
        models", ICLR 2018, per-layer clipping.
    """

    max_norm: Annotated[float, POSITIVE]
    split: Literal["uniform", "none"]

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        layers = layers_of(tuple(gradient.names))
        max_norm = self.max_norm
        if self.split == "uniform":
            max_norm /= math.sqrt(len(layers))
        norms = _layer_norms(gradient, layers) if gradient.norm > max_norm else [0.0]
        if max(norms) <= max_norm:
            return Outcome(False, max_norm)
        for layer, norm in zip(layers, norms, strict=True):
            if norm > max_norm:
                for i in layer:
                    scale_(gradient.grads[i], max_norm, norm)
        norms = _layer_norms(gradient, layers)
        refuse_above(max_norm, max(norms), gradient.grads)
        return Outcome(True, max_norm, norm=math.hypot(*norms))


def _layer_norms(gradient: Gradient, layers: Sequence[Sequence[int]]) -> list[float]:
    norms = tensor_norms(gradient.grads)
    return [math.hypot(*(norms[i] for i in layer)) for layer in layers]


@lru_cache(maxsize=16)
def layers_of(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Which parameters belong to one layer, by index.

    >>> layers_of(("rnn.weight_ih_l0", "rnn.bias_hh_l0_reverse", "rnn.bias_ih_l0", "fc.bias"))
    ((0, 2), (1,), (3,))
    >>> layers_of(("cells.0.weight_hh", "cells.0.norm.weight", "cells.1.weight_hh"))
    ((0, 1), (2,))
    """
    layers: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        module, _, parameter = name.rpartition(".")
        if cell := _CELL.match(name):
            module = cell.group(1)
        elif suffix := _SUFFIX.fullmatch(parameter):
            module = f"{module}.{suffix.group(1)}"
        layers.setdefault(module, []).append(index)
    return tuple(map(tuple, layers.values()))
