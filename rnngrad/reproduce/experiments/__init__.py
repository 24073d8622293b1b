"""The experiments, one a file."""

from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import clip_rules, irnn_rmsprop, temporal_order

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (irnn_rmsprop, temporal_order, clip_rules)
}
"""By name, in the order in which they are run."""
