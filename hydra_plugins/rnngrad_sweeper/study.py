"""A study of Optuna's in a sweep's directory, which the same command goes on with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Study(Sweeper):
    """Hydra's Optuna sweeper, whose ``n_trials`` is that of the study and not of the command.

    Trials that were on their way when an earlier command ended come first, with the values they
    had: so they find their runs, and these go on.

    Args:
        keys: Those of ``hydra/sweeper=optuna``.
    """

    def __init__(self, **keys: Any) -> None:
        self._keys = keys

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # here: Hydra imports this file for every command
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

        self._directory = Path(str(config.hydra.sweep.dir))
        self._sweeper = OptunaSweeperImpl(**self._keys)
        self._sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Runs what is missing of the study.

        Raises:
            InUse: Another command is at it.
        """
        from optuna.logging import set_verbosity

        from rnngrad.launcher import lock_directory
        from rnngrad.progress import Progress

        set_verbosity(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._directory.mkdir(parents=True, exist_ok=True)
        with lock_directory(self._directory):
            self._sweeper.n_trials -= self._go_on()
            if Progress.current is not None:  # it has been told of all trials
                Progress.current.total = self._sweeper.n_trials
            self._sweeper.sweep(arguments)

    def _go_on(self) -> int:
        """Asks again for the trials that nobody is at any more; how many are finished."""
        from optuna import create_study
        from optuna.samplers import BaseSampler
        from optuna.trial import TrialState

        study = create_study(
            study_name=self._sweeper.study_name,
            storage=self._sweeper.storage,
            directions=self._sweeper._get_directions(),
            load_if_exists=True,
        )
        trials = study.get_trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)
        if trials and isinstance(self._sweeper.sampler, BaseSampler):
            self._sweeper.sampler.reseed_rng()  # else it would choose as at first once more
        return sum(trial.state == TrialState.COMPLETE for trial in trials)
