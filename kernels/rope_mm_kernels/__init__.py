"""Triton kernels of rope_mm; they need torch and triton, and nothing of rope_mm.

Triton is imported with the first kernel, so `rope_mm_kernels.checks` serves where it is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rope_mm_kernels.norm_rotary import norm_rotate as norm_rotate
    from rope_mm_kernels.rotary import rotate as rotate
    from rope_mm_kernels.rotary import rotate_ as rotate_
    from rope_mm_kernels.rotary import rotate_by_angles as rotate_by_angles
    from rope_mm_kernels.table import norm_rotate_by_table as norm_rotate_by_table
    from rope_mm_kernels.table import rotate_by_table as rotate_by_table

__all__ = ["norm_rotate", "norm_rotate_by_table", "rotate", "rotate_", "rotate_by_angles", "rotate_by_table"]

_MODULES = {
    "norm_rotate": "norm_rotary",
    "norm_rotate_by_table": "table",
    "rotate": "rotary",
    "rotate_": "rotary",
    "rotate_by_angles": "rotary",
    "rotate_by_table": "table",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
