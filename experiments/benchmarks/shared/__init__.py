"""Shared parts of the benchmarks: rows, dense starts, peers, times and table cells."""
