"""Training: losses and steps, data order, checkpoints, configuration, logs."""

from rope_mm.checks.extras import require

require("train", "transformers", "accelerate", "datasets", "omegaconf", "tqdm", "yaml")
