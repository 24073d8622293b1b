"""The experiments, one a file."""

from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import (
    arjovsky_adding,
    arjovsky_copy,
    chrono,
    cliff,
    clip_before_backward,
    clip_rules,
    gradient_at_start,
    gradient_ratio,
    hochreiter_order,
    irnn_rmsprop,
    smoothness,
    temporal_order,
)

MODULES = (
    irnn_rmsprop,
    gradient_at_start,
    cliff,
    arjovsky_adding,
    arjovsky_copy,
    gradient_ratio,
    temporal_order,
    hochreiter_order,
    chrono,
    smoothness,
    clip_rules,
    clip_before_backward,
)
"""In the order in which they are run."""

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES
}
"""By name."""
