"""Clip rules: what may happen to the gradient between backward and the optimiser's step.

A new rule is one file here, which registers it, and one yaml in conf/clip.
"""

from rnngrad.clipping.audit import ClipAudit, ClipCount
from rnngrad.clipping.base import CLIPS, Clip, ClipReport, Gradient, Outcome
from rnngrad.clipping.clipper import Clipper
from rnngrad.clipping.norms import total_norm

__all__ = [
    "CLIPS",
    "Clip",
    "ClipAudit",
    "ClipCount",
    "ClipReport",
    "Clipper",
    "Gradient",
    "Outcome",
    "total_norm",
]
