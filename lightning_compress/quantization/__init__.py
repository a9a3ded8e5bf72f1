"""Grids and observers: pure functions from a weight to the values it may take."""
