"""What a budget tried, as a table on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_compress.adaptive.levers import Lever
from lightning_compress.adaptive.search import Trial

__all__ = ["trial_table"]


def trial_table(
    history: Sequence[Trial],
    levers: Sequence[Lever],
    monitor: str,
    console: Console | None = None,
) -> None:
    """Print a row a trial: where each lever was, bytes, the metric and the verdict.

    Args:
        history: the trials.
        levers: in the order of their levels.
        monitor: name of the metric.
        console: where to; None: standard output.
    """
    table = Table(title="Budget: what was tried")
    for heading in (
        *(lever.name for lever in levers),
        "bytes",
        f"{monitor}, worse by",
        "readings",
        "verdict",
    ):
        table.add_column(heading, overflow="fold")
    for trial in history:
        settings = [one.setting(level) for one, level in zip(levers, trial.levels, strict=True)]
        numbers = f"{trial.size:,.0f}", f"{trial.cost:+.2%}", str(trial.readings)
        table.add_row(*settings, *numbers, trial.verdict)
    (console or Console(soft_wrap=False)).print(table)
