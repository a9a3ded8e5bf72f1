"""Former name of `lightning_compress.budget`."""

from lightning_compress._moved import alias

__getattr__ = alias(
    __name__,
    "lightning_compress.budget",
    {
        "allocation": "lightning_compress.budget.sensitivity",
        "arguments": "lightning_compress.budget.reference",
        "curves": "lightning_compress.budget.sensitivity",
        "levers": "lightning_compress.budget.levers",
        "readings": "lightning_compress.budget.search",
        "reference": "lightning_compress.budget.reference",
        "regrowing": "lightning_compress.budget.snapshot",
        "search": "lightning_compress.budget.search",
        "sizes": "lightning_compress.budget.reference",
        "sizing": "lightning_compress.budget.search",
        "snapshots": "lightning_compress.budget.snapshot",
        "table": "lightning_compress.budget.reference",
    },
)
