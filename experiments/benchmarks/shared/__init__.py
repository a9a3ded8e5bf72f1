"""What several benchmarks share: rows, dense starts, peers, times and table cells."""
