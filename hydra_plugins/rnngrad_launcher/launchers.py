"""``hydra/launcher=stacked`` and ``slurm``: a sweep's runs as stacks, a process for each core.

Every Hydra application in the environment imports this file as it starts, so that it must not
import what takes time. It does so without giving the module a place in ``sys.modules``, which
dataclasses with annotations that are texts need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class Stacked:
    """Settings of ``hydra/launcher=stacked``; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.rnngrad_launcher.launchers.StackedLauncher"
    processes: Any = None
    max_stack: Any = 64
    memory_mib: Any = 512


@dataclass
class Slurm:
    """Settings of ``hydra/launcher=slurm``; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.rnngrad_launcher.launchers.SlurmLauncher"
    tasks: Any = 2
    cpus_per_task: Any = 1
    timeout_min: Any = 240
    partition: Any = None
    cluster: Any = "slurm"
    additional: Any = field(default_factory=dict)
    max_stack: Any = 64
    memory_mib: Any = 512


for _name, _node in (("stacked", Stacked), ("slurm", Slurm)):
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_node)


class StackedLauncher(Launcher):
    """Trains runs of the same shape as one program.

    Args:
        processes: That share the runs; ``null`` for one a core.
        max_stack: Runs that a process trains at a time, at most.
        memory_mib: MiB that the states and gates of these may take.
    """

    SETTINGS = frozenset(Stacked.__dataclass_fields__) - {"_target_"}

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    @staticmethod
    def check(**settings: Any) -> Any:
        """The settings, checked.

        Raises:
            InputError: A setting is not allowed.
        """
        from hydra_plugins.rnngrad_launcher import _launch

        return _launch.here(**settings)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from hydra_plugins.rnngrad_launcher import _launch

        loader = self.context.config_loader
        how = self.check(**self.settings)
        return _launch.launch(self.config, loader, job_overrides, initial_job_idx, how)


class SlurmLauncher(StackedLauncher):
    """Trains stacks in the tasks of an array job, which share one list of runs.

    Args:
        tasks: Of the array.
        cpus_per_task: Cores, and so processes, of each.
        timeout_min: Minutes, at the end of which a task saves its runs and leaves.
        partition: Of the cluster; ``null`` for its default.
        cluster: ``slurm``; ``local`` tries the same on this machine.
        additional: More options of ``sbatch``, by name.
        max_stack: Runs that a process trains at a time, at most.
        memory_mib: MiB that the states and gates of these may take.
    """

    SETTINGS = frozenset(Slurm.__dataclass_fields__) - {"_target_"}

    @staticmethod
    def check(**settings: Any) -> Any:
        from hydra_plugins.rnngrad_launcher import _launch

        return _launch.on_slurm(**settings)
