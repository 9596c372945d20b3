"""Training: losses and steps, data order, checkpoints, configuration, logs."""
