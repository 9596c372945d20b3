"""Queries and keys rotated: the definition, its CPU form, and the door to the Triton kernels."""

from importlib.util import find_spec

if find_spec("rope_mm_kernels") is None:
    raise ModuleNotFoundError(
        "rope_mm_kernels is not installed; run `pip install -e .` in the folder of the repository, "
        "or add its folder kernels/ to PYTHONPATH",
        name="rope_mm_kernels",
    )
