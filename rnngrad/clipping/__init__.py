"""Clip rules: what may happen to the gradient between backward and the optimiser's step.

A new rule is one file here, which registers it, and one yaml in conf/clip.
"""

from rnngrad.clipping.base import CLIPS, Clip, ClipReport, total_norm

__all__ = ["CLIPS", "Clip", "ClipReport", "total_norm"]
