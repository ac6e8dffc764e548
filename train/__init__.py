"""Training: configuration, loop, checkpoints, export and metrics."""
