"""The experiments, one a file."""

from rnngrad.reproduce.experiment import Experiment
from rnngrad.reproduce.experiments import (
    cliff,
    clip_before_backward,
    gradient_at_start,
    irnn_rmsprop,
    smoothness,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        irnn_rmsprop,
        gradient_at_start,
        cliff,
        smoothness,
        clip_before_backward,
    )
}
