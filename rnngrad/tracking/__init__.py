"""What a run leaves on disk: metrics, recorded gradients, summary, and TensorBoard's view of them.

Every file is appended or replaced whole, so that a run killed at any moment can be read.
"""

from rnngrad.tracking.files import Result, Tracker
from rnngrad.tracking.heatmap import heatmap
from rnngrad.tracking.loop import log
from rnngrad.tracking.scalars import tag
from rnngrad.tracking.sweep import summarize

__all__ = ["Result", "Tracker", "heatmap", "log", "summarize", "tag"]
