"""Adversarial training where it can be solved: the Dirac-GAN's dynamics, and flows of probability."""
