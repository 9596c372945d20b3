"""The parts of the transformer."""
