"""Reference value of a metric, a dense model's value or curve; predicted bytes; checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.budget.levers import Lever
from lightning_compress.budget.search import Trial, estimated_spread, recent
from lightning_compress.deployment import deployed_part
from lightning_compress.errors import check_choice
from lightning_compress.quantization.entropy import grid_bits
from lightning_compress.state import Grid, compression_state
from lightning_compress.targets import clean_path

__all__ = [
    "DENSE",
    "Reference",
    "check_goal",
    "check_window_of_run",
    "part_bytes",
    "predicted_bytes",
    "tensor_bytes",
    "trial_table",
]
DENSE = "dense"
_FILE, _HEADER = 160, 17  # bytes of a file, and of each tensor in it, besides the values, about


def check_goal(max_degradation: float | None, max_bytes: float | None) -> None:
    """Check that there is one goal.

    Raises:
        ValueError: naming the value.
    """
    if (max_degradation is None) == (max_bytes is None):
        raise ValueError("give one of max_degradation and max_bytes")
    if max_degradation is not None and not 0 <= max_degradation < math.inf:
        raise ValueError(f"max_degradation={max_degradation!r} must be a fraction, 0 or more")
    if max_bytes is not None and not 0 < max_bytes < math.inf:
        raise ValueError(f"max_bytes={max_bytes!r} must be above 0")


def check_window_of_run(begin: float, end: float) -> None:
    """Check two fractions of a run.

    Raises:
        ValueError: naming them.
    """
    if not 0 <= begin < end <= 1:
        raise ValueError(f"begin={begin!r}, end={end!r}: fractions of the run, 0 <= begin < end")


class Reference:
    """A dense model's metric, as a cost of which less is better.

    Args:
        given: a number, "dense" for a curve that `take` brings, or None to measure it.
        mode: "min" or "max": which way the metric is better.
        spread: standard deviation of one reading; None: estimated.
        irreducible: value of the metric that no model can better; fractions refer to the dense
            model's distance from it.

    Raises:
        ValueError: for another word, another mode, or a negative spread.

    >>> reference = Reference(2.0, "max")
    >>> reference.fix([], patience=4)
    >>> reference.worse(reference.cost(1.5), after=0)
    0.25
    >>> bound = Reference(250.0, "min", irreducible=200.0)  # nats
    >>> bound.fix([], patience=4)
    >>> bound.worse(251.0, after=0)
    0.02
    """

    def __init__(
        self,
        given: float | str | None,
        mode: str,
        spread: float | None = None,
        *,
        irreducible: float = 0.0,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        if isinstance(given, str) and given != DENSE:
            raise ValueError(f"reference={given!r}: give a number, {DENSE!r} or None")
        if spread is not None and not 0 <= spread < math.inf:
            raise ValueError(f"spread={spread!r} must be 0 or more")
        if not math.isfinite(irreducible):
            raise ValueError(f"irreducible={irreducible!r} must be a finite value of the metric")
        self.given, self.mode, self._spread = given, mode, spread
        self.irreducible = irreducible
        self.curve: list[tuple[float, float]] = []
        self.dense = self.spread = 0.0

    @property
    def awaits_curve(self) -> bool:
        """Whether a curve was announced that has not come."""
        return self.given == DENSE and not self.curve

    def cost(self, value: float) -> float:
        """The metric's value as a cost, or a cost as its value; what is not finite is infinite."""
        if not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value

    def take(self, pairs: Iterable[tuple[float, float]]) -> None:
        """Take a dense run's curve, `(batches seen, value)`."""
        self.curve = [(float(at), self.cost(value)) for at, value in sorted(pairs)]

    def fix(self, readings: Sequence[float], *, patience: int) -> None:
        """Fix the reference value when a search begins.

        Args:
            readings: costs until then.
            patience: of them that count, and of these the later half.
        """
        before = [cost for _, cost in self.curve] or list(readings)
        if self.curve or self.given is None or isinstance(self.given, str):
            self.dense = recent(before[-patience:])
        else:
            self.dense = self.cost(float(self.given))
        self.spread = estimated_spread(before) if self._spread is None else self._spread

    @property
    def scale(self) -> float:
        """Value that fractions refer to."""
        return abs(self.dense - self.cost(self.irreducible)) or 1.0

    def worse(self, cost: float, after: float) -> float:
        """Loss of a cost against the dense model's after as many batches, as a fraction."""
        dense = self.dense
        if self.curve:
            batches, costs = zip(*self.curve, strict=True)
            dense = float(np.interp(after, batches, costs))
        return (cost - dense) / self.scale


@torch.no_grad()
def tensor_bytes(values: Tensor, grid: Grid | None = None, *, bits: int | None = None) -> float:
    """Bytes of a tensor: its symbols at their zero-order entropy, or its floats and where they are.

    Args:
        values: as deployed.
        grid: their quantization grid.
        bits: of each value that is not 0, where it is not on a grid yet; None: those of its dtype.

    >>> tensor_bytes(torch.ones(8))
    32.0
    >>> tensor_bytes(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    8.5
    """
    if grid is not None:
        return grid_bits(grid, values) / 8
    count, total = int(torch.count_nonzero(values)), values.numel()
    width = 8 * values.element_size() if bits is None else bits
    return (total * _binary_entropy(count / max(total, 1)) + count * width) / 8


def _binary_entropy(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def part_bytes(
    module: nn.Module, parts: Sequence[str] = ("",), bits: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Predicted bytes of each stored tensor, by its path in the module.

    Args:
        module: the model.
        parts: paths of the deployed children.
        bits: of weights that go onto a grid when training has ended, by clean path.
    """
    grids = compression_state(module).grids
    by_place = {id(one): path for path, one in module.named_parameters()}
    found: dict[str, float] = {}
    for part in parts:
        for name, tensor in module.get_submodule(part).state_dict(keep_vars=True).items():
            path = f"{part}.{name}" if part else name
            grid = grids.get(by_place.get(id(tensor), ""))
            width = (bits or {}).get(clean_path(path))
            found[path] = _HEADER + tensor_bytes(tensor.detach(), grid, bits=width)
    return found


def predicted_bytes(module: nn.Module, bits: Mapping[str, int] | None = None) -> float:
    """Bytes that the deployed part of a model would need, arguments as `part_bytes`.

    At the zero-order entropy of each tensor's symbols: the default coder ends a little lower.

    >>> predicted_bytes(nn.Linear(10, 10, bias=False))
    577.0
    """
    return _FILE + sum(part_bytes(module, deployed_part(module), bits).values())


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
