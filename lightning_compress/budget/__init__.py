"""Adaptive compression: control laws, levers, snapshots, and who gets how many bytes."""
