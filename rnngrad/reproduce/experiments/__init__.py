"""The experiments, one a file."""

from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import (
    chrono,
    clip_rules,
    hochreiter_order,
    irnn_rmsprop,
    temporal_order,
)

MODULES = (
    irnn_rmsprop,
    temporal_order,
    hochreiter_order,
    chrono,
    clip_rules,
)
"""In the order in which they are run."""

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES
}
"""By name."""
