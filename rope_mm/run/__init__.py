"""What every training script needs and no model does: configuration, checkpoints, a weight average, a log."""
