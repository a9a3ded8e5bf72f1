"""Pruning as pure functions: criteria, statistics, granularities and masks."""
