"""The experiment harness: models, data, evaluation, runs, sweeps and the report, by Hydra."""
