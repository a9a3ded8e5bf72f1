"""Pruning as pure functions: scores say what matters, masks say what stays."""
