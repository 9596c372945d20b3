"""Triton kernels of rope_mm; they need torch and triton, and nothing of rope_mm."""

from rope_mm_kernels.norm_rotary import norm_rotate
from rope_mm_kernels.rotary import rotate, rotate_
from rope_mm_kernels.table import norm_rotate_by_table, rotate_by_table

__all__ = ["norm_rotate", "norm_rotate_by_table", "rotate", "rotate_", "rotate_by_table"]
