"""``hydra/launcher=stacked``: a sweep's runs as stacks, in a process for each core.

Every Hydra application in the environment imports this file as it starts, so that it must not
import what takes time. It does so without giving the module a place in ``sys.modules``, which
dataclasses with annotations that are texts need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


ConfigStore.instance().store(group="hydra/launcher", name="stacked", node=Stacked)


class StackedLauncher(Launcher):
    """Trains runs of the same shape as one program.

    Args:
        processes: That share the runs; ``null`` for one a core.
        max_stack: Runs that a process trains at a time, at most.
        memory_mib: MiB that the states and gates of these may take.
    """

    def __init__(self, processes: Any, max_stack: Any, memory_mib: Any) -> None:
        self.processes, self.max_stack, self.memory_mib = processes, max_stack, memory_mib

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from hydra_plugins.rnngrad_launcher import _launch

        count = _launch.cores() if self.processes is None else self.processes
        _launch.check(processes=count, max_stack=self.max_stack, memory_mib=self.memory_mib)
        shares = _launch.shares(count, self.max_stack, self.memory_mib)
        loader = self.context.config_loader
        return _launch.launch(self.config, loader, job_overrides, initial_job_idx, shares)
