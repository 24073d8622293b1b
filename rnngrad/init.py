"""How weights start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn

from rnngrad.parts import Part, Registry


@dataclass(frozen=True)
class Init(Part, ABC):
    """An initialisation."""

    @abstractmethod
    def __call__(self, model: nn.Module) -> None:
        """Draws all weights of ``model`` anew, from torch's global generator."""


INITS: Registry[Init] = Registry("init", "rnngrad.init")


@INITS.register("torch")
@dataclass(frozen=True)
class TorchInit(Init):
    """Every module as torch.nn initialises it: ``U(-1/√H, 1/√H)`` in recurrent layers."""

    def __call__(self, model: nn.Module) -> None:
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
