"""Training: losses and steps, data order, checkpoints, configuration, logs."""

from rope_mm.checks.extras import TRAIN, require

require("train", *TRAIN)
