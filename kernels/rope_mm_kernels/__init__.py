"""Triton kernels of rope_mm; they need torch and triton, and nothing of rope_mm."""

from rope_mm_kernels.rotary import rotate

__all__ = ["rotate"]
