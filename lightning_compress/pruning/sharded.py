"""What of pruning works on sharded parameters, where a process sees its own rows alone."""

from __future__ import annotations

from lightning_compress.errors import TargetError
from lightning_compress.pruning.criteria import CRITERIA, Criterion, Stateless

__all__ = ["check_sharded"]


def check_sharded(*, criterion: Criterion, pooled: bool, regrow: str | None, rewind: bool) -> None:
    """Check a way of pruning that is asked for on sharded parameters (FSDP2).

    Args:
        criterion: what scores; a user's own object is trusted.
        pooled: whether the granularity is another than single weights.
        regrow: how weights return.
        rewind: whether weights go back to earlier ones.

    Raises:
        TargetError: naming everything that does not work there.

    >>> check_sharded(criterion=Stateless(abs), pooled=False, regrow=None, rewind=False)
    """
    ours = type(criterion).__module__.startswith(__name__.rsplit(".", 1)[0])
    faults = {
        f"criterion {type(criterion).__name__}": ours and not isinstance(criterion, Stateless),
        "a granularity other than 'unstructured'": pooled,
        "regrow='gradient'": regrow == "gradient",
        "rewind": rewind,
    }
    if found := [what for what, wrong in faults.items() if wrong]:
        known = sorted(name for name in CRITERIA if name.startswith("magnitude"))
        raise TargetError(
            f"sharded parameters (FSDP2) cannot be pruned with {', '.join(found)}: valid are "
            f"criterion {known} or a function of the weight, granularity 'unstructured', and "
            "regrow None or 'straight_through'"
        )
