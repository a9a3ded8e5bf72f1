"""From Hydra's sweep overrides to Optuna's distributions, and from a trial back to overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lightning_compress.errors import require

__all__ = ["search_space", "words_of"]


def search_space(
    params: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What is searched, key -> Optuna distribution, and the words that every trial shares.

    Args:
        params: the sweeper's own, key -> value in Hydra's grammar.
        arguments: the command line's; one with the same key takes the place of a parameter.

    Raises:
        ValueError: when nothing is left to search.

    >>> space, fixed = search_space({"bits": "range(4,9)"}, ["model=vae"])
    >>> space["bits"].low, space["bits"].high, fixed
    (4, 8, ['model=vae'])
    """
    words = [f"{key}={value}" for key, value in params.items()]
    parsed = OverridesParser.create().parse_overrides([*words, *arguments])
    latest = {one.get_key_element(): one for one in parsed}
    space = {key: _distribution(one) for key, one in latest.items() if one.is_sweep_override()}
    if not space:
        raise ValueError(
            "nothing is swept: give at least one key several values, such as "
            "'compression.prune.final_sparsity=interval(0.5,0.98)', or sweep=pareto"
        )
    return space, [one.input_line or "" for key, one in latest.items() if key not in space]


def _distribution(override: Override) -> Any:
    optuna = require("optuna", extra="sweep")
    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kinds = optuna.distributions
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(value.start, value.end, log=log)
    if isinstance(value, RangeSweep):
        found: list[Any] = list(override.sweep_iterator())
        whole = all(isinstance(one, int) for one in found)
        if whole and len(found) > 1:
            return optuna.distributions.IntDistribution(found[0], found[-1], step=value.step)
    return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def words_of(params: Mapping[str, Any]) -> list[str]:
    """A trial's parameters as overrides; numbers with five digits, as one would type them.

    >>> words_of({"compression.prune.final_sparsity": 0.8123456789, "model": "vae"})
    ['compression.prune.final_sparsity=0.81235', 'model=vae']
    """
    return [
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    ]
