"""Without a GPU the kernels are interpreted, and memory that nobody wrote holds NaN."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from truth import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
    # it is read where kernels are decorated, triton's own included: what was imported before is imported anew
    for module in [name for name in sys.modules if name.startswith(("triton", "rope_mm_kernels"))]:
        if not module.startswith("triton._C"):
            del sys.modules[module]
import triton

# cuBLAS asks for it where algorithms must be deterministic, and reads it at its first use
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        """Round once, as hardware does; older interpreters round the product as well."""
        wide = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


@pytest.fixture(autouse=True)
def unwritten_elements_are_nan_and_nothing_is_random() -> Iterator[None]:
    # torch fills what torch.empty returns in this mode
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="the kernel is compiled here")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="there is no CUDA device")]
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
