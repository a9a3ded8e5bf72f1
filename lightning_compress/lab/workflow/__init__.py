"""One experiment from config to files: train twice, measure both, write everything down."""
