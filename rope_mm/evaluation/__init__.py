"""Metrics and evaluators; needs nothing of training."""
