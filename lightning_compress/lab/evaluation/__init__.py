"""What a model is worth and what it costs: fidelity, likelihood, bytes, operations, latency."""
