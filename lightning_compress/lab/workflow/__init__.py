"""Workflow of an experiment: train a dense and a compressed model, measure both, write files."""
