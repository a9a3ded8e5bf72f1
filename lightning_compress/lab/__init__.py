"""Experiment harness on Hydra: models, data, evaluation, runs, sweeps and the report."""
