"""Channel pruning: the dependency graph of a module's channels, and their physical removal."""
