"""Queries and keys rotated: the definition, its CPU form, and the door to the Triton kernels."""
