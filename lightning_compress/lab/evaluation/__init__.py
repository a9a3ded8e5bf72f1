"""Evaluation of models: fidelity, likelihood, bytes, operations, latency, sensitivity."""
