"""Hydra looks for sweepers in this namespace; it imports little, since every Hydra app does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["ParetoSweeper"]


class ParetoSweeper(Sweeper):
    """Hydra's side of `lightning_compress.lab.sweeps.study`: gives it the launcher.

    Args:
        options: of `lightning_compress.lab.sweeps.study.StudyOptions`.
    """

    def __init__(self, **options: Any) -> None:
        self.options: Mapping[str, Any] = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher that the command chose."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.folder = str(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are as many as asked for."""
        from lightning_compress.lab.sweeps.study import StudyOptions, run_study

        launcher = self.launcher
        assert launcher is not None, "Hydra calls setup first"

        def launch(jobs: Sequence[Sequence[str]], first: int) -> list[Any]:
            self.validate_batch_is_legal(jobs)
            runs = launcher.launch(jobs, initial_job_idx=first)
            return [run.return_value for run in runs]

        return run_study(StudyOptions.of(self.options), arguments, self.folder, launch)
