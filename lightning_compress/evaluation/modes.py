"""How a module is put into its evaluation state: see `lightning_compress.modes`."""

from lightning_compress.modes import evaluating

__all__ = ["evaluating"]
