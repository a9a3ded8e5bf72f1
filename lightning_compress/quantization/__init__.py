"""Quantization: grids, observers, weight quantizers and activation ranges."""
