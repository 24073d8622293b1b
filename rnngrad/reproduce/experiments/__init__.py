"""The experiments, one a file."""

from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import (
    arjovsky_adding,
    arjovsky_copy,
    gradient_ratio,
    irnn_rmsprop,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (irnn_rmsprop, arjovsky_adding, arjovsky_copy, gradient_ratio)
}
